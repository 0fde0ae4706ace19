"""Shards on a Ray cluster: the same files as without, whoever is killed meanwhile."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import clipfast
from clipfast.data.scenes import Scenes
from clipfast.engine.base import Shard
from clipfast.engine.engines import on_ray
from clipfast.engine.ray import _room, connected, ray_job, ray_workers
from clipfast.engine.sources import open_source
from clipfast.engine.texts import Prompts
from clipfast.engine.totals import RunError
from clipfast.engine.watch import Watch as Silent
from clipfast.engine.work import Job
from clipfast.errors import InputError

# Ray leaves sockets, and processes that it has started, to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

TEXTS = ("a dog", "a red car")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray of this module's own, on this machine, which all its runs find connected."""
    if os.environ.get("RAY_ADDRESS"):
        pytest.skip("RAY_ADDRESS names a cluster that is not this test's")
    home = Path.home() / ".ray" / "auth_token"
    before = home.exists()
    handler = signal.getsignal(signal.SIGTERM)
    with connected(None) as (ray, local):
        assert local
        assert home.exists() == before, "a token was written into the home folder"
        assert signal.getsignal(signal.SIGTERM) is handler
        yield ray
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i, scene in enumerate(Scenes(30, size=96, seed=3)):
        Image.fromarray(scene.image).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def local(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run without Ray."""
    out = tmp_path_factory.mktemp("local") / "maps"
    clipfast.run(str(photos), TEXTS, out, device="cpu", shard_size=3, features=True)
    return _files(out)


def _files(out: Path) -> dict[str, bytes]:
    assert not list(out.rglob("*.part"))
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.parquet")}


def _work(log: Path) -> Callable[[float], Callable[[Shard], dict[str, Any]]]:
    """A worker that does as its shard says, and keeps a line of what it was given."""

    def start(gpus: float) -> Callable[[Shard], dict[str, Any]]:
        def work(shard: Shard) -> dict[str, Any]:
            with log.open("a") as lines:
                lines.write(f"{shard.id}\n")
            first = log.read_text().split().count(shard.id) == 1
            if shard.holds == "die" or (shard.holds == "die once" and first):
                os.kill(os.getpid(), signal.SIGKILL)
            if shard.holds == "raise":
                raise OSError(28, "No space left on device")
            return {"shard": shard.id, "process": os.getpid(), "gpus": gpus}

        return work

    return start


def _shards(*holds: str) -> list[Shard]:
    return [Shard(f"s{i}", i, what) for i, what in enumerate(holds)]


def test_every_shard_has_one_outcome_whatever_workers_do(cluster: Any, tmp_path: Path) -> None:
    shards = _shards("", "die once", "", "raise", "", "die", "")
    found = list(ray_workers(_work(tmp_path / "log"), shards, workers=2, cpus=0.5, attempts=2))
    assert sorted(shard.id for shard, _ in found) == [shard.id for shard in shards]
    outcomes = {shard.id: outcome for shard, outcome in found}
    for name in ("s0", "s1", "s2", "s4", "s6"):
        assert isinstance(outcomes[name], dict) and outcomes[name]["shard"] == name
        assert outcomes[name]["gpus"] == 0 and outcomes[name]["process"] != os.getpid()
    assert isinstance(outcomes["s3"], OSError) and outcomes["s3"].errno == 28
    assert isinstance(outcomes["s5"], RunError) and "shard s5: 2 workers died" in str(outcomes["s5"])
    given = (tmp_path / "log").read_text().split()
    assert {name: given.count(name) for name in outcomes} == {**dict.fromkeys(outcomes, 1), "s1": 2, "s5": 2}


def test_stop_finishes_what_is_under_way(cluster: Any, tmp_path: Path) -> None:
    done: list[str] = []
    work = _work(tmp_path / "log")
    for shard, _ in ray_workers(work, _shards(*[""] * 50), workers=1, cpus=0.5, stop=lambda: len(done) >= 2):
        done.append(shard.id)
    assert done == ["s0", "s1"]


def test_a_start_that_fails_says_why(cluster: Any) -> None:
    def refuses(gpus: float) -> Any:
        raise InputError("there is no such model.")

    with pytest.raises(InputError, match=r"there is no such model\."):
        list(ray_workers(refuses, _shards(""), workers=1, cpus=0.5))

    def lacks(gpus: float) -> Any:
        raise ImportError("no module called x")

    with pytest.raises(RunError, match="a worker could not start: no module called x"):
        list(ray_workers(lacks, _shards(""), workers=1, cpus=0.5))


def test_too_much_asked_ends_in_a_sentence(cluster: Any, tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(InputError, match=r"no worker could be placed in 1 s: each needs 1000 CPUs"):
        list(ray_workers(_work(tmp_path / "log"), _shards(""), cpus=1000, patience=1))
    assert time.monotonic() - begun < 20
    machine = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 3.0}]
    assert _room(machine, None, 1, 0, True) == 7
    assert _room(machine, None, 2, 0, True) == 3
    assert _room(machine, None, 1, 1, True) == 1
    assert _room(machine, 2, 1, 0, True) == 2
    with pytest.raises(InputError, match=r"a worker needs 5 CPUs, and this machine has 7 CPUs and 1 GPU"):
        _room(machine, None, 5, 0, True)
    with pytest.warns(UserWarning, match=r"has room for 3 workers of 2 CPUs, not for 9: 3 are started"):
        assert _room(machine, 9, 2, 0, True) == 3
    # A cluster may grow when it is asked to.
    assert _room(machine, 9, 2, 0, False) == 9 and _room([], None, 2, 0, False) == 1
    for wrong in ({"workers": 0}, {"cpus": 0, "gpus": 0}, {"cpus": -1}):
        with pytest.raises(InputError, match="at least one worker"):
            list(ray_workers(_work(tmp_path / "log"), _shards(""), **wrong))


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'clipfast\[ray\]'"):
        list(ray_workers(lambda gpus: lambda shard: {}, _shards("")))


def test_a_model_in_memory_does_not_travel(photos: Path, tmp_path: Path, build_clip: Any) -> None:
    job = Job(open_source(str(photos)), Prompts(TEXTS), tmp_path, model=build_clip())
    with pytest.raises(InputError, match="load the model by themselves"):
        list(ray_job(job, job.source.shards()))


def test_an_address_where_nothing_listens(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    code = (
        "from clipfast.engine.ray import ray_workers\n"
        "from clipfast.engine.base import Shard\n"
        f"list(ray_workers(print, [Shard('a', 0, None)], address='127.0.0.1:{port}'))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150)
    assert f"InputError: the Ray cluster at 127.0.0.1:{port} cannot be used: Connection refused." in result.stderr


def test_a_killed_worker_changes_no_byte(cluster: Any, photos: Path, local: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "maps"
    killed: list[int] = []
    progress: list[int] = []

    class Watch(Silent):
        def images(self, finished: int) -> None:
            progress.append(finished)
            if len(progress) == 2:
                killed.extend(_kill(_workers(os.getpid())[:1]))

    engine = on_ray(workers=2, cpus=0.5)
    summary = clipfast.run(str(photos), TEXTS, out, shard_size=3, features=True, engine=engine, watch=Watch())
    assert len(killed) == 1 and sum(progress) == summary["images"] == 30
    assert _files(out) == local


def test_a_killed_driver_is_gone_on_from(cluster: Any, photos: Path, local: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "maps"
    words = ["run", str(photos), "-t", TEXTS[0], "-t", TEXTS[1], "--features", "--shard-size", "3", "-o", str(out)]
    command = [sys.executable, "-m", "clipfast", *words, "--engine", "ray", "--processes", "1"]
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait(lambda: len(list(out.glob("shards/*.json"))) >= 2 or driver.poll() is not None)
        finally:
            driver.kill()
            driver.wait()
    committed = {path.name: path.stat().st_mtime_ns for path in out.glob("shards/*.json")}
    assert 2 <= len(committed) < 10, (tmp_path / "log").read_text()
    clipfast.run(str(photos), TEXTS, out, shard_size=3, features=True, engine=on_ray(workers=1, cpus=0.5))
    assert _files(out) == local
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("shards/*.json") if path.name in committed}
    assert kept == committed
    # What the driver started ends with it; who lingers is helped.
    _kill(_session(driver.pid))


def _wait(until: Callable[[], bool], seconds: float = 150) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.02)


def _kill(processes: list[int]) -> list[int]:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    return processes


def _workers(driver: int) -> list[int]:
    """The processes in which Ray's workers run whose raylet this process started."""
    return [p for p in _processes() if _name(p).startswith("ray::Worker") and driver in _ancestors(p)]


def _session(leader: int) -> list[int]:
    return [process for process in _processes() if _session_of(process) == leader]


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _session_of(process: int) -> int | None:
    with suppress(ProcessLookupError):
        return os.getsid(process)
    return None


def _name(process: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
    return ""


def _ancestors(process: int) -> Iterator[int]:
    while process > 1:
        yield process
        try:
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return
