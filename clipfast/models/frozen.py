"""A module run by itself: copied in structure, with the user's own weights, in evaluation and without hooks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from clipfast.errors import ModelError
from clipfast.models.openclip import read_weight


def frozen(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of a module's structure that computes what the module does in evaluation, whatever its own flags say.

    Its parameters and buffers are the module's, outside of autograd (but in `trained_weights`): they take no memory,
    unless a floating one has to be cast to `dtype`. All else is copied, so that calling it, from any thread, reaches
    neither the module nor its hooks, and no running statistics move. Differentiable in its inputs.

    Raises ModelError for a module that cannot be copied, or that needs a hook to compute its weights.
    """
    module = getattr(module, "_orig_mod", module)  # what torch.compile wraps
    memo: dict[int, Any] = {}
    for path, part in module.named_modules():
        where = f"{path or 'the module'} ({type(part).__name__})"
        if isinstance(part, torch.jit.ScriptModule):
            raise ModelError(f"{where} is TorchScript: give the module that it was made of.")
        for hook in part._forward_pre_hooks.values():
            # torch.nn.utils' older weight_norm and spectral_norm, and pruning.
            if hasattr(hook, "compute_weight") or hasattr(hook, "apply_mask"):
                raise ModelError(
                    f"{where} computes its weights in a hook of {type(hook).__name__}: remove the hook, which leaves "
                    "the computed weights in its place, or use torch.nn.utils.parametrizations."
                )
        for name, value in vars(part).items():
            # Hooks are not copied either: there is no telling what they hold on to.
            if "_hooks" in name and isinstance(value, dict):
                memo[id(value)] = type(value)()
            elif isinstance(value, Tensor):
                memo[id(value)] = _own(value, dtype)
        for held in (part._parameters, part._buffers):
            memo |= {id(value): _own(value, dtype) for value in held.values() if value is not None}
    try:
        found: nn.Module = copy.deepcopy(module, memo)
    except Exception as error:
        raise ModelError(f"{type(module).__name__} cannot be copied, so that it could be run: {error}") from error
    for part in found.modules():
        # Not by `eval`: some modules merge weights in it, in place.
        part.training = False
        part._compiled_call_impl = None
    return found


def _own(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    return read_weight(t, dtype if t.is_floating_point() else None)
