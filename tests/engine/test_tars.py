"""Tars as a source: whole, cut, damaged and hostile ones."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clipfast.data.tars import TarError, members
from clipfast.engine.base import Failure, Item, Source
from clipfast.engine.sources import open_source
from clipfast.engine.texts import Prompts
from clipfast.errors import InputError, TextError


def encoded(grey: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), grey, np.uint8)).save(stream, kind)
    return stream.getvalue()


def grey(item: Item | Failure) -> int:
    assert isinstance(item, Item), item
    return int(np.asarray(Image.open(io.BytesIO(item.read())))[0, 0, 0])


def packed(*files: tuple[str, bytes] | tarfile.TarInfo, format: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
        for file in files:
            if isinstance(file, tarfile.TarInfo):
                archive.addfile(file)
            else:
                info = tarfile.TarInfo(file[0])
                info.size = len(file[1])
                archive.addfile(info, io.BytesIO(file[1]))
    return stream.getvalue()


def samples(start: int, stop: int) -> list[tuple[str, bytes]]:
    return [(f"{i:04d}.{e}", d) for i in range(start, stop) for e, d in (("png", encoded(i)), ("txt", b"a %d" % i))]


def everything(source: Source) -> list[Item | Failure]:
    return [found for shard in source.shards() for found in source.items(shard)]


def keys(source: Source) -> list[str]:
    return [found.key for found in everything(source)]


def ids(source: Source) -> list[str]:
    return [shard.id for shard in source.shards()]


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Three tars of 4, 2 and 3 samples."""
    root = tmp_path / "tars"
    root.mkdir()
    for number, (start, stop) in enumerate(((0, 4), (4, 6), (6, 9))):
        (root / f"{number:05d}.tar").write_bytes(packed(*samples(start, stop)))
    return root


def test_each_tar_is_a_shard(tars: Path) -> None:
    names = [f"0000{t}/{i:04d}" for t, part in enumerate((range(4), range(4, 6), range(6, 9))) for i in part]
    first = open_source(tars)
    for spec in (tars, f"{tars}/*.tar", f"{tars}/{{00000..00002}}.tar", [str(p) for p in tars.iterdir()]):
        source = pickle.loads(pickle.dumps(open_source(spec, shard_size=2)))
        assert keys(source) == names and ids(source) == ids(first)
        assert [grey(item) for item in everything(source)] == list(range(9))
        assert [(s.number, s.images) for s in source.shards()] == [(0, None), (1, None), (2, None)]
        assert [s.bytes for s in source.shards()] == [p.stat().st_size for p in sorted(tars.iterdir())]
    assert first.config() == {"kind": "tars", "place": str(tars)}


def test_a_list_of_tars(tars: Path) -> None:
    (tars / "list.txt").write_text("00002.tar\n00000.tar\n")
    assert keys(open_source(tars / "list.txt"))[:4] == ["00002/0006", "00002/0007", "00002/0008", "00000/0000"]
    assert keys(open_source(tars / "00001.tar")) == ["00001/0004", "00001/0005"]


def test_a_limit_cuts_the_last_tar(tars: Path) -> None:
    whole = open_source(tars)
    cases = {1: [1], 4: [4], 5: [4, 1], 6: [4, 2], 8: [4, 2, 2], 9: [4, 2, 3], 99: [4, 2, 3]}
    for limit, counts in cases.items():
        source = open_source(tars, limit=limit)
        assert keys(source) == keys(whole)[:limit]
        assert [shard.images for shard in source.shards()] == counts
        uncut = sum(a == b for a, b in zip(counts, (4, 2, 3), strict=False))
        assert ids(source)[:uncut] == ids(whole)[:uncut]
        assert set(ids(source)[uncut:]).isdisjoint(ids(whole))


def test_tars_in_several_folders_are_told_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.tar").write_bytes(packed(*samples(0, 1)))
    for spec in (tmp_path, f"{tmp_path}/*/0.tar"):
        assert keys(open_source(spec)) == ["a/0/0000", "b/0/0000"]


