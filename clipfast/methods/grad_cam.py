"""Grad-CAM (Selvaraju et al., ICCV 2017): a layer's channels weighted by their mean gradient.

    H_i = ReLU(sum_c w_c h_ic),   w = mean over tokens j of dS/dh_j,   h (N, D): the input of a transformer's block

On convolutional towers h is the output of a layer, and its tokens are its places. A ResNet's last ones are, with their
mean, the tokens of the attention pool, so that the mean gradient at places is 1/n of the sum over all of these. Other
towers' heads see of the last places only the mean: dS/dh_j is 1/n of the score's gradient with respect to that.

For a transformer's last block w needs no backward pass through its tokens. With g = dS/do and y = dS/dr at the pooled
token p (o: its attention output, r: its residual stream), heads left out, s = 1/sqrt(d), a_j its attention,
x_j = (h_j - mean) rho_j the standardised tokens, W the weights of q, k and v times norm1's gain, and t_j the tokens'
shares of the mean:

    dS/dv_j = a_j g      dS/dk_j = s q e_j,  e_j = a_j (g.v_j - g.o)      dS/dq = s sum_j e_j k_j
    dS/dh_j = rho_j (1 - 11'/D - x_j x_j'/D) W' (dS/dq [j = p], dS/dk_j, dS/dv_j) + y [j = p]

Summed with t_j, all of it is one row a prompt and one weight c_j for each x_j: what it costs is in vectors of length D.
All is linear in the text, so that products of h with the weights of all E directions serve every later prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clipfast.errors import InputError
from clipfast.methods.attention import PIECE, pooled_attention
from clipfast.methods.base import Explained, Method, MethodInfo, Relu, choice, combine
from clipfast.methods.tokens import Tokens, image_tokens, text_tokens
from clipfast.models.block import AttentionBlock, Block, Pool
from clipfast.models.conv import ConvTower
from clipfast.models.families import AnyImageTower, FeatureTower
from clipfast.models.gradients import score_gradients
from clipfast.models.layers import Affine, Norm, standardize
from clipfast.models.resnet import ResNetTower
from clipfast.models.tail import LinearTail
from clipfast.models.text import TextTower
from clipfast.models.tower import Site, Tower

MeanGradient = Callable[[Tensor], Tensor]
"""Cotangents t (P, E) or (B, P, E) -> the mean over tokens of d(z . t)/dh: (B, P, D)."""


@dataclass(frozen=True)
class WeightedChannels(Explained):
    """features (B, n, D): h at the places of the map. inside (B, n): 1 for those that are explained, else 0."""

    z: Tensor
    features: Tensor
    inside: Tensor
    mean_gradient: MeanGradient
    relu: Relu = "each"

    @torch.no_grad()
    def maps(self, texts: Tensor, *, out: Tensor | None = None) -> Tensor:
        batch, n, _ = self.features.shape
        prompts, embed = texts.shape[-2], self.z.shape[1]
        if out is None:
            out = self.z.new_empty(batch, prompts, n)
        rows = n if isinstance(self.mean_gradient, OfMean) else embed
        if prompts > rows and not isinstance(self.mean_gradient, Below):
            values, weights = self.prompt_free()
            return combine([weights], [values], texts, self.relu, out)
        return combine([self.inside], [self.features], self.mean_gradient(texts), self.relu, out)

    def prompt_free(self) -> tuple[Tensor, Tensor]:
        if isinstance(self.mean_gradient, OfMean):
            return self.mean_gradient.towards(self.features), self.inside
        identity = torch.eye(self.z.shape[1], dtype=self.z.dtype, device=self.z.device)
        return self.features @ self.mean_gradient(identity).mT, self.inside


@dataclass(frozen=True)
class LastBlock:
    """The mean gradient at the last block's input, in closed form (see above).

    h (B, N, D): that input. site: what its attention sees; attention (B, H, N): the pooled token's. shares (B, N): of
    each token in the mean.
    """

    tail: LinearTail
    site: Site
    attention: Tensor
    h: Tensor
    pooled: Tensor
    shares: Tensor

    def __call__(self, texts: Tensor) -> Tensor:
        step = max(1, PIECE // self.attention.numel())
        return torch.cat([self._of(texts[..., i : i + step, :]) for i in range(0, texts.shape[-2], step)], dim=1)

    def _of(self, texts: Tensor) -> Tensor:
        block, site, a = self.tail.tail.block, self.site, self.attention[:, :, None]
        heads, at_pooled = a.shape[1], (torch.arange(len(a), device=a.device), self.pooled)
        query, kv = _maps(block)

        def split(t: Tensor) -> Tensor:
            return t.unflatten(-1, (heads, -1)).transpose(1, 2)

        at_residual, at_output = self.tail.vjps(texts)
        g = split(at_output)  # (B, H, P, d)
        scale = block.scale_of(heads)
        q, k, v = split(site.q[:, None]) * scale, split(site.k), split(site.v)
        av = a * (g @ v.mT)  # (B, H, P, N)
        e = av - a * av.sum(-1, keepdim=True)
        x, weight = self.h, self.shares
        if isinstance(block.norm1, Norm):
            x, rho = standardize(self.h, block.norm1.eps)
            weight = self.shares * rho[..., 0]  # (B, N)
        dk = (e * weight[:, None, None]).sum(-1, keepdim=True) * q
        dv = (a * weight[:, None, None]).sum(-1, keepdim=True) * g
        total = torch.cat([t.transpose(1, 2).flatten(2) for t in (dk, dv)], dim=-1) @ kv.weight
        dq = None if query is None else (e @ k * scale).transpose(1, 2).flatten(2)
        if dq is not None and query is not None:
            total = total + dq * weight[at_pooled][:, None, None] @ query.weight
        if isinstance(block.norm1, Norm):
            # What the norm's bias alone becomes as q, k and v: the rest of them is linear in x.
            bias = torch.zeros_like(x[0, 0]) if block.norm1.bias is None else block.norm1.bias
            k0, v0 = kv(bias).chunk(2)
            c = (e * (q @ split(site.k - k0).mT) + av - a * (g @ split(v0[None, None]).mT)).sum(1)  # (B, P, N)
            if dq is not None and query is not None:
                c[at_pooled[0], :, self.pooled] += (dq @ (site.q - query(bias))[..., None])[..., 0]
            if block.norm1.weight is not None:
                total = total * block.norm1.weight
            total = total - total.mean(-1, keepdim=True) - (c * weight[:, None]) @ x / x.shape[-1]
        return total if isinstance(block, Pool) else total + self.shares[at_pooled][:, None, None] * at_residual


def _closed(block: AttentionBlock) -> bool:
    """Whether `LastBlock` knows the block's derivative: no norm or rotation lies between its maps and its attention."""
    plain = block.norm1.centred if isinstance(block.norm1, Norm) else not block.norm1.stages
    if isinstance(block, Block):
        return plain and block.qk_norm is None and block.rotary is None
    return plain and isinstance(block, Pool) and block.key_norm is None


