"""The public calls: what users pass in, what they get back, and that their model is left alone."""

from __future__ import annotations

import copy
import io
import json
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import clipfast
from clipfast import api
from clipfast.errors import ImageError, InputError, ModelError, TextError
from clipfast.methods import METHODS
from clipfast.methods.base import Explained, Method
from clipfast.methods.grad_eclip import GradEclip
from clipfast.models import tower

TEXTS = ["a dog", "a red car", "two small birds on a wire"]


@pytest.fixture
def model(build_clip, tokenizer) -> clipfast.Model:
    return clipfast.load(build_clip(), tokenizer=tokenizer)


@pytest.fixture
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(64, 64), (120, 80), (50, 90), (64, 64), (7, 300)]
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def test_scores_and_maps_of_all_pairs(model):
    x = torch.randn(3, 3, 64, 64)
    out = clipfast.explain(x, TEXTS, model=model)
    assert out.maps.shape == (3, 3, 4, 4) and out.maps.dtype == torch.float32 and len(out) == 3
    with torch.no_grad():
        ids = model.tokenizer(TEXTS)
        expected = model.module.encode_image(x, normalize=True) @ model.module.encode_text(ids, normalize=True).T
    torch.testing.assert_close(out.scores, expected, rtol=0, atol=1e-6)
    units = out.normalized()
    hot = out.maps.flatten(2).amax(-1) > 0
    assert (units.flatten(2).amax(-1)[hot] == 1).all() and units.min() == 0


