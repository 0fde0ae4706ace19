"""A CLIP model as clipfast uses it: the user's module, read into two towers, with its tokenizer and input spec."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.data.spec import InputSpec, spec_of
from clipfast.errors import InputError, ModelError, TextError, nearest
from clipfast.models.families import AnyImageTower, image_tower, text_tower
from clipfast.models.hf import family_spec
from clipfast.models.image import PatchTower
from clipfast.models.openclip import trained_weights
from clipfast.models.reader import TokenReader
from clipfast.models.text import AnyTextTower, OpaqueText
from clipfast.models.tokens import TokenStates, word_states
from clipfast.models.words import Word

Precision = Literal["float32", "bfloat16", "auto"] | None
Tokenizer = Callable[[list[str]], Tensor]

_TEXT_BATCH = 256


class Model:
    """A CLIP model and what goes with it. The module is only ever read: never called, hooked or changed.

    module: open_clip's or OpenAI's CLIP. tokenizer: texts -> ids (B, T), or None when texts come as embeddings.
    preprocess: an InputSpec, a torchvision Compose to read one from, or None for the module's own.
    name: what results call the model.

    Raises ModelError when the structure does not fit, InputError for a preprocessing that cannot be read.
    """

    def __init__(
        self, module: nn.Module, tokenizer: Tokenizer | None = None, preprocess: Any = None, name: str | None = None
    ):
        self.module = module
        self.tokenizer = tokenizer
        self.name = name or type(module).__name__
        self._towers: dict[torch.dtype | None, tuple[Any, AnyImageTower, AnyTextTower]] = {}
        with torch.no_grad():
            tower = image_tower(module)
        if preprocess is None:
            self.spec = _own_spec(module, tower)
        elif isinstance(preprocess, InputSpec):
            self.spec = replace(preprocess, patch=tower.patch_size)
        else:
            self.spec = spec_of(preprocess, tower.patch_size)
        self.towers()

    def __repr__(self) -> str:
        tower, _ = self.towers()
        depth = len(getattr(tower, "bottlenecks", ())) or tower.depth
        return (
            f"<clipfast model {self.name}: {depth} x {tower.width}, patch {tower.patch_size[0]}, "
            f"input {self.spec.size[0]} x {self.spec.size[1]}, embedding {tower.embed_dim}, "
            f"{tower.dtype}, {tower.device}>"
        )

    @property
    def device(self) -> torch.device:
        return self.towers()[0].device

    @torch.inference_mode(False)
    def towers(self, precision: Precision = None) -> tuple[AnyImageTower, AnyTextTower]:
        """The image and the text tower with their trunks in `precision`; None runs the weights as they are.

        Towers share the module's tensors (casts are cached), and are read anew when the module's parameters or buffers
        were replaced or changed, so that an explainer made before a fine-tuning step explains the model after it.
        """
        dtype = self._dtype(precision)
        state = _fingerprint(self.module)
        cached = self._towers.get(dtype)
        if cached is None or cached[0] != state:
            with torch.no_grad():
                image = replace(image_tower(self.module, dtype), black=self.spec.black)
                cached = (state, image, text_tower(self.module, dtype))
            self._towers[dtype] = cached
        return cached[1], cached[2]

    @torch.inference_mode(False)
    def trained_towers(self) -> tuple[AnyImageTower, AnyTextTower]:
        """The towers with the module's own parameters in them: what they compute has gradients that reach these.

        For one step of training: read them again after it. `towers` is what everything else uses.
        """
        with trained_weights():
            return image_tower(self.module), text_tower(self.module)

    def _dtype(self, precision: Precision) -> torch.dtype | None:
        if precision is None:
            return None
        if precision == "auto":
            device = next(self.module.parameters()).device
            return torch.bfloat16 if multiplies_bfloat16(device) else None
        try:
            return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
        except KeyError:
            raise InputError(
                f"precision {precision!r} is unknown: {nearest(str(precision), ['float32', 'bfloat16', 'auto'])}"
            ) from None

    def tokenize(self, texts: Sequence[str], *, empty: bool = False) -> Tensor:
        """Token ids (P, T) on the model's device.

        Raises TextError for an empty text (but with `empty`), a text that is no string, or when the model came without
        a tokenizer; warns with what was cut from texts longer than the context.
        """
        if self.tokenizer is None:
            raise TextError(
                f"{self.name} was loaded without a tokenizer: "
                "pass tokenizer= to clipfast.load, or texts as unit embeddings (P, E)."
            )
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TextError(
                    f"text {i} is a {type(text).__name__}: texts are strings, or one tensor of embeddings (P, E)."
                )
            if not empty and not text.strip():
                raise TextError(f"text {i} is empty: give at least one word.")
        context = self.towers()[1].context_length
        reader = TokenReader(self.tokenizer)
        ids = reader.ids(texts, context)
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            raise TextError(f"the tokenizer of {self.name} must return a tensor of ids (texts, length).")
        if ids.shape[1] > context:
            raise TextError(
                f"the tokenizer of {self.name} gave {ids.shape[1]} tokens a text, the model takes {context}: "
                "pass the model's own tokenizer."
            )
        for text, row in zip(texts, ids.tolist(), strict=True):
            cut = reader.cut(text, row)
            if cut is not None:
                warnings.warn(
                    f"a text of {cut.tokens} tokens was cut to the {cut.kept} that {self.name} takes; "
                    f"lost: {cut.lost!r}",
                    stacklevel=2,
                )
        return ids.to(self.device)

    def spell(self, ids: Sequence[int]) -> str:
        """The text of some token ids."""
        return TokenReader(self.tokenizer).spell(ids)

    def words(self, texts: Sequence[str], ids: Tensor) -> list[list[Word]]:
        """The words of each text, from its row of token ids (P, T), with their positions and the user's characters.

        Of a text with an end of text inside, the words before it: the model sees no others. Raises TextError for a
        tokenizer that does not say which pieces its ids stand for.
        """
        _, tower = self.towers()
        reader = TokenReader(self.tokenizer)
        return [reader.words(*each) for each in zip(texts, ids.tolist(), tower.lengths(ids).tolist(), strict=True)]

    def tokenize_words(self, texts: Sequence[str]) -> tuple[Tensor, list[list[Word]]]:
        """Token ids (P, T), and the words of each text.

        Raises TextError as `tokenize` and `words` do, and for a text without words.
        """
        ids = self.tokenize(texts)
        found = self.words(texts, ids)
        for text, words in zip(texts, found, strict=True):
            if not words:
                raise TextError(f"{text!r} has no words to explain.")
        return ids, found

    @torch.inference_mode(False)
    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str], precision: Precision = None, *, empty: bool = False) -> Tensor:
        """Unit embeddings (P, E) of texts, equal to the model's own. Raises TextError as `tokenize` does.

        Texts run sorted by length, so that short ones do not pay for the padding of long ones.
        """
        _, tower = self.towers(precision)
        ids = self.tokenize(texts, empty=empty)
        chunks = _by_length(tower.lengths(ids))
        found = torch.cat([tower.encode(ids[chunk]) for chunk in chunks])
        return found[torch.cat(chunks).argsort()]

    @torch.inference_mode(False)
    @torch.no_grad()
    def token_states(self, texts: Sequence[str], precision: Precision = None) -> TokenStates:
        """Texts and their words in the joint space: every token through the whole tower, final norm and projection.

        Costs one pass of `encode_texts` whose last block runs for all tokens. Raises TextError as `tokenize_words`.
        """
        _, tower = self.towers(precision)
        ids, named = self.tokenize_words(texts)
        if isinstance(tower, OpaqueText):
            tower.read(ids)
        embeddings = torch.empty(len(texts), tower.embed_dim, dtype=tower.result_dtype, device=ids.device)
        found: dict[int, Tensor] = {}
        for chunk in _by_length(tower.lengths(ids)):
            read = tower.read(ids[chunk])
            h = tower.run(read.h, mask=read.mask)
            embeddings[chunk] = tower.top(h, read.pooled)
            states = F.normalize(tower.project(h), dim=-1)
            spans = [[word.positions for word in named[i]] for i in chunk.tolist()]
            found.update(zip(chunk.tolist(), word_states(states, spans), strict=True))
        names = [[word.text for word in words] for words in named]
        return TokenStates(embeddings, names, torch.cat([found[i] for i in range(len(texts))]))


def _by_length(lengths: Tensor) -> tuple[Tensor, ...]:
    """The numbers of the texts in batches, short texts first."""
    return lengths.argsort(stable=True).split(_TEXT_BATCH)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has native bfloat16 products; elsewhere they are emulated and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def _fingerprint(module: nn.Module) -> tuple[tuple[int, int], ...]:
    # Buffers too: a batch norm's statistics move in training mode without any parameter.
    held = chain(module.parameters(), module.buffers())
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in held)


def _own_spec(module: Any, tower: AnyImageTower) -> InputSpec:
    if isinstance(tower, PatchTower) and not hasattr(module, "visual"):
        return family_spec(tower)
    visual = module.visual
    config = dict(getattr(visual, "preprocess_cfg", None) or {})
    (ph, pw), (gh, gw) = tower.patch_size, tower.grid
    config.setdefault("size", getattr(visual, "image_size", None) or (gh * ph, gw * pw))
    for key, name in (("mean", "image_mean"), ("std", "image_std")):
        if getattr(visual, name, None) is not None:
            config.setdefault(key, getattr(visual, name))
    try:
        return InputSpec.from_open_clip(config, tower.patch_size)
    except InputError as error:
        raise ModelError(f"the module's own preprocessing cannot be used: {error}") from error
