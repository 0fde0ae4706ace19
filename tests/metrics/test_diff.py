"""Two checkpoints: themselves, noisy copies, other architectures, pictures that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import clipfast
from clipfast import Explainer
from clipfast.data.datasets import Dataset, Sample, Target
from clipfast.data.datasets.rendered import RenderedScenes
from clipfast.data.scenes import names, render
from clipfast.errors import ImageError, InputError, TextError
from clipfast.metrics import base, evaluation
from clipfast.metrics import diff as differ
from clipfast.metrics.comparison import Comparison
from clipfast.metrics.diff import Differ, diff
from clipfast.metrics.evaluate import evaluate
from clipfast.metrics.held import Asked, Held
from clipfast.metrics.map_pairs import drawn, map_likeness
from clipfast.metrics.probe import encode, fit_probe, hold_out
from clipfast.metrics.robust import RobustAccuracy
from clipfast.metrics.stability import map_ssim
from clipfast.metrics.zero_shot import ZeroShot
from clipfast.models import demo
from clipfast.models.model import Model

QUICK = ["pointing_game", "gini"]
SCENES = RenderedScenes(1, 10)
ATTACK = RobustAccuracy(radii=(0.1,), steps=1, targets=0, templates="bare")


@pytest.fixture(scope="module", autouse=True)
def few_draws() -> Iterator[None]:
    """Bootstraps of a few draws: thousands of them would be most of the time here."""
    with pytest.MonkeyPatch.context() as patched:
        for module in (differ, evaluation):
            for name in ("figures", "compare"):
                patched.setattr(module, name, partial(getattr(base, name), resamples=40))
        yield


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with noise on its image tower, as a checkpoint on the disk."""
    weights = {name: t.float() for name, t in load_file(demo.WEIGHTS).items()}
    generator = torch.Generator().manual_seed(0)
    for name, t in weights.items():
        if name.startswith("visual") and t.ndim > 1:
            weights[name] = t + 0.3 * t.std() * torch.randn(t.shape, generator=generator)
    with safe_open(demo.WEIGHTS, "pt") as stored:
        header = stored.metadata()
    path = tmp_path_factory.mktemp("tuned") / "noisy.safetensors"
    save_file(weights, path, header)
    return path


@pytest.fixture(scope="module")
def found(noisy: Path) -> Comparison:
    return diff("demo", f"demo:{noisy}", SCENES, protocols=QUICK, concepts=["dog", "cat", "red"], show=4)


class Listed(Dataset):
    """Samples that the test makes up."""

    name, offers = "listed", frozenset({"labels"})

    def __init__(self, samples: list[Sample | ImageError]):
        self.samples, self.classes, self.opened = samples, names(), 0

    def __len__(self) -> int:
        return len(self.samples)

    def _sample(self, index: int) -> Sample:
        self.opened += 1
        one = self.samples[index]
        if isinstance(one, ImageError):
            raise one
        return one


def labelled(count: int) -> list[Sample]:
    return [
        Sample(f"p{i}", Image.fromarray(render(40 + i).image), [Target(names()[i], i)], []) for i in range(count)
    ]  # fmt: skip


def test_a_model_and_itself_differ_by_nothing() -> None:
    same = diff(
        "demo",
        "demo",
        RenderedScenes(3, 5),
        protocols=["energy_pointing_game", "stability/ssim:sigmas=3"],
        concepts=["dog", "sun"],
        robust=ATTACK,
    )
    assert (same.before, same.after) == ("demo (1)", "demo (2)")
    assert {one.protocol for one in same.changes} >= {
        "energy_pointing_game", "stability/ssim:sigmas=3", "similarity", "zero_shot", "class_entropy",
        "dissection/clip", "robust_accuracy"}  # fmt: skip
    for one in same.changes:
        assert one.before == one.after
        assert one.difference is not None
        assert (one.difference.value, one.difference.low, one.difference.high, one.difference.p) == (0, 0, 0, 1)
    assert [f.value for f in same.between.values()] == [1, 1, 1]
    assert set(same.counts.values()) == {0}
    for card in same.cards:
        assert card.drift == 1
        for pair in card.pairs:
            assert pair.ssim == 1 and torch.equal(pair.before, pair.after) and pair.scores[0] == pair.scores[1]


def test_figures_are_those_of_either_model_alone(found: Comparison, noisy: Path) -> None:
    for model, side in (("demo", "before"), (f"demo:{noisy}", "after")):
        alone = evaluate(model, SCENES, ["grad_eclip"], QUICK, prompt="{}", templates="bare")
        for protocol in QUICK:
            for one in alone.figures("grad_eclip", protocol):
                assert getattr(found.change(protocol, one.name), side) == one
        accuracy = ZeroShot("bare").measure(clipfast.load(model), SCENES)["top-1"]
        assert getattr(found.change("zero_shot", "top-1"), side).value == pytest.approx(float(accuracy.mean()))
    hit = found.change("pointing_game", "hit")
    assert hit.difference is not None
    assert hit.difference.value == pytest.approx(hit.after.value - hit.before.value)
    assert found.pairs == hit.before.count > found.samples == 10


