"""Shards as tasks of a Ray cluster, for data sets that outgrow one machine.

Ray places workers and says when one is gone; which shards there are, what their files are called and when one is done
stays clipfast's: a worker commits a shard by its marker, so that a lost worker, or a lost driver, costs no more than
the shards that were being computed.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from clipfast.engine.base import Shard
from clipfast.engine.local import Marker, Outcome
from clipfast.engine.totals import RunError
from clipfast.engine.work import Job, Worker
from clipfast.errors import ClipfastError, InputError

# Shards and markers travel within Ray's messages: nothing of them needs shared memory, of which Ray takes a third else.
_OBJECT_STORE = 80 << 20
# Read when Ray is imported, so that it reports nothing home and prints nothing among a command's results on stdout.
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# Deaths for each worker without a shard finished between, after which no more are tried.
_DEATHS = 3
# Seconds in which the machine of an address has to answer.
_REACH = 10
# How long to wait at a time: signals are seen in between.
_TICK = 0.5


def ray_job(
    job: Job,
    shards: Iterable[Shard],
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda images: None,
    *,
    workers: int | None = None,
    cpus: float = 1,
    gpus: float | None = None,
    address: str | None = None,
) -> Generator[Outcome]:
    """The shards of a job, computed by a Ray cluster: an engine for `run`.

    Every machine must reach the job's images, model and folder under the same names. workers, cpus, gpus, address, and
    what is raised: as for `ray_workers`; by default a worker takes a GPU unless the job's device is the CPU. progress:
    called with a shard's images when it is done. Raises InputError for a model that only this process has, too.
    """
    if not job.portable:
        raise InputError("Ray's workers load the model by themselves: name it, or its checkpoint's path.")
    if gpus is None and job.device is not None:
        gpus = float(job.device.startswith("cuda"))
    start = partial(_begin, replace(job, threads=job.threads or max(1, int(cpus))))
    for shard, outcome in ray_workers(start, shards, workers=workers, cpus=cpus, gpus=gpus, address=address, stop=stop):
        if not isinstance(outcome, Exception):
            progress(outcome["images"] + len(outcome["errors"]))
        yield shard, outcome


def _begin(job: Job, gpus: float) -> Worker:
    # Of the machine's GPUs a worker sees those that Ray gave it, and none it may use where it was given none.
    other = job.device is not None and not job.device.startswith("cuda")
    return Worker(job if other else replace(job, device="cuda" if gpus else "cpu"))


def ray_workers(
    start: Callable[[float], Callable[[Shard], Marker]],
    shards: Iterable[Shard],
    *,
    workers: int | None = None,
    cpus: float = 1,
    gpus: float | None = None,
    address: str | None = None,
    attempts: int = 3,
    patience: float = 120,
    stop: Callable[[], bool] = lambda: False,
) -> Generator[Outcome]:
    """Each shard with what became of it, in the order in which they end: the worker's marker, or why there is none.

    start: called once in each worker (a Ray actor) with its share of GPUs; computes one shard at a time. Must pickle.
    workers: how many (None: as many as the cluster has room for), of `cpus` and `gpus` each; gpus None is one, where
        the cluster has any. On a machine that has room for fewer there are fewer, with a warning; on a cluster those
        that come later join, so that it may grow.
    address: of a cluster; None takes the Ray that the process is connected to, then RAY_ADDRESS, and otherwise starts
        one on this machine, which ends with the iteration.
    attempts: how many workers may die of a shard before it is given up. An exception that a worker raises is handed
        on at the first time.
    patience: seconds that may pass without a machine for any worker. stop: asked now and then; if true, shards under
        way are finished and no more are begun.

    Raises InputError where Ray is not installed, the cluster cannot be reached, or it has no room for a single worker;
    RunError where workers do not start for another reason, or keep dying before they finish anything; clipfast's own
    exceptions of `start` as they are.
    """
    if (workers is not None and workers < 1) or cpus < 0 or (gpus or 0) < 0 or cpus + (gpus or 0) == 0:
        raise InputError("Ray needs at least one worker, and some of a CPU or a GPU for each.")
    with connected(address) as (ray, local):
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if gpus is None:
            gpus = float(any(node.get("GPU", 0) >= 1 for node in nodes))
        waiting = deque((shard, 1) for shard in shards)
        count = min(_room(nodes, workers, cpus, gpus, local), len(waiting))
        pool = _Pool(ray, start, count, cpus, gpus, patience)
        try:
            yield from pool.run(waiting, attempts, stop)
        finally:
            pool.close()


@dataclass
class _Actor:
    """A worker. task: what is awaited of it: to be placed, to start, or a shard for the n-th time; None if it idles.

    placed: it has a machine; from there on, its start may take as long as loading or fetching a model takes.
    """

    handle: Any
    task: Any
    placed: bool = False
    shard: Shard | None = None
    attempt: int = 0


class _Pool:
    """Actors, each starting, computing one shard, or idle."""

    def __init__(self, ray: Any, start: Any, count: int, cpus: float, gpus: float, patience: float):
        self._ray = ray
        self._kind = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_concurrency=1)(_worker())
        self._start = ray.put(start), gpus
        self._needs = _amount(cpus, gpus)
        self._patience = patience
        self._actors: list[_Actor] = []
        self._deaths = 0
        for _ in range(count):
            self._add()

    def run(self, waiting: deque[tuple[Shard, int]], attempts: int, stop: Callable[[], bool]) -> Generator[Outcome]:
        seen = time.monotonic()
        while True:
            if stop():
                waiting.clear()
            for actor in self._actors:
                if actor.task is None and waiting:
                    actor.shard, actor.attempt = waiting.popleft()
                    actor.task = actor.handle.work.remote(actor.shard)
            if not waiting and not any(actor.shard for actor in self._actors):
                return
            if any(actor.placed for actor in self._actors):
                seen = time.monotonic()
            elif time.monotonic() - seen > self._patience:
                raise InputError(self._absent())
            awaited = {actor.task: actor for actor in self._actors if actor.task is not None}
            done, _ = self._ray.wait(list(awaited), num_returns=1, timeout=_TICK, fetch_local=False)
            for task in done:
                actor = awaited[task]
                outcome = self._outcome(task)
                shard, attempt, actor.shard, actor.task = actor.shard, actor.attempt, None, None
                if outcome is None:
                    self._replace(actor)
                    if shard is not None and attempt < attempts:
                        waiting.appendleft((shard, attempt + 1))
                    elif shard is not None:
                        yield shard, RunError(_fatal(shard, attempts))
                elif shard is not None:
                    self._deaths = 0
                    yield shard, outcome
                elif isinstance(outcome, ClipfastError):
                    raise outcome
                elif isinstance(outcome, Exception):
                    raise RunError(f"a worker could not start: {outcome}") from outcome
                elif not actor.placed:
                    actor.placed, actor.task = True, actor.handle.start.remote(*self._start)

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor.handle)

    def _add(self) -> None:
        handle = self._kind.remote()
        self._actors.append(_Actor(handle, handle.here.remote()))

    def _outcome(self, task: Any) -> Marker | Exception | None:
        """What a worker returned or raised; None if it is dead, or cannot be reached."""
        from ray.exceptions import RayError, RayTaskError

        try:
            return self._ray.get(task, timeout=self._patience) or {}
        except RayTaskError as error:
            return error.cause if isinstance(error.cause, Exception) else ClipfastError(str(error))
        except RayError:
            return None

    def _replace(self, actor: _Actor) -> None:
        """Another worker in place of a dead one. Raises ClipfastError when that has not helped often enough."""
        self._actors.remove(actor)
        # It may live, and only be out of reach.
        self._ray.kill(actor.handle)
        self._deaths += 1
        if self._deaths > _DEATHS * (len(self._actors) + 1):
            raise RunError(
                f"{self._deaths} workers died one after the other and no shard was finished between: a worker takes "
                "more memory than its machine has, or its machine cannot run it; `ray logs` says more."
            )
        self._add()

    def _absent(self) -> str:
        total, free = self._ray.cluster_resources(), self._ray.available_resources()
        return (
            f"no worker could be placed in {self._patience:.0f} s: each needs {self._needs}, and of its "
            f"{_amount(total.get('CPU', 0), total.get('GPU', 0))} the cluster has "
            f"{_amount(free.get('CPU', 0), free.get('GPU', 0))} free; end what else runs there, or ask for less."
        )


def _worker() -> type:
    # Made in a function, and so sent as code: a worker needs the clipfast that `start` names and no more of this file.
    class Worker:
        def here(self) -> None:
            pass

        def start(self, start: Callable[[float], Callable[[Shard], Marker]], gpus: float) -> None:
            self.call = start(gpus)

        def work(self, shard: Shard) -> Marker:
            return self.call(shard)

    return Worker


@contextmanager
def connected(address: str | None) -> Iterator[tuple[Any, bool]]:
    """Ray, connected, and whether it was started here; a connection that was there before stays."""
    try:
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        import ray
    except ImportError:
        raise InputError("--engine ray needs Ray: pip install 'clipfast[ray]'.") from None
    if ray.is_initialized():
        yield ray, False
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    local = address == "local"
    options: dict[str, Any] = {"address": address, "logging_level": "ERROR", "log_to_driver": False}
    if local:
        options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE}
        _bring_token()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _answers(address)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(**options)
    except Exception as error:
        lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
        reason = lines[0].rstrip(".") if lines else type(error).__name__
        raise InputError(f"the Ray cluster at {address} cannot be used: {reason}.") from error
    finally:
        # Ray puts its own handler there.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
    try:
        yield ray, local
    finally:
        ray.shutdown()


def _answers(address: str) -> None:
    """Raises OSError where nothing listens at host:port. Ray would try for minutes, and say so every few seconds."""
    host, colon, port = address.rpartition(":")
    if colon and "://" not in address and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH).close()


def _bring_token() -> None:
    """A secret for a Ray of our own, in the environment: without one Ray writes a file of its own into the home folder.

    It stays: Ray reads it once in a process, and sets RAY_AUTH_MODE beside it.
    """
    if not any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _room(nodes: list[dict[str, float]], wanted: int | None, cpus: float, gpus: float, local: bool) -> int:
    """How many workers to ask for. Raises InputError where this machine has room for none."""
    needs = [(kind, number) for kind, number in (("CPU", cpus), ("GPU", gpus)) if number]
    room = int(sum(min(node.get(kind, 0) // number for kind, number in needs) for node in nodes))
    if not local:
        # A cluster that has no room yet may be one that grows when it is asked to.
        return wanted or max(room, 1)
    if room == 0:
        has = _amount(*(sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")))
        raise InputError(f"a worker needs {_amount(cpus, gpus)}, and this machine has {has}: ask for less.")
    if wanted is not None and wanted > room:
        warnings.warn(
            f"this machine has room for {room} workers of {_amount(cpus, gpus)}, not for {wanted}: {room} are started.",
            stacklevel=4,
        )
    return min(wanted or room, room)


def _amount(cpus: float, gpus: float) -> str:
    found = [f"{n:g} {kind}{'' if n == 1 else 's'}" for n, kind in ((cpus, "CPU"), (gpus, "GPU")) if n]
    return " and ".join(found) or "no CPU and no GPU"


def _fatal(shard: Shard, attempts: int) -> str:
    return (
        f"shard {shard.id}: {attempts} workers died while they computed it, as they do when memory runs out; "
        "take smaller batches or shards."
    )
