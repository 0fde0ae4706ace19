"""Every kind of source: what it lists, what its images are called, and that its shards depend on the input alone."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clipfast.data.images import is_image
from clipfast.data.keys import numbered
from clipfast.data.places import common, matches, walk
from clipfast.engine.base import Failure, Item, Source
from clipfast.engine.sources import open_source
from clipfast.errors import ImageError, InputError


def encoded(grey: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), grey, np.uint8)).save(stream, kind)
    return stream.getvalue()


def grey(item: Item | Failure) -> int:
    assert isinstance(item, Item), item
    return int(np.asarray(Image.open(io.BytesIO(item.read())))[0, 0, 0])


def everything(source: Source) -> list[Item | Failure]:
    return [found for shard in source.shards() for found in source.items(shard)]


def keys(source: Source) -> list[str]:
    return [found.key for found in everything(source)]


def ids(source: Source) -> list[str]:
    return [shard.id for shard in source.shards()]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five pictures in a folder, its folders, and what is no picture; 0 to 4 by the order of their paths."""
    root = tmp_path / "photos"
    for number, name in enumerate(("B.JPG", "a.png", "sub/deep/x.webp", "sub/y.jpeg", "ä ö.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(number))
    for name in (".hidden.png", "notes.txt", "sub/.cache/z.png", "sub/Thumbs.db"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"no picture")
    return root


@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


PATHS = ["B.JPG", "a.png", "sub/deep/x.webp", "sub/y.jpeg", "ä ö.png"]


def test_a_folder_gives_the_pictures_below_it_by_their_paths(photos: Path) -> None:
    source = open_source(photos, shard_size=2)
    assert keys(source) == PATHS
    assert [grey(item) for item in everything(source)] == [0, 1, 2, 3, 4]
    assert [(s.number, s.images) for s in source.shards()] == [(0, 2), (1, 2), (2, 1)]
    assert source.config()["kind"] == "folder" and source.config()["place"] == str(photos)
    assert json.loads(json.dumps(source.config())) == source.config()


def test_ids_are_a_number_and_a_digest_of_the_names(photos: Path, tmp_path: Path) -> None:
    expected = hashlib.sha256(b"B.JPG\0a.png\0\0").hexdigest()[:10]
    assert ids(open_source(photos, shard_size=2))[0] == f"000000-{expected}"
    moved = photos.rename(tmp_path / "elsewhere")
    again = ids(open_source(moved, shard_size=2))
    assert again[0] == f"000000-{expected}"
    (moved / "zz.png").write_bytes(encoded(9))
    grown = ids(open_source(moved, shard_size=2))
    assert grown[:2] == again[:2] and grown[2] != again[2]


def test_a_limit_leaves_the_ids_of_whole_shards(photos: Path) -> None:
    whole = ids(open_source(photos, shard_size=2))
    for limit in (1, 2, 3, 4, 5, 6):
        source = open_source(photos, shard_size=2, limit=limit)
        assert keys(source) == PATHS[:limit]
        uncut = limit // 2 if limit < 5 else 3
        assert ids(source)[:uncut] == whole[:uncut]
        assert set(ids(source)[uncut:]).isdisjoint(whole)


def test_the_same_in_another_process(photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(photos.parent)
    for spec in ("photos", "photos/**/*.png", ["photos/a.png", "photos/B.JPG"]):
        source = open_source(spec, shard_size=2)
        shards = pickle.loads(pickle.dumps(source.shards()))
        copy = pickle.loads(pickle.dumps(source))
        monkeypatch.chdir(tmp_path)
        assert ids(copy) == [shard.id for shard in shards]
        items = [item for shard in shards for item in copy.items(shard)]
        assert [grey(pickle.loads(pickle.dumps(item))) for item in items] == [grey(i) for i in everything(source)]
        monkeypatch.chdir(photos.parent)


def test_pickles_do_not_grow_with_the_source(photos: Path) -> None:
    small = len(pickle.dumps(open_source(photos)))
    for number in range(300):
        (photos / f"{number:040d}.png").touch()
    assert len(pickle.dumps(open_source(photos))) == small


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.png", ["a.png", "ä ö.png"]),
        ("**/*.*", PATHS),
        ("*/*", ["sub/y.jpeg"]),
        ("{sub/y.jpeg,a.png}", ["a.png", "sub/y.jpeg"]),
        ("sub/**/*.webp", ["deep/x.webp"]),
        ("s{ub,ob}/*.jpeg", ["sub/y.jpeg"]),
    ],
)
def test_patterns(photos: Path, pattern: str, expected: list[str]) -> None:
    source = open_source(f"{photos}/{pattern}")
    assert keys(source) == expected
    assert all(isinstance(item, Item) and item.read() for item in everything(source))
    assert keys(pickle.loads(pickle.dumps(source))) == expected


def test_files_named_one_by_one_as_a_shell_does(photos: Path) -> None:
    source = open_source([str(photos / "sub" / "y.jpeg"), str(photos / "a.png"), f"{photos}/*.JPG"])
    assert keys(source) == ["B.JPG", "a.png", "sub/y.jpeg"]
    assert keys(open_source(photos / "a.png")) == ["a.png"]
    (photos / "odd").write_bytes(encoded(7))
    assert [grey(item) for item in everything(open_source(photos / "odd"))] == [7]
    with pytest.raises(InputError, match="sub is a folder among 2 sources"):
        open_source([str(photos / "sub"), str(photos / "a.png")])


def test_a_file_whose_name_looks_like_a_pattern(photos: Path) -> None:
    (photos / "{1}[x].png").write_bytes(encoded(8))
    assert [grey(item) for item in everything(open_source(photos / "{1}[x].png"))] == [8]


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    for name in ("a/one.png", "b/two.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(encoded(1))
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "a").symlink_to(tmp_path / "a")
    (tmp_path / "b" / "link.png").symlink_to(tmp_path / "a" / "one.png")
    found = keys(open_source(tmp_path))
    assert {"a/one.png", "b/two.png", "b/link.png", "a/b/two.png", "b/a/one.png"} <= set(found)
    assert len(found) < 20


def test_a_folder_that_cannot_be_listed_is_a_failure(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuses(place: Any) -> Any:
        if str(place).endswith("sub"):
            raise PermissionError(13, "Permission denied")
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refuses)
    found = everything(open_source(photos))
    assert [f.key for f in found] == ["B.JPG", "a.png", "sub/", "ä ö.png"]
    assert isinstance(found[2], Failure) and found[2].reason.endswith("photos/sub/ could not be listed.")


def test_what_became_of_files_since_they_were_listed(photos: Path) -> None:
    source = open_source(photos)
    items = everything(source)
    (photos / "B.JPG").unlink()
    (photos / "a.png").write_bytes(b"")
    (photos / "sub" / "y.jpeg").unlink()
    (photos / "sub" / "y.jpeg").mkdir()
    os.remove(photos / "ä ö.png")
    os.mkfifo(photos / "ä ö.png")
    expected = {0: "does not exist", 1: "is empty: 0 bytes", 3: "is a folder", 4: "not a regular file"}
    for number, why in expected.items():
        item = items[number]
        assert isinstance(item, Item)
        with pytest.raises(ImageError, match=f"{item.key} {why}|{item.key} is {why}"):
            item.read()
    assert grey(items[2]) == 2


def test_enormous_files_are_not_read(photos: Path) -> None:
    with (photos / "a.png").open("wb") as stream:
        stream.truncate(2**31)
    item = everything(open_source(photos / "a.png"))[0]
    assert isinstance(item, Item)
    with pytest.raises(ImageError, match="2,147,483,648 bytes"):
        item.read()


def test_names_that_are_not_unicode(tmp_path: Path) -> None:
    for name in (b"\xff.png", b"\xfe.png", b"fine.png"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as stream:
            stream.write(encoded(5))
    source = open_source(tmp_path)
    assert keys(source) == ["fine.png", "\ufffd.png", "\ufffd.png~2"]
    assert [grey(item) for item in pickle.loads(pickle.dumps(everything(source)))] == [5, 5, 5]


def test_captions_beside_pictures(photos: Path) -> None:
    (photos / "B.txt").write_text("a big dog\n")
    (photos / "a.json").write_text('{"caption": ["one", "two"], "width": 5}')
    (photos / "sub" / "y.json").write_text("{")
    items = everything(open_source(photos, columns=["caption"]))
    found = [item.columns for item in pickle.loads(pickle.dumps(items))]
    assert found[0]["caption"] == ["a big dog"] and found[1]["caption"] == ["one", "two"]
    assert found[2]["caption"] == [] and dict(found[4]) == {"caption": []}
    with pytest.raises(ImageError, match=r"sub/y\.json is damaged"):
        found[3]["caption"]
    assert all(not item.columns for item in everything(open_source(photos)) if isinstance(item, Item))


def test_a_text_list(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = photos / "list.txt"
    listed.write_text(f"\ufeffa.png\n\n  sub/y.jpeg  \na.png\n{photos}/B.JPG\ngone.png\n", encoding="utf-8")
    source = open_source(listed, shard_size=2)
    assert keys(source) == ["a.png", "sub/y.jpeg", "a.png~2", f"{photos}/B.JPG", "gone.png"]
    assert [grey(item) for item in everything(source)[:4]] == [1, 3, 1, 0]
    assert [shard.images for shard in source.shards()] == [2, 2, 1]
    again = ids(source)
    assert again == ids(pickle.loads(pickle.dumps(source)))
    monkeypatch.chdir(photos)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed.read_bytes())))
    assert ids(open_source("-", shard_size=2)) == again


