"""Runs under fire: killed at any moment, fed with rubbish, without room, and two at once."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import clipfast
from clipfast.engine.run import run
from clipfast.engine.watch import Watch
from clipfast.errors import InputError, OutputError
from clipfast.models.model import Model

TEXTS = ["a dog", "a red car"]
KILLS = 50
PHOTOS = 40
Forked = Callable[..., tuple[int, float]]


def picture(number: int) -> bytes:
    """A JPEG of blotches, 70 pixels wide or a little more."""
    noise = np.random.default_rng(number).integers(0, 255, (8, 8, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).resize((70 + number % 9, 66)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(PHOTOS):
        (folder / f"{i:03d}.jpg").write_bytes(picture(i))
    return folder


@pytest.fixture
def model(build_clip: Any, tokenizer: Any) -> Model:
    return Model(build_clip(layers=2), tokenizer, name="tiny")


@pytest.fixture(scope="module")
def forge() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(Path(__file__).with_name("fire.py"))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        yield process
        process.kill()


@pytest.fixture
def forked(forge: subprocess.Popen[str]) -> Forked:
    """A run in a fork of a prepared process: its wait status and the seconds that it lived."""

    def call(**request: Any) -> tuple[int, float]:
        assert forge.stdin is not None and forge.stdout is not None
        forge.stdin.write(json.dumps({"texts": TEXTS, **request}, default=str) + "\n")
        forge.stdin.flush()
        line = forge.stdout.readline()
        assert line, forge.stderr.read() if forge.stderr else ""
        status, seconds = json.loads(line)
        return status, seconds

    return call


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("*/*.parquet"))}


def test_killed_at_fifty_moments_it_ends_as_if_it_had_not_been(forked: Forked, photos: Path, tmp_path: Path) -> None:
    request = {"source": photos, "shard_size": 2, "features": True}
    assert forked(**request, out=tmp_path / "whole")[0] == 0
    _, window = forked(**request, out=tmp_path / "first", limit=4)
    out, killed, lives, moments = tmp_path / "killed", 0, [0], random.Random(0)
    deadline = time.monotonic() + 60
    while True:
        # On a machine that is busy with other things, fewer deaths have to do.
        enough = killed >= KILLS or time.monotonic() > deadline
        moment = None if enough else moments.uniform(0, window)
        status, _ = forked(**request, out=out, kill_after=moment)
        assert status in (0, signal.SIGKILL)
        killed += status == signal.SIGKILL
        lives.append(len(list(out.glob("shards/*.json"))))
        if status == 0 and enough:
            break
        if status == 0:
            # It was done before its fiftieth death: the rest of them are another run's.
            compare(out, tmp_path / "whole")
            out = tmp_path / f"killed after {killed}"
        # So long that some lives finish a shard or two, and others die in their beginning.
        window *= 1.2 if lives[-1] == lives[-2] else 0.75
    assert killed >= 10 and len(set(lives)) > 3, lives
    compare(out, tmp_path / "whole")


def compare(out: Path, whole: Path) -> None:
    assert files(out) == files(whole)
    found = list(clipfast.open_run(out).keys())
    assert found == [f"{i:03d}.jpg" for i in range(PHOTOS)]
    assert json.loads((out / "summary.json").read_text())["complete"]
    assert not list(out.rglob("*.part")) and not list(out.glob(".lock/*-of-*"))


def png(width: int, height: int) -> bytes:
    """The beginning of a PNG of that size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + b"\0\0\xff\0IDAT"
        + bytes(64)
    )


