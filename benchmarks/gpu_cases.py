"""What `gpu_check.py` runs of each op: cases to check against float64, and cases to time against a floor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.ops.gmm_threshold import gmm_threshold
from clipfast.ops.mask_sequence import mask_sequence, rank_map
from clipfast.ops.path import path_accumulate, path_points
from clipfast.ops.pgd_step import Slope, pgd_step
from clipfast.ops.spatial_attribution import gradient_weighted, spatial_attribution, spatial_weight
from clipfast.ops.token_patch_similarity import token_patch_similarity, token_patch_threshold

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Relative L2 against float64. Products of half-precision numbers are exact in float32, so inputs of any dtype keep
# float32's bound; a mixture that stops an iteration earlier moves a map in the fourth digit, and with a hard threshold
# single patches appear or vanish.
EXACT, CLOSE, SOFT, HARD = 0.0, 1e-5, 1e-3, 3e-2
# Every branch of both kernels of pgd_step.
PGD = (
    (Slope(inner=0.3, knee=0.01, outer=2.0, level=-0.017), "none", "gradient"),
    (Slope(colour=0.02), "box", "sign"),
    (Slope(inner=0.25), "group", "normalized"),
    (Slope(inner=0.25), "group", "sign"),
)

Place = Callable[[Tensor], Tensor]
Size = tuple[int, int, int, int]


@dataclass(frozen=True)
class Check:
    """One comparison on inputs of its own. fast: the backend under test; run: what it gives; exact: what it should."""

    op: str
    case: str
    fast: str
    run: Callable[[], Tensor]
    exact: Callable[[], Tensor]
    bound: float
    untouched: Callable[[], bool] = lambda: True


@dataclass(frozen=True)
class Speed:
    """One timing. plain: the definition as torch.compile likes it best, in one piece. bytes: what must be moved at the
    least; flops: what must be multiplied, by `unit`."""

    op: str
    case: str
    fast: str
    run: Callable[[], object]
    plain: Callable[..., object]
    arguments: tuple[Any, ...]
    bytes: int
    flops: float = 0.0
    unit: str = "bfloat16"
    maps: int = 0


def checks(device: torch.device, *, tiny: bool = False) -> Iterator[Callable[[], Check]]:
    """Every fast path on random inputs in several dtypes and layouts. `tiny` keeps an interpreter's patience."""
    dtypes = [torch.float32, torch.float16] if tiny else [torch.float32, torch.float16, torch.bfloat16]
    layouts: dict[str, Place] = {"contiguous": lambda x: x, "padded": padded, "transposed": transposed}
    sizes = [(2, 9, 40, 3)] if tiny else [(3, 196, 768, 1), (2, 50, 768, 20), (2, 577, 1024, 100), (1, 1024, 1531, 300)]
    for size in sizes:
        for layout in layouts if size == sizes[0] else ("contiguous", "padded"):
            for dtype in dtypes:
                name, place = f"{'x'.join(map(str, size))} {_short(dtype)} {layout}", layouts[layout]
                for check in (_attribution_check, _weighted_check, _similarity_check):
                    yield partial(check, device, name, size, dtype, place)
                if layout != "transposed" and size in sizes[::3]:
                    yield partial(_path_check, device, name, size, dtype, place)
                    yield partial(_accumulate_check, device, name, size, dtype, place)
        for threshold in ("soft", "hard"):
            yield partial(_gmm_check, device, size, threshold)
            yield partial(_fused_check, device, size, threshold)
    for size in sizes[:2]:
        yield partial(_masked_weight_check, device, size)
        yield partial(_nan_check, device, size)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield partial(_mask_check, device, 8 if tiny else 224, dtype)
    for slope, bound, direction in PGD:
        yield partial(_pgd_check, device, 8 if tiny else 224, slope, bound, direction)


def huge_checks(device: torch.device) -> Iterator[Callable[[], Check]]:
    """Results of more than 2^31 elements, compared at their far end. Each needs up to 30 GB."""
    yield partial(_huge_attribution, device)
    yield partial(_huge_path, device)
    yield partial(_huge_gmm, device)
    yield partial(_huge_mask, device)


