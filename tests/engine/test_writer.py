"""A shard is there whole, with every row, or not at all."""

from __future__ import annotations

import errno
import json
import resource
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest

from clipfast.engine import writer as module
from clipfast.engine.base import Explained
from clipfast.engine.writer import ShardWriter, leftovers
from clipfast.errors import InputError, OutputError

Make = Callable[..., Explained]


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def _write(folder: Path, batches: list[Explained], shard: str = "s", **options: Any) -> dict[str, Any]:
    with ShardWriter(folder, shard, **options) as writer:
        for batch in batches:
            writer.add(batch)
        return writer.commit({"shard": shard, "number": 7})


def _part(batch: Explained, start: int, stop: int) -> Explained:
    part = slice(start, stop)
    features = None if batch.features is None else tuple(f[part] for f in batch.features)
    return Explained(
        batch.keys[part], batch.geometries[part], batch.prompts[part], batch.scores[part], batch.maps[part],
        None if batch.texts is None else batch.texts[part], features, batch.relu,  # type: ignore[arg-type]
    )  # fmt: skip


def test_every_row_as_other_readers_see_it(explained: Make, tmp_path: Path) -> None:
    batch = explained(5, 3)
    marker = _write(tmp_path, [_part(batch, 0, 2), _part(batch, 2, 5)], grid=(4, 5))
    assert _files(tmp_path) == ["shards/s.json", "shards/s.parquet"]
    assert marker == json.loads((tmp_path / "shards/s.json").read_text())
    assert (marker["shard"], marker["number"], marker["images"], marker["rows"]) == ("s", 7, 5, 15)
    assert marker["files"] == {"shards/s.parquet": (tmp_path / "shards/s.parquet").stat().st_size}
    assert marker["seconds"]["write"] > 0

    rows = parquet.read_table(tmp_path / "shards/s.parquet").to_pylist()
    assert [(row["key"], row["prompt"]) for row in rows] == [(key, p) for key in batch.keys for p in range(3)]
    assert [row["score"] for row in rows] == batch.scores.flatten().tolist()
    for i, row in enumerate(rows):
        known, geometry = batch.maps[i // 3, i % 3], batch.geometries[i // 3]
        found = np.frombuffer(row["map"], "<f2").reshape(row["grid_h"], row["grid_w"]) * np.float32(row["scale"])
        np.testing.assert_allclose(found, known, rtol=0, atol=known.max() * 2.0**-12 * (1 + 1e-6))
        assert row["scale"] == known.max()
        assert (row["height"], row["width"]) == (geometry.height, geometry.width)
        assert (row["left"], row["top"], row["right"], row["bottom"]) == geometry.box
        assert ((row["input_h"], row["input_w"]), (row["covered_h"], row["covered_w"])) == (
            geometry.input,
            geometry.covered,
        )


def test_images_with_texts_of_their_own_and_fewer_prompts(explained: Make, tmp_path: Path) -> None:
    batch = explained(3, 2)
    batch.prompts[1, 1] = -1
    batch.texts = [["a", "b"], ["c"], ["a", "é"]]
    assert _write(tmp_path, [batch], grid=(4, 5))["rows"] == 5
    rows = parquet.read_table(tmp_path / "shards/s.parquet").to_pylist()
    assert [(row["key"], row["prompt"], row["text"]) for row in rows] == [
        (batch.keys[0], 0, "a"), (batch.keys[0], 1, "b"), (batch.keys[1], 0, "c"), (batch.keys[2], 0, "a"),
        (batch.keys[2], 1, "é"),
    ]  # fmt: skip
    assert rows[3]["score"] == batch.scores[2, 0]


def test_grids_of_their_own(explained: Make, tmp_path: Path) -> None:
    first, second = explained(["a", "b"], 2, (4, 5)), explained(["c"], 2, (7, 3))
    _write(tmp_path, [first, second], maps="uint8")
    rows = parquet.read_table(tmp_path / "shards/s.parquet").to_pylist()
    assert [len(row["map"]) for row in rows] == [20] * 4 + [21] * 2
    found = np.frombuffer(rows[-1]["map"], "u1").reshape(7, 3) * np.float32(rows[-1]["scale"]) + rows[-1]["offset"]
    np.testing.assert_allclose(found, second.maps[0, 1], atol=np.ptp(second.maps[0, 1]) / 509)


def test_features_are_a_file_beside_the_maps(explained: Make, tmp_path: Path) -> None:
    batch = replace(explained(3, 1, features=(2, 20, 8)), relu="sum")
    marker = _write(tmp_path, [batch], grid=(4, 5), features="float32")
    assert list(marker["files"]) == ["shards/s.parquet", "features/s.parquet"]
    assert _files(tmp_path) == ["features/s.parquet", "shards/s.json", "shards/s.parquet"]
    table = parquet.read_table(tmp_path / "features/s.parquet")
    assert json.loads(table.schema.metadata[b"clipfast"]) == {"format": 1, "features": "float32", "relu": "sum"}
    assert batch.features is not None
    for row, value, weight, embedding in zip(table.to_pylist(), *batch.features, strict=True):
        assert (row["layers"], row["patches"]) == (2, 20)
        assert row["values_values"] == value.astype("<f4").tobytes()
        assert row["weights"] == weight.tobytes() and row["embedding"] == embedding.tobytes()


@pytest.mark.parametrize("prompts", [1, 7, 600, 1500])
def test_bytes_and_row_groups_depend_on_the_rows_alone(explained: Make, tmp_path: Path, prompts: int) -> None:
    batch = explained(max(3, 1300 // prompts), prompts, features=(4, 3))
    images, found = len(batch.keys), []
    for i, cuts in enumerate(([0, images], [*range(0, images, 1 + images // 40), images], [0, 1, images // 2, images])):
        parts = [_part(batch, a, b) for a, b in pairwise(cuts)]
        _write(tmp_path / str(i), parts, features="int8", grid=(4, 5))
        found.append([(tmp_path / str(i) / kind / "s.parquet").read_bytes() for kind in ("shards", "features")])
    assert found[0] == found[1] == found[2]
    file = parquet.ParquetFile(tmp_path / "0/shards/s.parquet")
    groups = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    assert sum(groups) == images * prompts
    assert all(rows % prompts == 0 for rows in groups), "an image's rows lie in one row group"
    assert max(groups) < 1000 + prompts and (prompts > 1000 or min(groups[:-1]) >= 1000 - prompts)


def test_large_maps_come_in_smaller_groups(explained: Make, tmp_path: Path) -> None:
    _write(tmp_path, [explained(7, 6, (500, 500))], maps="float16", grid=(500, 500))
    file = parquet.ParquetFile(tmp_path / "shards/s.parquet")
    assert [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)] == [36, 6]


def test_nothing_is_seen_before_the_commit(explained: Make, tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "s", grid=(4, 5), features="int8") as writer:
        writer.add(explained(300, 8, features=(4, 3)))
        until = time.monotonic() + 10
        while not _files(tmp_path) and time.monotonic() < until:
            time.sleep(0.01)
        assert _files(tmp_path) and all(Path(name).name.startswith(".") for name in _files(tmp_path))
        assert leftovers(tmp_path) == leftovers(tmp_path, "s") != []
        assert leftovers(tmp_path, "other") == []
    assert _files(tmp_path) == []


def test_leftovers_are_told_from_what_others_put_there(explained: Make, tmp_path: Path) -> None:
    _write(tmp_path, [explained()], grid=(4, 5), shard="a.b")
    (tmp_path / "shards/.a.b.parquet.0123abcd.part").touch()
    (tmp_path / "shards/.a.b.parquet.swp").touch()
    (tmp_path / "shards/notes.part").touch()
    assert [p.name for p in leftovers(tmp_path, "a.b")] == [".a.b.parquet.0123abcd.part"]
    assert leftovers(tmp_path, "a") == []


def test_a_shard_without_images_has_a_marker_alone(tmp_path: Path) -> None:
    marker = _write(tmp_path, [])
    assert _files(tmp_path) == ["shards/s.json"]
    assert (marker["images"], marker["rows"], marker["files"]) == (0, 0, {})


def test_waiting_for_the_writer_counts(explained: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = ShardWriter._write
    monkeypatch.setattr(ShardWriter, "_write", lambda self, batch: (time.sleep(0.2), write(self, batch)))
    with ShardWriter(tmp_path, "s") as writer:
        writer.add(explained())
        seconds = writer.commit({"seconds": {"total": 100.0, "decode": 5.0}})["seconds"]
    assert 0.2 < seconds["write"] < 50 and 100.15 < seconds["total"] < 150 and seconds["decode"] == 5


def test_abort_leaves_nothing(explained: Make, tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "s")
    writer.add(explained())
    writer.abort()
    writer.abort()
    with pytest.raises(InputError, match="finished"):
        writer.add(explained())


def test_an_error_of_the_caller_leaves_nothing(explained: Make, tmp_path: Path) -> None:
    other = ShardWriter(tmp_path, "s")
    with suppress(ZeroDivisionError), other:
        other.add(explained())
        raise ZeroDivisionError
    assert _files(tmp_path) == []


def test_a_committed_shard_stays(explained: Make, tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "s") as writer:
        writer.add(explained())
        writer.commit({})
        with pytest.raises(InputError, match="finished"):
            writer.add(explained())
    writer.abort()
    assert _files(tmp_path) == ["shards/s.json", "shards/s.parquet"]


def test_no_room_is_one_kind_of_error_at_the_next_call(explained: Make, tmp_path: Path) -> None:
    """/dev/full takes nothing, as a full disk does."""
    for call in ("add", "commit"):
        writer = ShardWriter(tmp_path, "s")
        part = writer._maps._part
        part.parent.mkdir(exist_ok=True)
        part.symlink_to("/dev/full")
        writer.add(explained(100, 50))
        assert writer._thread is not None
        if call == "add":
            until = time.monotonic() + 10
            while writer._error is None and time.monotonic() < until:
                time.sleep(0.01)
        with pytest.raises(OutputError, match=r"shard s cannot be written to .*: No space left on device\.") as caught:
            writer.add(explained()) if call == "add" else writer.commit({})
        assert caught.value.full
        assert _files(tmp_path) == []
        with pytest.raises(OutputError):
            writer.commit({})
        assert Path("/dev/full").exists()


def test_a_file_that_may_not_grow(explained: Make, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OutputError, match="File too large") as caught:
            _write(tmp_path, [explained(100, 50)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.full and _files(tmp_path) == []


def test_a_place_that_cannot_be_written(explained: Make, tmp_path: Path) -> None:
    (tmp_path / "shards").touch()
    with pytest.raises(OutputError, match="cannot be written") as caught:
        _write(tmp_path, [explained(2, 2)])
    assert not caught.value.full


def test_a_marker_that_fails_takes_the_files_with_it(
    explained: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path, [explained()], features=None)

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_file", full)
    with pytest.raises(OutputError, match="No space left"):
        _write(tmp_path, [explained(seed=1)])
    assert _files(tmp_path) == [], "the older marker must not vouch for files that were being replaced"


def test_other_errors_surface_as_they_are(explained: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(module, "map_table", broken)
    with ShardWriter(tmp_path, "s") as writer:
        writer.add(explained())
        with pytest.raises(MemoryError):
            writer.commit({})


def test_a_second_commit_replaces_the_first(explained: Make, tmp_path: Path) -> None:
    first = _write(tmp_path, [explained(4)])
    second = _write(tmp_path, [explained(9)])
    assert (first["images"], second["images"]) == (4, 9)
    assert parquet.read_metadata(tmp_path / "shards/s.parquet").num_rows == second["rows"] == 27


def test_the_model_waits_only_for_a_full_queue(
    explained: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, write = threading.Event(), ShardWriter._write

    def slow(self: ShardWriter, batch: Explained) -> None:
        go.wait()
        write(self, batch)

    monkeypatch.setattr(ShardWriter, "_write", slow)
    added = []

    def model() -> None:
        for i in range(8):
            writer.add(explained([f"{i}"]))
            added.append(i)

    with ShardWriter(tmp_path, "s") as writer:
        thread = threading.Thread(target=model)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive() and 4 <= len(added) <= 5
        go.set()
        thread.join()
        assert writer.commit({})["images"] == 8


@pytest.mark.parametrize("name", ["../s", "", ".s", "a/b", "a b", "s" * 91, "é"])
def test_ids_that_are_no_file_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="shard's id"):
        ShardWriter(tmp_path, name)


def test_what_does_not_fit(explained: Make, tmp_path: Path) -> None:
    good = explained(4, 3)
    with ShardWriter(tmp_path, "s", grid=(4, 5)) as writer:
        for bad in (
            replace(good, scores=good.scores[:, :2]),
            replace(good, maps=good.maps[:3]),
            replace(good, prompts=good.prompts[:1]),
            replace(good, geometries=good.geometries[:1]),
            explained(4, 3, (5, 4)),
            explained(4, 3, features=(4, 3)),
        ):
            with pytest.raises(InputError, match="shard s"):
                writer.add(bad)
    with ShardWriter(tmp_path, "s", features="int8") as writer, pytest.raises(InputError, match="features"):
        writer.add(good)
    for options in ({"maps": "int4"}, {"features": "int4"}):
        with pytest.raises(InputError, match="int4"):
            ShardWriter(tmp_path, "s", **options)
    assert _files(tmp_path) == []