def test_every_kind_of_image_gives_the_same_map(model, images, tmp_path):
    square = images[0]
    square.save(tmp_path / "a.png")
    encoded = io.BytesIO()
    square.save(encoded, "PNG")
    array = np.array(square)
    same = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        square,
        array,
        torch.from_numpy(array).permute(2, 0, 1),
        encoded.getvalue(),
    ]
    out = clipfast.explain(same, TEXTS, model=model)
    torch.testing.assert_close(out.maps, out.maps[:1].expand_as(out.maps))
    for whole in (tmp_path, str(tmp_path / "*.png"), torch.from_numpy(array).permute(2, 0, 1)[None], array[None]):
        torch.testing.assert_close(clipfast.explain(whole, TEXTS, model=model).maps, out.maps[:1])


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.integers(1, 9), prompts=st.integers(1, 60), micro=st.sampled_from([1, 20, 50, 1000]))
def test_batch_equals_loop(model, monkeypatch, batch, prompts, micro):
    monkeypatch.setattr(tower, "CPU_TOKENS", micro)
    torch.manual_seed(batch)
    x, texts = torch.randn(batch, 3, 64, 64), torch.randn(prompts, 24)
    explainer = clipfast.Explainer(model)
    out = explainer(x, texts)
    for i in range(batch):
        torch.testing.assert_close(explainer(x[i], texts).maps[0], out.maps[i], rtol=1e-4, atol=1e-7)
    texts = texts[torch.arange(batch) % prompts]
    paired = explainer(x, texts, pairs=True)
    assert paired.maps.shape == (batch, 1, 4, 4) and paired.scores.shape == (batch, 1)
    rows = torch.arange(batch)
    torch.testing.assert_close(paired.maps[:, 0], out.maps[rows, rows % prompts], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(paired.scores[:, 0], out.scores[rows, rows % prompts], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("parameters", [{}, {"layers": 2}, {"layers": 2, "reduce": "sum_then_relu"}, {"signed": True}])
def test_features_give_the_maps_of_any_text(model, tmp_path, parameters):
    x = torch.randn(5, 3, 64, 64)
    explainer = clipfast.Explainer(model, **parameters)
    features = explainer.features(x)
    if not parameters:
        assert features.values.shape == (5, 16, 24) and features.weights.shape == (5, 16)
    out = explainer(x, TEXTS)
    again = features.maps(TEXTS)
    torch.testing.assert_close(again.maps, out.maps, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(again.scores, out.scores)
    stored = clipfast.Features.load(features.save(tmp_path / "f.safetensors"))
    embeddings = model.encode_texts(TEXTS)
    torch.testing.assert_close(stored.maps(embeddings).maps, out.maps, rtol=1e-4, atol=1e-6)
    # Embeddings of any length and dtype, as a call takes them.
    for known in (features, stored):
        others = known.maps(3 * embeddings.double())
        torch.testing.assert_close(others.maps, out.maps, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(others.scores, out.scores)
        with pytest.raises(TextError, match=r"floats of shape \(P, 24\), not torch.float32 \(24,\)"):
            known.maps(embeddings[0])
    assert stored.geometries == features.geometries
    with pytest.raises(TextError, match="pass embeddings"):
        stored.maps(TEXTS)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("grad_eclip", {}), ("grad_eclip", {"layers": 2}), ("clip_surgery", {}), ("rollout", {}), ("tclip", {"views": 9})],
)
def test_a_batch_can_be_asked_as_often_as_wanted(model, method, parameters):
    x = torch.randn(4, 3, 64, 64)
    explainer = clipfast.Explainer(model, method, **parameters)
    out = explainer(x, TEXTS)
    shown, asked = explainer.batch(x), explainer.asks(TEXTS)
    assert len(shown) == 4 and shown.grid == tuple(out.maps.shape[-2:]) == explainer.grid
    torch.testing.assert_close(shown.maps(asked), out.maps, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(shown.scores(asked), out.scores)
    # Of each image two texts of its own, in its own order, and then one.
    numbers = torch.tensor([[0, 1], [2, 0], [1, 2], [2, 1]])
    some, scores = shown.maps(asked, numbers), shown.scores(asked, numbers)
    single = shown.maps(asked, numbers[:, :1])
    for i, row in enumerate(numbers.tolist()):
        torch.testing.assert_close(some[i], explainer(x[i], [TEXTS[j] for j in row]).maps[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(scores[i], out.scores[i, row])
        torch.testing.assert_close(single[i], explainer(x[i], TEXTS[row[0]]).maps[0], rtol=1e-4, atol=1e-6)
    embeddings = model.encode_texts(TEXTS)
    torch.testing.assert_close(shown.maps(explainer.asks(3 * embeddings)), out.maps, rtol=1e-4, atol=1e-6)


def test_a_batch_of_words_states(model):
    x = torch.randn(3, 3, 64, 64)
    explainer = clipfast.Explainer(model, "tclip", aggregate="max")
    shown, asked = explainer.batch(x), explainer.asks(TEXTS)
    numbers = torch.tensor([[2, 0], [0, 1], [1, 1]])
    out = explainer(x, TEXTS)
    torch.testing.assert_close(shown.maps(asked), out.maps)
    torch.testing.assert_close(shown.maps(asked, numbers), out.maps[torch.arange(3)[:, None], numbers])
    torch.testing.assert_close(shown.scores(asked, numbers), out.scores[torch.arange(3)[:, None], numbers])


def test_a_batch_runs_the_tower_once_and_maps_come_from_its_features(model, monkeypatch):
    runs = []
    image = GradEclip.image
    monkeypatch.setattr(GradEclip, "image", lambda self, tower, x: runs.append(len(x)) or image(self, tower, x))
    explainer = clipfast.Explainer(model)
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    shown, asked = explainer.batch(pixels), explainer.asks(TEXTS)
    before = shown.maps(asked)
    values, weights = shown.features
    assert values.shape == (3, 16, 24) and weights.shape == (3, 16) and runs == [3]
    expected = explainer.features(list(pixels))
    torch.testing.assert_close(values, expected.values, rtol=1e-4, atol=1e-6)
    assert torch.equal(shown.maps(asked), expected.maps(TEXTS).maps)
    torch.testing.assert_close(shown.maps(asked), before, rtol=1e-4, atol=1e-7)
    assert explainer.batch_size(64, 64) == tower.CPU_TOKENS // 16


def test_a_batch_of_what_is_none(model):
    explainer = clipfast.Explainer(model)
    for x in (torch.zeros(3, 64, 64), torch.zeros(1, 1, 64, 64), torch.zeros(1, 3, 64, 64, dtype=torch.long)):
        with pytest.raises(InputError, match=r"a batch is \(B, 3, H, W\)"):
            explainer.batch(x)
    shown, asked = explainer.batch(torch.zeros(2, 3, 64, 64)), explainer.asks(TEXTS)
    for numbers in (torch.zeros(3, 1), torch.zeros(2, 0), torch.zeros(2)):
        with pytest.raises(TextError, match=r"numbers of texts must be \(2, P\)"):
            shown.maps(asked, numbers.long())
    # Row by row: what is not finite in one image is none of the others' business.
    x = torch.randn(3, 3, 64, 64)
    clean = explainer.batch(x).maps(asked)
    x[1, 0, 5, 5] = torch.nan
    dirty = explainer.batch(x)
    assert torch.equal(dirty.maps(asked)[[0, 2]], clean[[0, 2]])
    assert dirty.embeddings.isfinite().all(1).tolist() == [True, False, True]
    explainer.check_weights()
    explainer.check_features()
    with pytest.raises(InputError, match="rollout has no attribution features"):
        clipfast.Explainer(model, "rollout").check_features()


def test_features_of_garbage(tmp_path):
    (tmp_path / "f").write_bytes(b"garbage")
    for path in (tmp_path / "f", tmp_path / "missing"):
        with pytest.raises(InputError, match="does not hold attribution features"):
            clipfast.Features.load(path)


def test_words_of_a_text(model, images):
    explainer = clipfast.Explainer(model)
    words = explainer.words(images[0], TEXTS[2])
    assert words.words == TEXTS[2].split() and words.values.shape == (6,) and words.tokens == words.words
    assert (words.values >= 0).all() and words.score == pytest.approx(
        float(explainer(images[0], TEXTS[2]).scores), abs=1e-6
    )
    signed = clipfast.Explainer(model, signed=True).words(images[0], TEXTS)
    alone = clipfast.Explainer(model, signed=True).words(images[0], TEXTS[1])
    torch.testing.assert_close(signed[1].values, alone.values)
    assert [len(w.words) for w in signed] == [2, 3, 6] and any((w.values < 0).any() for w in signed)
    embedding = torch.randn(24)
    assert explainer.words(embedding, "a dog").score == pytest.approx(
        float(F.normalize(embedding, dim=0) @ model.encode_texts(["a dog"])[0]), abs=1e-6
    )


def test_maps_on_the_original_pixels(model, images):
    for resize in (None, "crop", "squash", "longest", "keep"):
        out = clipfast.explain(images, TEXTS, model=model, resize=resize)
        for image, resized in zip(images, out.resize(), strict=True):
            assert resized.shape == (3, image.height, image.width) and resized.isfinite().all()
    assert isinstance(out.maps, list) and out.maps[1].shape == (3, 8, 5)
    assert len(out.normalized()) == 5


def test_kept_aspect_in_one_size_is_one_tensor(model, images):
    out = clipfast.explain([images[0], images[3]], TEXTS, model=model, resize="keep")
    assert isinstance(out.maps, torch.Tensor) and out.maps.shape == (2, 3, 4, 4)
    with pytest.raises(InputError, match="one patch grid"):
        clipfast.Explainer(model, resize="keep").features(images)


def test_bad_images_do_not_stop_the_others(model, images, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 broken")
    mixed = [
        images[0],
        tmp_path / "broken.jpg",
        images[1],
        tmp_path / "missing.png",
        torch.full((3, 64, 64), torch.nan),
    ]
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        clipfast.explain(mixed, TEXTS, model=model)
    done: list[int] = []
    explainer = clipfast.Explainer(model)
    out = explainer(mixed, TEXTS, on_error="skip", progress=done.append)
    assert sorted(out.errors) == [1, 3, 4] and sum(done) == 5
    assert out.maps[[0, 2]].isfinite().all() and out.maps[[1, 3, 4]].isnan().all() and out.scores[1].isnan().all()
    good = explainer([images[0], images[1]], TEXTS)
    torch.testing.assert_close(out.maps[[0, 2]], good.maps)
    features = explainer.features(mixed, on_error="skip")
    features.save(tmp_path / "features.safetensors")
    for kept in (features, clipfast.Features.load(tmp_path / "features.safetensors")):
        again = kept.maps(features.embeddings[[0, 2]])
        assert {i: str(error) for i, error in again.errors.items()} == {i: str(e) for i, e in out.errors.items()}
    assert features.values[1].isnan().all()
    written = out.save(tmp_path / "out")
    assert len([p for p in written if p.suffix == ".npz"]) == 2
    assert [("error" in record) for record in out.to_json()] == [False, True, False, True, True]
    kept = clipfast.explain(mixed, TEXTS, model=model, resize="keep", on_error="skip")
    assert kept.maps[1].isnan().all() and kept.maps[2].shape == (3, 8, 5)


def test_saved_maps_come_back(model, images, tmp_path):
    out = clipfast.explain(images[:2], ["a dog", "a/dog?"], model=model)
    written = out.save(tmp_path)
    assert all(p.exists() for p in written) and len(set(written)) == len(written) == 6
    with np.load(tmp_path / "image-1.npz") as stored:
        np.testing.assert_array_equal(stored["maps"], out.maps[1].numpy())
        assert stored["texts"].tolist() == ["a dog", "a/dog?"] and stored["size"].tolist() == [120, 80]
    page = out.report(tmp_path / "report.html").read_text()
    assert "a/dog?" in page and not list(tmp_path.glob("*.partial"))


def snapshot(module: torch.nn.Module) -> dict:
    return {
        "weights": {k: v.clone() for k, v in module.state_dict().items()},
        "grads": [p.grad for p in module.parameters()],
        "flags": [p.requires_grad for p in module.parameters()],
        "versions": [p._version for p in module.parameters()],
        "training": [m.training for m in module.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in module.modules()],
        "keys": [sorted(m.__dict__) for m in module.modules()],
    }


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("mode", ["plain", "inference", "no_grad"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_users_model_is_untouched(build_clip, tokenizer, images, frozen, mode, layers):
    module = build_clip(layers=4, patch_dropout=0.5).train()
    module.requires_grad_(not frozen)
    module.visual.transformer.resblocks[1].register_forward_hook(lambda *_: pytest.fail("the user's module was called"))
    before = snapshot(module)
    with {"plain": torch.enable_grad, "inference": torch.inference_mode, "no_grad": torch.no_grad}[mode]():
        explainer = clipfast.Explainer(clipfast.load(module, tokenizer=tokenizer), layers=layers)
        out = explainer(images[:2], TEXTS)
        features = explainer.features(images[:2])
        words = explainer.words(images[0], "a dog")
    assert not out.maps.requires_grad and not features.values.requires_grad and not words.values.requires_grad
    after = snapshot(module)
    for name, value in before.pop("weights").items():
        assert torch.equal(after["weights"][name], value)
    after.pop("weights")
    assert before == after


def test_threads_share_one_model(model):
    x = [torch.randn(4, 3, 64, 64) for _ in range(4)]
    explainer = clipfast.Explainer(model, layers=2)
    expected = [explainer(b, TEXTS).maps for b in x]
    found: dict[int, torch.Tensor] = {}

    def work(i: int) -> None:
        for _ in range(5):
            found[i] = explainer(x[i], TEXTS[: 1 + i % 3]).maps

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        torch.testing.assert_close(found[i], expected[i][:, : 1 + i % 3])


def test_changed_weights_change_the_answer(model, build_clip, tokenizer):
    x = torch.randn(1, 3, 64, 64)
    explainer = clipfast.Explainer(model)
    rounded = clipfast.Explainer(model, precision="bfloat16")
    before = [e(x, TEXTS).scores for e in (explainer, rounded)]
    other = build_clip(seed=5)
    model.module.load_state_dict(other.state_dict())
    expected = clipfast.explain(x, TEXTS, model=clipfast.load(other, tokenizer=tokenizer)).scores
    assert (before[0] - expected).abs().max() > 1e-3
    torch.testing.assert_close(explainer(x, TEXTS).scores, expected)
    torch.testing.assert_close(rounded(x, TEXTS).scores, expected, rtol=0, atol=2e-2)


def test_precision(model, build_clip, tokenizer):
    x = torch.randn(2, 3, 64, 64)
    exact = clipfast.explain(x.double(), TEXTS, model=clipfast.load(build_clip().double(), tokenizer=tokenizer))
    assert exact.maps.dtype == torch.float64 and exact.scores.dtype == torch.float64
    for precision, tolerance in ((None, 1e-5), ("float32", 1e-5), ("auto", 2e-2), ("bfloat16", 2e-2)):
        out = clipfast.explain(x, TEXTS, model=model, precision=precision)
        assert out.maps.dtype == torch.float32
        assert (out.maps - exact.maps).norm() / exact.maps.norm() < tolerance
    half = clipfast.load(build_clip().half(), tokenizer=tokenizer)
    out = clipfast.explain(x, TEXTS, model=half)
    assert (out.maps - exact.maps).norm() / exact.maps.norm() < 2e-2


def test_odd_tensors(model):
    base = torch.randn(2, 64, 64, 3)
    strided = base.permute(0, 3, 1, 2)
    torch.testing.assert_close(
        clipfast.explain(strided, TEXTS, model=model).maps,
        clipfast.explain(strided.contiguous(), TEXTS, model=model).maps,
    )
    asked = torch.randn(1, 3, 64, 64, requires_grad=True)
    assert not clipfast.explain(asked, torch.randn(2, 24, requires_grad=True), model=model).maps.requires_grad


def test_a_batch_is_not_copied_and_rows_in_any_order_are_right(model):
    x = torch.randn(6, 3, 64, 64)
    expected = clipfast.explain(x, TEXTS, model=model).maps
    assert api._together(list(x[1:4])).data_ptr() == x[1].data_ptr()
    for order in ([5, 3, 1], [0, 2, 4], [2, 2, 2], [1, 2, 4], [4]):
        rows = [x[i] for i in order]
        assert torch.equal(api._together(rows), x[order])
        torch.testing.assert_close(clipfast.explain(rows, TEXTS, model=model).maps, expected[order])


def test_embeddings_of_any_length_mean_the_same(model):
    x, unit = torch.randn(1, 3, 64, 64), F.normalize(torch.randn(5, 24), dim=-1)
    expected = clipfast.explain(x, unit, model=model)
    long = clipfast.explain(x, unit * torch.tensor([1, 1, 1, 1, 30.0])[:, None], model=model)
    torch.testing.assert_close(long.maps, expected.maps)
    torch.testing.assert_close(long.scores, expected.scores)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no image to explain"),
        (7, "a int is no image"),
        (torch.zeros(64, 64), "is no image: pass .3, H, W."),
        (torch.zeros(2, 64, 64, 3), "is no image: pass .3, H, W."),
        (torch.zeros(3, 64, 64, dtype=torch.int64), "torch.int64 is no image"),
        (torch.zeros(3, 8, 64), "holds no patch"),
        (torch.full((3, 64, 64), torch.inf), "NaN or infinite pixels"),
        (np.zeros((4, 4, 3), dtype=np.float64), "array of float64"),
        ("nothing/*.png", "no image found"),
        (b"garbage", "the image in memory"),
    ],
)
def test_images_that_cannot_be_used(model, images, message):
    with pytest.raises(InputError, match=message):
        clipfast.explain(images, TEXTS, model=model)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "there is no text"),
        (["a dog", "  "], "text 1 is empty"),
        (["a dog", 3], "text 1 is a int"),
        (torch.zeros(0, 24), "there is no text"),
        (torch.zeros(2, 24), "finite and not zero"),
        (torch.full((2, 24), torch.nan), "finite and not zero"),
        (torch.zeros(2, 25), r"shape \(P, 24\)"),
        (torch.zeros(24), r"shape \(P, 24\)"),
        (torch.zeros(2, 24, dtype=torch.long), "must be floats"),
    ],
)
def test_texts_that_cannot_be_used(model, texts, message):
    with pytest.raises(TextError, match=message):
        clipfast.explain(torch.randn(1, 3, 64, 64), texts, model=model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "grad_eclp"}, "did you mean 'grad_eclip'"),
        ({"layer": 2}, "did you mean 'layers'"),
        ({"precision": "fp8"}, "precision 'fp8' is unknown"),
        ({"resize": "stretch"}, "resize must be one of"),
        ({"on_error": "ignore"}, "'raise' or 'skip'"),
        ({"pairs": True}, "2 images and 3 texts"),
    ],
)
def test_arguments_that_cannot_be_used(model, arguments, message):
    with pytest.raises(InputError, match=message):
        clipfast.explain(torch.randn(2, 3, 64, 64), TEXTS, model=model, **arguments)