def test_what_lies_between_the_two(found: Comparison, noisy: Path) -> None:
    one, other = clipfast.load("demo"), clipfast.load(f"demo:{noisy}")
    pictures = [sample.image for sample in SCENES]
    drift, ssim = [], []
    for sample, picture in zip(SCENES, pictures, strict=True):
        texts = [target.text for target in sample.targets]
        a, b = Explainer(one)(picture, texts), Explainer(other)(picture, texts)
        ssim += map_ssim(a.maps, b.maps, 224).tolist()
        za, zb = (Explainer(model).features(picture).embeddings[0].double() for model in (one, other))
        drift.append(float(za @ zb))
    assert found.between["SSIM of the maps"].value == pytest.approx(np.mean(ssim), abs=1e-5)
    assert found.between["drift of pictures, cosine"].value == pytest.approx(np.mean(drift), abs=1e-5)
    assert 0.3 < found.between["drift of pictures, cosine"].value < 0.99
    # The noise is on the image tower alone.
    assert found.between["drift of texts, cosine"].value == 1
    shown = {card.title: card for card in found.cards}
    number = next(i for i, sample in enumerate(SCENES) if sample.key in shown)
    assert shown[SCENES[number].key].drift == pytest.approx(drift[number], abs=1e-5)


def test_pictures_that_changed_most_are_shown_and_others(found: Comparison) -> None:
    assert len(found.cards) == 4
    groups = [card.group for card in found.cards]
    assert groups[0] == groups[1] != groups[2] == groups[3]
    means = [np.mean([pair.ssim for pair in card.pairs]) for card in found.cards]
    assert means[0] <= means[1] <= min(means[2:])
    for card in found.cards:
        for pair in card.pairs:
            assert pair.before.shape == pair.after.shape == (card.picture.height, card.picture.width)
            assert pair.palette == "heat"
            # Between the centres of patches no pixel is quite as high as the highest of them; a map may be empty.
            assert float(pair.after.max()) == 0 or 0.8 < float(pair.after.max()) <= 1
            assert float(pair.after.min()) >= 0


def test_neurons_and_entropy(found: Comparison) -> None:
    assert found.protocols["dissection/clip"].parameters()["top"] == 2
    assert found.change("dissection/clip", "score").before.count == 768
    singles = sum(len(sample.targets) == 1 for sample in SCENES)
    assert found.change("class_entropy", "entropy share").before.count == singles
    titles = [one.title for one in found.histograms]
    assert titles == ["Similarity", "SSIM of the maps", "Drift of pictures", "Class entropy", "Dissection"]
    for one in found.histograms:
        assert len(one.edges) == len(one.after) + 1
        assert one.before is None or sum(one.before) == sum(one.after) > 0
    # Groups add what is within them.
    grouped = diff("demo", "demo", SCENES, protocols=["gini"], groups={"all": names()})
    assert grouped.change("class_entropy", "within").before.value == pytest.approx(
        grouped.change("class_entropy", "entropy").before.value
    )


def test_json_and_page(found: Comparison, tmp_path: Path, noisy: Path) -> None:
    paths = found.save(tmp_path / "new")
    assert [path.name for path in paths] == ["diff.json", "diff.html"]
    document = json.loads(paths[0].read_text())
    assert document["before"] == "demo" and document["after"] == f"demo:{noisy}"
    row = next(one for one in document["changes"] if (one["protocol"], one["figure"]) == ("pointing_game", "hit"))
    assert row["difference"]["value"] == found.change("pointing_game", "hit").difference.value  # type: ignore[union-attr]
    assert document["protocols"]["zero_shot"]["parameters"] == {"templates": "bare"}
    assert len(document["shown"]) == sum(len(card.pairs) for card in found.cards)
    page = paths[1].read_text()
    assert "similarity" in page and found.cards[0].title in page


def test_models_stay_as_they_are(noisy: Path) -> None:
    one, other = clipfast.load("demo"), clipfast.load(f"demo:{noisy}")
    before = [deepcopy(model.module.state_dict()) for model in (one, other)]
    diff(one, other, SCENES, limit=2, protocols=["gini"])
    for model, state in zip((one, other), before, strict=True):
        assert all(torch.equal(t, state[name]) for name, t in model.module.state_dict().items())
        assert not any(module._forward_hooks for module in model.module.modules())


