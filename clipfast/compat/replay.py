"""What stands in for an image tower's forward while another library runs it.

Libraries that explain any model know CLIP's image tower as a function: they call it again for every step of a path,
every target and every perturbed image, and look at its layers through hooks. `Replay` is that function, faster and with
the same numbers:

- no gradient is made for weights, and none below the lowest layer that is hooked;
- the last block runs for the pooled token alone, and images go through in batches that fit the caches;
- what the blocks below a hooked layer make of an image is kept, so that the same image does not go through them again.

Blocks with hooks are called as the modules that they are, so that their hooks see and change what they always did.
"""

from __future__ import annotations

import threading
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clipfast.errors import ModelError
from clipfast.models.image import PatchTower
from clipfast.models.model import Model

# Images whose state at one block is kept: the batches of a path, and the baselines between them.
_KEPT = 64
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# How far values and input gradients may be from the tower's own, relative, by the tower's dtype.
_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}
_CLOSE_IN_HALF = 5e-2

_local = threading.local()


@contextmanager
def replaying() -> Iterator[None]:
    """Within it, in this thread, towers whose forward was replaced run as `Replay`; elsewhere as they always did."""
    _local.depth = getattr(_local, "depth", 0) + 1
    try:
        yield
    finally:
        _local.depth -= 1


@contextmanager
def own_forwards() -> Iterator[None]:
    """Within it, in this thread, towers run their own forwards whatever is accelerated: to compare with."""
    before, _local.off = getattr(_local, "off", False), True
    try:
        yield
    finally:
        _local.off = before


def is_replaying() -> bool:
    """Whether this thread is inside of `replaying`, and not of `own_forwards`."""
    return getattr(_local, "depth", 0) > 0 and not getattr(_local, "off", False)


