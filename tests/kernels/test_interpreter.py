from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_kernels_agree_with_their_definitions_in_the_interpreter() -> None:
    # Triton decides between compiler and interpreter when it is imported, once for a process.
    pytest.importorskip("triton")
    here = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-m", "pytest", str(here), "-q", "-p", "no:cacheprovider"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=here.parents[1],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
