"""A shard's results on the disk: encoded and written beside the model's work, and committed all at once.

    DIR/shards/{id}.parquet      a row for each image and prompt
    DIR/features/{id}.parquet    a row for each image, where attribution features are kept
    DIR/shards/{id}.json         the marker, written last: without it the others do not count

Until `commit`, everything has a name that begins with a dot and ends in ".part".
"""

from __future__ import annotations

import errno
import json
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from clipfast.data.arrow import pyarrow
from clipfast.engine.base import Explained
from clipfast.engine.rows import FEATURE_GROUP, MAP_GROUP, RowFile, feature_table, map_table
from clipfast.engine.storage import feature_codec, map_codec
from clipfast.errors import InputError, OutputError
from clipfast.view.files import write_file

SHARDS, FEATURES = "shards", "features"

_DEPTH = 4
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NAME = re.compile(r"\w[\w.+=-]{0,89}", re.ASCII)
_PART = re.compile(r"\.(.+)\.[0-9a-f]{8}\.part")


class ShardWriter:
    """Writes one shard's maps: `add` what was explained, then `commit`, or `abort`.

    folder: the run's. shard: its id. maps, features: codecs by name (`storage`); features None keeps none. grid: (h, w)
    of every map of the run; None where images have grids of their own. As a context manager it aborts what was not
    committed.

    Encoding, compressing and writing run in a thread of their own. The files' bytes depend on the rows alone, not on
    how they came in batches. Raises InputError for an id that is no plain file name, or an unknown codec.
    """

    def __init__(
        self,
        folder: str | Path,
        shard: str,
        *,
        maps: str = "float16",
        features: str | None = None,
        grid: tuple[int, int] | None = None,
    ):
        if not _NAME.fullmatch(shard):
            raise InputError(f"{shard!r} cannot be a shard's id: up to 90 letters, digits and . _ + = - make one.")
        pyarrow()
        self.folder, self.shard = Path(folder), shard
        self.images = 0
        self._codecs = map_codec(maps), None if features is None else feature_codec(features)
        self._grid = grid
        self._marker = self.folder / SHARDS / f"{shard}.json"
        self._maps = RowFile(self.folder / SHARDS / f"{shard}.parquet", MAP_GROUP)
        self._features = RowFile(self.folder / FEATURES / f"{shard}.parquet", FEATURE_GROUP)
        self._queue: queue.Queue[Explained | None] = queue.Queue(_DEPTH)
        self._thread: threading.Thread | None = None
        self._stopped = self._committed = False
        self._error: BaseException | None = None
        self._seconds = 0.0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def add(self, batch: Explained) -> None:
        """Take over a batch, whose arrays must not change any more; waits only while several are still unwritten.

        Raises OutputError where an earlier batch could not be written, InputError for arrays that do not fit together.
        """
        self._raise()
        if self._stopped or self._committed:
            raise InputError(f"shard {self.shard} is finished: nothing can be added to it.")
        self._check(batch)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"writer of {self.shard}", daemon=True)
            self._thread.start()
        self.images += len(batch.keys)
        self._queue.put(batch)

    def commit(self, marker: Mapping[str, Any]) -> dict[str, Any]:
        """Put the files in their places and then the marker, each synced to the disk; returns the marker as written.

        marker: what the caller knows of the shard; `images`, `rows`, `files` (bytes by name) and `seconds.write` are
        entered here, and `seconds.total`, where it is given, grows by what committing takes. Raises OutputError where
        something could not be written; then nothing is committed.
        """
        begun = time.perf_counter()
        self._finish()
        self._raise()
        started = time.perf_counter()
        with self._output():
            # Were it to stay, it would vouch for files that are being replaced.
            self._marker.unlink(missing_ok=True)
            files = {
                str(each.place.relative_to(self.folder)): each.publish()
                for each in (self._maps, self._features)
                if each.rows
            }
            now = time.perf_counter()
            seconds = {**marker.get("seconds", {}), "write": round(self._seconds + now - started, 4)}
            if "total" in seconds:
                seconds["total"] = round(seconds["total"] + now - begun, 4)
            written = {**marker, "images": self.images, "rows": self._maps.rows, "files": files, "seconds": seconds}
            write_file(self._marker, json.dumps(written, indent=1).encode(), durable=True)
            self._committed = True
        return written

    def abort(self) -> None:
        """Leave nothing of what was not committed."""
        if self._committed:
            return
        self._stopped = True
        self._finish()
        if self._maps.published or self._features.published:
            self._marker.unlink(missing_ok=True)
        self._maps.discard()
        self._features.discard()

    def _finish(self) -> None:
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _raise(self) -> None:
        if self._error is not None:
            with self._output():
                raise self._error

    @contextmanager
    def _output(self) -> Iterator[None]:
        """What the file system refuses as one kind of error, with nothing left behind."""
        try:
            yield
        except OSError as error:
            self.abort()
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise OutputError(
                f"shard {self.shard} cannot be written to {self.folder}: {reason}.", full=error.errno in _FULL
            ) from error
        except BaseException:
            self.abort()
            raise

    def _work(self) -> None:
        # Taken to the end even after an error, so that nobody waits for room in the queue.
        while (batch := self._queue.get()) is not None:
            if self._error is None and not self._stopped:
                self._attempt(partial(self._write, batch))
        if self._error is None and not self._stopped:
            self._attempt(self._close)

    def _attempt(self, step: Callable[[], None]) -> None:
        started = time.perf_counter()
        try:
            step()
        except BaseException as error:
            self._error = error
        self._seconds += time.perf_counter() - started

    def _close(self) -> None:
        self._maps.close()
        self._features.close()

    def _write(self, batch: Explained) -> None:
        maps, features = self._codecs
        table, counts = map_table(batch, maps, self._grid)
        self._maps.add(table, counts, maps.nbytes(batch.maps.shape[2:]))
        if features is not None and batch.features is not None:
            values = batch.features[0]
            ones = np.ones(len(values), np.int64)
            self._features.add(feature_table(batch, features), ones, features.nbytes(values.shape[1:]))

    def _check(self, batch: Explained) -> None:
        """Raises InputError for arrays that do not fit together or the run."""
        images = len(batch.keys)
        expected = (images, batch.prompts.shape[1], *(self._grid or batch.maps.shape[2:]))
        if batch.maps.shape != expected or batch.scores.shape != expected[:2] or len(batch.prompts) != images:
            raise InputError(
                f"shard {self.shard}: {images} images with prompts {batch.prompts.shape}, scores {batch.scores.shape} "
                f"and maps {batch.maps.shape} do not fit together, or the run's grid {self._grid}."
            )
        if len(batch.geometries) != images or (self._codecs[1] is not None) != (batch.features is not None):
            raise InputError(
                f"shard {self.shard}: every image needs a geometry, and features where the run keeps them."
            )


def leftovers(folder: str | Path, shard: str | None = None) -> list[Path]:
    """Temporary files that killed writers left in a run's folder: all, or those of one shard.

    Whoever is to write that shard may delete them; nobody else's work has the names.
    """
    folder = Path(folder)
    own = None if shard is None else (f"{shard}.parquet", f"{shard}.json")
    return [
        path
        for place in (folder, folder / SHARDS, folder / FEATURES)
        for path in sorted(place.glob(".*.part"))
        if (match := _PART.fullmatch(path.name)) and (own is None or match[1] in own)
    ]
