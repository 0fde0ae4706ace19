"""Train the demo model from nothing on rendered scenes, and write clipfast/models/demo.safetensors.

    python scripts/train_demo.py --out runs/demo                 # starts, or goes on from the last checkpoint
    python scripts/train_demo.py --out runs/demo --export-only   # figures and weights of the last checkpoint

The recipe and what was tried are in docs/demo-model.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import clipfast
from clipfast.data.scenes import COLOURABLE, Scene, Scenes, names, render
from clipfast.models.demo import MEAN, STD, WEIGHTS, WORDS, DemoTokenizer, build_demo

NAMES = names()
INDEX = {name: i for i, name in enumerate(NAMES)}
TOKENIZER = DemoTokenizer()
SLOTS = 5  # up to four objects and a written word
SEEN = 0.8  # how sure the name loss wants to be of what is in plain sight; stronger evidence may be surer
VIEW_WEIGHTS = torch.tensor([1.5, 1.0, 0.75, 0.75, 1.0, 0.75, 0.75])
TRAINING_SEEDS = 1 << 50  # benchmarks count from (seed << 32), far below
PROMPTS = (
    "{}", "a {}", "a {}", "the {}", "a photo of a {}", "a photo of a {}", "a photo of a {}", "a picture of a {}",
    "an image of a {}", "there is a {}", "a scene with a {}", "a drawing of a {}", "a photo of the {}",
    "here is a {}",
)  # fmt: skip


@dataclass
class Batch:
    """Scenes as tensors.

    images (B, 3, 96, 96) uint8; cover (B, 5, 144): the share of each slot's visible pixels in each patch; labels
    (B, 5), -1 where no slot is; written (B, 5): 1 where a written word competes with things; texts (2 B, 32):
    captions, then foils.
    """

    images: Tensor
    cover: Tensor
    labels: Tensor
    written: Tensor
    texts: Tensor


def training_scene(index: int, pages: float, words: float, coloured: float) -> Scene:
    """Scene `index` of the training; shares of pages of words, scenes with one word, and things of seven colours."""
    rng = random.Random(index)
    seed = TRAINING_SEEDS + index
    kind = rng.random()
    if kind < pages:
        return render(seed, objects=0, word=rng.sample(NAMES, rng.randint(2, SLOTS)))
    if kind < pages + words:
        return render(seed, objects=rng.choice((0, 1, 1, 2)), word=True)
    only = list(COLOURABLE) if kind < pages + words + coloured else None
    return render(seed, objects=rng.choices((0, 1, 2, 3, 4), (5, 32, 28, 25, 10))[0], only=only)


class TrainingScenes(Dataset):
    def __init__(self, first: int, last: int, shares: tuple[float, float, float]):
        self.first, self.last, self.shares = first, last, shares

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> Scene:
        return training_scene(self.first + index, *self.shares)


def collate(scenes: list[Scene]) -> Batch:
    cover = torch.zeros(len(scenes), SLOTS, 144)
    labels = torch.full((len(scenes), SLOTS), -1)
    written = torch.zeros(len(scenes), SLOTS)
    for b, scene in enumerate(scenes):
        written[b, len(scene.objects) :] = bool(scene.objects)
        for s, thing in enumerate((*scene.objects, *scene.written)):
            counts = thing.mask.reshape(12, 8, 12, 8).sum((1, 3)).reshape(144)
            cover[b, s] = torch.from_numpy(counts / counts.sum())
            labels[b, s] = INDEX[thing.name]
    images = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2).contiguous()
    texts = TOKENIZER([scene.caption for scene in scenes] + [scene.foil for scene in scenes])
    return Batch(images, cover, labels, written, texts)


def normalise(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


# The towers, run so that tokens can be left out.


def trunk(model: CLIP, images: Tensor, keep: Tensor | None) -> Tensor:
    """Input of the last block (B, 1 + n, D); keep (B, n) are the patches that take part, None for all."""
    visual = model.visual
    x = visual.conv1(images).flatten(2).transpose(1, 2) + visual.positional_embedding[1:]
    if keep is not None:
        x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
    first = (visual.class_embedding + visual.positional_embedding[0]).expand(x.shape[0], 1, -1)
    x = visual.ln_pre(torch.cat([first, x], 1))
    for block in visual.transformer.resblocks[:-1]:
        x = block(x)
    return x


@dataclass
class Site:
    """The last attention, heads apart: q (B, h, 1, d), k and v (B, h, N, d), the class token's residual (B, 1, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    residual: Tensor