def test_weights_with_nan_are_named(build_clip, tokenizer):
    module = build_clip()
    with torch.no_grad():
        module.visual.transformer.resblocks[1].mlp.c_fc.weight[3, 4] = torch.nan
    explainer = clipfast.Explainer(clipfast.load(module, tokenizer=tokenizer))
    with pytest.raises(ModelError, match=r"first in visual.transformer.resblocks.1.mlp.c_fc.weight"):
        explainer(torch.randn(1, 3, 64, 64), TEXTS)
    with torch.no_grad():
        module.text_projection[0, 0] = torch.inf
    with pytest.raises(ModelError, match="hold NaN or infinite values"):
        explainer.words(torch.randn(24), "a dog")


def test_more_maps_than_memory(model, monkeypatch):
    monkeypatch.setattr(api, "_memory", lambda device: 300)
    with pytest.raises(InputError, match=r"2 x 3 maps need .* keep features\(images\)"):
        clipfast.explain(torch.randn(2, 3, 64, 64), TEXTS, model=model)


def test_copying_an_explained_module_still_works(model, images):
    clipfast.explain(images[0], TEXTS, model=model)
    clone = copy.deepcopy(model.module)
    torch.testing.assert_close(clone(torch.ones(1, 3, 64, 64))[0], model.module(torch.ones(1, 3, 64, 64))[0])


