from __future__ import annotations

import io
import itertools
import random
import tarfile
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from clipfast.data.geometry import InputSpec
from clipfast.engine.base import Failure, Item
from clipfast.errors import InputError, TextError
from clipfast.finetune.data import Indexed, Loader, Order, Place, Streamed, open_images

SPEC = InputSpec((32, 32), (8, 8))


def png(colour: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), (colour, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def tars(tmp_path: Path) -> str:
    """Three tars of 5, 1 and 7 pictures."""
    number = 0
    for t, count in enumerate((5, 1, 7)):
        with tarfile.open(tmp_path / f"{t}.tar", "w") as archive:
            for _ in range(count):
                data = png(number)
                entry = tarfile.TarInfo(f"{number:03d}.png")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
                number += 1
    return str(tmp_path / "*.tar")


def keys(order: Order, count: int, place: Place | None = None) -> list[str]:
    return [item.key for item, _ in islice(order.items(place or Place()), count)]


def orders(photos: Path, tars: str) -> list[Order]:
    return [open_images(str(photos)), *(open_images(tars, shuffle=size) for size in (3, 4, 13, 100))]


def test_an_epoch_has_every_image_once_and_another_order_than_the_one_before(photos: Path, tars: str) -> None:
    for order in orders(photos, tars):
        assert order.images is not None
        found = keys(order, 3 * order.images)
        epochs = [found[i : i + order.images] for i in range(0, len(found), order.images)]
        assert all(len(set(epoch)) == order.images for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 3


def test_it_goes_on_from_any_place_as_if_it_had_come_there(photos: Path, tars: str) -> None:
    for order in orders(photos, tars):
        count = 3 * (order.images or 0)
        whole = [(item.key, place) for item, place in islice(order.items(Place()), count)]
        for i, (_, place) in enumerate(whole):
            place = Place(*place.to_json())
            assert (
                keys(order, 5, place)
                == [key for key, _ in whole[i + 1 : i + 6]]
                + keys(order, 5, whole[-1][1])[: max(0, 5 - (count - i - 1))]
            )
        assert whole[order.images - 1][1] == Place(1)


def test_the_seed_decides_the_order(photos: Path, tars: str) -> None:
    for images in (str(photos), tars):
        first, again, other = (keys(open_images(images, seed=seed), 8) for seed in (1, 1, 2))
        assert first == again != other


def test_only_the_shard_of_a_place_is_read_to_find_it(tars: str, monkeypatch: pytest.MonkeyPatch) -> None:
    order = open_images(tars, shuffle=3)
    read: list[int] = []
    items = type(order.source).items

    def counted(self: Any, shard: Any) -> Any:
        read.append(shard.number)
        return items(self, shard)

    monkeypatch.setattr(type(order.source), "items", counted)
    shards = [place.shard for _, place in islice(order.items(Place()), 12)]
    before = list(dict.fromkeys(read))
    at = [place for _, place in islice(order.items(Place()), 12)][-1]
    read.clear()
    keys(order, 1, at)
    assert at.shard == shards[-1] == 2
    assert read == before[2:]


def test_shards_are_shuffled_and_then_windows_of_their_images(tars: str) -> None:
    order = open_images(tars, shuffle=4)
    found = keys(order, 39)
    shards = [[item.key for item in order.source.items(shard)] for shard in order.source.shards()]
    for epoch in (found[:13], found[13:26], found[26:]):
        begun = sorted(range(3), key=lambda number: min(map(epoch.index, shards[number])) // 4)
        streams = [[key for number in way for key in shards[number]] for way in itertools.permutations(begun)]
        windows = [[set(one[i : i + 4]) for i in range(0, 13, 4)] for one in (epoch, *streams)]
        assert windows[0] in windows[1:]


def test_tables_and_scenes(tmp_path: Path) -> None:
    table = pa.table({"image": [png(i) for i in range(9)], "label": [f"a {i}" for i in range(9)]})
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    order = open_images(str(tmp_path / "t.parquet"), columns=("label",))
    assert isinstance(order, Streamed) and order.images == 9
    assert len(set(keys(order, 9))) == 9
    scenes = open_images("scenes:3:70", columns=("caption",))
    assert isinstance(scenes, Indexed) and scenes.images == 70
    assert len(set(keys(scenes, 70))) == 70
    item, _ = next(scenes.items(Place()))
    assert isinstance(item, Item)
    assert Image.open(io.BytesIO(item.read())).size == (96, 96)
    assert isinstance(item.columns["caption"][0], str)
    assert item.columns.get("label") is None
    with pytest.raises(InputError, match="no column 'label'"):
        open_images("scenes:3", columns=("label",))


def test_a_listing_that_changed_is_another_configuration(photos: Path) -> None:
    before = open_images(str(photos)).config()
    assert open_images(str(photos)).config() == before
    (photos / "0.png").rename(photos / "00.png")
    assert open_images(str(photos)).config() != before


def test_nothing_to_train_on(tmp_path: Path, tars: str) -> None:
    with pytest.raises(InputError):
        open_images(str(tmp_path / "none"))
    with pytest.raises(InputError, match="shuffle=0"):
        open_images(tars, shuffle=0)
    assert open_images(tars, counted=False).images is None


def steps(order: Order, count: int, **given: Any) -> list[Any]:
    options = {"batch": 4, "micro": 2, "workers": 3, "read": lambda item: None, **given}
    found = Loader(order, SPEC, **options).steps(options.pop("place", Place()))
    try:
        return list(islice(found, count))
    finally:
        found.close()


def named(loaded: list[Any]) -> list[list[list[str]]]:
    return [[[read.key for read in part] for part in one.parts] for one in loaded]


def test_steps_do_not_depend_on_threads_and_their_timing(photos: Path) -> None:
    def slow(item: Item) -> str:
        time.sleep(random.random() / 100)
        return item.key

    order = open_images(str(photos))
    plain = steps(order, 8, workers=1)
    hurried = steps(order, 8, workers=8, read=slow)
    assert named(plain) == named(hurried)
    assert [one.place for one in plain] == [one.place for one in hurried]
    assert all(read.extra == read.key for one in hurried for part in one.parts for read in part)
    pixels = [read.prepared.pixels for one in plain for part in one.parts for read in part]
    again = [read.prepared.pixels for one in hurried for part in one.parts for read in part]
    assert all(a.equal(b) for a, b in zip(pixels, again, strict=True))


def test_processes_share_each_batch(photos: Path) -> None:
    order = open_images(str(photos))
    alone = named(steps(order, 6, micro=1))
    shares = [named(steps(order, 6, micro=1, rank=rank, world=2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*shares, strict=True)] == alone


def test_steps_go_on_from_the_place_of_any_of_them(photos: Path, tars: str) -> None:
    for order in (open_images(str(photos)), open_images(tars, shuffle=5)):
        whole = steps(order, 9)
        for i in (0, 3, 7):
            found = Loader(order, SPEC, lambda item: None, batch=4, micro=2).steps(whole[i].place)
            assert named(list(islice(found, 9 - i - 1))) == named(whole)[i + 1 :]
            found.close()


def test_an_image_that_cannot_be_read_leaves_its_place_empty(photos: Path) -> None:
    order = open_images(str(photos))
    whole = named(steps(order, 5))
    (photos / "3.png").write_bytes(b"\x89PNG not quite")
    (photos / "7.png").write_bytes(b"")

    def read(item: Item) -> None:
        if item.key == "5.png":
            raise TextError("5.png has no caption.")

    found = steps(order, 5, read=read)
    bad = {"3.png", "7.png", "5.png"}
    assert named(found) == [[[key for key in part if key not in bad] for part in parts] for parts in whole]
    failures = Counter(failure.key for one in found for failure in one.failures)
    assert failures == {"3.png": 2, "7.png": 2, "5.png": 2}
    reasons = {failure.key: failure.reason for one in found for failure in one.failures}
    assert "empty: 0 bytes" in reasons["7.png"] and reasons["5.png"] == "5.png has no caption."


def test_a_tar_that_is_cut_gives_what_is_whole(tmp_path: Path, tars: str) -> None:
    path = tmp_path / "2.tar"
    path.write_bytes(path.read_bytes()[:4000])
    order = open_images(tars, shuffle=100)
    assert order.images is not None and 6 < order.images < 13
    # The damage has a place of its own.
    found = [item for item, place in islice(order.items(Place()), order.images + 1)]
    assert [type(item) for item in found].count(Failure) == 1
    assert len({item.key for item in found}) == order.images + 1