CSV = 'path,caption,key\na.png,"a cat, asleep",k1\n./sub/y.jpeg,,k2\n,nothing,k3\nonly one cell\nB.JPG,a dog,k1\n'


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_a_table_of_paths_as_text(photos: Path, delimiter: str) -> None:
    content = CSV.replace("cat, asleep", "cat~ asleep").replace(",", delimiter).replace("~", ",")
    (photos / "list.csv").write_text(content)
    source = open_source(photos / "list.csv", columns=["caption"], shard_size=2)
    found = everything(source)
    assert keys(source) == ["k1", "k2", "k3", "list/000003", "k1~2"]
    assert found[2] == Failure("k3", "k3 is a row that names no image, or lacks cells.")
    assert isinstance(found[3], Failure)
    assert [grey(found[i]) for i in (0, 1, 4)] == [1, 3, 0]
    assert [i.columns["caption"] for i in found if isinstance(i, Item)] == ["a cat, asleep", "", "a dog"]
    assert keys(open_source(photos / "list.csv", key_column="caption"))[:2] == ["a cat, asleep", "list/000001"]
    assert keys(pickle.loads(pickle.dumps(source))) == keys(source)


def test_odd_keys_and_names_in_a_table(photos: Path) -> None:
    (photos / "list.csv").write_text('path,id\na.png,"x\0y"\n"B\0.JPG","two\nlines"\nsub/,z\n', newline="")
    found = everything(open_source(photos / "list.csv", key_column="id"))
    assert [f.key for f in found] == ["x\ufffdy", "two\nlines", "z"] and grey(found[0]) == 1
    for item, why in zip(found[1:], ("does not exist", "is a folder"), strict=True):
        assert isinstance(item, Item)
        with pytest.raises(ImageError, match=why):
            item.read()


