"""What holds for every method there is: whoever adds one to METHODS adds it here, too."""

from __future__ import annotations

import gc
import importlib
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast import Explainer, load
from clipfast.errors import InputError
from clipfast.methods import METHODS, build_method
from clipfast.methods.base import Method
from clipfast.models.image import ImageTower
from clipfast.models.openclip import image_tower, text_tower
from clipfast.models.text import TextTower

ROOT = Path(__file__).parents[2]
# Cheap settings of what would run for long; everything else as it comes.
CHEAP: dict[str, dict[str, Any]] = {
    "integrated_gradients": {"steps": 3},
    "smooth_grad": {"samples": 3},
    "mga_clip": {"steps": 3},
    "m2ib": {"steps": 2, "samples": 2},
    "rise": {"masks": 9},
    "kernel_shap": {"samples": 20},
    "score_cam": {},
    "gscore_cam": {"top": 5},
    "group_cam": {"groups": 4},
}
# What a prompt's map is depends on which others are asked with it.
COMPARES_PROMPTS = {"clip_surgery"}
TEXTS = ["a dog on the left", "boat", "two red cars next to a tree"]

LACKS = {"transformer": ("features",), "resnet": ("blocks",), "convnext": ("tokens", "query", "blocks")}
# Every method with every kind of image tower that it explains.
PAIRS = [
    (name, kind)
    for name, method in METHODS.items()
    for kind, lacking in LACKS.items()
    if "image" in method.sides() and method.needs not in lacking
]
IMAGE = [name for name, kind in PAIRS if kind == "transformer"]
TEXT = [name for name, method in METHODS.items() if "text" in method.sides()]


def built(name: str) -> Method:
    return build_method(name, CHEAP.get(name, {}))


@pytest.fixture
def build(build_clip: Any, build_resnet: Any, build_stages: Any) -> Any:
    """A model of a kind, small enough for 200 calls, for images of `size` where it is a transformer."""

    def made(kind: str, size: tuple[int, int], patch: int = 16) -> Any:
        if kind == "resnet":
            return build_resnet(image_size=64, width=4)
        if kind == "convnext":
            return build_stages()
        return build_clip(image_size=size, patch_size=patch, layers=3 if patch == 16 else 2)

    return made


@pytest.fixture
def towers(build_clip: Any) -> tuple[ImageTower, TextTower]:
    # A grid that is not square, and small enough for 200 calls.
    module = build_clip(image_size=(32, 48), patch_size=16).double()
    return image_tower(module), text_tower(module)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def texts() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return F.normalize(torch.randn(4, 24, dtype=torch.float64, generator=generator), dim=-1)


