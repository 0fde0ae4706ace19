"""The demo model: a small CLIP in open_clip's own architecture, trained from nothing on clipfast.data.scenes.

It explains rendered scenes offline in milliseconds; it says nothing about photographs. `scripts/train_demo.py` trains
it, `docs/demo-model.md` says how and how well."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, set_model_preprocess_cfg
from open_clip.tokenizer import SimpleTokenizer
from safetensors import SafetensorError, safe_open

from clipfast.errors import ModelError, TextError

WEIGHTS = Path(__file__).with_name("demo.safetensors")

VISION = {"image_size": 96, "patch_size": 8, "width": 192, "layers": 4, "head_width": 64}
TEXT = {"context_length": 32, "width": 128, "heads": 4, "layers": 3}
EMBED_DIM = 128
MEAN = (0.57, 0.56, 0.52)
STD = (0.24, 0.23, 0.24)

WORDS = tuple(
    """
    dog cat mouse rabbit fox bear panda lion tiger cow pig frog monkey penguin owl horse bee butterfly snail turtle fish
    octopus crab whale elephant apple banana lemon strawberry grapes watermelon carrot corn mushroom bread cheese pizza
    hamburger cake donut car bus train airplane rocket boat tree cactus sunflower house clock book umbrella guitar drum
    football balloon shirt camera star heart moon sun gift

    dogs cats mice rabbits foxes bears pandas lions tigers cows pigs frogs monkeys penguins owls horses bees butterflies
    snails turtles octopuses crabs whales elephants apples bananas lemons strawberries watermelons carrots corns
    mushrooms breads cheeses pizzas hamburgers cakes donuts cars buses trains airplanes rockets boats trees cacti
    sunflowers houses clocks books umbrellas guitars drums footballs balloons shirts cameras stars hearts moons suns
    gifts

    red orange yellow green blue purple pink small tiny little big large two left right top bottom middle corner
    a an the of on at in and next to with is this that there here i see no says
    photo picture image drawing scene showing empty plain just background nothing object objects sign word text written
    """.split()  # noqa: SIM905
)
"""Every word the model was trained on; punctuation in PUNCTUATION is known too."""

PUNCTUATION = (",", ".")
WORDS_KEY = "words"
"""Under which a weights file's header has WORDS, as JSON: by it the demo model's weights are known."""


class DemoTokenizer:
    """open_clip's SimpleTokenizer with its ids renumbered to the few that the demo vocabulary needs.

    The order of ids is kept: padding is 0, start and end are the two largest, the end the larger, which open_clip's
    pooling relies on.
    """

    def __init__(self, context_length: int = TEXT["context_length"]):
        full = SimpleTokenizer()
        pieces = {word: full.encode(word) for word in (*WORDS, *PUNCTUATION)}
        known = sorted({i for ids in pieces.values() for i in ids})
        # Id 0 is padding, as in open_clip, where it is also "!", which the demo does not know.
        compact = {i: new for new, i in enumerate(known, start=1)}
        self._words = {word: [compact[i] for i in ids] for word, ids in pieces.items()}
        self.decoder: dict[int, str] = {new: full.decoder[i] for i, new in compact.items()}
        self.sot_token_id = len(known) + 1
        self.eot_token_id = len(known) + 2
        self.decoder[self.sot_token_id], self.decoder[self.eot_token_id] = "<start_of_text>", "<end_of_text>"
        self.vocab_size = len(known) + 3
        self.context_length = context_length

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without start and end. Raises TextError for words outside the vocabulary."""
        words = re.findall(r"[^\W_]+|[^\w\s]|_", text.lower())
        unknown = list(dict.fromkeys(word for word in words if word not in self._words))
        if unknown:
            raise TextError(
                f"The demo model does not know {', '.join(map(repr, unknown))}: it knows the {len(WORDS)} words "
                "of clipfast.models.demo.WORDS, 64 everyday things, colours, sizes and places."
            )
        return [i for word in words for i in self._words[word]]

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> torch.Tensor:
        """Token ids (B, context_length), int64; texts too long are cut, keeping the end token, as open_clip does."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        length = context_length or self.context_length
        ids = torch.zeros(len(texts), length, dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            tokens = [self.sot_token_id, *self.encode(text)[: length - 2], self.eot_token_id]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids


@lru_cache(maxsize=1)
def _tokenizer() -> DemoTokenizer:
    return DemoTokenizer()


def build_demo() -> tuple[CLIP, DemoTokenizer]:
    """The architecture with random weights, in training mode, and its tokenizer."""
    tokenizer = _tokenizer()
    text = CLIPTextCfg(vocab_size=tokenizer.vocab_size, **TEXT)
    model = CLIP(EMBED_DIM, CLIPVisionCfg(**VISION), text)
    set_model_preprocess_cfg(
        model,
        {
            "size": VISION["image_size"],
            "mode": "RGB",
            "mean": MEAN,
            "std": STD,
            "interpolation": "bicubic",
            "resize_mode": "shortest",
            "fill_color": 0,
        },
    )
    return model, tokenizer


def is_demo(path: Path) -> bool:
    """Whether a file of weights is the demo model's, by the words in its header."""
    try:
        with safe_open(path, "pt") as stored:
            return WORDS_KEY in (stored.metadata() or {})
    except (OSError, SafetensorError):
        return False


def load_demo(path: Path | None = None) -> tuple[CLIP, DemoTokenizer]:
    """The trained demo model, float32, in evaluation mode, and its tokenizer.

    path: weights of the same architecture, such as a fine-tuning's, in the place of the packaged ones.

    Raises ModelError where there are none, or they were trained for another vocabulary or architecture.
    """
    if path is None and not WEIGHTS.exists():
        raise ModelError(f"The demo model's weights are missing: {WEIGHTS.name} should lie in clipfast/models.")
    path = path or WEIGHTS
    model, tokenizer = build_demo()
    try:
        with safe_open(path, "pt") as stored:
            words = json.loads((stored.metadata() or {}).get(WORDS_KEY, "[]"))
            weights = {key: stored.get_tensor(key).float() for key in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} holds no weights of the demo model: {error}") from error
    if words != list(WORDS):
        raise ModelError(
            "The demo model's weights were trained for another vocabulary: train them anew with scripts/train_demo.py."
            if path == WEIGHTS
            else f"{path} holds no weights of the demo model: those carry its words in their header."
        )
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ModelError(f"{path} does not fit the demo model's architecture.") from error
    return model.eval(), tokenizer