class Pixels(Explained):
    """Each prompt's map: the input's red, times the prompt's number, and a companion's first number if there is one."""

    def __init__(self, z, red):
        self.z, self.red = z, red

    def maps(self, texts, *, out=None, companions=None):
        numbers = torch.arange(1, texts.shape[-2] + 1, dtype=self.red.dtype)
        found = self.red.flatten(1)[:, None] * numbers[None, :, None] * (1 if companions is None else companions[0, 0])
        self.delta = self.z[:, : len(numbers)]
        return found if out is None else out.copy_(found)

    def extras(self):
        return {"delta": self.delta}


class PixelMethod(Method):
    def image(self, tower, x):
        return Pixels(tower.encode(x), x[:, 0])

    def grid(self, tower, size):
        return size


class Compared(PixelMethod):
    def companions(self, prompts):
        return ("", "a thing") if prompts == 1 else ()


@pytest.fixture
def pixel_methods(monkeypatch):
    monkeypatch.setitem(METHODS, "pixels", PixelMethod)
    monkeypatch.setitem(METHODS, "compared", Compared)
    monkeypatch.setattr(PixelMethod, "parameters", classmethod(lambda cls: {}))


def test_maps_of_pixels_and_extras_everywhere(model, pixel_methods, tmp_path):
    # 70 columns hold four patches of 16 and a rest: a map of pixels covers the rest, too.
    x = torch.randn(3, 3, 64, 70)
    x[1, 0, 5, 68] = 9.0
    out = clipfast.explain(x, TEXTS, model=model, method="pixels")
    assert out.maps.shape == (3, 3, 64, 70)
    torch.testing.assert_close(out.maps[:, 1], 2 * x[:, 0])
    assert out.extras["delta"].shape == (3, 3)
    records = json.loads(json.dumps(out.to_json()))
    assert records[1]["prompts"][0]["peak"] == [68.5, 5.5]
    assert [p["delta"] for p in records[2]["prompts"]] == pytest.approx(out.extras["delta"][2].tolist())
    assert [m.shape for m in out.resize()] == [(3, 64, 70)] * 3
    written = out.save(tmp_path)
    with np.load(written[1]) as stored:
        np.testing.assert_array_equal(stored["delta"], out.extras["delta"][1].numpy())
        assert stored["maps"].shape == (3, 64, 70)


