"""AFT and FARE: the image tower learns to embed perturbed images as the frozen one embeds the clean ones.

    min_theta E_x max_delta 1/2 |E_z f_theta(x + z + delta) - f_0(x)|^2 - h(delta),  z ~ N(0, sigma^2)

AFT: Gong et al., Boosting the Visual Interpretability of CLIP via Adversarial Fine-Tuning, ICLR 2025. FARE:
Schlarmann et al., Robust CLIP, ICML 2024. Images are all they need. `recipe` "paper" is what the paper writes,
"released" what its code computes; docs/finetuning.md has the differences.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.engine.base import Item, Source
from clipfast.engine.texts import Prompts
from clipfast.errors import InputError, ModelError, nearest
from clipfast.finetune.adversary import Adversary, Encode, perturb
from clipfast.finetune.checkpoint import Finetuned
from clipfast.finetune.encode import pixel_encoder
from clipfast.finetune.log import Follow
from clipfast.finetune.objective import Batch, Objective, Step, copied, frozen
from clipfast.finetune.parallel import own_device
from clipfast.finetune.settings import Settings
from clipfast.finetune.train import Trainer
from clipfast.models.load import load
from clipfast.models.model import Model

RECIPES = ("paper", "released")
BATCH_NORM = ("frozen", "batch")


class Adversarial(Objective):
    """Embeddings of perturbed images are drawn to those of the clean ones by the frozen tower, or of their captions.

    adversary: the inner problem. normalize: whether embeddings are divided by their lengths first. captions: a column
    with texts ("caption" for those beside the images): the supervised form, equation 1 of AFT's paper, in which the
    target is the text's embedding and the loss 1 - cosine; several captions of an image are drawn from. samples: of the
    noise in the outer problem, whose embeddings are averaged; 0 for none, as released. batch_norm: "frozen", the
    statistics of a ResNet stay those of the frozen tower, in both problems; "batch", as released: the outer problem
    takes those of each batch and moves the stored ones.

    Raises InputError for values that cannot be.
    """

    counts = ("nan_gradients",)

    def __init__(
        self,
        name: str,
        adversary: Adversary,
        *,
        normalize: bool,
        captions: str | None = None,
        samples: int = 1,
        batch_norm: Literal["frozen", "batch"] = "frozen",
    ):
        if samples < 0:
            raise InputError(f"samples={samples} must be at least 0.")
        if batch_norm not in BATCH_NORM:
            raise InputError(f"there is no batch_norm {batch_norm!r}: {nearest(batch_norm, BATCH_NORM)}")
        self.name = name  # type: ignore[misc]
        self.adversary, self.normalize, self.samples = adversary, normalize, samples
        self.batch_norm, self.moves_statistics = batch_norm, batch_norm == "batch"
        self.captions = None if captions is None else Prompts(column=captions)
        self.columns = () if captions is None else (captions,)

    def config(self) -> dict[str, Any]:
        return {
            "adversary": asdict(self.adversary),
            "normalize": self.normalize,
            "captions": self.columns[0] if self.columns else None,
            "samples": self.samples,
            "batch_norm": self.batch_norm,
        }

    def prepare(self, model: Model) -> nn.Module:
        visual = getattr(model.module, "visual", None)
        if not isinstance(visual, nn.Module):
            raise ModelError(f"{model.name} has no image tower called visual.")
        trained = copied(visual)
        self._model, self._frozen = model, copied(visual).requires_grad_(False)
        like = next(trained.parameters())
        self._mean, self._std = (like.new_tensor(v).view(3, 1, 1) for v in (model.spec.mean, model.spec.std))
        return trained

    def read(self, item: Item) -> list[str] | None:
        return None if self.captions is None else self.captions.own(item)

    def embed(self, tower: nn.Module, pixels: Tensor) -> Tensor:
        """Pixels (b, 3, H, W) in [0, 1] -> embeddings (b, E), float32 or as wide as the weights."""
        found = tower((pixels - self._mean) / self._std)
        pooled = (found[0] if isinstance(found, tuple) else found).to(self._mean.dtype)
        return F.normalize(pooled, dim=-1) if self.normalize else pooled

    def _pixels(self, trained: nn.Module) -> Encode:
        """`embed` for gradients of pixels alone: by a tower on the same weights, where clipfast reads one."""
        with suppress(ModelError):
            return pixel_encoder(trained, self._mean, self._std, normalize=self.normalize)
        return partial(self.embed, trained)

    def step(self, trained: nn.Module, batch: Batch) -> Step:
        x = batch.images.to(self._mean.dtype)
        with torch.no_grad():
            clean = self.embed(self._frozen, x)
            target = clean if self.captions is None else self._texts(batch)
        loss = partial(self._loss, target=target)
        trained.eval()
        with frozen(trained):
            found = perturb(self._pixels(trained), loss, x, self.adversary, batch.generator)
        terms = {"objective": found.objective.mean(), "delta": found.delta.abs().mean()}
        if batch.measure:
            with torch.no_grad():
                terms["clean_cosine"] = F.cosine_similarity(self.embed(trained, x), clean).mean()
        # It stays so for the backward pass, in which blocks may run again.
        trained.train(self.moves_statistics)
        moved = self._outer(trained, x + found.delta, batch.generator)
        terms["adversarial_cosine"] = F.cosine_similarity(moved.detach(), clean).mean()
        return Step(loss(moved).mean(), terms, {"nan_gradients": found.nan_gradients})

    def _outer(self, trained: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
        """E_z of the embedding, over the samples of the noise."""
        if not self.samples or not self.adversary.sigma:
            return self.embed(trained, x)
        noise = torch.empty_like(x)
        drawn = [
            self.embed(trained, x + noise.normal_(0, self.adversary.sigma, generator=generator))
            for _ in range(self.samples)
        ]
        return torch.stack(drawn).mean(0)

    def _loss(self, embeddings: Tensor, target: Tensor) -> Tensor:
        """Of each image: (b,)."""
        if self.captions is None:
            return self.adversary.distance(embeddings, target)
        return 1 - F.cosine_similarity(embeddings, target)

    def _texts(self, batch: Batch) -> Tensor:
        """One caption's unit embedding for each image (b, E)."""
        chosen = torch.rand(len(batch.extras), generator=batch.generator, device=batch.images.device).tolist()
        texts = [own[int(share * len(own))] for own, share in zip(batch.extras, chosen, strict=True)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "a text of .* tokens was cut")
            return self._model.encode_texts(texts).to(self._mean.dtype)


