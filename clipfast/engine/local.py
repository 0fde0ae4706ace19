"""Shards on several processes of one machine: one for each GPU, or several on the CPU.

Each process is fed through a pipe of its own, so that one that is killed leaves no lock behind that others wait for;
its shard is given to another.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from clipfast.errors import ClipfastError

if TYPE_CHECKING:
    from clipfast.engine.base import Shard

Marker = dict[str, Any]
Outcome: TypeAlias = "tuple[Shard, Marker | Exception]"


class Work(Protocol):
    """Computes a shard; calls the second argument with the number of images finished since."""

    def __call__(self, shard: Shard, progress: Callable[[int], None], /) -> Marker: ...


_TICK = 0.5


def local_workers(
    starts: Sequence[Callable[[], Work]],
    shards: Iterable[Shard],
    *,
    attempts: int = 3,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda images: None,
) -> Generator[Outcome]:
    """Each shard with its marker, or the exception that it raised, in the order in which they end.

    starts: one for each process, called in it once; what it returns computes one shard at a time. Must pickle.
    attempts: how many processes may die of a shard before it is given up. stop: if true, shards under way are finished
    and no more are begun. progress: called with the number of images that were finished somewhere.

    Raises what a start raised, and ClipfastError when processes keep dying before they compute anything.
    """
    pool = [_Process(start) for start in starts]
    waiting = deque((shard, 1) for shard in shards)
    deaths = 0
    try:
        for process in pool:
            process.begin()
        while True:
            if stop():
                waiting.clear()
            for process in pool:
                if waiting and process.idle:
                    process.give(*waiting.popleft())
            if not waiting and not any(process.shard for process in pool):
                return
            for process in _ready(pool):
                shard, attempt = process.shard, process.attempt
                message = process.hear()
                if message is None:
                    deaths += 1
                    if deaths > attempts * len(pool):
                        raise ClipfastError(
                            f"{deaths} processes died one after the other and no shard was finished between "
                            f"({process.end()}): does each have enough memory?"
                        )
                    if shard is not None and attempt >= attempts:
                        yield (
                            shard,
                            ClipfastError(
                                f"shard {shard.id}: {attempts} processes died while computing it ({process.end()}); "
                                "if memory ran out, take smaller batches or shards, or fewer processes."
                            ),
                        )
                    elif shard is not None:
                        waiting.appendleft((shard, attempt + 1))
                    process.begin()
                elif isinstance(message, int):
                    progress(message)
                elif shard is None:
                    if isinstance(message, Exception):
                        raise message
                else:
                    deaths = 0
                    yield shard, message
    finally:
        for process in pool:
            process.dismiss()
        for process in pool:
            process.bury()


@dataclass
class _Process:
    """One worker process. shard: what it computes, at its n-th attempt; started: it has said that it can."""

    start: Callable[[], Work]
    shard: Shard | None = None
    attempt: int = 0
    started: bool = False
    pipe: Connection = field(init=False)
    process: BaseProcess = field(init=False)

    def begin(self) -> None:
        """Start a process; in place of a dead one, if there was one."""
        if hasattr(self, "pipe"):
            self.pipe.close()
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(self.start, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.shard, self.started = None, False

    @property
    def idle(self) -> bool:
        return self.started and self.shard is None

    def give(self, shard: Shard, attempt: int) -> None:
        self.shard, self.attempt = shard, attempt
        try:
            self.pipe.send(shard)
        except OSError:
            # It has died meanwhile, which `hear` will find out.
            return

    def hear(self) -> Marker | Exception | int | None:
        """What it has to say: images finished, a shard's marker or exception, or None: it is dead."""
        try:
            message = self.pipe.recv()
        except (EOFError, OSError):
            return None
        if not isinstance(message, int):
            self.shard, self.started = None, True
        return message

    def end(self) -> str:
        """How it died."""
        self.process.join(1)
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"signal {signal.Signals(-code).name}"
        return f"exit code {code}"

    def dismiss(self) -> None:
        """Have it end: at once, if it is in the middle of a shard."""
        if not hasattr(self, "process"):
            return
        self.pipe.close()
        if self.shard is not None or not self.started:
            self.process.kill()

    def bury(self) -> None:
        if not hasattr(self, "process"):
            return
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()


def _ready(pool: Sequence[_Process]) -> list[_Process]:
    """Those that have something to say, or have died; after a moment, none."""
    pipes: dict[Any, _Process] = {process.pipe: process for process in pool}
    return [pipes[pipe] for pipe in wait(list(pipes), _TICK)]


def _serve(start: Callable[[], Work], pipe: Connection) -> None:
    """The life of a worker process: start, then shard after shard, until the pipe ends."""
    # A Ctrl-C at the terminal, or a job's end, reaches every process: the one that gives out shards decides.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_follow, daemon=True).start()
    # Without the other end of the pipe nobody is left to tell.
    with suppress(EOFError, OSError):
        try:
            work = start()
        except Exception as error:
            pipe.send(_portable(error))
            return
        pipe.send({})
        while True:
            shard = pipe.recv()
            try:
                outcome: Marker | Exception = work(shard, pipe.send)
            except Exception as error:
                outcome = _portable(error)
            pipe.send(outcome)


def _follow() -> None:
    """End with the process that gives out shards, however it ends: what it began it can no longer finish."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _portable(error: Exception) -> Exception:
    """The exception as it can travel, with all that it says."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return ClipfastError(f"{type(error).__name__}: {error}")
    return error
