"""How a run is followed, and asked to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

from clipfast.engine.base import Shard
from clipfast.engine.totals import Totals


class Watch:
    """Is told how a run goes; this one keeps it to itself."""

    def begins(self, listed: Sequence[Shard], todo: Sequence[Shard], totals: Totals) -> None:
        """There is so much to do; totals: of what was done before."""

    def images(self, finished: int) -> None:
        """So many more images are finished."""

    def shard(self, totals: Totals) -> None:
        """Another shard is done; totals: with it."""

    def stops(self) -> None:
        """The run was asked to stop; called where a signal is handled, so nothing may be printed but by `os.write`."""


class Stop:
    """Ctrl-C and SIGTERM: the first lets the shards under way be finished, the second interrupts at once.

    As a context; call it to learn whether to stop. Outside the main thread, where Python knows no signals, it never is.
    """

    def __init__(self, watch: Watch):
        self._watch = watch
        self._asked = False
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self._asked

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._heard) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        self._watch.stops()
