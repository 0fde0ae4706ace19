"""The similarity of every token with every patch, and the same with each token's map thresholded by its mixture.

    scores[b, t, i] = cos(tokens[b, t], patches[b, i])
    maps[b, t]      = gmm_threshold(scores[b, t])

Tokens and patches are states in the joint space, after their towers' final norms and projections. Source: TCLIP, whose
S = T^ I^T this is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipfast.errors import InputError
from clipfast.ops.dispatch import Backend, Op, Triton, registered
from clipfast.ops.gmm_threshold import check_threshold, gmm_threshold

FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16})


@dataclass(frozen=True)
class Similarity:
    """What every backend of token_patch_similarity gets."""

    tokens: Tensor  # (B, T, E)
    patches: Tensor  # (B, n, E)
    out: Tensor  # (B, T, n) float32, or float64 where tokens or patches are


@dataclass(frozen=True)
class Thresholded(Similarity):
    """What every backend of token_patch_threshold gets."""

    hard: bool


def define(x: Similarity) -> Tensor:
    """token_patch_similarity in plain PyTorch: what it means, and what runs where nothing faster can."""
    tokens, patches = x.tokens.to(x.out.dtype), x.patches.to(x.out.dtype)
    # Divided after the product: the states need not be written once more, normalised.
    torch.bmm(tokens, patches.mT, out=x.out)
    return x.out.div_(_lengths(tokens)[:, :, None]).div_(_lengths(patches)[:, None, :])


def _lengths(states: Tensor) -> Tensor:
    return torch.linalg.vector_norm(states, dim=-1).clamp(min=1e-12)


class TorchSimilarity(Backend[Similarity]):
    name = "torch"

    def run(self, inputs: Similarity) -> Tensor:
        return define(inputs)


class TritonSimilarity(Triton[Similarity]):
    """kernels/token_patch_similarity.py."""

    dtypes = {"tokens": FLOATS, "patches": FLOATS}  # noqa: RUF012

    def launch(self, inputs: Similarity) -> Tensor:
        from clipfast.kernels import token_patch_similarity as kernels

        kernels.token_patch_similarity(inputs.tokens, inputs.patches, inputs.out)
        return inputs.out


class TritonThresholded(Triton[Thresholded]):
    """kernels/token_patch_similarity.py: scores never leave the registers between similarity, mixture and threshold."""

    dtypes = {"tokens": FLOATS, "patches": FLOATS}  # noqa: RUF012
    largest = 1024

    def why_not(self, inputs: Thresholded) -> list[str]:
        reasons = super().why_not(inputs)
        if inputs.patches.shape[1] > self.largest:
            reasons.append(f"{inputs.patches.shape[1]} patches are more than {self.largest}")
        return reasons

    def launch(self, inputs: Thresholded) -> Tensor:
        from clipfast.kernels import token_patch_similarity as kernels

        kernels.token_patch_threshold(inputs.tokens, inputs.patches, inputs.hard, inputs.out)
        return inputs.out


class TorchThresholded(Backend[Thresholded]):
    """The one op after the other, each in the fastest way it has: on the CPU the mixture is native."""

    name = "torch"

    def run(self, inputs: Thresholded) -> Tensor:
        scores = _similarity(inputs)
        return inputs.out.copy_(gmm_threshold(scores, "hard" if inputs.hard else "soft"))


_similarity = Op("token_patch_similarity", TritonSimilarity(), TorchSimilarity())
_thresholded = Op("token_patch_threshold", TritonThresholded(), TorchThresholded())


def _fake(tokens: Tensor, patches: Tensor, threshold: str = "soft") -> Tensor:
    dtype = torch.promote_types(torch.promote_types(tokens.dtype, patches.dtype), torch.float32)
    return patches.new_empty(patches.shape[0], tokens.shape[-2], patches.shape[1], dtype=dtype)


@registered(_fake)
def token_patch_similarity(tokens: Tensor, patches: Tensor) -> Tensor:
    """The cosine of every token with every patch: (B, T, n).

    tokens   (B, T, E), or (T, E) for the same tokens with every image; floating, any strides.
    patches  (B, n, E) floating, on the same device.

    Returns float64 where either is float64, else float32. A state of length zero has similarity 0. No gradient flows
    through. Raises InputError when shapes, dtypes or devices do not fit.
    """
    tokens, out = _checked(tokens, patches)
    return _similarity(Similarity(tokens, patches.detach(), out)) if out.numel() else out


@registered(_fake)
def token_patch_threshold(tokens: Tensor, patches: Tensor, threshold: str = "soft") -> Tensor:
    """`gmm_threshold` of `token_patch_similarity`, (B, T, n), in one go where there is a GPU.

    Arguments as theirs: tokens (B, T, E) or (T, E), patches (B, n, E), threshold "soft", "hard" or "none". Raises
    InputError as they do.
    """
    check_threshold(threshold)
    if threshold == "none":
        return token_patch_similarity(tokens, patches)
    tokens, out = _checked(tokens, patches)
    return _thresholded(Thresholded(tokens, patches.detach(), out, threshold == "hard")) if out.numel() else out


def _checked(tokens: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
    fits = tokens.ndim in (2, 3) and patches.ndim == 3 and tokens.shape[-1] == patches.shape[-1] > 0
    if not fits or (tokens.ndim == 3 and tokens.shape[0] != patches.shape[0]):
        raise InputError(
            "tokens and patches must be (B, T, E) or (T, E) and (B, n, E), "
            f"not {tuple(tokens.shape)} and {tuple(patches.shape)}."
        )
    if not tokens.is_floating_point() or not patches.is_floating_point():
        raise InputError(f"tokens and patches must be floating, not {tokens.dtype} and {patches.dtype}.")
    if tokens.device != patches.device:
        raise InputError(f"tokens are on {tokens.device} and patches on {patches.device}; they must be on one device.")
    out = _fake(tokens, patches)
    return tokens.detach().expand(len(patches), -1, -1), out