def test_pictures_and_texts_alone(noisy: Path, tmp_path: Path) -> None:
    for i in (5, 6):
        Image.fromarray(render(i).image).save(tmp_path / f"scene {i}.png")
    (tmp_path / "torn.png").write_bytes(b"not a picture")
    found = diff("demo", f"demo:{noisy}", images=tmp_path, texts=["a dog", "the red car"])
    assert set(found.protocols) == {"deletion+insertion/cosine:steps=10", "stability/ssim", "gini", "similarity"}
    assert found.pairs == 4 and found.prompt == "{}"
    assert [card.title for card in found.cards] == ["scene_5", "scene_6"]
    assert [pair.text for pair in found.cards[0].pairs] == ["a dog", "the red car"]
    want = Explainer("demo")(tmp_path / "scene 5.png", ["a dog", "the red car"]).scores[0].tolist()
    assert [pair.scores[0] for pair in found.cards[0].pairs] == pytest.approx(want, abs=1e-6)
    assert "torn.png" in next(iter(found.errors.values())) and len(found.errors) == 1
    assert not found.counts and "zero_shot" not in found.protocols


def test_pictures_beside_a_data_set_are_only_looked_at(noisy: Path) -> None:
    picture = Image.fromarray(render(5).image)
    found = diff("demo", f"demo:{noisy}", SCENES, limit=3, protocols=["pointing_game"], images=[picture], texts=["dog"])
    assert found.samples == 3 and found.change("pointing_game", "hit").before.count == found.pairs
    assert [(card.title, card.group) for card in found.cards] == [("picture_000000", "")]


def test_other_architectures(build_clip: Any, build_resnet: Any, tokenizer: Any) -> None:
    def model(module: Any) -> Model:
        return clipfast.load(module, tokenizer=tokenizer, device="cpu")

    data = Listed([*labelled(3)])
    wide = diff(model(build_clip()), model(build_clip(patch_size=8, embed_dim=16, seed=1)), data, protocols=["gini"])
    assert wide.method == "grad_eclip" and wide.prompt == "a photo of a {}." and wide.templates == "photo"
    assert list(wide.between) == ["SSIM of the maps"]
    assert any("24 and 16 dimensions" in one for one in wide.notes)
    assert all(card.drift is None for card in wide.cards)
    resnet = diff(model(build_clip()), model(build_resnet()), data, protocols=["gini"])
    assert "drift of pictures, cosine" in resnet.between
    deeper = diff(model(build_clip()), model(build_clip(layers=2)), data, protocols=["gini"], method="mask_clip")
    assert deeper.method == "mask_clip"
    with pytest.raises(InputError, match="gem cannot explain images with both models; can: "):
        diff(model(build_clip()), model(build_resnet()), data, method="gem")


def test_neurons_of_other_numbers_are_not_paired(build_clip: Any, tokenizer: Any) -> None:
    one = clipfast.load(build_clip(), tokenizer=tokenizer, device="cpu")
    other = clipfast.load(build_clip(mlp_ratio=2.0), tokenizer=tokenizer, device="cpu")
    found = diff(one, other, Listed([*labelled(3)]), protocols=["gini"], concepts=["dog", "cat"])
    change = found.change("dissection/clip", "score")
    assert (change.before.count, change.after.count) == (128, 64)
    assert change.difference is None
    assert found.to_json()["changes"][-1]["difference"] is None
    assert not any("neurons" in name for name in found.counts)


def test_samples_that_cannot_be_read_are_left_out(noisy: Path) -> None:
    data = Listed([*labelled(2), ImageError("p2 is damaged.", "p2"), *labelled(4)[3:]])
    found = diff("demo", f"demo:{noisy}", data, protocols=["gini"], concepts=["dog", "cat"], robust=ATTACK)
    assert found.errors == {"sample 2": "p2 is damaged."} and found.samples == 4
    for one in found.changes:
        assert one.before.count == (768 if one.protocol == "dissection/clip" else 3), one.protocol
    assert found.between["drift of pictures, cosine"].count == 3


def test_linear_probes_are_measured_on_what_they_did_not_see(noisy: Path) -> None:
    data = Listed(
        [
            Sample(f"{kind}{i}", Image.fromarray(render(100 * kind + i, objects=1).image), [Target(name, kind)], [])
            for i in range(5)
            for kind, name in enumerate(["dog", "cat", "car"])
        ]
    )
    data.classes = ["dog", "cat", "car"]
    found = diff("demo", f"demo:{noisy}", data, protocols=["gini"], probe=True, seed=3)
    encoded = encode(clipfast.load("demo"), data)
    fitted, kept = hold_out(encoded.labels, 0.2, 3)
    head = fit_probe(encoded.select(fitted), seed=3)
    accuracy = found.change("linear probe", "accuracy")
    assert accuracy.before.count == len(kept) == 3
    assert accuracy.before.value == pytest.approx(head.accuracy(encoded.select(kept)))
    assert accuracy.before.better == "higher"
    assert found.change("class_entropy, linear probe", "entropy share").after.count == 3
    with pytest.raises(InputError, match="a sample of every class"):
        diff("demo", "demo", Listed([*labelled(3)]), protocols=["gini"], probe=True)