def site(model: CLIP, x: Tensor) -> Site:
    block = model.visual.transformer.resblocks[-1]
    heads = block.attn.num_heads
    normed = block.ln_1(x)
    width = x.shape[-1]
    weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
    q = F.linear(normed[:, :1], weight[:width], bias[:width])
    k, v = F.linear(normed, weight[width:], bias[width:]).chunk(2, -1)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return Site(q, k, v, x[:, :1])


def attend(at: Site, visible: Tensor | None) -> Tensor:
    """Attention output of the class token (B, M, D) when it sees only the tokens of `visible` (B, M, N) bool."""
    scores = (at.q @ at.k.transpose(-1, -2)) * at.q.shape[-1] ** -0.5
    if visible is not None:
        scores = scores.expand(-1, -1, visible.shape[1], -1).masked_fill(~visible[:, None], float("-inf"))
    return (scores.softmax(-1) @ at.v).transpose(1, 2).flatten(2)


def tail(model: CLIP, residual: Tensor, o: Tensor) -> Tensor:
    """Normalised embeddings (B, M, E) from the class token's attention output (B, M, D)."""
    block = model.visual.transformer.resblocks[-1]
    x = residual + block.attn.out_proj(o)
    x = x + block.mlp(block.ln_2(x))
    return F.normalize(model.visual.ln_post(x) @ model.visual.proj, dim=-1)


def embed_texts(model: CLIP, ids: Tensor) -> Tensor:
    """Normalised text embeddings, in two runs, short texts and long ones, so that less padding is computed."""
    ends = ids.argmax(-1)
    order = ends.argsort()
    parts = []
    for rows in order.chunk(2 if len(order) > 64 else 1):
        length = int(ends[rows].max()) + 1
        x = model.token_embedding(ids[rows, :length]) + model.positional_embedding[:length]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
        parts.append(x[torch.arange(len(rows)), ends[rows]] @ model.text_projection)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return F.normalize(torch.cat(parts)[back], dim=-1)


# What the class token may see, and what it should say then.


def views(cover: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Visible patches (B, 5, n) bool for five views of each image.

    0: everything. 1: some objects are left out. 2: only background, or a part of it. 3: a random half or quarter, in a
    rectangle or scattered. 4: one object with a little background.
    """

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    batch, slots, n = cover.shape
    touched = cover > 0
    used = labels >= 0
    everything = torch.ones(batch, n, dtype=torch.bool)

    dropped = (rand(batch, slots) < 0.5) & used
    some = ~(touched & dropped[..., None]).any(1)

    background = ~touched.any(1)
    background &= rand(batch, n) < torch.where(rand(batch, 1) < 0.5, 1.0, 0.4)

    side = 12
    centre, half = rand(batch, 2, 1) * side, 2 + rand(batch, 2, 1) * 4
    inside = (torch.arange(side) + 0.5 - centre).abs() < half
    rectangle = (inside[:, 0, :, None] & inside[:, 1, None, :]).flatten(1)
    scattered = rand(batch, n) < 0.25
    return_part = torch.where(rand(batch, 1) < 0.7, rectangle, scattered) if n == side * side else scattered

    chosen = (rand(batch, slots) * used).argmax(1)
    own = touched[torch.arange(batch), chosen]
    others = (touched & (torch.arange(slots) != chosen[:, None])[..., None]).any(1)
    one = own | ((rand(batch, n) < 0.3) & ~others)
    return torch.stack([everything, some, background, return_part, one], 1)


def targets(cover: Tensor, labels: Tensor, written: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """What to say of each view: (B, M, 64) targets, and weights, 0 where too little of an object is seen to tell."""
    shown = torch.einsum("bsn,bmn->bms", cover, visible.float())
    whole = cover.sum(-1).clamp_min(1e-6)[:, None]
    share = shown / whole
    used = (labels >= 0)[:, None]
    value = torch.where(share > 0.4, SEEN * (1 - 0.4 * written[:, None]), 0.0) * used
    unsure = ((share > 0.1) & (share <= 0.4) & used).float()
    index = labels.clamp_min(0)[:, None].expand_as(value)
    shape = (*value.shape[:2], len(NAMES))
    target = torch.zeros(shape).scatter_reduce(-1, index, value, "amax")
    doubt = torch.zeros(shape).scatter_reduce(-1, index, unsure, "amax")
    return target, 1 - doubt * (target == 0)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are orthogonalised before each step (Jordan et al., 2024), for the weights inside blocks.

    A fused projection of queries, keys and values counts as three matrices.
    """

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @staticmethod
    def orthogonal(g: Tensor) -> Tensor:
        """Five Newton-Schulz steps of the quintic towards U V^T, for (k, rows, columns)."""
        tall = g.shape[-2] > g.shape[-1]
        x = g.mT if tall else g
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return x.mT if tall else x

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])
                parts = 3 if p.shape[0] == 3 * p.shape[1] else 1
                update = self.orthogonal(update.unflatten(0, (parts, -1)))
                scale = max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.flatten(0, 1), alpha=-group["lr"] * scale)


