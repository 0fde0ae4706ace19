"""Triton kernels without a GPU: compiled ahead of time for real ones, and run by Triton's interpreter.

To test a new kernel, write `tests/kernels/test_X.py`:

    def test_compiles(compiled: Compile) -> None:
        compiled("float16, ViT-B/16", lambda: launch(torch.empty(8, 197, 768, dtype=torch.float16), ...))

    @pytest.mark.interpreter
    def test_agrees_with_the_definition() -> None:
        with backend("triton"):
            ...

`compiled(label, run)` compiles every launch that `run` makes, with the specialisations that these shapes and strides
get on a GPU, for compute capability 8.0 and 9.0 in turn; nothing is executed, so `torch.empty` is enough. It fails on
too much shared memory, on spilled registers (`spills="why"` allows them), and when registers differ from those
recorded in `benchmarks/results/kernels/X.json`. After a change that is meant, record them anew:

    CLIPFAST_RECORD=1 python -m pytest tests/kernels/test_X.py

Tests marked `interpreter` run in a process of their own, which `test_interpreter.py` starts; alone they run with

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_X.py

A program takes the interpreter about 8 ms: choose small shapes. It does no bfloat16 arithmetic, not even `tl.dot`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
# The most that one block may use, less than the multiprocessor has.
SHARED_LIMIT = {80: 166_912, 90: 232_448}
FIGURES = Path(__file__).parents[2] / "benchmarks" / "results" / "kernels"


class Compile(Protocol):
    def __call__(self, label: str, run: Callable[[], object], *, spills: str | None = None) -> None: ...


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreter: runs under TRITON_INTERPRET=1 alone")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    kept, dropped = [], []
    for item in items:
        fits = here not in item.path.parents or (item.get_closest_marker("interpreter") is not None) == INTERPRETING
        (kept if fits else dropped).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def compiled(request: pytest.FixtureRequest, tmp_path: Path) -> Compile:
    """Compiles launches ahead of time and checks what they use; see above."""
    pytest.importorskip("triton")
    arch: int = request.param
    table = FIGURES / f"{request.path.stem.removeprefix('test_')}.json"

    def check(label: str, run: Callable[[], object], *, spills: str | None = None) -> None:
        with ahead_of_time(arch) as kernels:
            run()
        assert kernels, f"{label} launched no kernel"
        found = {f"{label}, {kernel.name}, sm_{arch}": figures(kernel, tmp_path) for kernel in kernels}
        for name, used in found.items():
            assert used["shared"] <= SHARED_LIMIT[arch], f"{name}: {used['shared']} bytes of shared memory"
            assert spills or not used["spilled"], f"{name}: {used['spilled']} bytes of registers spilled"
        _compare_or_record(table, found)

    return check


@contextmanager
def ahead_of_time(arch: int) -> Iterator[list[Any]]:
    """Within the block every `kernel[grid](...)` compiles for this architecture instead; yields what was compiled."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Absent(DriverBase):
        """A GPU of this architecture that cannot be reached. The number of the device keys Triton's caches."""

        @classmethod
        def is_active(cls) -> bool:
            return False

        def map_python_to_cpp_type(self, ty: str) -> str:
            raise NotImplementedError

        def get_benchmarker(self) -> Any:
            raise NotImplementedError

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_current_device(self) -> int:
            return arch

        def get_current_stream(self, device: int) -> int:
            return 0

    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        kernels.append(kernel)
        return kernel

    before = driver._active
    driver.set_active(Absent())
    JITFunction.run = compile_only
    try:
        yield kernels
    finally:
        JITFunction.run = run
        driver._active = before


def figures(kernel: Any, folder: Path) -> dict[str, int]:
    """What one compiled kernel uses: registers a thread, bytes spilled a thread, shared bytes, warps, stages."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    said = subprocess.run([program, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    used = dict(re.findall(r"(\w+):(\d+)", said))
    return {
        "registers": int(used["REG"]),
        "spilled": int(used["STACK"]) + int(used["LOCAL"]),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
    }


def _compare_or_record(table: Path, found: dict[str, dict[str, int]]) -> None:
    import triton

    recorded = json.loads(table.read_text()) if table.exists() else {"triton": triton.__version__, "kernels": {}}
    if os.environ.get("CLIPFAST_RECORD") == "1":
        if recorded["triton"] != triton.__version__:
            recorded = {"triton": triton.__version__, "kernels": {}}
        kernels = dict(sorted((recorded["kernels"] | found).items()))
        table.parent.mkdir(parents=True, exist_ok=True)
        rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(used)}" for name, used in kernels.items())
        table.write_text(f'{{\n  "triton": {json.dumps(recorded["triton"])},\n  "kernels": {{\n{rows}\n  }}\n}}\n')
    elif recorded["triton"] == triton.__version__:
        expected = {name: recorded["kernels"].get(name) for name in found}
        assert found == expected, "other figures than those recorded; the conftest here says how to record them anew"