def _maps(block: AttentionBlock) -> tuple[Affine | None, Affine]:
    """What makes the query of the normed pooled token, None where it is a constant; and keys and values."""
    if isinstance(block, Block):
        return block.qkv.part(slice(None, block.width)), block.qkv.part(slice(block.width, None))
    assert isinstance(block, Pool)
    return block.query if isinstance(block.query, Affine) else None, block.kv


@dataclass(frozen=True)
class Below:
    """The mean gradient at the tokens h (B, N, D) of an earlier block: a backward pass a prompt from z (B, E)."""

    z: Tensor
    h: Tensor
    shares: Tensor

    def __call__(self, texts: Tensor) -> Tensor:
        shares = self.shares[:, None]
        found = score_gradients(self.z, [self.h], texts, keep=True)
        return torch.cat([shares @ gradient.to(shares.dtype) for (gradient,) in found], dim=1)


@dataclass(frozen=True)
class OfMean:
    """The mean gradient at n places of which z (B, E) is made through their `mean` (B, D, 1, 1) alone, by `top`."""

    z: Tensor
    mean: Tensor
    places: int
    top: Callable[[Tensor], Tensor]

    def __call__(self, texts: Tensor) -> Tensor:
        cotangents = texts.to(self.z.dtype).expand(len(self.z), *texts.shape[-2:]).transpose(0, 1)
        step = max(1, PIECE // self.mean.numel())
        found = [
            torch.autograd.grad(self.z, self.mean, some, retain_graph=True, is_grads_batched=True)[0]
            for some in cotangents.split(step)
        ]
        return torch.cat(found).flatten(2).transpose(0, 1) / self.places

    def towards(self, rows: Tensor) -> Tensor:
        """Rows (B, R, D) times the mean gradient of every direction of the embedding at once: (B, R, E).

        It is the embedding's derivative towards each of them, so that there are R rows to compute, not E.
        """
        batch, count, _ = rows.shape
        point = self.mean.detach().repeat_interleave(count, dim=0)
        found: Tensor = torch.func.jvp(self.top, (point,), (rows.flatten(0, 1)[..., None, None],))[1]
        return found.unflatten(0, (batch, count)) / self.places


@dataclass(frozen=True)
class GradCam(Method):
    """Grad-CAM at a block. In the last one all prompts cost about as much as Grad-ECLIP's.

    layer: the block, from the bottom, or from the top where negative: a transformer's input or a ResNet's output of it;
        of other convolutional towers the stage. Layers of convolutions may be named, too ("layer3", "layer4.0",
        "stages.2"). Another than the last takes a backward pass through the blocks above for each prompt.
    heads: "model", or "single": the blocks from `layer` up run as one head of width D with scale D**-0.5, as the
        released Grad-ECLIP code does; it explains a slightly different model.
    mean_over: "tokens", prefix included, as that code does; or "patches", as general libraries do with the usual
        `reshape_transform`, which drops the class token. A text's tokens are all that EOT sees, its patches the words.
        On convolutional towers, where all tokens are places, both are the same.
    """

    layer: int | str = -1
    heads: Literal["model", "single"] = "model"
    mean_over: Literal["tokens", "patches"] = "tokens"

    needs: ClassVar = "pixels"
    info: ClassVar = MethodInfo(
        source="Selvaraju et al., ICCV 2017",
        forwards="1",
        backwards="0 (P from a layer below the last)",
        prompt_free=True,
        agrees="the Grad-ECLIP authors' released code to 1e-9 in float64, with heads='single'; captum's LayerGradCam "
        "and pytorch-grad-cam's GradCAM with mean_over='patches', and on ResNets and ConvNeXts",
        our_reading="a text's mean is over the tokens that EOT sees",
    )

    @property
    def has_features(self) -> bool:
        return self.layer == -1

    @property
    def keeps_activations(self) -> bool:  # type: ignore[override]
        return self.layer != -1

    def __post_init__(self) -> None:
        choice(self, "heads", "model", "single")
        choice(self, "mean_over", "tokens", "patches")

    def grid(self, tower: AnyImageTower, size: tuple[int, int]) -> tuple[int, int]:
        return tower.grid_at(size, self.layer) if isinstance(tower, FeatureTower) else super().grid(tower, size)

    def image(self, tower: AnyImageTower, x: Tensor) -> WeightedChannels:
        if isinstance(tower, FeatureTower):
            return self._explain_features(tower, x)
        return self._explain(tower, *image_tokens(tower, x))

    def text(self, tower: TextTower, ids: Tensor, words: Tensor) -> WeightedChannels:
        return self._explain(tower, *text_tokens(tower, ids, words))

    @torch.no_grad()
    def _explain(self, tower: Tower, h: Tensor, tokens: Tokens) -> WeightedChannels:
        index = tower.block_index(self.layer, "layer")
        heads = 1 if self.heads == "single" else None
        h = tower.run(h, stop=index, mask=tokens.mask)
        dtype = tower.result_dtype
        shares = self._shares(tokens, h.shape[1], dtype)
        mean_gradient: MeanGradient
        if index == tower.depth - 1 and tokens.pooled.ndim == 1 and _closed(tower.blocks[-1]):
            site = tower.site(h, tokens.pooled, heads=heads, visible=tokens.visible)
            tail = tower.tail.linearize(site.residual, site.o)
            z, attention = tail.z, pooled_attention(tower.blocks[-1], site, heads)
            mean_gradient = LastBlock(tail, site, attention, h.to(dtype), tokens.pooled, shares)
        else:
            with torch.enable_grad():
                h.requires_grad_()
                graph = tower.finish(h, tokens.pooled, index, heads=heads, mask=tokens.mask, visible=tokens.visible)
            z, mean_gradient = graph.detach(), Below(graph, h, shares)
        return WeightedChannels(z, h.detach()[:, tokens.keep].to(dtype), tokens.inside.to(dtype), mean_gradient)

    @torch.no_grad()
    def _explain_features(self, tower: FeatureTower, x: Tensor) -> WeightedChannels:
        if self.heads == "single":
            raise InputError(f"heads='single' of GradCam is for transformers: leave it out for a {tower.kind}.")
        features = tower.features(x, self.layer).to(tower.result_dtype)
        h = features.flatten(2).mT
        mean_gradient: MeanGradient
        last = tower.above(self.layer) == tower.above(-1)
        if last and isinstance(tower, ResNetTower):
            t = tower.pool_tokens(features)
            site = tower.site(t, tower.pooled(t))
            tail = tower.tail.linearize(site.residual, site.o)
            shares = torch.full_like(t[..., 0], 1 / h.shape[1])
            attention = pooled_attention(tower.blocks[-1], site)
            z, mean_gradient = tail.z, LastBlock(tail, site, attention, t, tower.pooled(t), shares)
        elif last and isinstance(tower, ConvTower) and tower.averages:
            with torch.enable_grad():
                mean = features.mean((2, 3), keepdim=True).requires_grad_()
                graph = tower.from_features(mean)
            z, mean_gradient = graph.detach(), OfMean(graph, mean, h.shape[1], tower.from_features)
        else:
            with torch.enable_grad():
                graph = tower.from_features(h.requires_grad_().mT.unflatten(2, features.shape[2:]), self.layer)
            z, mean_gradient = graph.detach(), Below(graph, h, torch.full_like(h[..., 0], 1 / h.shape[1]))
        return WeightedChannels(z, h.detach(), torch.ones_like(h[..., 0]), mean_gradient)

    def _shares(self, tokens: Tokens, length: int, dtype: torch.dtype) -> Tensor:
        """Each token's share of the mean: (B, N)."""
        counted = torch.ones(len(tokens.pooled), length, dtype=dtype, device=tokens.pooled.device)
        if self.mean_over == "patches":
            counted.zero_()[:, tokens.keep] = tokens.inside.to(dtype)
        elif tokens.visible is not None:
            counted = tokens.visible.to(dtype)
        return counted / counted.sum(1, keepdim=True)