def speeds(device: torch.device, *, tiny: bool = False) -> Iterator[Callable[[], Speed]]:
    """The sizes that the engine uses: ViT-B/16, a batch of 256."""
    batch, patches, width = (2, 9, 16) if tiny else (256, 196, 768)
    for dtype in (torch.bfloat16, torch.float32):
        for prompts in (3,) if tiny else (1, 100, 1000):
            yield partial(_weighted_speed, device, batch, patches, width, prompts, dtype)
        for prompts in (3,) if tiny else (20, 100):
            yield partial(_attribution_speed, device, batch, patches, width, prompts, dtype)
        yield partial(_path_speed, device, 4, patches, width, 32, dtype)
        yield partial(_accumulate_speed, device, 4, patches, width, 32, dtype)
        yield partial(_similarity_speed, device, batch, 2 if tiny else 16, patches, 16 if tiny else 512, dtype)
        yield partial(_mask_speed, device, 1 if tiny else 8, 8 if tiny else 224, dtype)
    for bound in ("box", "group"):
        yield partial(_pgd_speed, device, 2 if tiny else 128, 28 if tiny else 224, bound)
    yield partial(_gmm_speed, device, 20 if tiny else 65536, patches)
    yield partial(_fused_speed, device, batch, 2 if tiny else 256, patches, 16 if tiny else 512)


def padded(x: Tensor) -> Tensor:
    """The same numbers inside of a larger tensor of NaN: odd strides, no alignment, and nothing to read beyond."""
    around = torch.full([size + 2 for size in x.shape], torch.nan, dtype=x.dtype, device=x.device)
    inside = around[tuple(slice(1, size + 1) for size in x.shape)]
    return inside.copy_(x)


def transposed(x: Tensor) -> Tensor:
    """The same numbers with the last two dimensions stored the other way round."""
    return x.mT.contiguous().mT


@contextmanager
def poisoned() -> Iterator[None]:
    """Within the block, memory that comes uninitialised holds NaN: what an op leaves unwritten shows."""
    empty, new_empty, empty_like = torch.empty, torch.Tensor.new_empty, torch.empty_like

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            made = make(*args, **kwargs)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        return call

    torch.empty, torch.empty_like = filled(empty), filled(empty_like)
    torch.Tensor.new_empty = filled(new_empty)  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.empty, torch.empty_like = empty, empty_like
        torch.Tensor.new_empty = new_empty  # type: ignore[method-assign]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _attribution_inputs(device: torch.device, size: Size, dtype: torch.dtype, place: Place) -> list[Tensor]:
    batch, patches, width, prompts = size
    shapes = (batch, width), (batch, patches, width), (batch, patches, width), (batch, prompts, width)
    return [place(torch.randn(shape, device=device).to(dtype)) for shape in shapes]


def _attribution_check(device: torch.device, name: str, size: Size, dtype: torch.dtype, place: Place) -> Check:
    inputs = _attribution_inputs(device, size, dtype, place)
    return Check(
        "spatial_attribution",
        name,
        "triton",
        lambda: spatial_attribution(*inputs),
        lambda: _by_definition(spatial_attribution, *inputs),
        CLOSE,
    )


def _weighted_check(device: torch.device, name: str, size: Size, dtype: torch.dtype, place: Place) -> Check:
    """The engine's own use: values out of packed q, k and v, texts shared by the batch, results into a view."""
    batch, patches, width, prompts = size
    packed = place(torch.randn(batch, patches + 1, 3 * width, device=device).to(dtype))
    v, g = packed[:, 1:, 2 * width :], torch.randn(prompts, width, device=device)
    weight = torch.rand(batch, patches, device=device)
    around = torch.full((batch, prompts + 2, patches), torch.nan, device=device)
    out = around[:, 1:-1]
    return Check(
        "gradient_weighted",
        name,
        "triton",
        lambda: gradient_weighted(weight, v, g, out=out),
        lambda: torch.einsum("bi,bic,pc->bpi", weight.double(), v.double(), g.double()),
        CLOSE,
        lambda: bool(around[:, [0, -1]].isnan().all()),
    )


