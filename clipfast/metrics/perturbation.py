"""Deletion and insertion curves, and the confidence that masking costs: how faithful maps are to the model.

    deletion    the pixels that a map ranks first disappear step by step; a faithful map's score falls fast
    insertion   they appear step by step on a bare image; a faithful map's score rises fast
    AUC         trapezoids over the share of pixels; for equal steps (sum - first / 2 - last / 2) / (points - 1)

Petsiuk et al., RISE, BMVC 2018 (`deletion/rise`, `insertion/rise`); Zhao et al., Grad-ECLIP, ICML 2024
(`deletion/grad_eclip`, `insertion/grad_eclip`); Wang et al., M2IB, NeurIPS 2023 and Chattopadhay et al., Grad-CAM++,
WACV 2018 (`confidence/m2ib`, `confidence/gradcam++`).

Images x prompts x steps go through the model in batches of one fixed size, whatever the number of steps. A curve's two
ends do not depend on the map: they are encoded once an image, and the clean one once for both curves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clipfast.data.geometry import InputSpec, normalize, prepare
from clipfast.data.images import read_image
from clipfast.errors import InputError
from clipfast.metrics.base import Columns, Protocol
from clipfast.ops.mask_sequence import Noise, mask_sequence, rank_map
from clipfast.ops.minmax import minmax

Mode = Literal["deletion", "insertion"]
Encode = Callable[[Tensor], Tensor]
"""Inputs (n, C, H, W) -> whatever scores are made of, (n, E): unit embeddings, or logits."""
Score = Callable[[Tensor, Tensor], Tensor]
"""(encoded (n, E), which of the B * P pairs each belongs to (n,)) -> scores (n,) or, of several kinds, (n, K)."""


@dataclass
class Clock:
    """Seconds inside the model and in all."""

    forwards: float = 0.0
    total: float = 0.0

    def run(self, encode: Encode, x: Tensor) -> Tensor:
        """What `encode` makes of x, its seconds counted as the model's."""
        begun = _now(x)
        z = encode(x)
        self.forwards += _now(x) - begun
        return z

    @property
    def beside(self) -> float:
        """The share of time that was not the model's."""
        return 1 - self.forwards / self.total if self.total else 0.0


@dataclass(frozen=True)
class Classes:
    """Scores of pairs whose prompts are classes: softmax over K classes of scaled cosines with an image.

    embeddings (K, E): unit text embeddings of the classes. scale: the model's logit scale. target (B * P,): the class
    whose score is followed.
    """

    embeddings: Tensor
    scale: float
    target: Tensor

    def probability(self, z: Tensor, pair: Tensor) -> Tensor:
        """Softmax probability of each pair's class: (n,)."""
        p = (self.scale * z @ self.embeddings.T).softmax(-1)
        return p.gather(1, self.target[pair, None])[:, 0]

    def hit(self, z: Tensor, pair: Tensor) -> Tensor:
        """Whether each pair's class is the best, and among the best five: (n, 2)."""
        top = (z @ self.embeddings.T).topk(min(5, len(self.embeddings)), dim=-1).indices
        hit = top == self.target[pair, None]
        return torch.stack((hit[:, 0], hit.any(-1)), dim=-1).to(z.dtype)


def cosine(texts: Tensor) -> Score:
    """Cosines with unit text embeddings (P, E) shared by all images, or (B, P, E): each pair's own."""

    def score(z: Tensor, pair: Tensor) -> Tensor:
        own = texts[pair % len(texts)] if texts.ndim == 2 else texts.flatten(0, 1)[pair]
        return (z * own).sum(-1)

    return score


def area(curve: Tensor, fractions: Sequence[float]) -> Tensor:
    """The area under curves (..., points) at these shares of the pixels, by trapezoids: (...)."""
    return torch.trapezoid(curve, torch.tensor(fractions, dtype=curve.dtype, device=curve.device))


