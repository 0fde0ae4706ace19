"""Rendered scenes with ground truth: pictograms of everyday things over varied backgrounds, captioned in plain English.

A scene is a function of its seed. It knows, for every object, the exact pixels that stay visible, the box around them,
and the words that describe it, so it can measure explanations: a benchmark of any size, on any machine, offline.

    from clipfast.data.scenes import Scenes, render
    scene = render(7, size=224, objects=2)
    scene.image, scene.caption, [(o.name, o.box) for o in scene.objects]

The pictograms come from Noto Color Emoji (SIL OFL 1.1; see pictograms.LICENSE.txt beside this file).
"""

from __future__ import annotations

import colorsys
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from typing import overload

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from clipfast.errors import InputError, nearest

WORD_FLOOR = 0.95  # the same of a written word, which has to stay legible
VISIBLE_FLOOR = 0.6  # least share of an object's pixels that later objects and the word leave visible
MAX_OBJECTS = 4

HUES = {"red": 0.0, "orange": 0.078, "yellow": 0.145, "green": 0.36, "blue": 0.6, "purple": 0.76, "pink": 0.92}
COLOURABLE = {
    "apple": "red", "book": "red", "balloon": "red", "bus": "blue", "butterfly": "orange", "car": "red",
    "guitar": "red", "heart": "red", "shirt": "blue", "star": "yellow", "umbrella": "purple",
}  # fmt: skip
"""Things that come in every colour, with the colour in which the pictogram is drawn."""

PLURALS = {
    "mouse": "mice", "fish": "fish", "butterfly": "butterflies", "octopus": "octopuses", "strawberry": "strawberries",
    "grapes": "grapes", "bus": "buses", "cactus": "cacti", "fox": "foxes",
}  # fmt: skip
_NO_ARTICLE = {"grapes", "bread", "cheese", "corn"}
_SIZES = {"small": (0.27, 0.33), "medium": (0.34, 0.45), "big": (0.46, 0.62)}
_LARGEST = {1: 0.62, 2: 0.52, 3: 0.42, 4: 0.36}  # so that this many objects find room
_SIZE_WORDS = {"small": ("small", "tiny", "little"), "medium": ("",), "big": ("big", "large")}


@dataclass(frozen=True)
class SceneObject:
    """One thing in a scene. `mask` (H, W) bool holds its visible pixels, `box` their x0, y0, x1, y1 (exclusive)."""

    name: str
    colour: str | None
    size: str
    position: str
    mask: np.ndarray
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """An image (H, W, 3) uint8 with what is in it.

    `caption` says what is there; `foil` is the same sentence with one thing wrong. `written` are the words on the
    image, named by what they say; their masks cover the ink and its plate.
    """

    image: np.ndarray
    objects: tuple[SceneObject, ...]
    caption: str
    foil: str
    written: tuple[SceneObject, ...] = ()

    @property
    def word(self) -> str | None:
        """The first written word, None where none is."""
        return self.written[0].name if self.written else None

    @property
    def word_mask(self) -> np.ndarray | None:
        """The pixels of the first written word and its plate, (H, W) bool; None where no word is."""
        return self.written[0].mask if self.written else None

    @property
    def names(self) -> tuple[str, ...]:
        """The distinct names of what is drawn, in the order of drawing."""
        return tuple(dict.fromkeys(thing.name for thing in self.objects))

    def mask(self, name: str) -> np.ndarray:
        """Visible pixels of everything called `name`, (H, W) bool."""
        masks = [thing.mask for thing in self.objects if thing.name == name]
        if not masks:
            raise InputError(f"This scene has no {name!r}; it holds {', '.join(self.names) or 'nothing'}.")
        return np.logical_or.reduce(masks)