def test_a_large_map_makes_a_small_page(build_clip, tokenizer, pixel_methods, tmp_path):
    model = clipfast.load(build_clip(image_size=480), tokenizer=tokenizer)
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    out = clipfast.explain([noise], TEXTS, model=model, method="pixels", resize="squash")
    assert out.maps.shape == (1, 3, 480, 480)
    page = out.report(tmp_path / "report.html").read_text()
    assert '"extras":{"delta":"' in page and '"palette":"signed"' in page
    maps = [part.split('"')[0] for part in page.split('"map":"')[1:]]
    assert len(maps) == 3 and all(len(each) < 20_000 for each in maps)


def test_companions_are_encoded_once_and_given_to_the_method(model, pixel_methods, monkeypatch):
    x = torch.randn(2, 3, 64, 64)
    explainer = clipfast.Explainer(model, "compared")
    asked = []
    encode = model.encode_texts
    monkeypatch.setattr(
        model, "encode_texts", lambda texts, *a, **k: asked.append(tuple(texts)) or encode(texts, *a, **k)
    )
    one, own = explainer(x, TEXTS[:1]), explainer(x, TEXTS[:2], pairs=True)
    assert asked == [(TEXTS[0],), ("", "a thing"), tuple(TEXTS[:2])]
    ids = model.tokenizer(["", "a thing"])
    expected = model.module.encode_text(ids, normalize=True)[0, 0].detach()
    for out in (one, own):
        torch.testing.assert_close(out.maps[:, 0], x[:, 0] * expected)
    torch.testing.assert_close(explainer(x, TEXTS).maps[:, 0], x[:, 0])
    with pytest.raises(TextError, match="text 0 is empty"):
        explainer(x, [""])
    mute = clipfast.Explainer(clipfast.load(model.module), "compared")
    with pytest.raises(TextError, match=r"compared compares so few texts with '' and 'a thing'.* pass tokenizer="):
        mute(x, torch.randn(1, 24))
    mute(x, torch.randn(2, 24))


