"""What all commands share: one line for bad input, one for a warning, and the exit codes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from typer import Abort
from typer.core import TyperGroup

from clipfast.cli.console import error, note
from clipfast.errors import ClipfastError

BAD_INPUT, INTERRUPTED = 2, 130


class Commands(TyperGroup):
    """The commands, whose bad input ends in one line on stderr and exit code 2, and Ctrl-C in 130."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        code = BAD_INPUT
        with _notes():
            try:
                result = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
                code = result if isinstance(result, int) else 0
            except ClipfastError as failure:
                error(str(failure))
            except (KeyboardInterrupt, Abort):
                code = INTERRUPTED
                error("interrupted; nothing was written.")
            except OSError as failure:
                error(f"{failure.filename or 'a file'} cannot be used: {failure.strerror or failure}.")
            except Exception as failure:
                sentence = _sentence(failure)
                if sentence is None:
                    raise
                error(sentence)
        if standalone_mode:
            sys.exit(code)
        return code


def _sentence(failure: Exception) -> str | None:
    """What an exception tells the user, or None where it is a mistake of clipfast's own and its traceback is wanted."""
    if isinstance(failure, MemoryError) or type(failure).__name__ == "OutOfMemoryError":
        return "the memory is full: explain fewer images or texts at a time, or take --device cpu."
    # What is wrong with the command's words; typer does not export the class.
    usage = getattr(failure, "format_message", None)
    if usage is None:
        return None
    context = getattr(failure, "ctx", None)
    path = context.command_path if context is not None else "clipfast"
    return f"{usage().rstrip('.')} (see {path} --help)."


@contextmanager
def _notes() -> Iterator[None]:
    """What users are warned of becomes one line each, said once; what developers are, is shown as ever."""
    said: set[str] = set()
    ordinary = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if category is not UserWarning:
            ordinary(message, category, filename, lineno, file, line)
        elif str(message) not in said:
            said.add(str(message))
            note(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield
