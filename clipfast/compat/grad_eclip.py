"""The functions of Grad-ECLIP's released scripts (Zhao et al., ICML 2024), by their names and shapes.

Their `generate_emap.py` holds functions around a module-wide `clipmodel`; a script that imports them changes two lines:

    from clipfast.compat.grad_eclip import use, clip_encode_dense, grad_eclip, ...
    use(clipmodel)  # an OpenAI or open_clip model, or what clipfast.load returns

What comes back has their shapes and values: explained blocks run as one head of width D, tokens come first (N, B, D),
q and k have gone through the output projection. What differs: it runs on any device and in the model's own dtype, the
blocks below the explained ones keep no graph, the model's parameters collect no gradient, and a gradient that reaches
the output at a few tokens only (that of a cosine with the class token) is worked out for those tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clipfast.data.geometry import InputSpec, normalize, prepare
from clipfast.errors import InputError, ModelError
from clipfast.models.block import Block
from clipfast.models.image import PatchTower
from clipfast.models.load import load
from clipfast.models.model import Model
from clipfast.models.tail import Tail
from clipfast.models.text import OpaqueText

# A gradient at one token costs every weight of the tail once; from about here on its whole Jacobian is the cheaper.
_JACOBIAN_AFTER = 16

_using: list[Model] = []


def use(model: Any) -> None:
    """Let the functions of this module explain a model: their `clipmodel`. Takes what `clipfast.load` takes.

    Raises ModelError for a model whose image tower is no vision transformer with a class token.
    """
    loaded = load(model)
    tower = loaded.towers()[0]
    if not isinstance(tower, PatchTower) or not tower.has_class_token:
        raise ModelError(f"{loaded.name} has no vision transformer: these functions explain its last attention.")
    _using[:] = [loaded]


def imgprocess_keepsize(img: Image.Image, patch_size: tuple[int, int] = (16, 16), scale_factor: float = 1) -> Tensor:
    """A picture near its own size: each side rounded to whole patches, bicubic, OpenAI's normalisation, (3, H, W).

    Raises InputError for a picture smaller than half a patch.
    """
    (ph, pw), (width, height) = patch_size, img.size
    size = int(height * scale_factor / ph + 0.5) * ph, int(width * scale_factor / pw + 0.5) * pw
    if 0 in size:
        raise InputError(f"a picture of {width} x {height} is smaller than half a patch: scale it up.")
    spec = InputSpec(size=size, patch=(ph, pw), resize="squash")
    return normalize(prepare(img, spec)[0][None], spec)[0]


def attention_layer(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int = 1, attn_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of q, k, v (N, B, D): its output (N, B, D), and its weights (B, N, N), the mean over heads."""
    split = [t.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for t in (q, k, v)]
    scores = split[0] * split[0].shape[-1] ** -0.5 @ split[1].mT
    weights = (scores if attn_mask is None else scores + attn_mask).softmax(-1)
    return (weights @ split[2]).permute(2, 0, 1, 3).flatten(2), weights.mean(1)


def clip_encode_dense(
    x: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, tuple[int, int]]:
    """Normalised images (B, 3, H, W) through the image tower, its last block as one head.

    Returns outputs (B, N, E), not normalised; v_final (B, n, E), the patches' values as outputs; last_input (N, B, D);
    v, q_out, k_out (N, B, D), the latter two through the output projection; attn (B, N, N); att_output (N, B, D); the
    grid (h, w). outputs can be differentiated towards att_output and last_input.
    """
    tower = _model().towers()[0]
    assert isinstance(tower, PatchTower) and isinstance(tower.tail.block, Block)
    block, tail = tower.tail.block, tower.tail
    with torch.no_grad():
        h = tower.run(tower.embed(x.to(tower.device)), stop=tower.depth - 1).to(tower.result_dtype)
        grid = tower.grid_of(x)
    with torch.enable_grad():
        x_in = h.transpose(0, 1).requires_grad_()
        q, k, v, o, attn, out = _explained(block, tail, x_in)
    with torch.no_grad():
        q_out, k_out, v_out = (block.out(t) for t in (q, k, v))
        v_final = tail.project(block.rest(v_out + x_in)).transpose(0, 1)
    return out.transpose(0, 1), v_final[:, tower.prefix :], x_in, v, q_out, k_out, attn, o, grid


def clip_encode_text_dense(
    text: Tensor, n: int
) -> tuple[Tensor, tuple[list[Tensor], list[Tensor], list[Tensor]], list[Tensor], list[Tensor]]:
    """Token ids (B, T) through the text tower, its last n blocks as one head each.

    Returns embeddings (B, E), not normalised; (q_outs, k_outs, vs), attentions (B, T, T) and attention outputs
    (T, B, D), of each of the n blocks, the lowest first. Raises InputError where the tower has fewer blocks.
    """
    tower = _model().towers()[1]
    wide = tower.result_dtype
    if isinstance(tower, OpaqueText):
        tower.read(text)
    with torch.no_grad():
        texts = tower.read(text.to(tower.device), whole=True)
        mask = texts.mask
        x = tower.run(texts.h, stop=tower.last_blocks(n), mask=mask).to(wide).transpose(0, 1)
    q_outs, k_outs, vs, attns, outputs = [], [], [], [], []
    with torch.enable_grad():
        x = x.requires_grad_()
        for block in (block.to(wide) for block in tower.trunk[-n:]):
            q, k, v = block.query_key_value(x)
            o, attn = attention_layer(q, k, v, 1, None if mask is None else mask.to(wide))
            x = block.above(x, o)
            with torch.no_grad():
                q_outs.append(block.out(q))
                k_outs.append(block.out(k))
            vs.append(v)
            attns.append(attn)
            outputs.append(o)
        pooled = x.transpose(0, 1)[torch.arange(len(text), device=tower.device), texts.pooled]
        return tower.tail.project(pooled), (q_outs, k_outs, vs), attns, outputs


def grad_eclip(
    c: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    v: Tensor,
    att_output: Tensor,
    map_size: tuple[int, int],
    withksim: bool = True,
) -> Tensor:
    """The map (h, w) of a score c made from `clip_encode_dense`'s outputs of one image; withksim: times cos(q, k)."""
    places = slice(-map_size[0] * map_size[1], None)
    (gradient,) = torch.autograd.grad(c, att_output, retain_graph=True)
    with torch.no_grad():
        heat = v[places, 0] @ gradient[0, 0]
        if withksim:
            heat = heat * _similarity(q_out[0, 0], k_out[places, 0])
        return heat.relu_().reshape(map_size)


def grad_eclip_text(
    c: Tensor,
    q_outs: Sequence[Tensor],
    k_outs: Sequence[Tensor],
    lastvs: Sequence[Tensor],
    attn_outputs: Sequence[Tensor],
    eos_position: int,
    withksim: bool = True,
) -> Tensor:
    """The shares (eos_position - 1,) of a text's tokens in a score c made from `clip_encode_text_dense` of one text.

    NaN where no token speaks for the score, as theirs.
    """
    # One way down gives every block's gradient; theirs goes down once for each.
    gradients = torch.autograd.grad(c, list(attn_outputs), retain_graph=True)
    with torch.no_grad():
        heat = torch.zeros_like(lastvs[0][:, 0, 0])
        for gradient, q, k, v in zip(gradients, q_outs, k_outs, lastvs, strict=True):
            own = v[:, 0] @ gradient[eos_position, 0]
            heat += own * _similarity(q[eos_position, 0], k[:, 0]) if withksim else own
        heat = heat.relu_()[1:eos_position]
        return heat / heat.sum()


def grad_cam(c: Tensor, layer_feat: Tensor, map_size: tuple[int, int]) -> Tensor:
    """Grad-CAM (h, w) of a score c at `last_input` (N, B, D) of one image: weights are means over all tokens."""
    (gradient,) = torch.autograd.grad(c, layer_feat, retain_graph=True)
    with torch.no_grad():
        heat = layer_feat[-map_size[0] * map_size[1] :, 0] @ gradient[:, 0].mean(0)
        return heat.relu_().reshape(map_size)