@lru_cache(maxsize=1)
def _pictograms() -> dict[str, Image.Image]:
    folder = files("clipfast.data")
    index = json.loads((folder / "pictograms.json").read_text())
    with (folder / "pictograms.webp").open("rb") as stream:
        atlas = Image.open(stream).convert("RGBA")
    cell, columns = index["cell"], index["columns"]
    return {
        name: atlas.crop((i % columns * cell, i // columns * cell, (i % columns + 1) * cell, (i // columns + 1) * cell))
        for i, name in enumerate(index["names"])
    }


def names() -> list[str]:
    """What scenes are made of: 64 singular English nouns."""
    return list(_pictograms())


def pictogram(name: str, colour: str | None = None) -> Image.Image:
    """The picture of one thing, RGBA, recoloured if `colour` is given (a key of HUES, for names in COLOURABLE)."""
    if name not in _pictograms():
        raise InputError(f"No pictogram is called {name!r}; {nearest(name, names())}")
    sprite = _pictograms()[name]
    if colour is None or colour == COLOURABLE.get(name):
        return sprite.copy()
    if name not in COLOURABLE or colour not in HUES:
        raise InputError(
            f"{name!r} cannot be {colour!r}: colourable are {', '.join(COLOURABLE)}, in {', '.join(HUES)}."
        )
    hue, saturation, value = (np.array(band) for band in sprite.convert("RGB").convert("HSV").split())
    coloured = saturation > 40  # leaves white and grey parts as they are
    hue[coloured] = round(HUES[colour] * 255)
    saturation[coloured] = np.maximum(saturation[coloured], 140)
    if colour == "pink":
        saturation[coloured] = (saturation[coloured] * 0.55).astype(np.uint8)
    if colour in ("pink", "yellow", "orange"):
        value[coloured] = 255 - ((255 - value[coloured].astype(np.int32)) * 0.5).astype(np.uint8)
    bands = [Image.fromarray(band) for band in (hue, saturation, value)]
    recoloured = Image.merge("HSV", bands).convert("RGB")
    recoloured.putalpha(sprite.getchannel("A"))
    return recoloured


@lru_cache(maxsize=2048)
def _turned(name: str, colour: str | None, flipped: bool, angle: int) -> Image.Image:
    sprite = pictogram(name, colour).convert("RGBa")
    if flipped:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return sprite.rotate(angle, Image.Resampling.BICUBIC, expand=True) if angle else sprite


@lru_cache(maxsize=8192)
def _sprite(name: str, colour: str | None, side: int, flipped: bool, angle: int) -> Image.Image:
    turned = _turned(name, colour, flipped, angle)
    side = round(side * turned.width / _turned(name, colour, flipped, 0).width)
    sprite = turned.resize((side, side), Image.Resampling.LANCZOS).convert("RGBA")
    return sprite.crop(sprite.getbbox())


@lru_cache(maxsize=1)
def _noise() -> np.ndarray:
    # RandomState's stream is frozen for good, Generator's is not.
    return np.random.RandomState(20260).standard_normal((512, 512)).astype(np.float32)


def _tone(rng: random.Random, loud: bool) -> list[float]:
    saturation = rng.uniform(0.2, 0.9) if loud else rng.uniform(0.0, 0.45)
    return [255 * c for c in colorsys.hsv_to_rgb(rng.random(), saturation, rng.uniform(0.25, 1.0))]


def _near(rng: random.Random, tone: list[float], spread: float) -> list[float]:
    return [min(255.0, max(0.0, c + rng.uniform(-spread, spread))) for c in tone]


def _background(rng: random.Random, height: int, width: int) -> Image.Image:
    """A calm surface, now and then a loud one: gradient, blobs, stripes, checks, horizon or plain, perhaps grainy."""
    loud = rng.random() < 0.15
    spread = rng.uniform(40, 110) if loud else rng.uniform(5, 35)
    base = _tone(rng, loud)
    kind = rng.choice(("plain", "gradient", "gradient", "blobs", "blobs", "stripes", "checks", "horizon"))
    if kind in ("stripes", "checks"):
        period = rng.uniform(0.06, 0.3) * min(height, width)
        across, down = rng.choice(((1, 0), (0, 1), (0.7, 0.7), (0.7, -0.7)))
        y, x = np.ogrid[:height, :width]
        band = np.floor((x * across + y * down) / period)
        if kind == "checks":
            band = band + np.floor((x * down - y * across) / period)
        odd = (band % 2).astype(np.float32)[..., None]
        ground, other = np.asarray(base, np.float32), np.asarray(_near(rng, base, spread), np.float32)
        field: np.ndarray = ground + odd * (other - ground)
    else:
        if kind == "horizon":
            split = rng.randint(3, 6)
            soil = _tone(rng, loud)
            rows = [base if row < split else soil for row in range(8)]
            cells = [[_near(rng, tone, 6)] for tone in rows]
        else:
            k = {"plain": 1, "gradient": 2, "blobs": rng.randint(3, 7)}[kind]
            cells = [[_near(rng, base, spread) for _ in range(k)] for _ in range(k)]
        small = Image.fromarray(np.asarray(cells, np.float32).astype(np.uint8))
        field = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    if rng.random() < 0.4:
        grain = _noise()
        top, left = rng.randrange(512), rng.randrange(512)
        rows_ = (np.arange(height) + top) % 512
        columns_ = (np.arange(width) + left) % 512
        field = field + np.float32(rng.uniform(2, 12)) * grain[rows_[:, None], columns_][..., None]
    return Image.fromarray(np.clip(field, 0, 255).astype(np.uint8))


def _distract(rng: random.Random, canvas: Image.Image) -> None:
    """Draw shapes that no caption speaks of."""
    draw = ImageDraw.Draw(canvas)
    unit = min(canvas.size)
    for _ in range(rng.randint(1, 3)):
        r = rng.uniform(0.04, 0.16) * unit
        x, y = rng.uniform(0, canvas.width), rng.uniform(0, canvas.height)
        ink = tuple(round(c) for c in _tone(rng, rng.random() < 0.5))
        box = (x - r, y - r, x + r, y + r)
        kind = rng.choice(("disc", "ring", "square", "triangle", "line"))
        if kind == "disc":
            draw.ellipse(box, fill=ink)
        elif kind == "ring":
            draw.ellipse(box, outline=ink, width=max(1, round(r / 4)))
        elif kind == "square":
            draw.rectangle(box, fill=ink)
        elif kind == "triangle":
            draw.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=ink)
        else:
            draw.line((x - 2 * r, y, x + 2 * r, y + rng.uniform(-r, r)), fill=ink, width=max(1, round(r / 4)))


def _position(x: float, y: float) -> str:
    across = "left" if x < 0.4 else "right" if x > 0.6 else ""
    down = "top" if y < 0.4 else "bottom" if y > 0.6 else ""
    return f"{down} {across}".strip() or "middle"


@dataclass
class _Layer:
    """Something pasted on the canvas: its full mask, the part still visible, and the share that has to stay so."""

    full: np.ndarray
    visible: np.ndarray
    floor: float


def _fits(layers: list[_Layer], mask: np.ndarray) -> bool:
    return all((layer.visible & ~mask).sum() >= layer.floor * layer.full.sum() for layer in layers)


def _cover(layers: list[_Layer], mask: np.ndarray, floor: float) -> None:
    for layer in layers:
        layer.visible &= ~mask
    layers.append(_Layer(mask, mask.copy(), floor))


def _place(
    rng: random.Random, canvas: Image.Image, layers: list[_Layer], sprite: Image.Image, floor: float
) -> tuple[int, int] | None:
    """Paste where every earlier layer keeps its floor; the top left corner, or None when no try fitted."""
    alpha = np.asarray(sprite.getchannel("A")) > 127
    for _ in range(12):
        x = rng.randint(0, max(0, canvas.width - sprite.width))
        y = rng.randint(0, max(0, canvas.height - sprite.height))
        mask = np.zeros((canvas.height, canvas.width), bool)
        region = mask[y : y + sprite.height, x : x + sprite.width]
        region[:] = alpha[: region.shape[0], : region.shape[1]]
        if _fits(layers, mask):
            canvas.paste(sprite, (x, y), sprite)
            _cover(layers, mask, floor)
            return x, y
    return None


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _written(rng: random.Random, word: str, width: int, unit: int) -> Image.Image:
    """The word as a layer: dark on a light plate, light on a dark one, or bare ink with an outline."""
    size = max(8, round(rng.uniform(0.16, 0.25) * unit))
    while size > 8 and _font(size).getlength(word) > 0.92 * width:
        size -= 1
    font = _font(size)
    x0, y0, x1, y1 = font.getbbox(word)
    pad = max(1, size // 5)
    layer = Image.new("RGBA", (int(x1 - x0) + 2 * pad, int(y1 - y0) + 2 * pad))
    draw = ImageDraw.Draw(layer)
    dark = tuple(rng.randint(0, 70) for _ in range(3))
    light = tuple(rng.randint(200, 255) for _ in range(3))
    ink, other = (dark, light) if rng.random() < 0.6 else (light, dark)
    if rng.random() < 0.6:
        draw.rectangle((0, 0, *layer.size), fill=(*other, 255))
        draw.text((pad - x0, pad - y0), word, font=font, fill=(*ink, 255))
    else:
        draw.text((pad - x0, pad - y0), word, font=font, fill=(*ink, 255), stroke_width=1, stroke_fill=(*other, 255))
    return layer


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def render(
    seed: int,
    size: int | tuple[int, int] = 96,
    objects: int | tuple[int, int] = (1, 3),
    *,
    word: bool | str | Sequence[str] = False,
    only: Sequence[str] | None = None,
    repeat: float = 0.08,
    distractors: float = 0.35,
) -> Scene:
    """Draw the scene of a seed.

    size: pixels, one number for a square or (height, width); objects: how many things, one number or an inclusive
    range, 0 to 4 (fewer are drawn where no room is left, but never fewer than one unless 0 was asked for); word: write
    a random name on it, or the given text or texts, where room is left; only: names to choose from; repeat: how often a
    second thing of the same
    name appears in scenes of two and more; distractors: how often nameless shapes lie in the background.

    Raises InputError for a size below 32, a count outside 0 to 4, or an unknown name.
    """
    height, width = (size, size) if isinstance(size, int) else size
    low, high = (objects, objects) if isinstance(objects, int) else objects
    if min(height, width) < 32:
        raise InputError(f"A scene needs at least 32 pixels a side, not {height} x {width}.")
    if not 0 <= low <= high <= MAX_OBJECTS:
        raise InputError(f"A scene holds 0 to {MAX_OBJECTS} objects, not {objects}.")
    choices = names() if only is None else list(only)
    for name in choices:
        if name not in _pictograms():
            raise InputError(f"No pictogram is called {name!r}; {nearest(name, names())}")
    rng = random.Random(seed)
    count = rng.randint(low, high)
    canvas = _background(rng, height, width)
    if rng.random() < distractors:
        _distract(rng, canvas)

    unit = min(height, width)
    picked = rng.sample(choices, min(count, len(choices)))
    if len(picked) > 1 and rng.random() < repeat:
        picked[-1] = picked[0]
    layers: list[_Layer] = []
    things: list[SceneObject] = []
    nothing = np.zeros((0, 0), bool)
    for name in picked:
        colour = rng.choice(list(HUES)) if name in COLOURABLE else None
        flipped, angle = rng.random() < 0.5, rng.choice((-16, -8, 0, 0, 0, 8, 16))
        size_word = rng.choice([word for word, (least, _) in _SIZES.items() if least < _LARGEST[count]])
        least, most = _SIZES[size_word]
        side = 2 * round(unit * rng.uniform(least, min(most, _LARGEST[count])) / 2)
        sprite = _sprite(name, colour, side, flipped, angle)
        corner = _place(rng, canvas, layers, sprite, VISIBLE_FLOOR)
        if corner is not None:
            x, y = (corner[0] + sprite.width / 2) / width, (corner[1] + sprite.height / 2) / height
            things.append(SceneObject(name, colour, size_word, _position(x, y), nothing, (0, 0, 0, 0)))
    drawn = len(things)

    texts = [rng.choice(names())] if word is True else [word] if isinstance(word, str) else list(word or ())
    for text in texts:
        plate = _written(rng, text, width, unit)
        corner = _place(rng, canvas, layers, plate, WORD_FLOOR)
        if corner is not None:
            x, y = (corner[0] + plate.width / 2) / width, (corner[1] + plate.height / 2) / height
            things.append(SceneObject(text, None, "medium", _position(x, y), nothing, (0, 0, 0, 0)))
    things = [
        replace(thing, mask=layer.visible, box=_box(layer.visible)) for thing, layer in zip(things, layers, strict=True)
    ]
    caption, foil = _describe(rng, things[:drawn], [thing.name for thing in things[drawn:]])
    return Scene(np.asarray(canvas), tuple(things[:drawn]), caption, foil, tuple(things[drawn:]))


@dataclass(frozen=True)
class _Phrase:
    """What a caption says of one thing."""

    name: str
    colour: str
    size: str
    place: str
    count: int = 1

    def text(self, bare: bool) -> str:
        noun = self.name if self.count == 1 else PLURALS.get(self.name, self.name + "s")
        words = " ".join(part for part in (self.size, self.colour, noun) if part)
        if self.count > 1:
            words = f"two {words}"
        elif not bare and (self.name not in _NO_ARTICLE):
            words = f"an {words}" if words[0] in "aeiou" else f"a {words}"
        return f"{words} {self.place}" if self.place else words


_FRAMES = (
    "{}", "{}", "a photo of {}", "a photo of {}", "a picture of {}", "an image of {}", "a drawing of {}",
    "a photo with {}", "a picture with {}", "a scene with {}", "there is {}", "this is {}", "here is {}",
    "i see {}", "a photo showing {}",
)  # fmt: skip
_EMPTY = (
    "an empty background", "nothing", "a photo of nothing", "an empty scene", "no object", "a plain background",
    "a picture of an empty background", "there is nothing here", "an image with no objects", "just a background",
)  # fmt: skip
_WORD_FRAMES = (
    "the word {}", "a photo of the word {}", "a picture with the word {}", "text that says {}", "a sign that says {}",
    "{}", "the written word {}",
)  # fmt: skip
_PLACES = {"left": "on the {}", "right": "on the {}", "top": "at the {}", "bottom": "at the {}"}


def _place_words(position: str, corner: bool) -> str:
    if position == "middle":
        return "in the middle"
    words = position.split()
    if len(words) == 2 and corner:
        return f"in the {position} corner"
    return _PLACES[words[-1]].format(words[-1])


def _sentence(phrases: Sequence[_Phrase], frame: str, joint: str, bare: bool) -> str:
    parts = [phrase.text(bare) for phrase in phrases]
    if joint == "," and bare:
        return frame.format(", ".join(parts))
    if len(parts) == 1:
        return frame.format(parts[0])
    if len(parts) > 2:
        joint = "and"
    return frame.format(", ".join(parts[:-1]) + f" {joint} " + parts[-1])


def _swapped(rng: random.Random, phrases: list[_Phrase]) -> list[_Phrase]:
    """The phrases with one statement made wrong."""
    i = rng.randrange(len(phrases))
    phrase = phrases[i]
    kinds = [kind for kind in ("colour", "size", "place") if getattr(phrase, kind)] or ["name"]
    kind = rng.choice((*kinds, "name"))
    if kind == "colour":
        wrong = replace(phrase, colour=rng.choice([colour for colour in HUES if colour != phrase.colour]))
    elif kind == "size":
        wrong = replace(phrase, size="big" if phrase.size in _SIZE_WORDS["small"] else "small")
    elif kind == "place":
        other = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
        words = [other.get(word, word) for word in phrase.place.split()]
        wrong = replace(phrase, place=" ".join(words) if words[-1] != "middle" else "on the left")
    else:
        taken = {p.name for p in phrases}
        wrong = replace(phrase, name=rng.choice([name for name in names() if name not in taken]))
    return [*phrases[:i], wrong, *phrases[i + 1 :]]


def _describe(rng: random.Random, things: Sequence[SceneObject], written: Sequence[str]) -> tuple[str, str]:
    """A true caption and its foil. A written word is what the caption speaks of in half of the scenes that hold one."""
    if written and (not things or rng.random() < 0.5):
        frame = rng.choice(_WORD_FRAMES)
        word = written[0] if len(written) == 1 else rng.choice(written)
        return frame.format(word), frame.format(rng.choice([name for name in names() if name not in written]))
    if not things:
        frame = rng.choice(_FRAMES[2:])
        return rng.choice(_EMPTY), frame.format(_Phrase(rng.choice(names()), "", "", "").text(False))

    told = list({thing.name: thing for thing in things}.values())
    rng.shuffle(told)
    if len(told) > 1 and rng.random() < 0.2:
        told.pop()
    phrases = []
    for thing in told:
        same = [other for other in things if other.name == thing.name]
        plain = len(same) > 1
        sized = thing.size != "medium" and rng.random() < 0.35 and not plain
        phrases.append(
            _Phrase(
                thing.name,
                thing.colour if thing.colour and rng.random() < 0.65 and not plain else "",
                rng.choice(_SIZE_WORDS[thing.size]) if sized else "",
                _place_words(thing.position, rng.random() < 0.5) if rng.random() < 0.3 and not plain else "",
                len(same),
            )
        )
    bare = rng.random() < 0.2
    frame, joint = ("{}" if bare else rng.choice(_FRAMES)), rng.choice(("and", "and", "and", "next to", "with", ","))
    if joint == "," and not bare:
        joint = "and"
    return _sentence(phrases, frame, joint, bare), _sentence(_swapped(rng, phrases), frame, joint, bare)


class Scenes(Sequence[Scene]):
    """n scenes of consecutive seeds: `Scenes(1000, seed=1)[7]` is the eighth scene of benchmark 1.

    Arguments after the seed are `render`'s. Different benchmark seeds share no scene.
    """

    def __init__(
        self,
        n: int,
        seed: int = 0,
        size: int | tuple[int, int] = 96,
        objects: int | tuple[int, int] = (1, 3),
        *,
        word: bool | str | Sequence[str] = False,
        only: Sequence[str] | None = None,
        repeat: float = 0.08,
        distractors: float = 0.35,
    ):
        if n < 0:
            raise InputError(f"A benchmark holds 0 or more scenes, not {n}.")
        self.n, self.seed, self.size, self.objects = n, seed, size, objects
        self.word, self.only, self.repeat, self.distractors = word, only, repeat, distractors

    def __len__(self) -> int:
        return self.n

    @overload
    def __getitem__(self, index: int) -> Scene: ...
    @overload
    def __getitem__(self, index: slice) -> list[Scene]: ...
    def __getitem__(self, index: int | slice) -> Scene | list[Scene]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.n))]
        if not -self.n <= index < self.n:
            raise IndexError(f"scene {index} of {self.n}")
        return render(
            (self.seed << 32) + index % self.n,
            self.size,
            self.objects,
            word=self.word,
            only=self.only,
            repeat=self.repeat,
            distractors=self.distractors,
        )

    def __iter__(self) -> Iterator[Scene]:
        return (self[i] for i in range(self.n))