def test_what_lies_beside_a_picture(tmp_path: Path) -> None:
    fields = json.dumps({"caption": ["from json"], "url": "u", "width": 3}).encode()
    files = [
        ("s/1.jpg", encoded(1, "JPEG")),
        ("s/1.txt", b" a dog \n"),
        ("s/1.json", fields),
        ("s/1.cls", b"7\n"),
        ("s/2.seg.png", b"not the picture"),
        ("s/2.PNG", encoded(2)),
        ("s/2.json", fields),
        ("3.webp", encoded(3, "WEBP")),
        ("4.png", encoded(4)),
        ("4.json", b"{"),
        ("README.txt", b"no sample"),
    ]
    (tmp_path / "x.tar").write_bytes(packed(*files))
    source = open_source(tmp_path / "x.tar", columns=["caption", "url", "cls"])
    found = everything(source)
    assert [f.key for f in found] == ["x/s/1", "x/s/2", "x/3", "x/4"]
    assert [dict(i.columns) for i in found if isinstance(i, Item)] == [
        {"caption": ["a dog"], "url": "u", "cls": "7"},
        {"caption": ["from json"], "url": "u", "cls": None},
        {"caption": [], "url": None, "cls": None},
    ]
    assert isinstance(found[3], Failure) and "the .json of x/4 is damaged" in found[3].reason
    with pytest.raises(
        InputError, match=r"no column 'ulr': its first sample, s/1, has txt, cls, caption, url, width\."
    ):
        open_source(tmp_path / "x.tar", columns=["ulr"])
    with pytest.raises(InputError, match="has no columns of images or keys: leave 'url' out"):
        open_source(tmp_path / "x.tar", key_column="url")
    own = Prompts(column="caption")
    assert isinstance(found[0], Item) and own.own(found[0]) == ["a dog"]
    assert isinstance(found[2], Item)
    with pytest.raises(TextError, match="x/3 has no caption"):
        own.own(found[2])
    assert len([i for i in everything(open_source(tmp_path / "x.tar")) if isinstance(i, Item)]) == 4


def test_equal_names_are_numbered(tmp_path: Path) -> None:
    twice = [*samples(0, 2), *samples(0, 1), ("0000.png", encoded(9)), ("0000~2.png", encoded(8))]
    (tmp_path / "x.tar").write_bytes(packed(*twice))
    source = open_source(tmp_path / "x.tar")
    assert keys(source) == ["x/0000", "x/0001", "x/0000~2", "x/0000~3", "x/0000~2~2"]
    assert [grey(item) for item in everything(source)] == [0, 1, 0, 9, 8]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_that_would_climb_out_are_only_keys(tmp_path: Path, format: int) -> None:
    names = {
        "/etc/passwd.png": "x/etc/passwd",
        "../../up.png": "x/up",
        "a/../../b/./c.png": "x/a/b/c",
        "..\\back\\slash.png": "x/.._back_slash",
        "new\nline\x1b[1m.png": "x/new_line_[1m",
        "ümläut/" + "é" * 20 + ".png": "x/ümläut/" + "é" * 20,
    }
    names = {name: key for name, key in names.items() if not name.startswith("..\\")}
    folder = tmp_path / "in" / "side"
    folder.mkdir(parents=True)
    content = packed(*((name, encoded(i)) for i, name in enumerate(names)), format=format)
    (folder / "x.tar").write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    source = open_source(folder / "x.tar")
    assert keys(source) == list(names.values())
    assert [grey(item) for item in everything(source)] == list(range(len(names)))
    assert sorted(tmp_path.rglob("*")) == before and not Path("/etc/passwd.png").exists()


def test_links_devices_and_sparse_files_are_passed_over(tmp_path: Path) -> None:
    odd = []
    for kind, name in ((tarfile.SYMTYPE, "a"), (tarfile.LNKTYPE, "b"), (tarfile.FIFOTYPE, "c"), (tarfile.CHRTYPE, "d")):
        info = tarfile.TarInfo(f"{name}.png")
        info.type, info.linkname = kind, "/etc/passwd"
        odd.append(info)
    folder = tarfile.TarInfo("e.png")
    folder.type = tarfile.DIRTYPE
    (tmp_path / "x.tar").write_bytes(packed(*odd, folder, ("._f.png", b"hidden"), *samples(3, 4)))
    assert keys(open_source(tmp_path / "x.tar")) == ["x/0003"]


def test_empty_and_enormous_pictures(tmp_path: Path) -> None:
    content = packed(("a.png", b""), *samples(1, 2))
    (tmp_path / "x.tar").write_bytes(content)
    found = everything(open_source(tmp_path / "x.tar"))
    assert found[0] == Failure("x/a", "x/a is empty: 0 bytes.") and grey(found[1]) == 1
    info = tarfile.TarInfo("huge.png")
    info.size = 2**31
    with (tmp_path / "x.tar").open("wb") as stream:
        stream.write(info.tobuf())
        stream.seek(512 + 2**31)
        stream.write(content)
    found = everything(open_source(tmp_path / "x.tar"))
    assert [f.key for f in found] == ["x/huge", "x/a", "x/0001"]
    assert isinstance(found[0], Failure) and "2,147,483,648 bytes" in found[0].reason


