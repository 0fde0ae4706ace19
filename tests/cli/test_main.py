"""The program as a whole: help, version, typos, and real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import clipfast

# What `import clipfast` itself brings may be there; the command line adds nothing slow of its own to it.
_LIGHT = """
import sys
import clipfast
before = set(sys.modules)
from clipfast.cli import app
codes = [app(words, standalone_mode=False) for words in (["--help"], ["explain", "--help"], ["explain", "scene.png"])]
heavy = ("torch", "open_clip", "matplotlib", "PIL", "numpy", "clipfast.api", "clipfast.models", "clipfast.view")
print(codes, [name for name in set(sys.modules) - before if name.startswith(heavy)])
"""

_EXPLAIN = """
import runpy, sys
from pathlib import Path
from clipfast.models import demo
demo.WEIGHTS = Path(sys.argv.pop(1))
runpy.run_module("clipfast", run_name="__main__")
"""


def process(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_help_and_plain_mistakes_import_nothing_heavy() -> None:
    assert process("-c", _LIGHT).stdout.splitlines()[-1] == "[0, 0, 2] []"


def test_python_m_clipfast_explains(here: Path, weights: Path) -> None:
    (here / "broken.png").write_text("no image")
    result = process("-c", _EXPLAIN, weights, "explain", "scene.png", "broken.png", "-t", "a dog")
    assert result.returncode == 2
    assert result.stdout.splitlines()[-1] == "runs/explain/report.html"
    assert Path("runs/explain/report.html").is_file()
    note, error = result.stderr.splitlines()
    assert note.startswith("note: the demo model")
    assert error.startswith("error: broken.png is not an image")


def test_version(run: Any) -> None:
    assert run("--version").stdout == f"clipfast {clipfast.__version__}\n"


def test_no_command_shows_help(run: Any) -> None:
    assert "Usage: clipfast" in run().stdout
    for command in ("explain", "words", "demo", "eval", "models", "methods", "doctor"):
        assert command in run("--help").stdout
        assert f"clipfast {command}" in run(command, "--help").stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [(["explian"], "'explain'"), (["--verison"], "--version"), (["words", "--modle", "x"], "--model")],
)
def test_typos_name_the_nearest(run: Any, words: list[str], said: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_mistakes_of_our_own_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from clipfast.cli import app

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("clipfast.models.load.known_models", fail)
    assert isinstance(CliRunner().invoke(app, ["models"]).exception, ZeroDivisionError)
