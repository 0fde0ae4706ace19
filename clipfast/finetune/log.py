"""What a fine-tuning says of its steps: a line of JSON each, and TensorBoard's files where asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from clipfast.engine.base import Failure
from clipfast.engine.watch import Watch
from clipfast.errors import InputError
from clipfast.view.files import write_file

LOG, ERRORS = "log.jsonl", "errors.jsonl"


class Follow(Watch):
    """Is told how a fine-tuning goes; this one keeps it to itself."""

    def starts(self, steps: int, done: int, batch: int) -> None:
        """There are so many steps of so many images, and so many of them are done."""

    def step(self, record: Mapping[str, Any]) -> None:
        """Another step is done; record: as in the log, without losses for steps that are not logged."""


class Log:
    """Lines in LOG and ERRORS of a folder, those of steps behind `step` dropped: the run does them again.

    tensorboard: whether numbers go to TensorBoard's files in the folder, too. writes: whether anything is written at
    all; of several processes one does. As a context; at its end everything is on its way to the disk.

    Raises InputError where TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool = False, writes: bool = True):
        self._folder, self._writes = folder, writes
        if writes:
            for name in (LOG, ERRORS):
                _cut(folder / name, step)
        self._board: Any = _board(folder, step) if tensorboard and writes else None

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._board is not None:
            self._board.close()

    def step(self, record: Mapping[str, Any]) -> None:
        """A step's line; numbers that are not finite become null."""
        self._append(LOG, [{k: None if isinstance(v, float) and v - v != 0 else v for k, v in record.items()}])
        if self._board is not None:
            for name, value in record.items():
                if name != "step":
                    self._board.add_scalar(name, value, record["step"])

    def failed(self, step: int, failures: Sequence[Failure]) -> None:
        """Images that a step could not read."""
        if failures:
            self._append(ERRORS, [{"step": step, "key": one.key, "reason": one.reason} for one in failures])

    def _append(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        if self._writes:
            with (self._folder / name).open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(one, ensure_ascii=False, allow_nan=False) + "\n" for one in records)


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """The steps that a run logged, in order; a last line that was cut off is left out."""
    return _read(Path(folder) / LOG)


def _read(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _cut(path: Path, step: int) -> None:
    if path.exists():
        kept = [record for record in _read(path) if record["step"] <= step]
        write_file(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept).encode())


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("TensorBoard's files need the package tensorboard: pip install tensorboard.") from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