def test_a_table_of_paths_in_parquet(photos: Path) -> None:
    table = pyarrow.table(
        {
            "n": [0, 1, 2, 3],
            "filepath": pyarrow.array(["a.png", "B.JPG", None, "sub/y.jpeg"]).dictionary_encode(),
            "texts": [["x", "y"], [], None, ["z"]],
        }
    )
    pyarrow.parquet.write_table(table, photos / "list.parquet")
    source = open_source(photos / "list.parquet", columns=["texts"], shard_size=3)
    found = everything(source)
    assert keys(source) == ["a.png", "B.JPG", "list/000002", "sub/y.jpeg"]
    assert [grey(found[i]) for i in (0, 1, 3)] == [1, 0, 3] and isinstance(found[2], Failure)
    assert [i.columns["texts"] for i in found if isinstance(i, Item)] == [["x", "y"], [], ["z"]]
    assert keys(open_source(photos / "list.parquet", key_column="n")) == ["0", "1", "2", "3"]


def pictures_table(path: Path, count: int, start: int = 0, **more: Any) -> None:
    """A table as Hugging Face writes it, with classes that only its metadata names."""
    records = [{"bytes": encoded(start + i), "path": f"{start + i}.png"} for i in range(count)]
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    table = pyarrow.table({"image": records, "label": [i % 2 for i in range(count)], **more})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, path, row_group_size=4)