class Replay:
    """The forward of `model.module.visual`, (B, 3, H, W) -> (B, E), not normalised.

    calls, rows: how often it stood in, and for how many images; encoded: how many of these went through the tower's
    lower blocks. Where it cannot stand in, the tower's own forward runs: inputs of another size, dtype or device than
    the tower's, towers in training with dropout, or that return tokens, hooks on anything but blocks and what is in
    them.

    Raises ModelError for an image tower that is no vision transformer with a class token.
    """

    def __init__(self, model: Model):
        tower = model.towers()[0]
        visual: Any = getattr(model.module, "visual", None)
        if not (isinstance(tower, PatchTower) and tower.has_class_token and hasattr(visual, "transformer")):
            raise ModelError(
                f"{model.name} cannot be accelerated: its image tower is no VisionTransformer with a class token, "
                "as open_clip and OpenAI's package have it."
            )
        self.model = model
        self.visual, self.own = visual, visual.forward
        self.calls = self.rows = self.encoded = 0
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[Any, ...], tuple[Tensor, Tensor]] = OrderedDict()
        self._tower: PatchTower | None = None
        self._reason: tuple[str | None] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not is_replaying() or len(args) != 1 or kwargs or not self._fits(args[0]):
            return self.own(*args, **kwargs)
        lowest, only_norm = self._hooked()
        if lowest is None:
            return self.own(*args)
        return self._run(args[0], lowest, only_norm)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copied model has weights of its own.
        return _own_forward(memo[id(self.visual)])

    def __reduce__(self) -> Any:
        return _own_forward, (self.visual,)

    def why_not(self) -> str | None:
        """The reason why this cannot stand in, or None; found out once."""
        if self._reason is None:
            self._reason = (self._tried(),)
        return self._reason[0]

    def _tried(self) -> str | None:
        """Why this cannot stand in for the tower's own forward, tried on one image, its value and input gradient."""
        tower, _ = self.model.towers()
        x = torch.randn(1, 3, *self._size(tower), generator=torch.Generator().manual_seed(0))
        x = x.to(tower.device, tower.dtype)
        if not self._fits(x):
            return "its image tower returns tokens, too, or drops out at random: switch to eval()"
        found = []
        for forward in (self.own, lambda one: self._run(one, tower.depth, False)):
            with torch.enable_grad():
                one = x.clone().requires_grad_()
                out = forward(one)
                direction = torch.linspace(-1, 1, out.shape[-1], device=out.device, dtype=out.dtype)
                (gradient,) = torch.autograd.grad(out @ direction, one)
            found.append((out.detach(), gradient))
        far = max(float((ours - theirs).norm() / theirs.norm()) for theirs, ours in zip(*found, strict=True))
        limit = _CLOSE.get(tower.dtype, _CLOSE_IN_HALF)
        # Not a number is not close either.
        return (
            None if far <= limit else f"clipfast reads its image tower wrongly: results differ by {far:.1e}, relative"
        )

    def _size(self, tower: Any) -> tuple[int, int]:
        (gh, gw), (ph, pw) = tower.grid, tower.patch_size
        return gh * ph, gw * pw

    def _fits(self, x: Any) -> bool:
        if not isinstance(x, Tensor) or x.ndim != 4 or len(x) == 0 or getattr(self.visual, "output_tokens", False):
            return False
        if self.visual.training and any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.visual.modules()):
            return False
        tower, _ = self.model.towers()
        return (x.dtype, x.device, tuple(x.shape[2:])) == (tower.dtype, tower.device, self._size(tower))

    def _hooked(self) -> tuple[int | None, bool]:
        """The lowest block with hooks, or the depth where none has; and whether only the last one's first norm has.

        None where something outside of blocks has hooks.
        """
        blocks = list(self.visual.transformer.resblocks)
        inside: dict[int, int] = {id(m): i for i, block in enumerate(blocks) for m in block.modules()}
        hooked = [m for m in self.visual.modules() if m is not self.visual and any(getattr(m, name) for name in _HOOKS)]
        if not hooked:
            return len(blocks), False
        if any(id(m) not in inside for m in hooked):
            return None, False
        return min(inside[id(m)] for m in hooked), all(m is blocks[-1].ln_1 for m in hooked)

    def _run(self, x: Tensor, lowest: int, only_norm: bool) -> Tensor:
        tower, _ = self.model.towers()
        assert isinstance(tower, PatchTower) and tower.positions is not None
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        differentiable = torch.is_grad_enabled() and x.requires_grad
        step = tower.rows_at_once(tower.positions.shape[0], gradients=differentiable)
        if differentiable:
            self.encoded += len(x)
            state = torch.cat([self._below(tower, part, lowest) for part in x.split(step)])
        else:
            with torch.no_grad():
                state = self._remembered(tower, x, lowest, step)
            if torch.is_grad_enabled() and lowest < tower.depth:
                state = state.requires_grad_()
        if lowest == tower.depth:
            return state
        if only_norm:
            return self._last(tower, state, tower.blocks[-1], self.visual.transformer.resblocks[-1].ln_1(state))
        for block in list(self.visual.transformer.resblocks)[lowest:]:
            state = self._native(block, state)
        return tower.tail.project(state[:, 0].to(tower.result_dtype)).to(tower.dtype)

    def _native(self, block: nn.Module, h: Tensor) -> Tensor:
        """A block as the module that it is. OpenAI's own package, and older open_clip, put tokens first."""
        if getattr(self.visual.transformer, "batch_first", False):
            return block(h)
        return block(h.transpose(0, 1)).transpose(0, 1)

    def _below(self, tower: PatchTower, x: Tensor, lowest: int) -> Tensor:
        """The input (b, N, D) of block `lowest`, or the embedding (b, E) where it is the depth."""
        h = tower.embed(x)
        if lowest < tower.depth:
            return tower.run(h, stop=lowest)
        h = tower.run(h, stop=tower.depth - 1)
        last = tower.blocks[-1]
        return self._last(tower, h, last, last.norm1(h))

    def _last(self, tower: PatchTower, h: Tensor, block: Any, normed: Tensor) -> Tensor:
        """The embedding (b, E) of the last block's input h and what its first norm makes of it."""
        residual, q = block.pooled_query(h, normed, tower.pooled(h))
        o = block.attend(q[:, None], *block.key_value(normed))[:, 0]
        wide = tower.result_dtype
        return tower.tail.embed(residual.to(wide), o.to(wide)).to(tower.dtype)

    def _remembered(self, tower: PatchTower, x: Tensor, lowest: int, step: int) -> Tensor:
        """`_below` of each image, kept for the next time that the same one comes."""
        marks = [row.tobytes() for row in x.flatten(1)[:, :: max(1, x[0].numel() // 64)].float().cpu().numpy()]
        with self._lock:
            if self._tower is not tower:
                self._kept.clear()
                self._tower = tower
            known: dict[int, Tensor] = {}
            new: list[int] = []
            first: dict[bytes, list[int]] = {}
            same: dict[int, int] = {}
            for i, mark in enumerate(marks):
                kept = self._kept.get((lowest, mark))
                if kept is not None and torch.equal(kept[0], x[i]):
                    known[i] = kept[1]
                    continue
                twin = next((j for j in first.get(mark, []) if torch.equal(x[j], x[i])), None)
                if twin is None:
                    first.setdefault(mark, []).append(i)
                    new.append(i)
                else:
                    same[i] = twin
        for at in range(0, len(new), step):
            some = new[at : at + step]
            known.update(zip(some, self._below(tower, x[some], lowest), strict=True))
        self.encoded += len(new)
        with self._lock:
            for i in new[-_KEPT:]:
                self._kept[lowest, marks[i]] = (x[i].detach().clone(), known[i])
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return torch.stack([known[same.get(i, i)] for i in range(len(x))])


def _own_forward(visual: Any) -> Any:
    return types.MethodType(type(visual).forward, visual)
