"""Fine-tuning that a model's own explanations guide: regions found by Grad-ECLIP learn the phrases they were found by.

    global   L_g: images against captions, CLIP's symmetric InfoNCE (SigLIP's sigmoid loss where there is a logit bias)
    local    H_p  = Grad-ECLIP's map of the image for phrase p of its caption, detached
             w_pi = minmax_i H_pi / sum_j minmax_j H_pj
             r_p  = sum_i w_pi e_i                     e_i: unit embeddings of patches, by the value path of MaskCLIP
             L_l  = mean_p -log softmax_u(s cos(r_p, t_u))[p]             u: the distinct phrases of the batch
    loss     L_g + weight L_l

Zhao et al., Grad-ECLIP (arXiv 2502.18816), section on fine-tuning, as the reproduction report sums it up (section 4.2);
neither published code. Our reading: regions are told among phrases, not phrases among regions; a phrase that several
images have is one phrase, never its own negative; both losses use the model's logit scale, which learns from both; a
phrase whose map marks nothing is left out.

The maps cost next to nothing: they are made from the same pass of the tower as everything else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from clipfast.engine.base import Item
from clipfast.engine.listing import CAPTION
from clipfast.engine.texts import Prompts
from clipfast.errors import InputError, ModelError, TextError
from clipfast.finetune.objective import Batch, Objective, Step, copied
from clipfast.finetune.phrases import open_phraser
from clipfast.methods.grad_eclip import GradEclip
from clipfast.methods.mask_clip import MaskClip, last_attention, patch_embeddings
from clipfast.models.image import ImageTower
from clipfast.models.model import Model
from clipfast.ops.minmax import minmax

# What CLIP's training holds its logit scale below.
_LARGEST_SCALE = math.log(100)


def global_loss(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The contrastive loss of images and their captions, unit embeddings (B, E) each; scale: what multiplies cosines.

    Without a bias CLIP's, the mean of both directions' cross-entropies (Radford et al., 2021, fig. 3); with one
    SigLIP's, a sigmoid for each pair (Zhai et al., 2023, algorithm 1). Every other caption is a negative.
    """
    logits = scale * images @ texts.T
    own = torch.arange(len(images), device=images.device)
    if bias is not None:
        return _sigmoid_loss(logits + bias, own)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def local_loss(regions: Tensor, phrases: Tensor, own: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The contrastive loss of R unit embeddings of regions (R, E) against the U distinct phrases (U, E).

    own (R,): the number of each region's phrase. scale, bias: as for `global_loss`. Zero for no regions.
    """
    if not len(regions):
        return regions.sum() * 0
    logits = scale * regions @ phrases.T
    return F.cross_entropy(logits, own) if bias is None else _sigmoid_loss(logits + bias, own)


def _sigmoid_loss(logits: Tensor, own: Tensor) -> Tensor:
    signs = 2 * F.one_hot(own, logits.shape[1]).to(logits.dtype) - 1
    return -F.logsigmoid(signs * logits).sum(1).mean()


def pooled_regions(patches: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Unit embeddings (B, P, E) of what maps (B, P, n) mark on patches (B, n, E), and which mark anything (B, P).

    Maps are min-maxed and divided by their sum; a constant one marks nothing and pools to zero. No gradient reaches
    the maps.
    """
    weights = minmax(maps.detach(), constant=0.0)
    total = weights.sum(-1, keepdim=True)
    marked = total[..., 0] > 0
    weights = weights / torch.where(total > 0, total, 1)
    return F.normalize(weights.to(patches.dtype) @ patches, dim=-1), marked


@dataclass(frozen=True)
class Told:
    """What is said of an image: a caption's token ids (T,), its phrases, and theirs (P, T)."""

    caption: Tensor
    phrases: Sequence[str]
    ids: Tensor


class Grounded(Objective):
    """Fine-tuning of a whole CLIP, image and text tower, by the loss above, on images with captions.

    phrases: where they come from: "textblob", "spacy:PIPELINE", "names:FILE", "scenes" (see `open_phraser`), or
        "column:NAME" of the source: a list, or the text of one in JSON; an image may have none.
    weight: of the local loss; at 0 this is ordinary fine-tuning, and no phrase is looked for.
    freeze_text: the image tower learns alone.
    method: Grad-ECLIP with its parameters; the last layer's alone.
    caption: the column with the captions; of several, each step draws one.
    checkpointing: blocks of the image tower keep their inputs alone and run twice.

    Negatives are those of the images that go through the model at once: a micro-batch of one process. The towers run on
    the module's parameters, past its own forward: `Settings`' compile and checkpointing do not reach them, and
    parameters have to be whole in each process (DDP, not FSDP).

    Raises InputError for a weight below 0, and as `open_phraser` does.
    """

    name: ClassVar[str] = "grounded"

    def __init__(
        self,
        phrases: str = "textblob",
        *,
        weight: float = 1.0,
        freeze_text: bool = False,
        method: GradEclip | None = None,
        caption: str = CAPTION,
        checkpointing: bool = False,
    ):
        if not 0 <= weight < math.inf:
            raise InputError(f"weight={weight!r} of the local loss must be at least 0 and finite.")
        self.method = method or GradEclip()
        if self.method.layers not in (None, 1):
            raise InputError(f"layers={self.method.layers} of grad_eclip: a step has the last layer's maps alone.")
        self.weight, self.freeze_text, self.phrases, self.checkpointing = weight, freeze_text, phrases, checkpointing
        kind, _, rest = phrases.partition(":")
        self._column = rest if weight and kind == "column" and rest else None
        self._phraser = None if not weight or self._column else open_phraser(phrases)
        self._captions = Prompts(column=caption)
        self.columns = (caption, *([self._column] if self._column else []))
        self.counts = ("phrases", "unmarked") if weight else ()
        self.prefix = ""
        self._model: Model | None = None

    def config(self) -> dict[str, Any]:
        """The parameters, as JSON."""
        own: dict[str, Any] = {"weight": self.weight, "freeze_text": self.freeze_text, "caption": self.columns[0]}
        if self.weight:
            method = {name: getattr(self.method, name) for name in self.method.parameters()}
            own |= {"phrases": self.phrases, "grad_eclip": method}
        return own

    def prepare(self, model: Model) -> nn.Module:
        """A copy of the whole module, in which what takes no part in embeddings is frozen.

        Raises ModelError for an image tower without patches, no tokenizer, no logit scale, and where embeddings depend
        on weights that clipfast's towers do not differentiate.
        """
        tower, _ = model.towers()
        lacks = MaskClip.why_not(tower) or GradEclip.why_not(tower)
        if lacks is not None:
            raise ModelError(f"regions are pooled from patches, and {model.name} is a model whose image tower {lacks}.")
        if model.tokenizer is None:
            raise ModelError(f"{model.name} was loaded without a tokenizer, which captions need: pass tokenizer=.")
        twin: Any = copied(model.module)
        if not isinstance(getattr(twin, "logit_scale", None), Tensor):
            raise ModelError(f"{model.name} has no 'logit_scale', which a contrastive loss needs.")
        self._model = Model(twin, model.tokenizer, model.spec, model.name)
        image, text = _reached(self._model)
        trains = image if self.freeze_text else image | text
        for name, parameter in twin.named_parameters():
            parameter.requires_grad_(name in trains or name in ("logit_scale", "logit_bias"))
        return twin

    def read(self, item: Item) -> list[Told]:
        """The captions of an image, each with its phrases. Raises TextError where it has none, or unknown words."""
        told = []
        given = self._given(item)
        for caption in self._captions.own(item):
            found = given if self._phraser is None else self._phraser(caption)
            ids = self._tokenize([caption, *found])
            told.append(Told(ids[0], found, ids[1:]))
        return told

    def _tokenize(self, texts: list[str]) -> Tensor:
        assert self._model is not None and self._model.tokenizer is not None, "prepare comes first"
        return self._model.tokenizer(texts)

    def _given(self, item: Item) -> list[str]:
        value = item.columns.get(self._column) if self._column else None
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                value = [value]
        listed = [] if value is None else value
        if not isinstance(listed, list | tuple) or not all(isinstance(one, str) for one in listed):
            raise TextError(f"{item.key} has {str(value)[:40]!r} as its phrases, which is no list of texts.")
        return list(dict.fromkeys(" ".join(one.split()) for one in listed if one.strip()))

    def step(self, trained: nn.Module, batch: Batch) -> Step:
        """Both losses of a batch, whose extras are lists of `Told`. Raises InputError for a sharded module."""
        assert self._model is not None and trained is self._model.module, "the module that prepare gave"
        if isinstance(trained, FSDPModule):
            raise InputError("grounded fine-tuning reads whole weights: train with parallel='ddp'.")
        draws = torch.rand(len(batch.extras), generator=batch.generator, device=batch.generator.device).tolist()
        told: list[Told] = [own[int(u * len(own))] for own, u in zip(batch.extras, draws, strict=True)]
        return self.losses(batch.images, told)

    def losses(self, images: Tensor, told: Sequence[Told]) -> Step:
        """The step of B images (B, 3, H, W) in [0, 1] and what is said of each."""
        model = self._model
        assert model is not None, "prepare comes first"
        module: Any = model.module
        bias = getattr(module, "logit_bias", None)
        if bias is None:
            with torch.no_grad():
                module.logit_scale.clamp_(max=_LARGEST_SCALE)
        scale = module.logit_scale.exp()
        mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (model.spec.mean, model.spec.std))
        image_tower, text_tower = model.trained_towers()
        assert isinstance(image_tower, ImageTower)

        x = (images - mean) / std
        image_tower = image_tower.fitted(image_tower.grid_of(x))
        h = image_tower.embed(x)
        for block in image_tower.trunk[: image_tower.depth - 1]:
            h = checkpoint(block, h, use_reentrant=False) if self.checkpointing else block(h)
        _, v, z = last_attention(image_tower, h)
        captions = _wide(text_tower.encode(torch.stack([one.caption for one in told]).to(images.device)))
        with _exact(images):
            overall = global_loss(_wide(z), captions, scale, bias)
        if not self.weight:
            return Step(overall)

        ids = {phrase: row for one in told for phrase, row in zip(one.phrases, one.ids, strict=True)}
        if not ids:
            return Step(overall, {"global": overall.detach()}, {"phrases": 0, "unmarked": 0})
        number = {phrase: i for i, phrase in enumerate(ids)}
        phrases = _wide(text_tower.encode(torch.stack(list(ids.values())).to(images.device)))
        rows = [[number[phrase] for phrase in one.phrases] for one in told]
        most = max(map(len, rows))
        own = torch.tensor([row + [-1] * (most - len(row)) for row in rows], device=images.device)
        patches = _wide(patch_embeddings(image_tower, h, v))
        with _exact(images):
            # With the last, -1, in the place of none: what comes of it is left out again.
            with torch.no_grad():
                maps = self.method.from_last_block(image_tower, _wide(h)).maps(phrases[own])
            regions, marked = pooled_regions(patches, maps)
            there = (own >= 0) & marked
            local = local_loss(regions[there], phrases, own[there], scale, bias)
        total = sum(map(len, rows))
        counts = {"phrases": total, "unmarked": total - int(there.sum())}
        return Step(overall + self.weight * local, {"global": overall.detach(), "local": local.detach()}, counts)