def test_a_tar_cut_anywhere_gives_what_is_before(tmp_path: Path) -> None:
    whole = packed(*samples(0, 6))
    place = tmp_path / "x.tar"
    rng = np.random.default_rng(0)
    for cut in sorted({*range(512, 6 * 4 * 512, 512), *rng.integers(513, 6 * 4 * 512, 40).tolist()}):
        place.write_bytes(whole)
        source = open_source(place)
        place.write_bytes(whole[:cut])
        found = everything(source)
        items = [item for item in found if isinstance(item, Item)]
        # A sample is a header and a block for its picture, and the same for its text: four blocks of 512 bytes.
        complete = sum(cut >= i * 2048 + 512 + len(encoded(i)) for i in range(6))
        assert [grey(item) for item in items] == list(range(complete))
        failures = [one for one in found if isinstance(one, Failure)]
        assert len(failures) == 1 and found[-1] is failures[0] and failures[0].key == "x.tar"
        assert "x.tar is no whole, uncompressed tar" in failures[0].reason
        assert (f"the {complete} samples before that are used" in failures[0].reason) == (complete > 0)


def test_a_damaged_header_in_the_middle_is_no_end(tmp_path: Path) -> None:
    content = bytearray(packed(*samples(0, 6)))
    content[3 * 2048 : 3 * 2048 + 512] = os.urandom(512)
    (tmp_path / "x.tar").write_bytes(content)
    found = everything(open_source(tmp_path / "x.tar"))
    assert [grey(item) for item in found[:3]] == [0, 1, 2]
    assert isinstance(found[3], Failure) and f"damaged at byte {3 * 2048:,}" in found[3].reason and len(found) == 4


def test_vanished_and_foreign_tars_among_good_ones(tars: Path) -> None:
    source = open_source(f"{tars}/{{00000..00003}}.tar", columns=["caption"])
    (tars / "00000.tar").unlink()
    (tars / "00001.tar").write_bytes(gzip.compress(packed(*samples(0, 1))))
    found = everything(source)
    assert [f.key for f in found] == ["00000.tar", "00001.tar", "00002/0006", "00002/0007", "00002/0008", "00003.tar"]
    reasons = [f.reason for f in found if isinstance(f, Failure)]
    assert "00000.tar does not exist" in reasons[0] and "00003.tar does not exist" in reasons[2]
    assert "it is compressed" in reasons[1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot be read from byte 0 on .*empty file"),
        (b"<html>not found</html>" * 40, "no whole, uncompressed tar"),
        (gzip.compress(b"x" * 2000), "it is compressed"),
        (packed(("a.txt", b"words"), ("b.npy", b"numbers")), r"x\.tar holds no pictures \(\.jpg, \.jpeg, \.png"),
        (packed(), "holds no pictures"),
    ],
)
def test_tars_without_pictures_are_told_early(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(InputError, match=said):
        open_source(tmp_path)
    (tmp_path / "y.tar").write_bytes(packed(("a.txt", b"words")))
    with pytest.raises(InputError, match=r"The tars after it have none either\."):
        open_source(tmp_path)
    (tmp_path / "z.tar").write_bytes(packed(*samples(0, 1)))
    assert keys(open_source(tmp_path))[-1] == "z/0000"


def test_tars_by_address(tars: Path) -> None:
    system: Any = fsspec.filesystem("memory")
    try:
        system.put(f"{tars}/", "/tars/", recursive=True)
        for spec in ("memory://tars", "memory://tars/*.tar", "memory://tars/{00000..00002}.tar"):
            source = open_source(spec, columns=["caption"])
            assert keys(source) == keys(open_source(tars)) and ids(source) == ids(open_source(tars))
            assert [grey(item) for item in everything(pickle.loads(pickle.dumps(source)))] == list(range(9))
        system.pipe("/tars/00001.tar", system.cat("/tars/00001.tar")[:3000])
        system.rm("/tars/00002.tar")
        found = everything(source)
        assert [f.key for f in found[4:]] == ["00001/0004", "00001/0005", "00001.tar", "00002.tar"]
        assert isinstance(found[-1], Failure) and "memory://tars/00002.tar does not exist" in found[-1].reason
    finally:
        system.store.clear()


@given(st.lists(st.text("ab./~2\\", min_size=1, max_size=8), min_size=1, max_size=12))
def test_whatever_members_are_called_keys_are_unique_and_stay_inside(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    place = tmp_path_factory.getbasetemp() / "any.tar"
    place.write_bytes(packed(*((f"{name}.png", encoded(i)) for i, name in enumerate(names)), ("z.png", encoded(99))))
    found = keys(open_source(place))
    assert len(set(found)) == len(found) and "any/z" in found
    assert all(key.startswith("any/") and not {"", ".", ".."} & set(key.split("/")) for key in found)


@given(st.binary(max_size=3000), st.integers(0, 6000))
def test_garbage_never_breaks_the_reader(garbage: bytes, at: int) -> None:
    content = packed(*samples(0, 3))
    stream = io.BytesIO(content[:at] + garbage + content[at + len(garbage) :])
    found = []
    with contextlib.suppress(TarError):
        for member in members(stream):
            found.append(member.name)
            assert member.offset_data + member.size <= len(stream.getvalue())
    assert found[: at // 1024] == [name for name, _ in samples(0, 3)][: at // 1024]