# Training.


class Training:
    """Model, the two scales of the name loss, optimisers and the position in the data, all of which a checkpoint
    holds."""

    def __init__(self, args: argparse.Namespace):
        torch.manual_seed(args.seed)
        self.args = args
        self.model, _ = build_demo()
        self.name_scale = torch.nn.Parameter(torch.tensor(10.0).log())
        self.name_bias = torch.nn.Parameter(torch.tensor(-4.0))
        blocks = [*self.model.visual.transformer.parameters(), *self.model.transformer.parameters()]
        matrices = [p for p in blocks if p.ndim == 2]
        inside = {id(p) for p in matrices}
        rest = [p for p in (*self.model.parameters(), self.name_scale, self.name_bias) if id(p) not in inside]
        self.optimisers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=args.muon_lr, weight_decay=args.weight_decay),
            torch.optim.AdamW(
                [
                    {"params": [p for p in rest if p.ndim >= 2], "weight_decay": 0.05},
                    {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
                ],
                lr=args.lr,
                betas=(0.9, 0.98),
            ),
        ]
        self.peak = [[group["lr"] for group in optimiser.param_groups] for optimiser in self.optimisers]
        self.average = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.step = 0
        self.steps = args.images // args.batch
        self.seconds = 0.0

    def schedule(self) -> float:
        """Warm-up over 2 %, flat, then linear to zero over the last 40 %."""
        done = self.step / self.steps
        return min(1.0, (self.step + 1) / (0.02 * self.steps), max(0.0, (1 - done) / 0.4))

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "scales": (self.name_scale.detach(), self.name_bias.detach()),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        with torch.no_grad():
            self.name_scale.copy_(state["scales"][0])
            self.name_bias.copy_(state["scales"][1])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(self.step)
        picker = random.Random(self.step)
        images = normalise(batch.images)
        cover = batch.cover
        full = self.step >= (1 - self.args.full_tokens) * self.steps
        keep = None
        visible = views(cover, batch.labels, generator)
        if not full:
            # Patches of things are ten times as likely to stay as background (exponential races).
            race = -torch.rand(cover.shape[0], 144, generator=generator).log() / (1 + 9 * (cover > 0).any(1))
            keep = race.topk(self.args.keep, -1, largest=False).indices
            visible = visible.gather(-1, keep[:, None].expand(-1, visible.shape[1], -1))
            cover = cover.gather(-1, keep[:, None].expand(-1, cover.shape[1], -1))
        x = trunk(self.model, images, keep)
        at = site(self.model, x)
        with_class = F.pad(visible, (1, 0), value=True)
        o = attend(at, with_class)
        strength = torch.rand(len(o), 2, 1, generator=generator) / SEEN
        towards = torch.stack([torch.zeros_like(o[:, 2]), o[:, 2]], 1)
        embeddings = tail(self.model, at.residual, torch.cat([o, towards + strength * (o[:, :1] - towards)], 1))

        prompts = [picker.choice(PROMPTS).format(name) for name in NAMES]
        texts = embed_texts(self.model, torch.cat([TOKENIZER(prompts), batch.texts]))
        name_texts, captions = texts[: len(NAMES)], texts[len(NAMES) :]

        target, weight = targets(cover, batch.labels, batch.written, visible)
        target = torch.cat([target, target[:, :1] * strength], 1)
        weight = torch.cat([weight, weight[:, :1], weight[:, :1]], 1)
        logits = self.name_scale.exp() * embeddings @ name_texts.T + self.name_bias
        told = F.binary_cross_entropy_with_logits(logits, target, weight=weight, reduction="none").sum(-1).mean(0)
        name_loss = (told * VIEW_WEIGHTS).sum() / 5

        scale = self.model.logit_scale.exp().clamp_max(100)
        pairs = scale * embeddings[:, 0] @ captions.T
        truth = torch.arange(len(pairs))
        own = len(pairs)
        contrast = (F.cross_entropy(pairs, truth) + F.cross_entropy(pairs[:, :own].T, truth)) / 2
        figures = dict(
            zip(("names", "views", "captions"), torch.stack([told[0], told[1:].mean(), contrast]).tolist(), strict=True)
        )
        return name_loss + self.args.caption_weight * contrast, figures

    def advance(self, batch: Batch) -> dict[str, float]:
        factor = self.schedule()
        for optimiser, peaks in zip(self.optimisers, self.peak, strict=True):
            for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            optimiser.zero_grad(set_to_none=True)
        loss, figures = self.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        self.step += 1
        decay = min(0.995, self.step / (self.step + 10))
        with torch.no_grad():
            for key, value in self.model.state_dict().items():
                self.average[key].lerp_(value, 1 - decay)
        return figures

    def averaged(self) -> CLIP:
        model, _ = build_demo()
        model.load_state_dict(self.average)
        return model.eval()


