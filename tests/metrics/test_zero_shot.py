"""Zero-shot classifiers against open_clip's, and accuracy against a loop."""

from __future__ import annotations

import gc
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip import build_zero_shot_classifier
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES
from PIL import Image
from torch import Tensor, nn

import clipfast
from clipfast.data import prepare
from clipfast.data.datasets import Dataset, Sample, Target, open_dataset
from clipfast.data.geometry import InputSpec, normalize
from clipfast.data.scenes import names, render
from clipfast.errors import ImageError, InputError, TextError
from clipfast.metrics import samples as reading
from clipfast.metrics import zero_shot
from clipfast.metrics.base import figures
from clipfast.metrics.perturbation import Classes
from clipfast.metrics.zero_shot import ZeroShot, class_embeddings, default_templates, template_texts
from clipfast.models.model import Model

NAMES = ["tench", "cassette player", "French horn", "golf ball", "a {odd} name", "parachute"]


class Listed(Dataset):
    """Samples that the test makes up."""

    def __init__(self, samples: list[Sample | ImageError], classes: list[str] | None):
        self.samples, self.classes, self.name = samples, classes, "listed"
        self.offers = frozenset({"labels"})

    def __len__(self) -> int:
        return len(self.samples)

    def _sample(self, index: int) -> Sample:
        found = self.samples[index]
        if isinstance(found, ImageError):
            raise found
        return found


