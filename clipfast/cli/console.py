"""Results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

_PLAIN_EVERY = 10.0


def stdout() -> Console:
    """Where tables and words go; no colours where it is no terminal."""
    return Console(highlight=False)


def stderr() -> Console:
    """Where progress, notes and errors go."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def error(sentence: str) -> None:
    """One line that says what was wrong."""
    _say("error", "bold red", sentence)


def note(sentence: str) -> None:
    """One line that is worth knowing and changes nothing."""
    _say("note", "yellow", sentence)


def status(sentence: str) -> None:
    """One dim line about what is being done, for whoever sits at the terminal."""
    console = stderr()
    if console.is_terminal:
        console.print(Text(sentence, style="dim"))


def _say(kind: str, style: str, sentence: str) -> None:
    stderr().print(Text.assemble((f"{kind}:", style), " ", " ".join(sentence.split())))


def print_paths(*paths: Path) -> None:
    """Paths on lines of their own, whole, as short as the current folder allows."""
    for path in paths:
        typer.echo(shown(path))


def shown(path: Path) -> str:
    """A path as the user would type it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def print_json(data: Any) -> None:
    """The machine-readable form of a command's results: all there is on stdout."""
    typer.echo(json.dumps(data, ensure_ascii=False, allow_nan=False, indent=2))


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if not task.speed else f"{task.speed:.1f}/s", style="dim")


class _Detail(ProgressColumn):
    def __init__(self, detail: Callable[[], str]):
        super().__init__()
        self._detail = detail

    def render(self, task: Task) -> Text:
        return Text(self._detail(), style="dim")


@contextmanager
def progress(what: str, total: int | None, detail: Callable[[], str] | None = None) -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left on a terminal, a line every ten seconds elsewhere; call it with what is done.

    total: None where nobody knows. detail: asked for a few more words whenever something is shown.
    """
    console = stderr()
    if not console.is_terminal:
        yield _plain(what, total, detail)
        return
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate()]
    columns += [TimeRemainingColumn()] + ([_Detail(detail)] if detail is not None else [])
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda finished: bar.advance(task, finished)


def _plain(what: str, total: int | None, detail: Callable[[], str] | None) -> Callable[[int], None]:
    started = said = time.monotonic()
    done = 0

    def advance(finished: int) -> None:
        nonlocal said, done
        done += finished
        now = time.monotonic()
        if now - said >= _PLAIN_EVERY:
            said = now
            rate = done / (now - started)
            words = [f"{what} {done}" if total is None else f"{what} {done} of {total}", f"{rate:.1f}/s"]
            if total is not None and rate:
                words.append(f"{(total - done) / rate:.0f} s left")
            if detail is not None and detail():
                words.append(detail())
            print(", ".join(words), file=sys.stderr, flush=True)

    return advance
