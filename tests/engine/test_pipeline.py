"""Images in, maps out: the same whatever the threads do, and whatever is wrong with other images."""

from __future__ import annotations

import io
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import clipfast
from clipfast.engine import pipeline
from clipfast.engine.base import Explained, Failure, Item
from clipfast.engine.pipeline import Clock, explained
from clipfast.engine.texts import Prompts
from clipfast.errors import ImageError, InputError, ModelError, TextError

TEXTS = ("a dog", "a red car", "two small birds on a wire", "snow")


@pytest.fixture
def model(build_clip, tokenizer) -> clipfast.Model:
    return clipfast.load(build_clip(), tokenizer=tokenizer)


@pytest.fixture
def explainer(model) -> clipfast.Explainer:
    return clipfast.Explainer(model)


def encoded(seed: int, size: tuple[int, int] = (40, 50)) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def item(number: int, data: bytes | None = None, **columns: Any) -> Item:
    data = encoded(number) if data is None else data
    return Item(f"image {number}", lambda: data, columns)


def lazily(item: Item, rng: random.Random) -> Item:
    """The same image, there after a while."""
    pause = rng.random() * 0.004

    def read() -> bytes:
        time.sleep(pause)
        return item.read()

    return Item(item.key, read, item.columns)


def failing(key: str, error: BaseException) -> Item:
    def read() -> bytes:
        raise error

    return Item(key, read)


Found = dict[str, dict[str, np.ndarray]]


def by_key(outcome: Iterable[Explained | Failure]) -> tuple[Found, dict[str, str]]:
    """What each image got, and why others got nothing; no key may come twice."""
    found: Found = {}
    failures: dict[str, str] = {}
    for part in outcome:
        if isinstance(part, Failure):
            assert part.key not in failures
            failures[part.key] = part.reason
            continue
        assert len(part.keys) == len(part.geometries) == len(part.maps) == len(part.scores) == len(part.prompts)
        assert part.maps.dtype == part.scores.dtype == np.float32
        for i, key in enumerate(part.keys):
            assert key not in found
            found[key] = {"maps": part.maps[i], "scores": part.scores[i], "prompts": part.prompts[i]}
            if part.features is not None:
                found[key] |= dict(zip(("values", "weights", "z"), (f[i] for f in part.features), strict=True))
    assert not set(found) & set(failures)
    return found, failures


def same(first: Found, second: Found) -> bool:
    return list(first) == list(second) and all(
        np.array_equal(first[key][name], second[key][name]) for key in first for name in first[key]
    )