def test_a_table_of_encoded_images(tmp_path: Path) -> None:
    pictures_table(tmp_path / "one.parquet", 10)
    source = open_source(tmp_path / "one.parquet", shard_size=3, columns=["label"])
    assert [(s.number, s.images) for s in source.shards()] == [(0, 3), (1, 3), (2, 3), (3, 1)]
    assert keys(source) == [f"one/{i:06d}" for i in range(10)]
    items = everything(pickle.loads(pickle.dumps(source)))
    assert [grey(item) for item in items] == list(range(10))
    assert [i.columns["label"] for i in items if isinstance(i, Item)] == ["cat", "dog"] * 5
    cut = open_source(tmp_path / "one.parquet", shard_size=3, limit=7)
    assert ids(cut)[:2] == ids(source)[:2] and ids(cut)[2] != ids(source)[2]
    assert keys(cut) == keys(source)[:7]


def test_several_tables_with_a_key_column_of_their_own(tmp_path: Path) -> None:
    for number in (0, 1):
        pictures_table(tmp_path / f"{number}.parquet", 3, 10 * number, id=["x", "y" if number else "x", None])
    for spec in (tmp_path, f"{tmp_path}/*.parquet"):
        source = open_source(spec, key_column="id", shard_size=2)
        assert keys(source) == ["x", "x~2", "0/000002", "x~3", "y", "1/000002"]
        assert [grey(item) for item in everything(source)] == [0, 1, 2, 10, 11, 12]
    assert keys(open_source(tmp_path))[2:4] == ["0/000002", "1/000000"]
    assert keys(open_source(tmp_path, limit=4, key_column="id")) == ["x", "x~2", "0/000002", "x~3"]


def test_bytes_without_a_record_and_rows_without_bytes(photos: Path) -> None:
    column = [encoded(1), None, b"", encoded(2)]
    pyarrow.parquet.write_table(pyarrow.table({"jpg": pyarrow.array(column, "binary")}), photos / "b.parquet")
    found = everything(open_source(photos / "b.parquet"))
    assert [grey(found[0]), grey(found[3])] == [1, 2]
    assert [f.reason for f in found if isinstance(f, Failure)] == [
        "b/000001 holds no image.",
        "b/000002 is empty: 0 bytes.",
    ]
    records = [{"bytes": None, "path": "a.png"}, {"bytes": None, "path": None}]
    pyarrow.parquet.write_table(pyarrow.table({"image": records}), photos / "b.parquet")
    found = everything(open_source(photos / "b.parquet"))
    assert grey(found[0]) == 1 and isinstance(found[1], Failure)