# Figures.


def mask_clip(model: CLIP, images: Tensor) -> Tensor:
    """Patches in the joint space by the last block's value path (B, n, E), normalised (MaskCLIP)."""
    block = model.visual.transformer.resblocks[-1]
    values = site(model, trunk(model, images, None)).v[:, :, 1:].transpose(1, 2).flatten(2)
    return F.normalize(model.visual.ln_post(block.attn.out_proj(values)) @ model.visual.proj, dim=-1)


@torch.no_grad()
def maps(model: CLIP, scenes: list[Scene], texts: Tensor) -> dict[str, Tensor]:
    """Maps (B, P, 12, 12) of every scene and text: Grad-ECLIP, its two factors alone, and MaskCLIP."""
    features = clipfast.Explainer(clipfast.load(model, tokenizer=TOKENIZER)).features([scene.image for scene in scenes])
    spatial = features.weights[:, None].expand(-1, len(texts), -1).unflatten(-1, (12, 12))
    images = normalise(collate(scenes).images)
    return {
        "grad_eclip": features.maps(texts).maps,
        "without spatial weight": (features.values @ texts.T).relu().mT.unflatten(-1, (12, 12)),
        "spatial weight alone": spatial,
        "mask_clip": (mask_clip(model, images) @ texts.T).mT.unflatten(-1, (12, 12)),
    }


def average_precision(scores: np.ndarray, mask: np.ndarray) -> float:
    hits = mask.ravel()[np.argsort(-scores.ravel(), kind="stable")]
    precision = np.cumsum(hits) / np.arange(1, hits.size + 1)
    return float(precision[hits].mean())


def evaluate(model: CLIP, n: int, seed: int = 1) -> dict[str, float]:
    """Zero-shot top-1 on single-object scenes, pointing game and AP for scenes of 1, 2, 3 objects, foils, and the
    written word.

    n scenes of each kind, of a seed no training scene has.
    """
    model.eval()
    figures: dict[str, float] = {}
    with torch.no_grad():
        prompts = embed_texts(model, TOKENIZER([f"a photo of a {name}" for name in NAMES]))

        def embed(scenes: Scenes) -> Tensor:
            return torch.cat(
                [F.normalize(model.encode_image(normalise(collate(s).images)), dim=-1) for s in chunks(scenes)]
            )

        singles = Scenes(n, seed, objects=1)
        truth = torch.tensor([INDEX[scene.names[0]] for scene in singles])
        figures["top1"] = float(((embed(singles) @ prompts.T).argmax(-1) == truth).float().mean())

        mixed = Scenes(n, seed + 1, objects=(1, 3))
        true, false = (
            embed_texts(model, TOKENIZER([getattr(scene, kind) for scene in mixed])) for kind in ("caption", "foil")
        )
        pictures = embed(mixed)
        figures["caption_beats_foil"] = float(((pictures * true).sum(-1) > (pictures * false).sum(-1)).float().mean())

        plain, typed = Scenes(n, seed + 2, objects=1), Scenes(n, seed + 2, objects=1, word=True)
        pairs = [(a, b) for a, b in zip(plain, typed, strict=True) if b.word not in (None, a.names[0])]
        words = torch.tensor([INDEX[b.word] for _, b in pairs])
        before, after = (
            F.normalize(model.encode_image(normalise(collate([pair[i] for pair in pairs]).images)), dim=-1) @ prompts.T
            for i in (0, 1)
        )
        row = torch.arange(len(words))
        rise = after - before
        figures["word_raises_its_name"] = float((rise[row, words] > 0).float().mean())
        figures["word_raises_it_most"] = float((rise.argmax(-1) == words).float().mean())
        figures["word_takes_top1"] = float((after.argmax(-1) == words).float().mean())

    hits: dict[str, dict[int, list[float]]] = {}
    precisions: dict[str, list[float]] = {}
    for count in (1, 2, 3):
        for scenes in chunks(Scenes(n, seed + 10 + count, objects=count)):
            asked = [(b, name) for b, scene in enumerate(scenes) for name in scene.names]
            found = maps(model, scenes, prompts)
            for method, values in found.items():
                chosen = torch.stack([values[b, INDEX[name]] for b, name in asked])
                pixels = F.interpolate(chosen[:, None], size=(96, 96), mode="bilinear")[:, 0].numpy()
                for (b, name), heat in zip(asked, pixels, strict=True):
                    mask = scenes[b].mask(name)
                    hit = bool(mask.flat[heat.argmax()]) and bool(heat.max() > heat.min())
                    hits.setdefault(method, {}).setdefault(count, []).append(hit)
                    precisions.setdefault(method, []).append(average_precision(heat, mask))
    for method, by_count in hits.items():
        figures[f"{method}: pointing"] = float(np.mean([hit for found in by_count.values() for hit in found]))
        for count, found in by_count.items():
            figures[f"{method}: pointing {count}"] = float(np.mean(found))
        figures[f"{method}: AP"] = float(np.mean(precisions[method]))
    return figures