def test_every_picture_is_opened_once() -> None:
    data = Listed([*labelled(4)])
    diff("demo", "demo", data, protocols=["gini"], concepts=["dog", "cat"])
    assert data.opened == 4
    held = Held(data, 4, room=0)
    assert [held[i].key for i in (0, 0, 1)] == ["p0", "p0", "p1"] and data.opened == 7


def test_what_is_held_is_upright(tmp_path: Path) -> None:
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    mask = pixels[..., 0] > 0
    data = Listed([Sample("t", tmp_path / "turned.jpg", [Target("dog", 0, mask)], ["a caption"])])
    from clipfast.data.upright import read_sample

    want, targets = read_sample(data[0])
    held = Held(data, 1)
    for _ in range(2):
        picture, own = read_sample(held[0])
        assert picture.size == (40, 60) and np.array_equal(np.asarray(picture), np.asarray(want))
        assert own[0].mask is not None and targets[0].mask is not None
        assert np.array_equal(own[0].mask, targets[0].mask)
    assert held[0].captions == ["a caption"]
    assert len(encode(clipfast.load("demo"), held)) == 1


def test_asked_pictures_have_keys_of_their_own(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "x.png")
    asked = Asked([tmp_path / "a", tmp_path / "b" / "x.png", Image.new("RGB", (8, 8))], ["dog"])
    assert [sample.key for sample in asked] == ["x", "x~2", "picture_000002"]
    assert asked.name == "3 pictures" and asked.classes is None


def maps_of(kind: str, size: tuple[int, int]) -> tuple[Tensor, Any]:
    from clipfast.data import prepare
    from clipfast.data.geometry import InputSpec

    spec = InputSpec(size, (16, 16), resize=kind)
    _, geometry = prepare(Image.new("RGB", (120, 80)), spec)
    h, w = size[0] // 16, size[1] // 16
    maps = torch.linspace(0, 1, w).expand(1, h, w).contiguous()
    return maps, geometry


def test_maps_are_compared_where_they_lie_on_the_picture() -> None:
    crop, squash, small = maps_of("crop", (96, 96)), maps_of("squash", (96, 96)), maps_of("crop", (64, 64))
    assert float(map_likeness(crop, crop)[0]) == 1
    # The same region on another grid: a slope stays nearly the same slope.
    assert float(map_likeness(crop, small)[0]) > 0.9
    # Equal numbers of different regions are different maps of the picture.
    assert torch.equal(crop[0], squash[0])
    assert float(map_likeness(crop, squash)[0]) < 0.8


def test_signs_of_either_make_both_signed() -> None:
    maps, geometry = maps_of("squash", (96, 96))
    picture = Image.new("RGB", (120, 80))
    _, before, after, palette = drawn(picture, (maps, geometry), (maps - 0.5, geometry), True)
    assert palette == "signed"
    assert float(before.min()) == pytest.approx(0.5, abs=0.02) and float(after.min()) == pytest.approx(0, abs=0.02)
    assert drawn(picture, (maps, geometry), (maps - 0.5, geometry), False)[3] == "heat"
    small = drawn(Image.new("RGB", (1200, 800)), (maps, geometry), (maps, geometry), True)
    assert small[0].size == (416, 277) and small[1].shape == (1, 277, 416) and small[3] == "heat"


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({}, InputError, "there is nothing to compare on"),
        ({"images": "x.png"}, InputError, "give both, or neither"),
        ({"texts": ["dog"], "dataset": SCENES}, InputError, "give both, or neither"),
        ({"images": Image.new("RGB", (96, 96)), "texts": ["zeppelin"]}, TextError, "'zeppelin'"),
        ({"dataset": SCENES, "method": "grad_eclp"}, InputError, "did you mean 'grad_eclip'"),
        ({"dataset": SCENES, "method": "leave_one_out"}, InputError, "cannot explain images with both"),
        ({"dataset": SCENES, "protocols": ["ginny"]}, InputError, "did you mean 'gini'"),
        ({"dataset": SCENES, "protocols": ["deletion/words"]}, InputError, "does not explain texts|measures words"),
        ({"dataset": SCENES, "limit": 0}, InputError, "at least 1"),
        ({"images": Image.new("RGB", (96, 96)), "texts": ["dog"], "robust": 5}, InputError, "no classes to choose"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_measured(
    options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        Differ("demo", "demo", **options)