def sample(number: int, *labels: int, size: tuple[int, int] = (80, 60)) -> Sample:
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(256, (size[1] // 10, size[0] // 10, 3), generator=generator, dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy()).resize(size)
    return Sample(str(number), image, [Target(NAMES[label], label) for label in labels], [])


@pytest.fixture
def model(build_clip) -> Model:
    # The real vocabulary, in a tower that is small.
    module = build_clip(vocab_size=49408, context_length=32)
    return clipfast.load(module, tokenizer=open_clip.SimpleTokenizer(context_length=32), device="cpu")


@pytest.mark.parametrize(
    ("templates", "theirs"),
    [
        ("openai", OPENAI_IMAGENET_TEMPLATES),
        ("simple", SIMPLE_IMAGENET_TEMPLATES),
        ("photo", ("a photo of a {}.",)),
        ("bare", ("{}",)),
        (["a {}, twice a {}.", "the {}"], (lambda c: f"a {c}, twice a {c}.", lambda c: f"the {c}")),
    ],
)
def test_class_embeddings_are_open_clips(model: Model, templates, theirs, monkeypatch: pytest.MonkeyPatch) -> None:
    # Several chunks, the last of them smaller.
    monkeypatch.setattr(zero_shot, "_TEXTS", 4 * len(template_texts(templates)))
    found = class_embeddings(model, NAMES, templates)
    want = build_zero_shot_classifier(model.module, model.tokenizer, NAMES, theirs, num_classes_per_batch=3).T
    assert found.shape == (len(NAMES), 24)
    assert torch.allclose(found, want, atol=1e-6, rtol=0)
    assert not torch.allclose(found, found[[1, 0, 2, 3, 4, 5]], atol=1e-3)


def test_class_embeddings_of_a_float64_model(build_clip) -> None:
    module = build_clip(vocab_size=49408, context_length=32).double()
    model = clipfast.load(module, tokenizer=open_clip.SimpleTokenizer(context_length=32), device="cpu")
    want = build_zero_shot_classifier(module, model.tokenizer, NAMES, SIMPLE_IMAGENET_TEMPLATES).T
    assert float((class_embeddings(model, NAMES, "simple") - want).abs().max()) < 1e-12


def test_class_embeddings_are_kept_until_the_weights_change(model: Model) -> None:
    first = class_embeddings(model, NAMES)
    assert class_embeddings(model, list(NAMES), ["a photo of a {}."]) is first
    assert class_embeddings(model, NAMES, "bare") is not first
    assert class_embeddings(model, NAMES[:3], "photo").shape == (3, 24)
    assert class_embeddings(model, NAMES) is first
    with torch.no_grad():
        model.module.text_projection.mul_(torch.linspace(0.5, 2, 24))
    after = class_embeddings(model, NAMES)
    assert not torch.allclose(after, first, atol=1e-3)
    want = build_zero_shot_classifier(model.module, model.tokenizer, NAMES, ("a photo of a {}.",)).T
    assert torch.allclose(after, want, atol=1e-6, rtol=0)
    model.tokenizer = lambda texts: open_clip.SimpleTokenizer(context_length=32)([text.upper() * 2 for text in texts])
    assert not torch.allclose(class_embeddings(model, NAMES), after, atol=1e-3)


def test_nothing_is_kept_of_a_model_that_is_gone(build_clip) -> None:
    module = build_clip(vocab_size=49408, context_length=32)
    model = clipfast.load(module, tokenizer=open_clip.SimpleTokenizer(context_length=32), device="cpu")
    gc.collect()
    before = len(zero_shot._cache)
    class_embeddings(model, NAMES)
    assert len(zero_shot._cache) == before + 1
    del model
    gc.collect()
    assert len(zero_shot._cache) == before


def test_templates_by_name() -> None:
    assert len(template_texts("openai")) == 80 and len(template_texts("simple")) == 7
    assert [text.replace("{}", "x") for text in template_texts("openai")] == [t("x") for t in OPENAI_IMAGENET_TEMPLATES]
    assert template_texts("one {}") == ("one {}",)
    with pytest.raises(InputError, match="did you mean 'openai'"):
        template_texts("opneai")
    for wrong in ([], ["a photo"], ["a {}", "b"]):
        with pytest.raises(InputError, match="template"):
            template_texts(wrong)
    with pytest.raises(InputError, match="template"):
        ZeroShot(templates=["none"])
    assert ZeroShot(templates=["a {}"]).parameters() == {"templates": ("a {}",)}


def test_no_class_and_no_words(model: Model) -> None:
    with pytest.raises(InputError, match="no class"):
        class_embeddings(model, [])
    with pytest.raises(TextError, match="empty"):
        class_embeddings(model, ["cat", " "], "bare")


def test_templates_that_go_with_model_and_data(model: Model) -> None:
    scenes = open_dataset("scenes:1:2")
    assert default_templates(clipfast.load("demo", device="cpu"), scenes) == "bare"
    assert default_templates(model, scenes) == "photo"
    scenes.name = "imagenet_s/validation"
    assert default_templates(model, scenes) == "openai"


def by_hand(module: nn.Module, spec: InputSpec, samples: list[Sample], classes: Tensor) -> list[tuple[bool, bool, int]]:
    rows = []
    for one in samples:
        x = normalize(prepare(one.image, spec)[0][None], spec)
        with torch.no_grad():
            order = (module.encode_image(x, normalize=True)[0] @ classes.T).argsort(descending=True).tolist()
        right = {target.label for target in one.targets}
        rows.append((order[0] in right, bool(right & set(order[:5])), order[0]))
    return rows


def test_accuracy_is_that_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    # Pictures are opened a few at a time, and no multiple of what goes through the model at once.
    monkeypatch.setattr(reading, "_SAMPLES", 7)
    # A model that tells pictures apart, asked for things that are mostly not there: right by chance only.
    model = clipfast.load("demo", device="cpu")
    asked = names()[:6]
    samples = [
        Sample(str(i), Image.fromarray(render(i).image), [Target(asked[label], label) for label in labels], [])
        for i, labels in enumerate([{i % 6} for i in range(30)] + [{i % 6, i % 5} for i in range(30, 40)])
    ]
    columns = ZeroShot("bare").measure(model, Listed([*samples], asked))
    classes = build_zero_shot_classifier(model.module, model.tokenizer, asked, ("{}",)).T
    want = torch.tensor(by_hand(model.module, model.spec, samples, classes), dtype=torch.float64)
    assert torch.equal(torch.stack([columns[name] for name in ("top-1", "top-5", "prediction")], 1), want)
    found = {figure.name: figure.value for figure in figures(ZeroShot(), columns, resamples=10)}
    assert found == pytest.approx({"top-1": float(want[:, 0].mean()), "top-5": float(want[:, 1].mean())})
    # Neither all right nor all wrong, or the test would say little.
    assert 0 < found["top-1"] < found["top-5"] < 1
    assert want[:, 2].unique().numel() > 3


def test_pictures_of_several_sizes(build_clip) -> None:
    module = build_clip(vocab_size=49408, context_length=32, image_size=(64, 64))
    model = clipfast.load(module, tokenizer=open_clip.SimpleTokenizer(context_length=32), device="cpu")
    model.spec = InputSpec(size=(64, 64), patch=(16, 16), resize="keep")
    sizes = [(80, 60), (80, 60), (60, 80), (80, 60), (40, 40)]
    samples = [sample(i, 0, size=size) for i, size in enumerate(sizes)]
    columns = ZeroShot().measure(model, Listed([*samples], NAMES))
    alone = [ZeroShot().measure(model, Listed([one], NAMES))["prediction"] for one in samples]
    assert torch.equal(columns["prediction"], torch.cat(alone))


def test_equal_classes_go_to_the_lower_label(model: Model) -> None:
    dataset = Listed([sample(i, 3) for i in range(4)], ["tench", "parachute"] + ["golf ball"] * 4)
    chosen = set(ZeroShot().measure(model, dataset)["prediction"].tolist())
    assert chosen <= {0, 1, 2}
    only = Listed([sample(i, 1) for i in range(4)], ["tench", "tench"])
    columns = ZeroShot().measure(model, only)
    assert columns["prediction"].tolist() == [0] * 4
    assert columns["top-1"].tolist() == [0] * 4 and columns["top-5"].tolist() == [1] * 4


def test_samples_without_labels_or_pictures(model: Model, tmp_path: Path) -> None:
    damaged = Sample("damaged", tmp_path / "gone.jpg", [Target("tench", 0)], [])
    torn = ImageError("this one is torn")
    dataset = Listed([sample(0, 1), damaged, sample(2), torn, sample(4, 2)], NAMES)
    done: list[int] = []
    columns = ZeroShot().measure(model, dataset, on_error="skip", progress=done.append)
    assert sum(done) == 5
    assert columns["prediction"].isnan().tolist() == [False, True, False, True, False]
    assert columns["top-1"].isnan().tolist() == columns["top-5"].isnan().tolist() == [False, True, True, True, False]
    whole = ZeroShot().measure(model, Listed([sample(0, 1), sample(2), sample(4, 2)], NAMES))
    assert torch.equal(columns["prediction"][[0, 2, 4]], whole["prediction"])
    with pytest.raises(ImageError, match=r"gone\.jpg"):
        ZeroShot().measure(model, Listed([damaged], NAMES))
    with pytest.raises(ImageError, match="torn"):
        ZeroShot().measure(model, Listed([torn], NAMES))
    with pytest.raises(InputError, match="on_error"):
        ZeroShot().measure(model, dataset, on_error="ignore")
    with pytest.raises(InputError, match="no classes"):
        ZeroShot().measure(model, Listed([], None))


def test_the_demo_model_knows_its_scenes() -> None:
    model = clipfast.load("demo", device="cpu")
    dataset = open_dataset("scenes:1001:60")
    assert dataset.classes is not None
    columns = ZeroShot(default_templates(model, dataset)).measure(model, dataset)
    # One to three things a scene, any of which is right.
    assert float(columns["top-1"].mean()) > 0.9
    assert ((columns["top-5"] - columns["top-1"]) >= 0).all()

    # What it picks is what deletion and insertion follow: the class of the highest probability.
    tower = model.towers()[0]
    x = normalize(torch.stack([prepare(dataset[i].image, model.spec)[0] for i in range(8)]), model.spec)
    embeddings = class_embeddings(model, dataset.classes, "bare")
    with torch.no_grad():
        z = tower.encode(x)
    target = columns["prediction"][:8].long()
    chosen = Classes(embeddings, tower.logit_scale, target).probability(z, torch.arange(8))
    assert torch.equal(chosen, (tower.logit_scale * z @ embeddings.T).softmax(-1).amax(-1))


def test_bfloat16_is_near(model: Model) -> None:
    plain, half = class_embeddings(model, NAMES), class_embeddings(model, NAMES, precision="bfloat16")
    assert half is not plain and half.dtype == torch.float32
    assert float((plain - half).norm() / plain.norm()) < 2e-2