def test_word_maps_are_saved_shown_and_said(model, images, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"broken")
    explainer = clipfast.Explainer(model, "tclip")
    out = explainer([images[1], tmp_path / "broken.png"], TEXTS, words=True, on_error="skip")
    words = [text.split() for text in TEXTS]
    assert [each.texts for each in out.word_maps] == words
    assert all(each.maps[1].isnan().all() and 1 in each.errors for each in out.word_maps)
    record, failed = json.loads(json.dumps(out.to_json()))
    assert [[w["text"] for w in each["words"]] for each in record["word_maps"]] == words and "error" in failed
    assert record["word_maps"][1]["words"][2]["score"] == pytest.approx(float(out.word_maps[1].scores[0, 2]))
    written = out.save(tmp_path / "out")
    names = [path.name for path in written]
    assert names[:3] == ["image-0.npz", "image-0--a-dog.png", "image-0--a-dog--words.png"] and len(names) == 7
    with np.load(written[0]) as stored:
        assert stored["words"].tolist() == [word for some in words for word in some]
        assert stored["word_texts"].tolist() == [0] * 2 + [1] * 3 + [2] * 6
        np.testing.assert_array_equal(stored["word_maps"][2:5], out.word_maps[1].maps[0].numpy())
    page = out.report(tmp_path / "report.html").read_text()
    shown = json.loads(page.split('id="data">')[1].split("</script>")[0])["items"][0]["prompts"]
    assert [[w["text"] for w in p["strip"]] for p in shown] == words
    strip = out.word_maps[2].strip(0, cell=60, columns=4)
    assert strip.width < 4 * 60 and strip.height > 2 * 60
    with pytest.raises(InputError, match="normalised tensor"):
        explainer.word_maps(torch.randn(3, 64, 64), "a dog").strip(0)


def test_words_say_whether_they_are_signed(model, images):
    assert not clipfast.Explainer(model).words(images[0], TEXTS[2]).signed
    assert clipfast.Explainer(model, signed=True).words(images[0], TEXTS[2]).signed