@torch.enable_grad()
def _reached(model: Model) -> tuple[set[str], set[str]]:
    """The names of the weights that an image's embedding depends on, and of those that only a text's does.

    Raises ModelError where the module's own embeddings depend on more than those of its towers.
    """
    module: Any = model.module
    assert model.tokenizer is not None
    weights = dict(module.named_parameters())

    def behind(embedding: Tensor) -> set[str]:
        found = torch.autograd.grad(embedding.sum(), list(weights.values()), allow_unused=True)
        return {name for name, gradient in zip(weights, found, strict=True) if gradient is not None}

    like = next(module.parameters())
    x, ids = like.new_zeros(1, 3, *model.spec.size), model.tokenizer(["a"]).to(like.device)
    image_tower, text_tower = model.trained_towers()
    made = image_tower.encode(x), text_tower.encode(ids)
    image, text = (behind(one) if one.requires_grad else set() for one in made)
    wanted = set(weights) - {"logit_scale", "logit_bias"}
    if hasattr(module, "encode_image") and hasattr(module, "encode_text"):
        wanted = behind(module.encode_image(x)) | behind(module.encode_text(ids))
    lost = [name for name in weights if name in wanted - image - text]
    if lost:
        raise ModelError(
            f"{model.name} cannot be grounded: clipfast runs parts of it as they are, without gradients to their "
            f"{len(lost)} weights, such as {lost[0]}."
        )
    return image, text - image


def _wide(t: Tensor) -> Tensor:
    """Autocast's half precision as float32: logits of a hundred times a cosine need it."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _exact(images: Tensor) -> torch.autocast:
    return torch.autocast(images.device.type, enabled=False)