def test_rubbish_is_recorded_and_costs_nothing_else(model: Model, photos: Path, tmp_path: Path) -> None:
    rubbish = {
        "empty.jpg": b"",
        "truncated.jpg": picture(1)[:300],
        "corrupt.jpg": b"\xff\xd8" + random.Random(0).randbytes(2000),
        "text.jpg": b"<!DOCTYPE html><title>404</title>",
        "enormous.png": png(100_000, 100_000),
        "bomb.png": png(30_000, 30_000),
        "nothing.png": png(0, 5),
        "cut.webp": b"RIFF\x00\x10\x00\x00WEBPVP8 ",
    }
    for name, content in rubbish.items():
        (photos / name).write_bytes(content)
    (photos / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    (photos / "folder.jpg").mkdir()
    os.mkfifo(photos / "pipe.jpg")
    (photos / "\udcff.jpg").write_bytes(b"")
    run(photos, TEXTS, tmp_path / "maps", model=model, shard_size=16, max_error_rate=1)
    found = clipfast.open_run(tmp_path / "maps")
    reasons = {error.key: error.reason for error in found.errors()}
    assert {name for name in rubbish if name not in reasons} == set()
    assert all(reason.endswith(".") and "\n" not in reason for reason in reasons.values())
    assert all("too large to decode safely" in reasons[name] for name in ("enormous.png", "bomb.png"))
    good = [f"{i:03d}.jpg" for i in range(PHOTOS)]
    assert list(found.keys()) == good
    # Those beside them are what they are without: an image that cannot be read keeps its seat.
    for name in rubbish:
        (photos / name).unlink()
    alone = clipfast.Explainer(model)(str(photos / "007.jpg"), TEXTS).maps[0].numpy()
    np.testing.assert_allclose(found["007.jpg"].maps[0].numpy(), alone, atol=0.02 * alone.max())


class Deletes(Watch):
    """Makes files vanish while they are being read."""

    def __init__(self, *paths: Path):
        self.paths = paths

    def images(self, finished: int) -> None:
        for path in self.paths:
            path.unlink(missing_ok=True)


def test_files_that_vanish_are_recorded(model: Model, photos: Path, tmp_path: Path) -> None:
    watch = Deletes(photos / "038.jpg", photos / "039.jpg")
    run(photos, TEXTS, tmp_path / "maps", model=model, shard_size=8, watch=watch)
    found = clipfast.open_run(tmp_path / "maps")
    assert [error.key for error in found.errors()] == ["038.jpg", "039.jpg"]
    assert list(found.keys()) == [f"{i:03d}.jpg" for i in range(38)]


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_tars_cut_in_the_middle_keep_what_is_before_the_cut(model: Model, tmp_path: Path) -> None:
    for number in range(3):
        tar(tmp_path / f"{number}.tar", [(f"{i:03d}.jpg", picture(10 * number + i)) for i in range(8)])
    cut = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(cut[: len(cut) // 2 + 700])
    (tmp_path / "2.tar").write_bytes(b"this is no tar at all")
    run(str(tmp_path / "{0..2}.tar"), TEXTS, tmp_path / "maps", model=model, max_error_rate=1)
    found = clipfast.open_run(tmp_path / "maps")
    keys = list(found.keys())
    assert len(keys) == len(set(keys)) and 8 < len(keys) < 16
    assert sum(key.startswith("0/") for key in keys) == 8
    named = " ".join(f"{error.key} {error.reason}" for error in found.errors())
    assert "1.tar" in named and "2.tar" in named


def test_hostile_names_in_tars_stay_names(model: Model, tmp_path: Path) -> None:
    names = [
        "/abs/a.jpg",
        "../../b.jpg",
        "x\\c.jpg",
        "./d.jpg",
        "e\n.jpg",
        "x/" * 60 + "f.jpg",
        "ü.jpg",
        "a.jpg",
        "a.jpg",
    ]
    tar(tmp_path / "hostile.tar", [(name, picture(i)) for i, name in enumerate(names)])
    with tarfile.open(tmp_path / "hostile.tar", "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"link {kind!r}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    outside = set(tmp_path.rglob("*"))
    run(str(tmp_path / "hostile.tar"), TEXTS, tmp_path / "deep" / "maps", model=model, max_error_rate=1)
    written = set(tmp_path.rglob("*")) - outside
    assert all(path == tmp_path / "deep" or tmp_path / "deep" / "maps" in (path, *path.parents) for path in written)
    found = clipfast.open_run(tmp_path / "deep" / "maps")
    keys = list(found.keys())
    assert len(keys) == len(set(keys))
    assert len(keys) + len(found.errors()) >= len(names)
    assert all("passwd" not in key for key in keys)


def test_equal_keys_are_told_apart(model: Model, photos: Path, tmp_path: Path) -> None:
    (photos / "list.txt").write_text("000.jpg\n001.jpg\n000.jpg\n\n000.jpg\n")
    run(photos / "list.txt", TEXTS, tmp_path / "maps", model=model, shard_size=2)
    found = clipfast.open_run(tmp_path / "maps")
    assert list(found.keys()) == ["000.jpg", "001.jpg", "000.jpg~2", "000.jpg~3"]
    # The same numbers, but for the company that they were computed in.
    np.testing.assert_allclose(found["000.jpg"].maps, found["000.jpg~3"].maps, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("most", [0, 300, 3000])
def test_without_room_nothing_is_half_written(forked: Forked, photos: Path, tmp_path: Path, most: int) -> None:
    request = {"source": photos, "shard_size": 16, "features": True, "out": tmp_path / "maps"}
    status, _ = forked(**request, largest_file=most)
    assert os.waitstatus_to_exitcode(status) == 1
    assert not list((tmp_path / "maps").glob("*/*.parquet")) or not list((tmp_path / "maps").glob("*/*.json"))
    assert not list((tmp_path / "maps").rglob("*.part"))
    status, _ = forked(**request)
    assert status == 0
    assert len(clipfast.open_run(tmp_path / "maps")) == PHOTOS


def test_a_full_disk_stops_cleanly_and_the_run_goes_on(
    model: Model, photos: Path, tmp_path: Path, small_disk: Path
) -> None:
    out = small_disk / "maps"
    with pytest.raises(OutputError, match=r"No space left on device.*shards are done and safe; make room") as caught:
        run(photos, TEXTS, out, model=model, shard_size=8, features="float32")
    assert caught.value.full
    assert not list(out.rglob("*.part"))
    for marker in out.glob("shards/*.json"):
        for name, size in json.loads(marker.read_text())["files"].items():
            assert (out / name).stat().st_size == size
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    summary = run(photos, TEXTS, out, model=model, shard_size=8, features="float32")
    assert summary["complete"] and summary["this_run"]["shards"] > 0
    assert list(clipfast.open_run(out).keys()) == [f"{i:03d}.jpg" for i in range(PHOTOS)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs rights that are not here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_read_only_folder_is_refused_at_once(
    model: Model, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    monkeypatch.setattr("clipfast.engine.work.load", lambda *given, **options: pytest.fail("the model was loaded"))
    with pytest.raises(InputError, match="read-only"):
        run(photos, TEXTS, tmp_path / "maps", model=model)
    assert not (tmp_path / "maps").exists()


def test_two_runs_at_once(forked: Forked, model: Model, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "maps"

    class Meanwhile(Watch):
        codes: tuple[int, ...] = ()

        def images(self, finished: int) -> None:
            if not self.codes:
                request = {"source": photos, "out": out, "shard_size": 8}
                self.codes = tuple(
                    os.waitstatus_to_exitcode(forked(**request, part=part)[0]) for part in ((0, 1), (0, 2), (1, 2))
                )

    # The models differ, so that the part that may run at once is refused for that; parts of one run are tried below.
    watch = Meanwhile()
    run(photos, TEXTS, out, model=model, shard_size=8, part=(0, 2), watch=watch)
    assert watch.codes == (1, 1, 1)
    requests: dict[str, Any] = {"source": photos, "out": tmp_path / "parts", "shard_size": 4}
    for i in range(3):
        assert forked(**requests, part=[i, 3])[0] == 0
    assert forked(**{**requests, "out": tmp_path / "whole"})[0] == 0
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_ctrl_c_finishes_the_shard(forked: Forked, photos: Path, tmp_path: Path) -> None:
    request = {"source": photos, "shard_size": 2}
    assert forked(**request, out=tmp_path / "whole")[0] == 0
    out = tmp_path / "stopped"
    status, _ = forked(**request, out=out, after_shards=2, signal=signal.SIGINT)
    assert os.waitstatus_to_exitcode(status) == 130
    assert not list(out.rglob("*.part"))
    summary = json.loads((out / "summary.json").read_text())
    assert 2 <= summary["shards"] < PHOTOS // 2 and summary["images"] == 2 * summary["shards"]
    assert forked(**request, out=out)[0] == 0
    assert files(out) == files(tmp_path / "whole")