def no_threads_left() -> bool:
    deadline = time.monotonic() + 5
    while any(thread.name.startswith(("decode", "list")) for thread in threading.enumerate()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


@pytest.mark.parametrize("resize", ["crop", "squash", "longest", "keep"])
def test_maps_are_the_explainers(model, resize):
    explainer = clipfast.Explainer(model, resize=resize)
    datas = {f"image {i}": encoded(i, (40 + i % 3 * 20, 50)) for i in range(11)}
    items = [item(i, datas[f"image {i}"]) for i in range(11)]
    outcome = list(explained(items, explainer, Prompts(TEXTS), exact=True, batch=4))
    found, failures = by_key(outcome)
    assert not failures and set(found) == set(datas)
    geometries = {k: g for part in outcome for k, g in zip(part.keys, part.geometries, strict=True)}
    for key, data in datas.items():
        expected = explainer(data, TEXTS)
        np.testing.assert_allclose(found[key]["maps"], expected.maps[0], rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(found[key]["scores"], expected.scores[0], rtol=1e-5, atol=1e-6)
        assert found[key]["prompts"].tolist() == [0, 1, 2, 3]
        assert geometries[key] == expected.geometries[0]


@pytest.mark.parametrize("resize", ["crop", "keep"])
def test_threads_and_time_change_nothing(model, resize):
    explainer = clipfast.Explainer(model, resize=resize)
    sizes = random.Random(5)
    items = [item(i, encoded(i, sizes.choice([(40, 50), (70, 50), (50, 70), (40, 90)]))) for i in range(40)]
    items[7], items[21] = item(7, b"garbage"), failing("image 21", FileNotFoundError(2, "No such file or directory"))
    results = []
    for seed, workers in enumerate((1, 2, 5)):
        rng = random.Random(seed)
        outcome = explained((lazily(i, rng) for i in items), explainer, Prompts(TEXTS), workers=workers, batch=6)
        results.append(by_key(outcome))
    assert len(results[0][0]) == 38
    assert all(same(results[0][0], other[0]) and results[0][1] == other[1] for other in results[1:])


def test_a_failure_leaves_the_others_as_they_were(explainer):
    items = [item(i) for i in range(20)]
    whole, _ = by_key(explained(items, explainer, Prompts(TEXTS), batch=8))
    for bad in ({0}, {3, 4, 12}, set(range(8)), {19}):
        some = [item(i, b"") if i in bad else each for i, each in enumerate(items)]
        found, failures = by_key(explained(some, explainer, Prompts(TEXTS), batch=8))
        assert set(failures) == {f"image {i}" for i in bad}
        assert same(found, {key: value for key, value in whole.items() if key not in failures})


def test_every_failure_has_its_reason(explainer):
    items = [
        item(0),
        item(1, b""),
        item(2, b"<html>"),
        item(3, encoded(3)[:300]),
        failing("image 4", PermissionError(13, "Permission denied")),
        failing("image 5", ImageError("image 5 is not to be had.")),
        failing("image 6", KeyError("bucket")),
        failing("image 7", RuntimeError("connection\n  lost.")),
        failing("image 8", TimeoutError()),
        Failure("image 9", "image 9 is outside of the tar."),
        item(10),
    ]
    found, failures = by_key(explained(iter(items), explainer, Prompts(TEXTS)))
    assert list(found) == ["image 0", "image 10"]
    assert failures == {
        "image 1": "image 1 is empty: 0 bytes.",
        "image 2": "image 2 is a web page or an SVG, not an image of pixels: save the picture itself as PNG or JPEG.",
        "image 3": failures["image 3"],
        "image 4": "image 4 cannot be read: Permission denied.",
        "image 5": "image 5 is not to be had.",
        "image 6": "image 6 cannot be read: 'bucket'.",
        "image 7": "image 7 cannot be read: connection lost.",
        "image 8": "image 8 cannot be read: TimeoutError.",
        "image 9": "image 9 is outside of the tar.",
    }
    assert failures["image 3"].startswith("image 3 ")


@pytest.mark.parametrize("method", ["grad_eclip", "clip_surgery"])
def test_top_explains_the_best_of_each_image(model, method):
    explainer = clipfast.Explainer(model, method)
    items = [item(i) for i in range(9)]
    found, _ = by_key(explained(items, explainer, Prompts(TEXTS, top=2), exact=True, batch=4))
    for each in items:
        scores = explainer(each.read(), TEXTS).scores[0]
        best = scores.topk(2).indices.tolist()
        one = found[each.key]
        assert one["prompts"].tolist() == best
        np.testing.assert_allclose(one["scores"], scores[best], atol=1e-6)
        expected = explainer(each.read(), [TEXTS[i] for i in best]).maps[0]
        np.testing.assert_allclose(one["maps"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "parameters"), [("grad_eclip", {}), ("clip_surgery", {}), ("tclip", {"aggregate": "max"})]
)
def test_texts_of_each_images_own(model, method, parameters):
    explainer = clipfast.Explainer(model, method, **parameters)
    texts = [["a dog"], ["snow", "a dog"], ["a red car"], ["two birds", "a wire"], ["snow"]]
    items = [item(i, caption=own) for i, own in enumerate(texts)]
    outcome = list(explained(items, explainer, Prompts(column="caption"), exact=True))
    found, failures = by_key(outcome)
    assert not failures and sorted(len(part.texts) for part in outcome) == [2, 3]
    for each, own in zip(items, texts, strict=True):
        expected = explainer(each.read(), own)
        np.testing.assert_allclose(found[each.key]["maps"], expected.maps[0], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found[each.key]["scores"], expected.scores[0], atol=1e-6)
        (part,) = [part for part in outcome if each.key in part.keys]
        assert part.texts[part.keys.index(each.key)] == own
        assert found[each.key]["prompts"].tolist() == list(range(len(own)))


def test_texts_that_cannot_be_used_cost_their_image_alone(build_clip, tokenizer):
    def picky(texts: list[str]) -> torch.Tensor:
        if any("xyzzy" in text for text in texts):
            raise TextError("the word 'xyzzy' is unknown.")
        return tokenizer(texts)

    picky.encode, picky.decoder = tokenizer.encode, tokenizer.decoder
    explainer = clipfast.Explainer(clipfast.load(build_clip(), tokenizer=picky))
    long = "word " * 40
    captions = ["a dog", "an xyzzy", None, long, "  ", 7, "snow"]
    items = [item(i, caption=caption) for i, caption in enumerate(captions)]
    found, failures = by_key(explained(items, explainer, Prompts(column="caption")))
    assert list(found) == ["image 0", "image 3", "image 6"]
    assert failures["image 1"] == "image 1: the word 'xyzzy' is unknown."
    assert set(failures) == {"image 1", "image 2", "image 4", "image 5"}
    only, _ = by_key(explained([items[1]], explainer, Prompts(column="caption")))
    assert not only


def test_an_image_that_cannot_be_read_keeps_its_seat_among_texts_of_their_own(explainer):
    items = [item(i, caption="a dog" if i % 2 else ["snow", "a dog"]) for i in range(12)]
    whole, _ = by_key(explained(items, explainer, Prompts(column="caption"), batch=3))
    items[4] = item(4, b"", caption=["snow", "a dog"])
    found, failures = by_key(explained(items, explainer, Prompts(column="caption"), batch=3))
    assert set(failures) == {"image 4"}
    assert same(found, {key: value for key, value in whole.items() if key != "image 4"})


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("grad_eclip", {}), ("grad_eclip", {"layers": 2}), ("mask_clip", {}), ("tclip", {"threshold": "none"})],
)
@pytest.mark.parametrize("top", [None, 2])
def test_features_come_with_the_maps_that_they_give(model, method, parameters, top):
    explainer = clipfast.Explainer(model, method, **parameters)
    items = [item(i) for i in range(5)]
    outcome = list(explained(items, explainer, Prompts(TEXTS, top=top), exact=True, features=True))
    found, _ = by_key(outcome)
    expected = explainer.features([each.read() for each in items])
    assert {part.relu for part in outcome} == {expected.relu}
    again = expected.maps(list(TEXTS))
    for i, each in enumerate(items):
        one = found[each.key]
        np.testing.assert_allclose(one["values"], expected.values[i], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(one["weights"], expected.weights[i], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(one["z"], expected.embeddings[i], atol=1e-6)
        np.testing.assert_allclose(one["maps"], again.maps[i, one["prompts"]], rtol=1e-3, atol=1e-6)


def test_weights_that_are_not_finite_are_the_models_error(build_clip, tokenizer):
    module = build_clip()
    explainer = clipfast.Explainer(clipfast.load(module, tokenizer=tokenizer))
    with torch.no_grad():
        module.visual.ln_post.bias[3] = torch.nan
    with pytest.raises(ModelError, match=r"first in visual.ln_post.bias: load intact weights"):
        list(explained([item(0)], explainer, Prompts(TEXTS)))
    assert no_threads_left()


def test_an_image_that_overflows_costs_itself_alone(explainer, monkeypatch):
    items = [item(i) for i in range(9)]
    whole, _ = by_key(explained(items, explainer, Prompts(TEXTS), batch=4))
    ask = explainer.batch
    numbers = iter(range(0, 9, 4))

    def poisoned(x: torch.Tensor) -> Any:
        first = next(numbers)
        x = clipfast.data.geometry.normalize(x, explainer.spec)
        x[[i for i in range(len(x)) if first + i in (2, 8)]] = torch.nan
        return ask(x)

    monkeypatch.setattr(explainer, "batch", poisoned)
    found, failures = by_key(explained(items, explainer, Prompts(TEXTS), batch=4))
    reason = "makes CLIP overflow in float32."
    assert failures == {f"image {i}": f"image {i} {reason}" for i in (2, 8)}
    assert same(found, {key: value for key, value in whole.items() if key not in failures})


def test_an_overflow_in_half_precision_says_what_to_do(model, monkeypatch):
    explainer = clipfast.Explainer(model, precision="bfloat16")
    ask = explainer.batch
    monkeypatch.setattr(explainer, "batch", lambda x: ask(torch.full(x.shape, torch.inf)))
    (failure,) = explained([item(0)], explainer, Prompts(TEXTS))
    assert failure == Failure("image 0", "image 0 makes CLIP overflow in bfloat16: use precision='float32'.")


def test_what_the_model_raises_is_raised(explainer, monkeypatch):
    def broken(x: torch.Tensor) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(explainer, "batch", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(explained([item(i) for i in range(50)], explainer, Prompts(TEXTS), workers=3, batch=2))
    assert no_threads_left()


def test_what_listing_raises_is_raised_after_what_came_before(explainer):
    def items() -> Iterator[Item]:
        yield from (item(i) for i in range(4))
        raise InputError("the table is damaged.")

    found = explained(items(), explainer, Prompts(TEXTS), batch=4)
    assert next(found).keys == [f"image {i}" for i in range(4)]
    with pytest.raises(InputError, match="the table is damaged"):
        list(found)
    assert no_threads_left()


def test_leaving_early_ends_the_threads_and_the_listing(explainer):
    closed = threading.Event()

    def items() -> Iterator[Item]:
        try:
            yield from (item(i % 5) for i in range(10_000))
        finally:
            closed.set()

    found = explained(items(), explainer, Prompts(TEXTS), workers=2, batch=2)
    next(found)
    found.close()
    assert no_threads_left() and closed.wait(5)


def test_no_more_is_read_ahead_than_two_batches(explainer):
    read, lock = [0], threading.Lock()
    data = encoded(0)

    def counted() -> bytes:
        with lock:
            read[0] += 1
        return data

    found = explained((Item(str(i), counted) for i in range(400)), explainer, Prompts(TEXTS), workers=2, batch=10)
    for batches in range(1, 10):
        next(found)
        time.sleep(0.005)
        assert read[0] <= 10 * batches + 2 * 10
    found.close()


def test_nothing_gives_nothing(explainer):
    clock = Clock()
    assert list(explained([], explainer, Prompts(TEXTS), clock=clock)) == []
    assert clock.model == 0
    only = [Failure("a", "a is gone.")]
    assert list(explained(only, explainer, Prompts(TEXTS))) == only


def test_the_clock_knows_who_waited_for_whom(explainer, monkeypatch):
    clock, ask = Clock(), explainer.batch

    def slowly(x: torch.Tensor) -> Any:
        time.sleep(0.05)
        return ask(x)

    def late() -> bytes:
        time.sleep(0.1)
        return encoded(0)

    monkeypatch.setattr(explainer, "batch", slowly)
    list(explained([Item("a", late)], explainer, Prompts(TEXTS), clock=clock))
    assert 0.1 <= clock.decode < 1 and 0.05 <= clock.model < 1


def test_arguments_are_checked(model, explainer):
    for name in ("workers", "batch"):
        with pytest.raises(InputError, match=f"{name}=0 must be at least 1"):
            list(explained([], explainer, Prompts(TEXTS), **{name: 0}))
    with pytest.raises(InputError, match="rollout has no attribution features"):
        list(explained([], clipfast.Explainer(model, "rollout"), Prompts(TEXTS), features=True))


def test_shared_texts_are_encoded_once_for_all_shards(model):
    explainer = clipfast.Explainer(model)
    encode: Callable[..., Any] = model.encode_texts
    asked: list[list[str]] = []
    model.encode_texts = lambda texts, *args, **more: asked.append(list(texts)) or encode(texts, *args, **more)
    classes = Prompts(("dog", "car"), templates=("a photo of a {}.", "a {}."))
    for _ in range(3):
        list(explained([item(0)], explainer, classes))
    assert len(asked) == 1
    list(explained([item(0)], explainer, Prompts(("dog", "bird"), templates=("a photo of a {}.", "a {}."))))
    assert len(asked) == 2


def test_images_of_many_sizes_wait_in_few_batches(model, monkeypatch):
    explainer = clipfast.Explainer(model, resize="keep")
    sizes = [(16 * a, 16 * b) for a in range(1, 6) for b in range(1, 6)]
    items = [item(i, encoded(i % 25, sizes[i * 7 % 25])) for i in range(100)]
    waited = []
    ask = pipeline._Shard.ask
    monkeypatch.setattr(
        pipeline._Shard, "ask", lambda self, bucket: waited.append(len(bucket.seats)) or ask(self, bucket)
    )
    found, _ = by_key(explained(items, explainer, Prompts(TEXTS), batch=8))
    assert len(found) == 100 and sum(waited) == 100
    # 33 wait before the first bucket goes; among 25 sizes none is full by then.
    assert len(waited) > 25 and max(waited) <= 8


def test_maps_of_very_many_prompts_come_in_smaller_batches(explainer, monkeypatch):
    monkeypatch.setattr(pipeline, "_ELEMENTS", 4 * 16 * 3)
    outcome = list(explained([item(i) for i in range(7)], explainer, Prompts(TEXTS)))
    assert [len(part.keys) for part in outcome] == [3, 3, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("prompts", [Prompts(TEXTS), Prompts(TEXTS, top=2)])
def test_on_a_gpu_batches_overlap_and_nothing_changes(build_clip, tokenizer, prompts):
    explainer = clipfast.Explainer(clipfast.load(build_clip().cuda(), tokenizer=tokenizer))
    items = [item(i, b"" if i == 5 else None) for i in range(50)]
    results = [by_key(explained(items, explainer, prompts, workers=w, batch=8, features=True)) for w in (1, 8)]
    assert same(results[0][0], results[1][0]) and set(results[0][1]) == set(results[1][1]) == {"image 5"}
    onto_cpu = clipfast.Explainer(clipfast.load(build_clip(), tokenizer=tokenizer))
    for key, one in by_key(explained(items, onto_cpu, prompts, features=True))[0].items():
        np.testing.assert_allclose(results[0][0][key]["scores"], one["scores"], atol=1e-4)
        np.testing.assert_allclose(results[0][0][key]["maps"], one["maps"], rtol=1e-2, atol=1e-5)


def test_memory_is_flat(build_clip, tokenizer):
    explainer = clipfast.Explainer(clipfast.load(build_clip(image_size=32, layers=1), tokenizer=tokenizer))
    datas = [encoded(i, (20, 24)) for i in range(16)]
    items = (Item(str(i), lambda i=i: datas[i % 16] if i % 50 else b"") for i in range(3000))
    resident, seen = [], 0
    for part in explained(items, explainer, Prompts(TEXTS), batch=50):
        seen += len(part.keys) if isinstance(part, Explained) else 1
        resident.append(_resident())
    assert seen == 3000
    assert resident[-1] - resident[len(resident) // 3] < 8_000_000


def _resident() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096