def mask_clip(txt_feats: Tensor, v_final: Tensor, k_out: Tensor, map_size: tuple[int, int]) -> Tensor:
    """MaskCLIP times cos(k_cls, k_i): maps (P, h, w) of one image for unit text embeddings (E, P)."""
    with torch.no_grad():
        cosine = (F.normalize(v_final[0], dim=-1) @ txt_feats).T
        near = F.cosine_similarity(k_out[:1, 0], k_out[-cosine.shape[1] :, 0], dim=-1)
        return (cosine * near).reshape(-1, *map_size)


def _model() -> Model:
    if not _using:
        raise ModelError("no model is in use: call clipfast.compat.grad_eclip.use(model) first.")
    return _using[0]


def _similarity(q: Tensor, k: Tensor) -> Tensor:
    """cos(q, k_i) from 0 to 1, NaN where it is constant, as theirs: q (D,), k (n, D)."""
    cosine = F.normalize(k, dim=-1) @ F.normalize(q, dim=-1)
    return (cosine - cosine.min()) / (cosine.max() - cosine.min())


def _explained(block: Block, tail: Tail, x_in: Tensor) -> tuple[Tensor, ...]:
    """The last block as one head on x_in (N, B, D): q, k, v, attention output, its weights, projected outputs."""
    q, k, v = block.query_key_value(x_in)
    o, attn = attention_layer(q, k, v)
    return q, k, v, o, attn, _TokenTail.apply(x_in, o, tail)


class _TokenTail(torch.autograd.Function):
    """The tail of every token, (N, B, E), whose gradient costs only the tokens that have one: it is tokenwise."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, o: Tensor, tail: Tail) -> Tensor:
        ctx.save_for_backward(residual, o)
        ctx.tail, ctx.rows = tail, None
        return tail.embed(residual, o)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        residual, o = ctx.saved_tensors
        flat = gradient.flatten(0, 1)
        rows = flat.count_nonzero(-1).nonzero()[:, 0]
        if ctx.rows is None or not torch.equal(ctx.rows.rows, rows):
            ctx.rows = _Rows(ctx.tail, rows, residual.flatten(0, 1)[rows], o.flatten(0, 1)[rows])
        found = []
        for own in ctx.rows(flat[rows]):
            whole = torch.zeros_like(residual).flatten(0, 1)
            whole[rows] = own
            found.append(whole.view_as(residual))
        return found[0], found[1], None


class _Rows:
    """Gradients of some tokens' outputs, asked for again and again: one for every prompt of a loop."""

    def __init__(self, tail: Tail, rows: Tensor, residual: Tensor, o: Tensor):
        self.rows, self._tail, self._asked = rows, tail, 0
        self._residual, self._o = residual.detach().requires_grad_(), o.detach().requires_grad_()
        with torch.enable_grad():
            self._out = tail.embed(self._residual, self._o)
        self._jacobian: tuple[Tensor, Tensor] | None = None

    def __call__(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        self._asked += 1
        if self._jacobian is None and len(self.rows) == 1 and self._asked > _JACOBIAN_AFTER:
            self._jacobian = self._at_once()
        if self._jacobian is not None:
            return gradient @ self._jacobian[0], gradient @ self._jacobian[1]
        at = torch.autograd.grad(self._out, (self._residual, self._o), gradient, retain_graph=True)
        return at[0], at[1]

    def _at_once(self) -> tuple[Tensor, Tensor]:
        """d out / d residual and d out / d o of the one token, (E, D) each."""
        embed = self._out.shape[-1]
        with torch.enable_grad():
            inputs = [t.detach().expand(embed, -1).clone().requires_grad_() for t in (self._residual, self._o)]
            out = self._tail.embed(*inputs)
        at = torch.autograd.grad(out, inputs, torch.eye(embed, dtype=out.dtype, device=out.device))
        return at[0], at[1]