def aft_objective(
    recipe: Literal["paper", "released"] = "paper",
    *,
    normalize: bool | None = None,
    captions: str | None = None,
    samples: int | None = None,
    batch_norm: Literal["frozen", "batch"] | None = None,
    **adversary: Any,
) -> Adversarial:
    """AFT, as the paper writes it or as its code computes it; adversary: fields of `Adversary` that differ.

    Raises InputError for values that cannot be.
    """
    _check_recipe(recipe)
    released = recipe == "released"
    return Adversarial(
        "aft",
        replace(Adversary.aft(recipe), **adversary),
        normalize=released if normalize is None else normalize,
        captions=captions,
        samples=(0 if released else 1) if samples is None else samples,
        batch_norm=batch_norm or ("batch" if released else "frozen"),
    )


def fare_objective(
    eps: float = 4 / 255,
    *,
    normalize: bool = False,
    captions: str | None = None,
    batch_norm: Literal["frozen", "batch"] = "batch",
    **adversary: Any,
) -> Adversarial:
    """FARE as its code computes it: squared distances of embeddings as they are, in the box |delta| <= eps.

    Raises InputError for values that cannot be.
    """
    return Adversarial(
        "fare",
        replace(Adversary.fare(eps), **adversary),
        normalize=normalize,
        captions=captions,
        samples=0,
        batch_norm=batch_norm,
    )


def betas_of(recipe: str) -> tuple[float, float]:
    """AdamW's betas: those of AFT's paper, or torch's own, which its code and FARE's use."""
    return (0.9, 0.999) if recipe == "released" else (0.9, 0.95)


def aft(
    images: str | Path | Sequence[str] | Source,
    out: str | Path,
    *,
    model: Any = "demo",
    pretrained: str | None = None,
    recipe: Literal["paper", "released"] = "paper",
    settings: Settings | None = None,
    device: str | None = None,
    follow: Follow | None = None,
    source: dict[str, Any] | None = None,
    **objective: Any,
) -> Finetuned:
    """Fine-tune a model's image tower by AFT; the model stays as it is, and the result lies in the folder `out`.

        tuned = clipfast.finetune.aft("photos/", "runs/aft", model="ViT-B-16:openai", settings=Settings(epochs=2))
        clipfast.explain(image, texts, model=tuned.model())

    images: anything that `clipfast run` reads, or "scenes:SEED:COUNT". model, pretrained, device: as for
    `clipfast.load`. recipe: "paper" or "released". settings: by default those of the recipe. follow: is told how it
    goes. source: options of `open_images`. objective: of `aft_objective`: eps, sigma, penalty, normalize, captions ...

    The same call goes on with a run that was stopped, and reads one that is complete.

    Raises InputError, ModelError and OutputError as `Trainer` does.
    """
    chosen = aft_objective(recipe, **objective)
    loaded = load(model, pretrained, device=device or own_device())
    return Trainer(chosen, loaded, images, settings or Settings(betas=betas_of(recipe)), out, **source or {}).run(
        follow
    )


def fare(
    images: str | Path | Sequence[str] | Source,
    out: str | Path,
    *,
    model: Any = "demo",
    pretrained: str | None = None,
    eps: float = 4 / 255,
    settings: Settings | None = None,
    device: str | None = None,
    follow: Follow | None = None,
    source: dict[str, Any] | None = None,
    **objective: Any,
) -> Finetuned:
    """The same by FARE; eps: how far a pixel in [0, 1] may move. objective: of `fare_objective`."""
    chosen = fare_objective(eps, **objective)
    loaded = load(model, pretrained, device=device or own_device())
    return Trainer(chosen, loaded, images, settings or Settings(betas=betas_of("released")), out, **source or {}).run(
        follow
    )


def _check_recipe(recipe: str) -> None:
    if recipe not in RECIPES:
        raise InputError(f"there is no recipe {recipe!r}: {nearest(recipe, RECIPES)}")