def blur(images: Tensor, size: int = 11, sigma: float = 5.0) -> Tensor:
    """RISE's blurred image, (B, C, H, W), zeros outside.

    The kernel is that of the published code: a Gaussian of `sigma` reflected at the ends of `size` taps, not cut off.
    """
    reach = int(4 * sigma + 0.5)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / sigma).square())
    taps = torch.zeros(size, dtype=torch.float64)
    for offset, weight in zip(range(-reach, reach + 1), (weights / weights.sum()).tolist(), strict=True):
        folded = (size // 2 + offset) % (2 * size)
        taps[min(folded, 2 * size - 1 - folded)] += weight
    taps = taps.to(images.device, images.dtype)
    channels = images.shape[1]
    across = F.conv2d(images, taps.expand(channels, 1, 1, size), padding=(0, size // 2), groups=channels)
    return F.conv2d(across, taps[:, None].expand(channels, 1, size, 1), padding=(size // 2, 0), groups=channels)


def check_maps(images: Tensor, maps: Tensor) -> None:
    """Raises InputError unless images are (B, C, H, W) and maps (B, P, h, w)."""
    if images.ndim != 4 or maps.ndim != 4 or len(images) != len(maps):
        raise InputError(
            f"images and maps must be (B, C, H, W) and (B, P, h, w), not {tuple(images.shape)} and {tuple(maps.shape)}."
        )


def curves(
    encode: Encode,
    score: Score,
    images: Tensor,
    maps: Tensor,
    plan: Mapping[Mode, tuple[Sequence[float], float | Tensor | Noise]],
    *,
    batch: int = 32,
    clock: Clock | None = None,
) -> dict[Mode, Tensor]:
    """The scores along deletion and insertion, (B, P, points) or (B, P, points, K) each.

    images (B, C, H, W), normalised. maps (B, P, h, w), any grid: bilinear to the image where it is not the image's.
    plan: for each curve the fractions of pixels at its points, in [0, 1], and what `mask_sequence` fills with.
    batch: how many masked images go through the model at once.

    Raises InputError for maps that do not belong to the images or hold NaN.
    """
    check_maps(images, maps)
    clock = clock or Clock()
    started = time.perf_counter()
    b, p = maps.shape[:2]
    ranks = rank_map(on_pixels(maps, (images.shape[2], images.shape[3])))
    pairs = torch.arange(b * p, device=images.device)

    def at_end(x: Tensor) -> Tensor:
        """An image that is the same for all of its prompts: encoded once, scored for each. (B, P) or (B, P, K)."""
        z = torch.cat([clock.run(encode, part) for part in x.split(batch)])
        return score(z.repeat_interleave(p, 0), pairs).unflatten(0, (b, p))

    clean: Tensor | None = None
    found: dict[Mode, Tensor] = {}
    room = images.new_empty(batch, *images.shape[1:])
    for mode, (fractions, fill) in plan.items():
        whole = 0.0 if mode == "deletion" else 1.0
        inner = [f for f in fractions if 0 < f < 1]
        points: dict[float, Tensor] = {}
        if whole in fractions:
            clean = at_end(images) if clean is None else clean
            points[whole] = clean
        if 1 - whole in fractions:
            bare = mask_sequence(images, ranks[:, :1], [1 - whole], mode, fill)
            points[1 - whole] = at_end(bare)
        scores = []
        total = b * p * len(inner)
        for start in range(0, total, batch):
            stop = min(start + batch, total)
            x = mask_sequence(images, ranks, inner, mode, fill, window=(start, stop), out=room[: stop - start])
            scores.append(score(clock.run(encode, x), torch.arange(start, stop, device=x.device) // len(inner)))
        if inner:
            between = torch.cat(scores).unflatten(0, (b, p, len(inner)))
            points |= {f: between[:, :, i] for i, f in enumerate(inner)}
        found[mode] = torch.stack([points[f] for f in fractions], dim=2)
    clock.total += time.perf_counter() - started
    return found


def on_pixels(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, P, h, w) bilinear on (H, W), patch centres to patch centres; as they are where they have that size."""
    if tuple(maps.shape[-2:]) == size:
        return maps
    wide = maps if maps.dtype == torch.float64 else maps.float()
    return F.interpolate(wide, size=size, mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class Curves(Protocol):
    """Deletion and insertion together, since they share the clean image: columns for the points and areas of both.

    steps: of equal shares of what goes.
    """

    steps: int = 28

    figures: ClassVar[Mapping[str, str]] = {"deletion": "lower", "insertion": "higher"}

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps must be at least 1, not {self.steps}.")

    def columns(self, found: Mapping[Mode, Tensor]) -> Columns:
        """One row a pair, image by image: each curve's area under its own name, its points as "deletion 0.250"."""
        columns: Columns = {}
        for mode, curve in found.items():
            rows = curve.flatten(0, 1).double().cpu()
            columns[mode] = area(rows, self.fractions())
            for at, point in zip(self.fractions(), rows.unbind(1), strict=True):
                columns[f"{mode} {at:.3f}"] = point
        return columns

    def fractions(self) -> Sequence[float]:
        """The shares at a curve's points, both ends included."""
        return [i / self.steps for i in range(self.steps + 1)]


@dataclass(frozen=True)
class CurvesRise(Curves):
    """`deletion/rise` and `insertion/rise`: deletion to zeros, insertion from a blurred image, the score a probability.

    steps: of equal numbers of pixels; RISE's 224 pixels a step of a 224 x 224 image are 224 steps, its notebook's 28.
    size, sigma: of the blur.
    """

    steps: int = 224
    size: int = 11
    sigma: float = 5.0

    name: ClassVar[str] = "deletion+insertion/rise"
    source: ClassVar[str] = "Petsiuk et al., RISE, BMVC 2018"

    def measure(
        self,
        encode: Encode,
        classes: Classes,
        images: Tensor,
        maps: Tensor,
        *,
        batch: int = 32,
        clock: Clock | None = None,
    ) -> Columns:
        """Columns of B * P pairs; arguments as for `curves`."""
        plan: dict[Mode, tuple[Sequence[float], float | Tensor]] = {
            "deletion": (self.fractions(), 0.0),
            "insertion": (self.fractions(), blur(images, self.size, self.sigma)),
        }
        return self.columns(curves(encode, classes.probability, images, maps, plan, batch=batch, clock=clock))


@dataclass(frozen=True)
class CurvesCosine(Curves):
    """`deletion/cosine` and `insertion/cosine`: for pairs without classes; both to and from the mean colour (zeros).

    steps: of equal numbers of pixels.
    """

    name: ClassVar[str] = "deletion+insertion/cosine"
    source: ClassVar[str] = "RISE's curves with the cosine as score"

    def measure(
        self,
        encode: Encode,
        texts: Tensor,
        images: Tensor,
        maps: Tensor,
        *,
        batch: int = 32,
        clock: Clock | None = None,
    ) -> Columns:
        """Columns of B * P pairs for unit text embeddings (P, E) or (B, P, E); arguments as for `curves`."""
        plan: dict[Mode, tuple[Sequence[float], float]] = {
            "deletion": (self.fractions(), 0.0),
            "insertion": (self.fractions(), 0.0),
        }
        return self.columns(curves(encode, cosine(texts), images, maps, plan, batch=batch, clock=clock))


@dataclass(frozen=True)
class CurvesGradEclip(Protocol):
    """`deletion/grad_eclip` and `insertion/grad_eclip`: classification accuracy while half of the pixels go.

    The image is masked at its own size, and every masked image goes through the model's own preprocessing. steps: of
    one pixel in 2 * steps each (at least one pixel); scored every `every` of them and once whole. Deletion fills with
    uniform random colours (theirs are not seeded, ours are: seed), insertion starts from black. The areas are
    trapezoids over equal steps, since no area is in the published code.
    """

    steps: int = 100
    every: int = 10
    seed: int = 0

    name: ClassVar[str] = "deletion+insertion/grad_eclip"
    source: ClassVar[str] = "Zhao et al., Grad-ECLIP, ICML 2024, and their evaluation scripts"
    figures: ClassVar[Mapping[str, str]] = {
        "deletion top-1": "lower",
        "deletion top-5": "lower",
        "insertion top-1": "higher",
        "insertion top-5": "higher",
    }

    def measure(
        self,
        encode: Encode,
        classes: Classes,
        pictures: Sequence[Any],
        maps: Sequence[Tensor],
        spec: InputSpec,
        *,
        first: int = 0,
        batch: int = 32,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        clock: Clock | None = None,
    ) -> Columns:
        """Columns of B * P pairs, image by image; `classes.target` (B * P,) is the ground truth, or the prediction.

        pictures: B files or PIL images. maps: B tensors (P, H, W) on each picture's own pixels. first: the number of
        the first picture in the data set, which its random colours depend on. dtype, device: of what `encode` takes.

        Raises InputError for maps of another size than their picture.
        """
        clock = clock or Clock()
        started = time.perf_counter()
        waiting: list[Tensor] = []
        owners: list[int] = []
        hits: list[Tensor] = []

        def flush() -> None:
            x = normalize(torch.stack(waiting), spec, dtype, device)
            z = clock.run(encode, x)
            hits.append(classes.hit(z, torch.tensor(owners, device=z.device)).cpu())
            waiting.clear()
            owners.clear()

        pair = 0
        for number, (source, heat) in enumerate(zip(pictures, maps, strict=True)):
            for pixels, prompt in self._masked(source, heat, first + number):
                waiting.append(prepare(pixels, spec)[0])
                owners.append(pair + prompt)
                if len(waiting) == batch:
                    flush()
            pair += len(heat)
        if waiting:
            flush()
        points = self.steps // self.every + 1
        found = torch.cat(hits).double().view(pair, 2, points - 1, 2)
        clean, modes = self._clean(encode, classes, pictures, maps, spec, dtype, device, clock), {}
        modes["deletion"] = torch.cat((clean[:, None], found[:, 0]), dim=1)
        modes["insertion"] = torch.cat((found[:, 1], clean[:, None]), dim=1)
        columns: Columns = {}
        for mode, curve in modes.items():
            for k, kind in enumerate(("top-1", "top-5")):
                columns[f"{mode} {kind}"] = area(curve[..., k], [i / (points - 1) for i in range(points)])
                for i, point in enumerate(curve[..., k].unbind(1)):
                    columns[f"{mode} {kind} {i:03d}"] = point
        clock.total += time.perf_counter() - started
        return columns

    def _masked(self, source: Any, heat: Tensor, number: int) -> Iterator[tuple[Image.Image, int]]:
        """The masked pictures of one image, prompt by prompt, those of deletion first."""
        picture = read_image(source)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
        count = picture.width * picture.height
        if tuple(heat.shape[1:]) != tuple(pixels.shape[2:]):
            raise InputError(
                f"maps of a picture of {picture.height} x {picture.width} pixels must have its size, "
                f"not {tuple(heat.shape[1:])}: see Attribution.resize."
            )
        once = max(1, count // (2 * self.steps))
        inside = [min(once * i, count) / count for i in range(self.every, self.steps + 1, self.every)]
        ranks = rank_map(heat[None].cpu())
        for prompt in range(len(heat)):
            rows = ranks[:, prompt : prompt + 1]
            deleted = mask_sequence(pixels, rows, inside, "deletion", Noise(self.seed, number))
            inserted = mask_sequence(pixels, rows, inside, "insertion", 0.0)
            for masked in (*deleted, *inserted):
                values = masked.mul(255).round_().to(torch.uint8).permute(1, 2, 0).numpy()
                yield Image.fromarray(np.ascontiguousarray(values)), prompt

    def _clean(
        self,
        encode: Encode,
        classes: Classes,
        pictures: Sequence[Any],
        maps: Sequence[Tensor],
        spec: InputSpec,
        dtype: torch.dtype,
        device: torch.device | str,
        clock: Clock,
    ) -> Tensor:
        """Hits of the whole images, once an image: (B * P, 2)."""
        rows = []
        for source in pictures:
            x = normalize(prepare(source, spec)[0][None], spec, dtype, device)
            rows.append(clock.run(encode, x))
        prompts = torch.tensor([len(heat) for heat in maps])
        z = torch.cat(rows).repeat_interleave(prompts.to(rows[0].device), 0)
        return classes.hit(z, torch.arange(len(z), device=z.device)).double().cpu()


@dataclass(frozen=True)
class Confidence(Protocol):
    """`confidence/m2ib` and `confidence/gradcam++`: what is left of the score when the image is multiplied by its map.

    drop: "absolute" (100 mean max(0, c - c')) or "relative" (100 mean max(0, c - c') / c, where c > 0). The map is
    min-maxed and multiplies the normalised image, so that zero is the mean colour.
    """

    drop: Literal["absolute", "relative"] = "absolute"

    name: ClassVar[str] = "confidence"
    source: ClassVar[str] = "Wang et al., M2IB, NeurIPS 2023; Chattopadhay et al., Grad-CAM++, WACV 2018"
    figures: ClassVar[Mapping[str, str]] = {"drop": "lower", "increase": "higher"}

    def measure(
        self,
        encode: Encode,
        texts: Tensor,
        images: Tensor,
        maps: Tensor,
        *,
        batch: int = 32,
        clock: Clock | None = None,
    ) -> Columns:
        """Columns of B * P pairs: `drop` and `increase`, in percent; arguments as for `CurvesCosine`."""
        return self.columns(*self.scores(encode, texts, images, maps, batch=batch, clock=clock))

    def scores(
        self,
        encode: Encode,
        texts: Tensor,
        images: Tensor,
        maps: Tensor,
        *,
        batch: int = 32,
        clock: Clock | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The scores (B * P,) of the images and of the images times their maps, whatever `drop` makes of them."""
        clock = clock or Clock()
        started = time.perf_counter()
        b, p = maps.shape[:2]
        weights = on_pixels(maps, (images.shape[2], images.shape[3])).flatten(-2)
        weights = minmax(weights, constant=0.0).unflatten(-1, images.shape[2:]).flatten(0, 1).to(images.dtype)
        score = cosine(texts)
        pairs = torch.arange(b * p, device=images.device)

        def encoded(x: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
            return torch.cat([clock.run(encode, x(part)) for part in rows.split(batch)])

        clean = encoded(lambda rows: images[rows], torch.arange(b, device=images.device)).repeat_interleave(p, 0)
        masked = encoded(lambda rows: images[rows // p] * weights[rows][:, None], pairs)
        found = score(clean, pairs), score(masked, pairs)
        clock.total += time.perf_counter() - started
        return found

    def columns(self, before: Tensor, after: Tensor) -> Columns:
        """`drop` and `increase`, in percent, of scores (N,) before and after masking."""
        c, left = before.double().cpu(), after.double().cpu()
        lost = (c - left).clamp(min=0)
        if self.drop == "relative":
            lost = torch.where(c > 0, lost / c, torch.nan)
        return {"drop": 100 * lost, "increase": 100 * (left > c).double()}


def _now(x: Tensor) -> float:
    """The time, when what was asked of the device of x is done."""
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return time.perf_counter()
