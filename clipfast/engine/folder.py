"""The folder of a run: its configuration, which shards are done, and who is working on it.

run.json        what the maps depend on; written first
shards/*.json   markers: a shard with a marker of this configuration is done
.lock/          who is working on which part; a lock ends with its process, however that ends
summary.json, errors.jsonl   what the markers say together; rewritten at the end of each run
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from math import gcd
from pathlib import Path
from typing import Any

from clipfast.engine.base import Shard
from clipfast.engine.config import FORMAT, RunConfig, in_words
from clipfast.engine.writer import FEATURES, SHARDS, leftovers
from clipfast.errors import InputError
from clipfast.versions import versions
from clipfast.view.files import write_file

Part = tuple[int, int]
"""(i, n): of the shards, those whose number leaves the remainder i when divided by n."""

Marker = dict[str, Any]

RUN, SUMMARY, ERRORS = "run.json", "summary.json", "errors.jsonl"
_LOCKS, _DOOR = ".lock", "door"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class RunFolder:
    """The folder of a run, which need not be there yet. Raises InputError where it is a file."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file: name the folder to write to.")

    def config(self) -> RunConfig | None:
        """The configuration that is there, None in a folder without one. Raises InputError for a damaged one."""
        try:
            written = json.loads((self.path / RUN).read_text(encoding="utf-8"))
            if written["format"] != FORMAT:
                raise InputError(
                    f"{self.path} is of a clipfast whose runs have another format ({written['format']}, not {FORMAT}): "
                    "write to another folder."
                )
            return RunConfig.from_json(written["config"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{self.path / RUN} is damaged ({error}): remove it, or write to another folder."
            ) from error

    def check(self) -> None:
        """Raises InputError where the folder, or the one that it is to be made in, cannot be written."""
        there = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not os.access(there, os.W_OK | os.X_OK):
            raise InputError(f"{self.path} cannot be written: {there} is read-only.")

    def check_config(self, config: RunConfig, *, overwrite: bool = False) -> bool:
        """Whether the folder has that configuration already.

        Raises InputError, with what differs, where it has another or a damaged one, unless `overwrite`.
        """
        try:
            there = self.config()
        except InputError:
            if not overwrite:
                raise
            return False
        differences = {} if there is None else there.differences(config)
        if differences and not overwrite:
            raise InputError(
                f"{self.path} holds another run: {in_words(differences)}. Write to another folder, "
                "or begin anew in this one with --overwrite."
            )
        if there is None and self._markers() and not overwrite:
            raise InputError(f"{self.path} holds maps but no {RUN}: write elsewhere, or over it with --overwrite.")
        return there is not None and not differences

    @contextmanager
    def working(self, part: Part, config: RunConfig, *, overwrite: bool = False) -> Iterator[None]:
        """Hold a part of the run for as long as the context lasts, with `config` as the folder's.

        Other processes may hold other parts at the same time, on other machines, too, where the file system has locks.
        The locks of dead processes do not count. Raises InputError where the part is held, wholly or partly; where the
        folder has another configuration, unless `overwrite` and nobody else works on it; where it cannot be written.
        """
        self._make()
        with self._door():
            others = self._holders()
            for held, who in others.items():
                if (held[0] - part[0]) % gcd(held[1], part[1]) == 0:
                    raise InputError(
                        f"{self.path} is being written by another run ({who}): wait for it, stop it, "
                        "or divide the work between them with --shard 0/2 and --shard 1/2."
                    )
            self._settle(config, overwrite, alone=not others)
            lock = self._hold(part)
        try:
            yield
        finally:
            with self._door():
                (self.path / _LOCKS / _named(part)).unlink(missing_ok=True)
                os.close(lock)

    def done(self, shards: Iterable[Shard], digest: str) -> Iterator[Marker]:
        """The markers of those shards that are done with that configuration, their files there and whole."""
        present = self._markers()
        for shard in shards:
            if shard.id in present and (marker := self.marker(shard.id, digest)) is not None:
                yield marker

    def marker(self, shard: str, digest: str) -> Marker | None:
        """A shard's marker, if the shard is done with that configuration."""
        try:
            marker = json.loads((self.path / SHARDS / f"{shard}.json").read_bytes())
            whole = marker["config"] == digest and all(
                (self.path / name).stat().st_size == size for name, size in marker["files"].items()
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return marker if whole else None

    def clear(self, shards: Iterable[Shard]) -> None:
        """Remove what killed processes left of these shards; nobody else may be at work on them."""
        own = {shard.id for shard in shards}
        for path in leftovers(self.path):
            if path.name[1:].rsplit(".", 3)[0] in own:
                path.unlink(missing_ok=True)

    def longer(self, listed: Sequence[Shard], digest: str) -> list[Shard]:
        """A listing of the first images only, its last shard replaced where a longer one of that place is done."""
        *rest, last = listed
        for name in sorted(self._markers() - {last.id}):
            marker = self.marker(name, digest) if _place(name) == _place(last.id) else None
            if marker and last.images is not None and marker["images"] + len(marker["errors"]) >= last.images:
                return [*rest, replace(last, id=name)]
        return [*rest, last]

    def supersede(self, listed: Sequence[Shard], part: Part, *, whole: bool) -> int:
        """Remove the shards of a part of the run that another listing had; returns how many.

        A source that grew or shrank lists other shards, with the same images again. whole: `listed` is all there is,
        so that there is nothing behind its end.
        """
        keep = {shard.id for shard in listed}
        places = {_place(name) for name in keep}
        old = []
        for name in self._markers() - keep:
            place = _place(name)
            own = place.isdecimal() and int(place) % part[1] == part[0]
            if own and (whole or place in places):
                old.append(name)
        for name in old:
            # The marker first: without it the rest does not count.
            for file in (f"{SHARDS}/{name}.json", f"{SHARDS}/{name}.parquet", f"{FEATURES}/{name}.parquet"):
                (self.path / file).unlink(missing_ok=True)
        return len(old)

    def write_summary(self, summary: Mapping[str, Any], errors: Iterable[Mapping[str, Any]]) -> Path:
        """Rewrite summary.json, and errors.jsonl with a line for each error. Raises OSError as files do."""
        lines = "".join(json.dumps(error, ensure_ascii=False) + "\n" for error in errors)
        with self._door():
            write_file(self.path / ERRORS, _encoded(lines))
            return write_file(self.path / SUMMARY, _encoded(json.dumps(summary, ensure_ascii=False, indent=1) + "\n"))

    def _make(self) -> None:
        try:
            (self.path / _LOCKS).mkdir(parents=True, exist_ok=True)
            with (self.path / _LOCKS / _DOOR).open("a"):
                pass
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror or error}.") from error

    def _settle(self, config: RunConfig, overwrite: bool, *, alone: bool) -> None:
        for path in leftovers(self.path):
            if path.parent == self.path:
                path.unlink(missing_ok=True)
        if self.check_config(config, overwrite=overwrite):
            return
        if overwrite and not alone:
            raise InputError(f"{self.path} cannot be overwritten while another run writes to it.")
        about = {
            "format": FORMAT,
            "digest": config.digest,
            "config": config.to_json(),
            "versions": versions(),
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        write_file(self.path / RUN, _encoded(json.dumps(about, ensure_ascii=False, indent=1) + "\n"), durable=True)

    def _markers(self) -> set[str]:
        try:
            with os.scandir(self.path / SHARDS) as entries:
                return {e.name.removesuffix(".json") for e in entries if e.name.endswith(".json") and e.name[0] != "."}
        except FileNotFoundError:
            return set()

    @contextmanager
    def _door(self) -> Iterator[None]:
        """One process at a time: for moments only."""
        number = os.open(self.path / _LOCKS / _DOOR, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(number, fcntl.LOCK_EX)
            yield
        finally:
            os.close(number)

    def _holders(self) -> dict[Part, str]:
        """The parts that living processes hold, and who they are; locks of dead ones are removed."""
        found = {}
        for path in (self.path / _LOCKS).glob("*-of-*"):
            index, _, count = path.name.partition("-of-")
            number = os.open(path, os.O_RDWR)
            try:
                if _lock(number, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    path.unlink(missing_ok=True)
                else:
                    found[int(index), int(count)] = os.pread(number, 1000, 0).decode(errors="replace")
            finally:
                os.close(number)
        return found

    def _hold(self, part: Part) -> int:
        number = os.open(self.path / _LOCKS / _named(part), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        with suppress(OSError):
            os.write(number, f"process {os.getpid()} on {socket.gethostname()}".encode())
        _lock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return number


def _lock(number: int, how: int) -> bool:
    """Lock an open file, whether or not somebody else has; file systems without locks say yes to everyone."""
    try:
        # Of the open file, not of the process: two runs in one process exclude each other, too.
        fcntl.flock(number, how)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _encoded(text: str) -> bytes:
    """JSON as UTF-8; what is no Unicode in a file's name becomes an escape, as JSON has them."""
    return text.encode(errors="backslashreplace")


def _place(shard: str) -> str:
    """The number that a shard's id begins with: its place in the source."""
    return shard.partition("-")[0]


def _named(part: Part) -> str:
    return f"{part[0]}-of-{part[1]}"