def _masked_weight_check(device: torch.device, size: Size) -> Check:
    batch, patches, width, _ = size
    q, k = torch.randn(batch, width, device=device), torch.randn(batch, patches, width, device=device)
    where = torch.rand(batch, patches, device=device) > 0.3
    return Check(
        "spatial_weight",
        f"{batch}x{patches}x{width} masked",
        "triton",
        lambda: spatial_weight(q, k.masked_fill(~where[..., None], torch.nan), where),
        lambda: _by_definition(spatial_weight, q, k, where),
        CLOSE,
    )


def _nan_check(device: torch.device, size: Size) -> Check:
    batch, patches, width, _ = size
    q, k = torch.randn(batch, width, device=device), torch.randn(batch, patches, width, device=device)
    k[0, patches // 2] = torch.nan
    return Check(
        "spatial_weight",
        f"{batch}x{patches}x{width} with one NaN",
        "triton",
        lambda: spatial_weight(q, k).isnan().any(-1).double(),
        lambda: torch.tensor([1.0] + [0.0] * (batch - 1), device=device, dtype=torch.float64),
        EXACT,
    )


def _path_check(device: torch.device, name: str, size: Size, dtype: torch.dtype, place: Place) -> Check:
    batch, patches, width, _ = size
    start, delta = (place(torch.randn(batch, patches, width, device=device)) for _ in range(2))
    alphas = torch.rand(5, device=device)
    points = torch.addcmul(start.double(), delta.double(), alphas.double()[:, None, None, None])
    return Check(
        "path_points",
        name,
        "triton",
        lambda: path_points(start, delta, alphas, dtype),
        lambda: points.flatten(0, 1),
        torch.finfo(dtype).eps,
    )


def _accumulate_check(device: torch.device, name: str, size: Size, dtype: torch.dtype, place: Place) -> Check:
    batch, patches, width, _ = size
    grad = place(torch.randn(5 * batch, patches, width, device=device).to(dtype))
    weights = torch.rand(5, device=device)
    around = torch.full((batch, 2, patches, width), torch.nan, device=device)
    around[:, 0] = torch.randn(batch, patches, width, device=device)
    before = around[:, 0].double()

    def run() -> Tensor:
        path_accumulate(around[:, 0], grad, weights)
        return around[:, 0]

    return Check(
        "path_accumulate",
        name,
        "triton",
        run,
        lambda: before + torch.einsum("s,sbic->bic", weights.double(), grad.double().unflatten(0, (5, batch))),
        CLOSE,
        lambda: bool(around[:, 1].isnan().all()),
    )


def _pgd_check(device: torch.device, side: int, slope: Slope, bound: str, direction: str) -> Check:
    """A size that cells of 5 do not fill; no gradient is so small that rounding would choose its sign."""
    shape = (3, 3, side + 3, side + 1)
    image = torch.rand(shape, device=device)
    gradient = (torch.rand(shape, device=device) + 0.1) * torch.randn(shape, device=device).sign()
    gradient[0, 0, :3, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    around = torch.full((2, 5, *shape[1:]), torch.nan, device=device)
    around[0, 1:-1] = (0.02 * torch.randn(shape, device=device)).clamp_(-image, 1 - image)
    around[1, 1:-1] = torch.randn(shape, device=device).sign()
    wide = [x.double() for x in (*around[:, 1:-1], gradient, image)]
    numbers = (list(slope), bound, 0.02, 0.004, 0.9, direction, 5)

    def run(delta: Tensor, velocity: Tensor, gradient: Tensor, image: Tensor) -> Tensor:
        count = torch.zeros((), dtype=torch.int64, device=device)
        pgd_step(delta, velocity, gradient, image, count, *numbers)
        return torch.cat((delta.flatten(), velocity.flatten(), count[None]))

    return Check(
        "pgd_step",
        f"{bound}, {direction}",
        "triton",
        lambda: run(around[0, 1:-1], around[1, 1:-1], gradient, image),
        lambda: _as_defined(lambda: run(*wide)),
        CLOSE,
        lambda: bool(around[:, [0, -1]].isnan().all()),
    )


def _states(device: torch.device, size: Size, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Token and patch states of which a share has something in common, as the mixture expects."""
    batch, patches, width, tokens = size
    common = torch.randn(batch, 1, width, device=device)
    found = (torch.rand(batch, patches, 1, device=device) < 0.3) * common
    patch_states = torch.randn(batch, patches, width, device=device) + found
    token_states = torch.randn(batch, tokens, width, device=device) + common
    return token_states.to(dtype), patch_states.to(dtype)


def _similarity_check(device: torch.device, name: str, size: Size, dtype: torch.dtype, place: Place) -> Check:
    tokens, patches = (place(x) for x in _states(device, size, dtype))
    return Check(
        "token_patch_similarity",
        name,
        "triton",
        lambda: token_patch_similarity(tokens, patches),
        lambda: _by_definition(token_patch_similarity, tokens, patches),
        CLOSE,
    )


def _gmm_check(device: torch.device, size: Size, threshold: str) -> Check:
    scores = token_patch_similarity(*_states(device, size, torch.float32))
    # What a mixture can stumble over: a constant map, and one of two values.
    scores[0, 0] = 0.25
    scores[-1, -1] = (torch.rand(size[1], device=device) < 0.5).float()
    return Check(
        "gmm_threshold",
        f"{'x'.join(map(str, scores.shape))} {threshold}",
        "triton",
        lambda: gmm_threshold(scores, threshold),
        lambda: _by_definition(gmm_threshold, scores, threshold=threshold),
        SOFT if threshold == "soft" else HARD,
    )


def _fused_check(device: torch.device, size: Size, threshold: str) -> Check:
    tokens, patches = _states(device, size, torch.float32)
    return Check(
        "token_patch_threshold",
        f"{'x'.join(map(str, size))} {threshold}",
        "triton",
        lambda: token_patch_threshold(tokens, patches, threshold),
        lambda: _by_definition(token_patch_threshold, tokens, patches, threshold=threshold),
        SOFT if threshold == "soft" else HARD,
    )


def _mask_arguments(device: torch.device, batch: int, side: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "images": torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, device=device),
        "order": rank_map(torch.rand(batch, 2, side, side, device=device)),
        "fractions": torch.linspace(0, 1, 28),
        "fill": "mean",
        "mean": MEAN,
        "std": STD,
        "dtype": dtype,
    }


def _mask_check(device: torch.device, side: int, dtype: torch.dtype) -> Check:
    arguments = _mask_arguments(device, 3, side, dtype)
    return Check(
        "mask_sequence",
        f"3x{side}x{side} {_short(dtype)}",
        "native",
        lambda: mask_sequence(**arguments),
        lambda: _as_defined(lambda: mask_sequence(**arguments)),
        EXACT,
    )


def _huge_attribution(device: torch.device) -> Check:
    batch, patches, width, prompts = 3000, 730, 64, 1000
    v, g = torch.randn(batch, patches, width, device=device), torch.randn(prompts, width, device=device)
    weight, ends = torch.rand(batch, patches, device=device), [0, batch - 1]
    return Check(
        "gradient_weighted",
        f"{batch * patches * prompts:.2e} elements",
        "triton",
        lambda: gradient_weighted(weight, v, g)[ends],
        lambda: torch.einsum("bi,bic,pc->bpi", weight[ends].double(), v[ends].double(), g.double()),
        CLOSE,
    )


def _huge_path(device: torch.device) -> Check:
    batch, size, steps = 64, 197 * 768, 256
    start, delta = torch.randn(2, batch, size, device=device)
    alphas = torch.rand(steps, device=device)

    def run() -> Tensor:
        points = path_points(start, delta, alphas, torch.bfloat16)
        path_accumulate(total := torch.zeros(batch, size, device=device), points, alphas)
        return torch.stack((points[-1], total[-1]))

    def exact() -> Tensor:
        points = torch.addcmul(start[-1].double(), delta[-1].double(), alphas[:, None].double())
        return torch.stack((points[-1], (alphas[:, None] * points).sum(0)))

    return Check("path", f"{batch * size * steps:.2e} elements", "triton", run, exact, torch.finfo(torch.bfloat16).eps)


def _huge_gmm(device: torch.device) -> Check:
    maps, size = 11_000_000, 196
    scores = torch.rand(maps, size, device=device)
    scores[:, : size // 4] += 1
    return Check(
        "gmm_threshold",
        f"{maps * size:.2e} elements",
        "triton",
        lambda: gmm_threshold(scores)[-1000:],
        lambda: _by_definition(gmm_threshold, scores[-1000:]),
        SOFT,
    )


def _huge_mask(device: torch.device) -> Check:
    arguments = _mask_arguments(device, 260, 224, torch.bfloat16)
    items = 260 * 2 * 28
    return Check(
        "mask_sequence",
        f"{items * 3 * 224 * 224:.2e} elements",
        "native",
        lambda: mask_sequence(**arguments)[-3:],
        lambda: _as_defined(lambda: mask_sequence(**arguments, window=(items - 3, items))),
        EXACT,
    )


def _by_definition(op: Callable[..., Tensor], *inputs: Tensor, **settings: Any) -> Tensor:
    """The op's definition in float64."""
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    return _as_defined(lambda: op(*wide, **settings))


def _as_defined(run: Callable[[], Tensor]) -> Tensor:
    from clipfast.ops.dispatch import backend

    with backend("torch"):
        return run()


def _plain_attribution(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, k = q.float(), k.float()
    cosine = (k @ q[:, :, None])[..., 0] / (k.norm(dim=-1) * q.norm(dim=-1, keepdim=True))
    low, high = cosine.amin(-1, keepdim=True), cosine.amax(-1, keepdim=True)
    return _plain_weighted((cosine - low) / (high - low), v, g)


def _plain_weighted(weight: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return torch.relu(weight[:, None] * (g @ v.mT).float())


def _attribution_speed(
    device: torch.device, batch: int, patches: int, width: int, prompts: int, dtype: torch.dtype
) -> Speed:
    q, k, v, g = _attribution_inputs(device, (batch, patches, width, prompts), dtype, lambda x: x)
    moved = dtype.itemsize * (k.numel() + v.numel() + g.numel()) + 4 * batch * prompts * patches
    return Speed(
        "spatial_attribution",
        f"{batch}x{patches}x{width}, {prompts} prompts, {_short(dtype)}",
        "triton",
        lambda: spatial_attribution(q, k, v, g),
        _plain_attribution,
        (q, k, v, g),
        moved,
        *_products(batch * prompts * patches * width, dtype),
    )


def _weighted_speed(
    device: torch.device, batch: int, patches: int, width: int, prompts: int, dtype: torch.dtype
) -> Speed:
    weight = torch.rand(batch, patches, device=device)
    v = torch.randn(batch, patches, width, device=device).to(dtype)
    g = torch.randn(prompts, width, device=device).to(dtype)
    moved = dtype.itemsize * (v.numel() + g.numel()) + 4 * batch * prompts * patches
    return Speed(
        "gradient_weighted",
        f"{batch}x{patches}x{width}, {prompts} prompts, {_short(dtype)}",
        "triton",
        lambda: gradient_weighted(weight, v, g, relu=True),
        _plain_weighted,
        (weight, v, g),
        moved,
        *_products(batch * prompts * patches * width, dtype),
    )


def _products(count: int, dtype: torch.dtype) -> tuple[float, str]:
    """Operations and the unit that does them: a product as good as float32's takes three of TF32."""
    return (6.0 * count, "tf32") if dtype == torch.float32 else (2.0 * count, "bfloat16")


def _path_speed(device: torch.device, batch: int, patches: int, width: int, steps: int, dtype: torch.dtype) -> Speed:
    start, delta = torch.randn(2, batch, patches + 1, width, device=device)
    alphas = torch.rand(steps, device=device)

    def plain(start: Tensor, delta: Tensor, alphas: Tensor) -> Tensor:
        return (start + alphas[:, None, None, None] * delta).to(dtype).flatten(0, 1)

    return Speed(
        "path_points",
        f"{batch}x{patches + 1}x{width}, {steps} steps, {_short(dtype)}",
        "triton",
        lambda: path_points(start, delta, alphas, dtype),
        plain,
        (start, delta, alphas),
        4 * 2 * start.numel() + dtype.itemsize * steps * start.numel(),
    )


def _accumulate_speed(
    device: torch.device, batch: int, patches: int, width: int, steps: int, dtype: torch.dtype
) -> Speed:
    total = torch.zeros(batch, patches + 1, width, device=device)
    grad = torch.randn(steps * batch, patches + 1, width, device=device).to(dtype)
    weights = torch.rand(steps, device=device)

    def plain(total: Tensor, grad: Tensor, weights: Tensor) -> Tensor:
        return total.add_((weights[:, None, None, None] * grad.unflatten(0, (steps, batch)).float()).sum(0))

    return Speed(
        "path_accumulate",
        f"{batch}x{patches + 1}x{width}, {steps} steps, {_short(dtype)}",
        "triton",
        lambda: path_accumulate(total, grad, weights),
        plain,
        (total, grad, weights),
        4 * 2 * total.numel() + dtype.itemsize * grad.numel(),
    )


def _pgd_speed(device: torch.device, batch: int, side: int, bound: str) -> Speed:
    shape, radius, cell = (batch, 3, side, side), 4 / 255, 14
    gradient, image = torch.randn(shape, device=device), torch.rand(shape, device=device)
    delta, velocity, own_delta, own_velocity = torch.zeros(4, *shape, device=device)
    count = torch.zeros((), dtype=torch.int64, device=device)
    direction = "normalized" if bound == "group" else "sign"

    def directed(g: Tensor) -> Tensor:
        return g / norms(g).clamp(min=1e-12) if bound == "group" else g.sign()

    def norms(x: Tensor) -> Tensor:
        cells = x.unflatten(3, (-1, cell)).unflatten(2, (-1, cell))
        return cells.square().sum((3, 5), keepdim=True).sqrt().expand_as(cells).flatten(2, 3).flatten(3)

    def plain(delta: Tensor, velocity: Tensor, gradient: Tensor, image: Tensor) -> Tensor:
        g = gradient - 0.25 * delta
        g = torch.where(g.isfinite(), g, 0)
        velocity.copy_(directed(0.9 * velocity + directed(g)))
        moved = delta + velocity / 255
        moved = moved * (radius / norms(moved).clamp(min=radius)) if bound == "group" else moved.clamp(-radius, radius)
        return delta.copy_((image + moved).clamp(0, 1) - image)

    def run() -> Tensor:
        slope = list(Slope(inner=0.25))
        pgd_step(delta, velocity, gradient, image, count, slope, bound, radius, 1 / 255, 0.9, direction, cell)
        return delta

    return Speed(
        "pgd_step",
        f"{batch}x3x{side}x{side}, {bound}",
        "triton",
        run,
        plain,
        (own_delta, own_velocity, gradient, image),
        4 * 6 * delta.numel(),
    )


def _similarity_speed(
    device: torch.device, batch: int, tokens: int, patches: int, width: int, dtype: torch.dtype
) -> Speed:
    token_states, patch_states = _states(device, (batch, patches, width, tokens), dtype)

    def plain(tokens: Tensor, patches: Tensor) -> Tensor:
        return (F.normalize(tokens, dim=-1) @ F.normalize(patches, dim=-1).mT).float()

    return Speed(
        "token_patch_similarity",
        f"{batch}x{tokens} tokens by {patches}x{width}, {_short(dtype)}",
        "triton",
        lambda: token_patch_similarity(token_states, patch_states),
        plain,
        (token_states, patch_states),
        dtype.itemsize * (token_states.numel() + patch_states.numel()) + 4 * batch * tokens * patches,
        *_products(batch * tokens * patches * width, dtype),
    )


def _plain_mixture(scores: Tensor) -> Tensor:
    """Twenty iterations for every map, without a look at any: what a compiler can do with it."""
    z = (scores - scores.mean(-1, keepdim=True)) / scores.std(-1, correction=0, keepdim=True)
    means = torch.stack((z.quantile(0.25, dim=-1), z.quantile(0.75, dim=-1)), -1)[..., None]
    variances, weights = torch.ones_like(means), torch.full_like(means, 0.5)
    share = torch.zeros_like(z)[:, None]
    for _ in range(20):
        distance = (z[:, None] - means).square() / variances
        share = (weights.log() - 0.5 * (variances.log() + math.log(2 * math.pi) + distance)).softmax(1)
        mass = share.sum(-1, keepdim=True)
        means = (share * z[:, None]).sum(-1, keepdim=True) / mass
        variances = (share * (z[:, None] - means).square()).sum(-1, keepdim=True) / mass + 1e-6
        weights = mass / z.shape[-1]
    low = torch.where(means[:, :1] < means[:, 1:], means[:, :1], means[:, 1:])[..., 0]
    return (z - low).clamp(min=0) * share.amax(1)


def _gmm_speed(device: torch.device, maps: int, size: int) -> Speed:
    scores = token_patch_similarity(*_states(device, (maps // 4, size, 64, 4), torch.float32)).flatten(0, 1)
    return Speed(
        "gmm_threshold",
        f"{maps}x{size}",
        "triton",
        lambda: gmm_threshold(scores),
        _plain_mixture,
        (scores,),
        8 * scores.numel(),
        maps=maps,
    )


def _fused_speed(device: torch.device, batch: int, tokens: int, patches: int, width: int) -> Speed:
    token_states, patch_states = _states(device, (batch, patches, width, tokens), torch.bfloat16)

    def plain(tokens: Tensor, patches: Tensor) -> Tensor:
        scores = (F.normalize(tokens, dim=-1) @ F.normalize(patches, dim=-1).mT).float()
        return _plain_mixture(scores.flatten(0, 1))

    return Speed(
        "token_patch_threshold",
        f"{batch}x{tokens} tokens by {patches}x{width}, bfloat16",
        "triton",
        lambda: token_patch_threshold(token_states, patch_states),
        plain,
        (token_states, patch_states),
        2 * (token_states.numel() + patch_states.numel()) + 4 * batch * tokens * patches,
        *_products(batch * tokens * patches * width, torch.bfloat16),
        maps=batch * tokens,
    )


def _mask_speed(device: torch.device, batch: int, side: int, dtype: torch.dtype) -> Speed:
    arguments = _mask_arguments(device, batch, side, dtype)
    out = torch.empty(batch * 2 * 28, 3, side, side, dtype=dtype, device=device)
    arguments |= {"fill": 0.0, "out": out, "dtype": None}
    images, ranks = arguments["images"], arguments["order"]
    counts = (torch.linspace(0, 1, 28, device=device) * side * side + 0.5).floor().int()
    mean, std = (torch.tensor(c, device=device)[:, None, None] for c in (MEAN, STD))

    def plain(images: Tensor, ranks: Tensor, counts: Tensor) -> Tensor:
        normalised, black = ((images / 255 - mean) / std)[:, None, None], -mean / std
        return torch.where((ranks[:, :, None] < counts[:, None, None])[:, :, :, None], black, normalised).to(dtype)

    return Speed(
        "mask_sequence",
        f"{batch}x3x{side}x{side}, 2 prompts, 28 steps, {_short(dtype)}",
        "native",
        lambda: mask_sequence(**arguments),
        plain,
        (images, ranks, counts),
        out.numel() * out.itemsize + images.numel() + 4 * ranks.numel(),
    )