def chunks(scenes: Scenes, size: int = 64) -> Iterator[list[Scene]]:
    for start in range(0, len(scenes), size):
        yield scenes[start : start + size]


def export(model: CLIP, path: Path, figures: dict[str, float], images: int) -> None:
    metadata = {
        "words": json.dumps(WORDS),
        "figures": json.dumps({key: round(value, 4) for key, value in figures.items()}),
        "images_seen": str(images),
        "licence": "Apache-2.0",
    }
    weights = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    save_file(weights, path.with_suffix(".part"), metadata)
    os.replace(path.with_suffix(".part"), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the checkpoint and the log")
    parser.add_argument("--images", type=int, default=400_000, help="scenes to see in all")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3, help="AdamW, for embeddings, norms and projections")
    parser.add_argument("--muon-lr", type=float, default=0.02, help="Muon, for the matrices inside blocks")
    parser.add_argument("--weight-decay", type=float, default=0.02)
    parser.add_argument("--keep", type=int, default=80, help="patches kept of 144 until the last phase")
    parser.add_argument("--full-tokens", type=float, default=0.25, help="share of training at the end with every patch")
    parser.add_argument("--pages", type=float, default=0.0, help="share of scenes that are pages of words")
    parser.add_argument("--words", type=float, default=0.14, help="share of scenes with one written word")
    parser.add_argument("--coloured", type=float, default=0.15, help="share of scenes of things in seven colours")
    parser.add_argument("--caption-weight", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--evaluate-every", type=int, default=500, help="steps")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where the finished model goes")
    parser.add_argument("--export-only", action="store_true")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "checkpoint.pt"
    training = Training(args)
    if checkpoint.exists():
        training.load(checkpoint)
        print(f"going on from step {training.step}", flush=True)

    if not args.export_only:
        remaining = TrainingScenes(
            training.step * args.batch, training.steps * args.batch, (args.pages, args.words, args.coloured)
        )
        loader = DataLoader(remaining, args.batch, num_workers=1, collate_fn=collate, prefetch_factor=6, drop_last=True)
        begun, first, means = time.monotonic(), training.step, {}
        for batch in loader:
            training.model.train()
            moment = time.monotonic()
            figures = training.advance(batch)
            training.seconds += time.monotonic() - moment
            means = {key: 0.97 * means.get(key, value) + 0.03 * value for key, value in figures.items()}
            if training.step % 25 == 0:
                rate = (training.step - first) / (time.monotonic() - begun)
                eta = (training.steps - training.step) / rate / 60
                told = "  ".join(f"{key} {value:.3f}" for key, value in means.items())
                print(
                    f"{training.step}/{training.steps}  {rate * args.batch:.0f} scenes/s  {eta:.0f} min left  {told}",
                    flush=True,
                )
            if training.step % 50 == 0:
                training.save(checkpoint)
            if training.step % args.evaluate_every == 0 and training.step < training.steps:
                report(evaluate(training.averaged(), 128))
        training.save(checkpoint)

    figures = evaluate(training.averaged(), 500)
    report(figures)
    export(training.averaged(), args.weights, figures, training.step * args.batch)
    print(f"{training.step * args.batch} scenes in {training.seconds / 60:.0f} minutes of steps")
    print(args.weights)


def report(figures: dict[str, float]) -> None:
    for key, value in figures.items():
        print(f"    {key:40s} {value:.3f}", flush=True)


if __name__ == "__main__":
    main()