def test_damaged_tables_are_failures_beside_good_ones(tmp_path: Path) -> None:
    for number in range(3):
        pictures_table(tmp_path / f"{number}.parquet", 2, number)
    whole = open_source(tmp_path)
    (tmp_path / "0.parquet").write_bytes(b"PAR1 and no more")
    pyarrow.parquet.write_table(pyarrow.table({"other": [1]}), tmp_path / "2.parquet")
    found = everything(open_source(tmp_path))
    assert [f.key for f in found] == ["0.parquet", "1/000000", "1/000001", "2.parquet"]
    assert isinstance(found[0], Failure) and "0.parquet cannot be read as a table" in found[0].reason
    # Changed since the run was planned: each image that was to come is told.
    later = everything(whole)
    assert [f.key for f in later if isinstance(f, Failure)] == ["0/000000", "0/000001", "2/000000", "2/000001"]
    for number in (0, 1, 2):
        (tmp_path / f"{number}.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"0\.parquet cannot be read as a table"):
        open_source(tmp_path)


def save_to_disk(folder: Path, tables: list[pyarrow.Table]) -> None:
    """What datasets 5.2 writes: streams of arrow, state.json with their names, dataset_info.json (not read here)."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(tables):05d}.arrow" for i in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        with pyarrow.ipc.new_stream(str(folder / name), table.schema) as stream:
            stream.write_table(table, max_chunksize=4)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "00", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def saved_table(start: int, count: int) -> pyarrow.Table:
    records = [{"bytes": encoded(start + i), "path": None} for i in range(count)]
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    columns = {"image": records, "label": [i % 2 for i in range(count)], "caption": [f"a {i}" for i in range(count)]}
    return pyarrow.table(columns).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}, "fingerprint": "00"})}
    )


def test_a_saved_data_set(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "saved", [saved_table(0, 7), saved_table(7, 6)])
    for spec in (f"hf:{tmp_path}/saved", tmp_path / "saved"):
        source = open_source(spec, shard_size=5, columns=["label", "caption"])
        assert keys(source)[5:9] == [f"data-00000-of-00002/00000{i}" for i in (5, 6)] + [
            f"data-00001-of-00002/00000{i}" for i in (0, 1)
        ]
        items = everything(pickle.loads(pickle.dumps(source)))
        assert [grey(item) for item in items] == list(range(13))
        assert isinstance(items[1], Item) and items[1].columns == {"label": "dog", "caption": "a 1"}
        assert [shard.images for shard in source.shards()] == [5, 2, 5, 1]
    assert keys(open_source(f"hf:{tmp_path}/saved", key_column="caption", limit=2)) == ["a 0", "a 1"]


def test_a_saved_data_set_that_was_cut(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "saved", [saved_table(0, 12), saved_table(12, 3)])
    file = tmp_path / "saved" / "data-00000-of-00002.arrow"
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 3 // 4])
    for options in ({}, {"key_column": "caption"}):
        found = everything(open_source(tmp_path / "saved", shard_size=5, **options))
        assert [grey(item) for item in [*found[:8], *found[9:]]] == [*range(8), 12, 13, 14]
        assert isinstance(found[8], Failure) and "the 8 rows before that are used" in found[8].reason


def test_the_splits_of_a_saved_data_set(tmp_path: Path) -> None:
    for split in ("train", "test"):
        save_to_disk(tmp_path / split, [saved_table(0, 2)])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(InputError, match=r"has the splits train, test: name one, hf:.*/train or hf:.*/test"):
        open_source(tmp_path)
    assert len(keys(open_source(f"hf:{tmp_path}/test"))) == 2
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["test"]}')
    assert len(keys(open_source(tmp_path))) == 2


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("{", "state.json is damaged"),
        ("{}", "does not list the files"),
        ('{"_data_files": []}', "empty data set"),
        ('{"_data_files": [{"filename": "x"}], "_indices_data_files": [{"filename": "y"}]}', "old version"),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', "gone.arrow"),
    ],
)
def test_a_damaged_saved_data_set(tmp_path: Path, state: str, said: str) -> None:
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(InputError, match=said):
        open_source(f"hf:{tmp_path}")
    with pytest.raises(InputError, match="there is no folder"):
        open_source(f"hf:{tmp_path}/nowhere")


def test_everything_by_address(photos: Path, memory: Any, tmp_path: Path) -> None:
    memory.put(f"{photos}/", "/photos/", recursive=True)
    memory.pipe("/photos/B.txt", b"a dog")
    memory.pipe("/photos/list.txt", f"a.png\nmemory://photos/B.JPG\n{photos}/sub/y.jpeg\n".encode())
    memory.pipe("/photos/list.csv", b"path,caption\na.png,a cat\nsub/y.jpeg,a cow\n")
    pictures_table(tmp_path / "t.parquet", 6)
    memory.put(str(tmp_path / "t.parquet"), "/tables/t.parquet")
    save_to_disk(tmp_path / "saved", [saved_table(0, 3), saved_table(3, 2)])
    memory.put(f"{tmp_path}/saved/", "/saved/", recursive=True)

    folder = open_source("memory://photos", columns=["caption"])
    assert keys(folder) == PATHS and ids(folder) == ids(open_source(photos))
    assert [grey(item) for item in everything(pickle.loads(pickle.dumps(folder)))] == [0, 1, 2, 3, 4]
    first = everything(folder)[0]
    assert isinstance(first, Item) and first.columns["caption"] == ["a dog"]
    assert keys(open_source("memory://photos/*.png")) == ["a.png", "ä ö.png"]
    assert keys(open_source("memory://photos/**/y.{jpeg,png}")) == ["sub/y.jpeg"]
    assert [grey(i) for i in everything(open_source("memory://photos/a.png"))] == [1]
    assert [grey(i) for i in everything(open_source("memory://photos/list.txt"))] == [1, 0, 3]
    assert keys(open_source("memory://photos/list.csv", columns=["caption"])) == ["a.png", "sub/y.jpeg"]
    assert [grey(i) for i in everything(open_source("memory://tables", shard_size=4))] == [0, 1, 2, 3, 4, 5]
    saved = open_source("hf:memory://saved", columns=["label"])
    # A stream behind an address is one shard, whose rows nobody counted.
    assert [shard.images for shard in saved.shards()] == [None, None]
    assert keys(saved)[2:4] == ["data-00000-of-00002/000002", "data-00001-of-00002/000000"]
    assert [grey(i) for i in everything(saved)] == [0, 1, 2, 3, 4]
    assert len(keys(open_source("hf:memory://saved", limit=4))) == 4
    assert keys(open_source(["memory://photos/a.png", "memory://photos/sub/y.jpeg"])) == ["a.png", "sub/y.jpeg"]
    memory.rm("/photos/a.png")
    gone = everything(folder)[1]
    assert isinstance(gone, Item)
    with pytest.raises(ImageError, match=r"memory://photos/a\.png does not exist"):
        gone.read()


def test_file_addresses_are_local_files(photos: Path) -> None:
    assert ids(open_source(f"file://{photos}")) == ids(open_source(photos))
    (photos / "list.txt").write_text(f"file://{photos}/sub/y.jpeg\n")
    assert [grey(i) for i in everything(open_source(photos / "list.txt"))] == [3]


@pytest.mark.parametrize(
    ("spec", "options", "said"),
    [
        ("nowhere", {}, "there is no .*nowhere: name a folder, a pattern"),
        ("photos/*.gif", {}, r"no file matches '.*/photos/\*\.gif'"),
        ("photos/s*", {}, "matches folders, such as .*photos/sub: name the folder"),
        ("photos/sub/T*", {}, "matches 1 files, such as .*Thumbs.db, and none of them is a picture"),
        ("empty", {}, "no image was found in .*empty and the folders in it"),
        ("photos", {"columns": ["label"]}, "is no table, so it has no column 'label'"),
        ("photos", {"limit": 0}, "limit=0 must be at least 1"),
        ("photos", {"shard_size": 0}, "shard_size=0"),
        ("", {}, "no source of images was named"),
        ([], {}, "no source of images was named"),
        ("list.csv", {}, "has no column that is plainly the image's .* it has name, caption, n"),
        ("list.csv", {"image_column": "nme"}, "has no column 'nme'; it has name, caption, n"),
        ("list.csv", {"image_column": "name", "columns": ["cap"]}, "has no column 'cap'; it has name"),
        ("list.csv", {"image_column": "name"}, "names files that are not there, the first being .*/0.png"),
        ("empty.csv", {}, "empty.csv is empty"),
        ("photos.tar.gz", {}, "is compressed: unpack it"),
        ("zz://bucket/photos", {}, "zz://bucket/photos cannot be reached: Protocol not known: zz"),
        ("odd.txt", {}, "odd.txt lists no image"),
        ("web.txt", {}, "zz://a.b/c.jpg cannot be reached"),
    ],
)
def test_what_is_wrong_is_said_early(
    photos: Path, monkeypatch: pytest.MonkeyPatch, spec: Any, options: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(photos.parent)
    Path("empty").mkdir()
    Path("list.csv").write_text("name,caption,n\n0.png,a dog,1\n")
    Path("empty.csv").touch()
    Path("odd.txt").write_text("\n \n")
    Path("web.txt").write_text("photos/a.png\nzz://a.b/c.jpg\n")
    Path("photos.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(InputError, match=said):
        open_source(spec, **options)


def test_a_folder_of_pictures_and_tars_is_ambiguous(photos: Path) -> None:
    (photos / "x.tar").write_bytes(b"")
    with pytest.raises(InputError, match=r"has 5 pictures and 1 tars: say which with a pattern"):
        open_source(photos)


def test_no_fsspec_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(InputError, match=r"needs fsspec: pip install 'clipfast\[data\]'"):
        open_source("memory://never/asked/before")


@given(st.lists(st.sampled_from(["a", "A", "a~2", "a~3", "b", "a~2~2", ""]), max_size=12))
def test_numbered_names_are_unique_and_do_not_depend_on_later_ones(names: list[str]) -> None:
    for same in (str, str.lower):
        found = numbered(names, same)
        assert len({same(key) for key in found}) == len(names)
        assert all(key.startswith(name) for key, name in zip(found, names, strict=True))
        assert found[:5] == numbered(names[:5], same)


@given(
    st.lists(
        st.text(st.characters(exclude_characters="\r\n\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"), min_size=1, max_size=6),
        min_size=1,
        max_size=20,
    ),
    st.integers(1, 7),
)
def test_whatever_a_list_says_keys_are_unique(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], size: int
) -> None:
    place = tmp_path_factory.getbasetemp() / "any.list"
    place.write_bytes("\n".join([str(place), *lines]).encode(errors="surrogatepass"))
    source = open_source(place, shard_size=size)
    found = keys(source)
    assert len(set(found)) == len(found) == sum(shard.images or 0 for shard in source.shards())
    assert all(key.encode() for key in found)
    assert len(found) == 1 + sum(bool(line.strip()) for line in lines)


@given(st.lists(st.lists(st.sampled_from("ab"), max_size=3).map("/".join), min_size=1, max_size=3))
def test_the_folder_in_common(folders: list[str]) -> None:
    places = [os.path.normpath(f"/{folder}/x.png") for folder in folders]
    assert common(places) == os.path.commonpath([os.path.dirname(place) for place in places])


def test_patterns_and_walks_agree(photos: Path) -> None:
    root, names = matches(f"{photos}/**")
    assert root == str(photos)
    assert [name for name in names if name in PATHS] == walk(str(photos), is_image) == PATHS
