"""Several processes: what they hand over, and what becomes of a shard whose process dies."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from clipfast.data.scenes import Scenes
from clipfast.engine.base import Shard
from clipfast.engine.engines import process_starts
from clipfast.engine.local import local_workers
from clipfast.engine.sources import open_source
from clipfast.engine.texts import Prompts
from clipfast.engine.work import Job, Worker
from clipfast.errors import ClipfastError, InputError

# Processes import it by its name, and nothing heavy with it.
WORKER = """
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from clipfast.errors import InputError

class Work:
    def __init__(self, folder, wrong=False):
        self.folder = Path(folder)
        if wrong:
            raise InputError("these are other weights.")

    def __call__(self, shard, progress):
        progress(2)
        tries = len(list(self.folder.glob(f"{shard.id} *")))
        (self.folder / f"{shard.id} {tries}").touch()
        if shard.id == "fatal" or (shard.id == "once" and not tries):
            os.kill(os.getpid(), signal.SIGKILL)
        if shard.id == "refused":
            raise InputError("this shard cannot be.")
        if shard.id == "odd":
            raise type("Odd", (Exception,), {})("cannot travel")
        progress(1)
        return {"shard": shard.id}

def shard(name):
    return SimpleNamespace(id=name)
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "worker_of_tests.py").write_text(WORKER)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("worker_of_tests")


def test_shards_outlive_their_processes(worker: ModuleType, tmp_path: Path) -> None:
    names = ["a", "once", "b", "refused", "odd", "fatal", "c"]
    finished: list[int] = []
    found: dict[str, Any] = {}
    starts = [partial(worker.Work, tmp_path)] * 2
    for shard, outcome in local_workers(starts, map(worker.shard, names), progress=finished.append):
        assert shard.id not in found
        found[shard.id] = outcome
    assert found.keys() == set(names)
    assert [found[name] for name in ("a", "b", "c", "once")] == [{"shard": n} for n in ("a", "b", "c", "once")]
    assert isinstance(found["refused"], InputError) and str(found["refused"]) == "this shard cannot be."
    assert str(found["odd"]) == "Odd: cannot travel"
    assert "3 processes died while computing it (signal SIGKILL)" in str(found["fatal"])
    assert sorted(p.name for p in tmp_path.glob("* [0-9]") if p.name[0] in "of") == [
        "fatal 0", "fatal 1", "fatal 2", "odd 0", "once 0", "once 1",
    ]  # fmt: skip
    assert sum(finished) == 3 * 4 + 2 * 6


def test_stopping_finishes_what_is_begun(worker: ModuleType, tmp_path: Path) -> None:
    found: list[Shard] = []
    shards = map(worker.shard, "abcdefgh")
    for shard, _ in local_workers([partial(worker.Work, tmp_path)] * 2, shards, stop=lambda: bool(found)):
        found.append(shard)
    assert 1 <= len(found) <= 3
    assert len(list(tmp_path.glob("? 0"))) == len(found)


def test_a_start_that_fails_ends_it(worker: ModuleType, tmp_path: Path) -> None:
    starts = [partial(worker.Work, tmp_path, wrong=True)]
    with pytest.raises(InputError, match="these are other weights"):
        list(local_workers(starts, [worker.shard("a")]))


def test_processes_that_only_die_end_it(tmp_path: Path) -> None:
    with pytest.raises(ClipfastError, match="3 processes died one after the other"):
        list(local_workers([partial(__import__("os")._exit, 3)], [Shard("a", 0, None)], attempts=2))


def test_another_process_does_what_this_one_does(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for i, scene in enumerate(Scenes(4, seed=2)):
        Image.fromarray(scene.image).save(tmp_path / "photos" / f"{i}.png")
    source = open_source(tmp_path / "photos", shard_size=2)
    jobs = [Job(source, Prompts(("a dog",)), tmp_path / name, threads=1) for name in ("here", "there")]
    here = Worker(jobs[0])
    for shard in source.shards():
        here(shard)
    starts = process_starts(replace(jobs[1], digest=here.digest), [None])
    assert [shard.number for shard, _ in local_workers(starts, source.shards())] == [0, 1]
    for shard in source.shards():
        file = f"shards/{shard.id}.parquet"
        assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "there" / file).read_bytes()