@pytest.fixture
def tokens(towers: Any, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Texts of different lengths, and which word each position belongs to."""
    ids = tokenizer(TEXTS)
    words = torch.zeros_like(ids)
    for row, pooled in zip(words, towers[1].pooled(ids).tolist(), strict=True):
        row[1:pooled] = torch.arange(1, pooled)
    return ids, words


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def ask(method: Method, explained: Any, texts: Tensor, empty: Tensor) -> Tensor:
    """As the engine does: with the texts the method wants beside the user's."""
    more = {"companions": empty} if method.companions(texts.shape[-2]) else {}
    return explained.maps(texts, **more)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_a_batch_equals_one_image_at_a_time(name, kind, build, texts) -> None:
    method, empty = built(name), texts[-1:]
    tower, images = prepared(build, kind)
    together = method.image(tower, images)
    maps = ask(method, together, texts[:3], empty)
    height, width = method.grid(tower, (images.shape[2], images.shape[3]))
    assert maps.shape == (3, 3, height * width) and maps.isfinite().all()
    assert maps.abs().max() > 0
    same(together.z, tower.encode(images))
    for i in range(3):
        alone = method.image(tower, images[i : i + 1])
        same(ask(method, alone, texts[:3], empty), maps[i : i + 1])
        if name not in COMPARES_PROMPTS:
            for p in range(3):
                same(ask(method, alone, texts[p : p + 1], empty)[:, 0], maps[i : i + 1, p])


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_prompts_permute_and_may_belong_to_images(name, kind, build, texts) -> None:
    method, empty = built(name), texts[-1:]
    explained = method.image(*prepared(build, kind))
    maps = ask(method, explained, texts[:3], empty)
    order = [2, 0, 1]
    same(ask(method, explained, texts[order], empty), maps[:, order])
    own = torch.stack([texts[[0, 1, 2]], texts[[2, 0, 1]], texts[[1, 2, 0]]])
    found = ask(method, explained, own, empty)
    for i, picked in enumerate(([0, 1, 2], [2, 0, 1], [1, 2, 0])):
        same(found[i], maps[i, picked])
    # Where to write is the caller's choice, and may be part of something larger.
    room = torch.full((3, 5, maps.shape[-1]), torch.nan, dtype=maps.dtype)
    more = {"companions": empty} if method.companions(3) else {}
    explained.maps(texts[:3], out=room[:, 1:4], **more)
    same(room[:, 1:4], maps)
    assert room[:, [0, 4]].isnan().all()


def prepared(build: Any, kind: str) -> tuple[Any, Tensor]:
    """A float64 tower of a kind, and three images of other than square shape for it."""
    tower, _ = load(build(kind, (32, 48)).double()).towers()
    return tower, noise(3, 3, *((32, 48) if kind == "transformer" else (64, 96)))


@pytest.mark.parametrize("name", TEXT)
def test_texts_in_a_batch_equal_one_at_a_time(name, towers, tokens, texts) -> None:
    method, (ids, words) = built(name), tokens
    explained = method.text(towers[1], ids, words)
    maps = explained.maps(texts)
    same(explained.z, towers[1].encode(ids))
    assert maps.shape[:2] == (3, 4) and maps.isfinite().all() and maps.abs().max() > 0
    assert (maps[~(words[:, None] > 0)[..., : maps.shape[-1]].expand_as(maps)] == 0).all()
    for i in range(3):
        alone = method.text(towers[1], ids[i : i + 1], words[i : i + 1])
        for p in range(4):
            found = alone.maps(texts[p : p + 1])[0, 0]
            same(found, maps[i, p, : len(found)])
            assert (maps[i, p, len(found) :] == 0).all()
    order = [3, 1, 0, 2]
    same(explained.maps(texts[order]), maps[:, order])


@pytest.mark.parametrize("name", ["integrated_gradients", "kernel_shap", "leave_one_out"])
def test_words_are_signed_whatever_their_values_and_neighbours(name, build_clip, tokenizer) -> None:
    explainer = Explainer(load(build_clip(), tokenizer=tokenizer), name, **CHEAP.get(name, {}))
    # What a single word does for one embedding it does against the opposite one.
    both = [explainer.words(embedding, "dog") for embedding in (noise(24), -noise(24))]
    assert sum(bool(words.values > 0) for words in both) == 1
    assert all(words.signed for words in both)


@pytest.mark.parametrize("name", IMAGE)
def test_patches_that_cannot_be_told_apart_get_the_same(name, build_clip, texts) -> None:
    """One colour and no positions: every patch is like every other, and so is its place in the map."""
    module = build_clip(image_size=48, patch_size=16).double()
    module.visual.positional_embedding.data.zero_()
    tower, method = image_tower(module), built(name)
    if method.grid(tower, (48, 48)) != (3, 3) or name in ("kernel_shap", "m2ib"):
        pytest.skip("draws at random, or its map is of pixels")
    x = torch.tensor((0.4, -0.7, 1.1), dtype=torch.float64)[None, :, None, None].expand(1, 3, 48, 48)
    maps = ask(method, method.image(tower, x), texts[:2], texts[-1:])
    spread = maps.amax(-1) - maps.amin(-1)
    assert (spread <= 1e-9 * maps.abs().amax(-1).clamp(min=1e-3)).all()


BOTH = [*PAIRS, *((name, "transformer") for name in TEXT if name not in IMAGE)]


@pytest.mark.parametrize(("name", "kind"), BOTH)
def test_the_model_stays_as_it_was(name, kind, build, tokenizer) -> None:
    module = build(kind, (32, 32))
    module.train()
    for i, parameter in enumerate(module.parameters()):
        parameter.requires_grad_(i % 3 > 0)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    flags = [parameter.requires_grad for parameter in module.parameters()]
    explainer = Explainer(load(module, tokenizer=tokenizer), name, **CHEAP.get(name, {}))
    x = noise(2, 3, 32, 32).float() if kind == "transformer" else noise(2, 3, 64, 64).float()
    random = torch.get_rng_state()
    if name in TEXT:
        explainer.words(x[0], TEXTS)
    if (name, kind) in PAIRS:
        explainer(x, TEXTS)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert [parameter.requires_grad for parameter in module.parameters()] == flags
    assert all(parameter.grad is None for parameter in module.parameters())
    for part in module.modules():
        assert part.training
        hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
        assert not any(hooks) and "forward" not in vars(part)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(("name", "kind"), BOTH)
def test_inputs_may_be_made_under_inference_mode(name, kind, build, tokenizer) -> None:
    explainer = Explainer(load(build(kind, (32, 32)), tokenizer=tokenizer), name, **CHEAP.get(name, {}))

    def call(x: Tensor) -> Tensor:
        return explainer(x, TEXTS[:2]).maps if (name, kind) in PAIRS else explainer.words(x[0], TEXTS[0]).values

    x = noise(1, 3, 32, 32).float() if kind == "transformer" else noise(1, 3, 64, 64).float()
    with torch.inference_mode():
        made = x.clone()
        inside = call(made)
    torch.testing.assert_close(call(made), call(x))
    torch.testing.assert_close(inside, call(x))


@pytest.mark.parametrize(("name", "kind"), BOTH)
def test_memory_does_not_grow_over_200_calls(name, kind, build, tokenizer) -> None:
    explainer = Explainer(load(build(kind, (16, 16), 8), tokenizer=tokenizer), name, **CHEAP.get(name, {}))
    x = noise(1, 3, 16, 16).float() if kind == "transformer" else noise(1, 3, 64, 64).float()

    def call() -> None:
        if (name, kind) in PAIRS:
            explainer(x, TEXTS[:2])
        else:
            explainer.words(x[0], TEXTS[:2])

    for _ in range(20):
        call()
    tensors, pages = _tensors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Convolutions take several times as long.
    for _ in range(200 if kind == "transformer" else 40):
        call()
    assert _tensors() <= tensors
    # In kilobytes; a leaked map, graph or batch of so many calls would be several times that.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - pages < 4096


@pytest.mark.parametrize("name", list(METHODS))
def test_a_side_that_is_not_explained_is_named(name, build_clip, tokenizer) -> None:
    explainer = (
        Explainer(load(build_clip(image_size=32, patch_size=16), tokenizer=tokenizer), name)
        if name in IMAGE + TEXT
        else None
    )
    x = torch.zeros(1, 3, 32, 32)
    if explainer is not None and name not in IMAGE:
        with pytest.raises(InputError, match=f"{name} does not explain images; these methods do: grad_eclip"):
            explainer(x, TEXTS)
    if explainer is not None and name not in TEXT:
        with pytest.raises(InputError, match=f"{name} does not explain texts; these methods do: grad_eclip"):
            explainer.words(x[0], TEXTS[0])


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_says_what_it_is(name) -> None:
    method = METHODS[name]
    info = method.info
    assert info.source and info.forwards and info.backwards and info.agrees
    assert method.sides()
    documented = method.__doc__ or ""
    for parameter in method.parameters():
        assert f"{parameter}:" in documented or f"{parameter} " in documented, f"{parameter} is not explained"


def test_the_gallery_says_what_methods_say(monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    gallery = importlib.import_module("make_gallery")
    assert (ROOT / "docs" / "gallery.md").read_text() == gallery.page(), "run scripts/make_gallery.py"


def _tensors() -> int:
    gc.collect()
    return sum(issubclass(type(found), Tensor) for found in gc.get_objects())
