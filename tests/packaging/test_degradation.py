"""What the build does without a compiler, without nvcc, and with an nvcc that does not work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytest.importorskip("cmake")
pytest.importorskip("ninja")
pytest.importorskip("pybind11")

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


def build(tmp_path: Path, mode: str, **environment: str) -> tuple[int, str, set[str]]:
    """The build's exit status, its output and the modules it made."""
    keep = {k: v for k, v in os.environ.items() if k not in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "CXX", "CXXFLAGS")}
    command = [sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path}/lib", f"--build-temp={tmp_path}/temp"]
    # Debug compiles in a fraction of the time.
    settings = {"CLIPFAST_BUILD": mode, "CLIPFAST_CUDA_ARCHITECTURES": "90", "CMAKE_BUILD_TYPE": "Debug"} | environment
    result = subprocess.run(command, cwd=ROOT, env=keep | settings, capture_output=True, text=True)
    made = {path.name.split(".")[0] for path in (tmp_path / "lib").rglob("*.so")}
    return result.returncode, result.stdout + result.stderr, made


def path_without(program: str) -> str:
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if shutil.which(program, path=folder) is None)


@pytest.fixture
def broken_nvcc(tmp_path: Path) -> Path:
    program = tmp_path / "nvcc"
    program.write_text("#!/bin/sh\necho 'nvcc: no such device' >&2\nexit 1\n")
    program.chmod(0o755)
    return program


def test_no_compiler_leaves_pure_python(tmp_path: Path) -> None:
    status, output, made = build(tmp_path, "auto", CXX="/nowhere/c++", PATH=path_without("nvcc"))
    assert status == 0, output
    assert made == set()
    assert "_native is left out" in output
    assert "_native_cuda is left out: there is no nvcc" in output


@pytest.mark.parametrize("mode", ["strict", "cpu"])
def test_no_compiler_is_an_error_when_asked(tmp_path: Path, mode: str) -> None:
    status, output, made = build(tmp_path, mode, CXX="/nowhere/c++")
    assert status != 0, output
    assert made == set()


@needs_compiler
def test_no_nvcc_leaves_the_cpu_module(tmp_path: Path) -> None:
    status, output, made = build(tmp_path, "auto", PATH=path_without("nvcc"))
    assert status == 0, output
    assert made == {"_native"}
    assert "_native_cuda is left out: there is no nvcc" in output


@needs_compiler
def test_a_broken_nvcc_leaves_the_cpu_module(tmp_path: Path, broken_nvcc: Path) -> None:
    status, output, made = build(tmp_path, "auto", CUDACXX=str(broken_nvcc))
    assert status == 0, output
    assert made == {"_native"}
    assert "_native_cuda is left out" in output


@needs_compiler
@pytest.mark.parametrize("nvcc", ["none", "broken"])
def test_strict_needs_nvcc(tmp_path: Path, broken_nvcc: Path, nvcc: str) -> None:
    change = {"CUDACXX": str(broken_nvcc)} if nvcc == "broken" else {"PATH": path_without("nvcc")}
    status, output, made = build(tmp_path, "strict", **change)
    assert status != 0, output
    assert "_native_cuda" not in made


@needs_compiler
@needs_nvcc
def test_strict_builds_both_and_the_cuda_module_loads_without_a_driver(tmp_path: Path) -> None:
    status, output, made = build(tmp_path, "strict")
    assert status == 0, output
    assert made == {"_native", "_native_cuda"}
    (module,) = (tmp_path / "lib/clipfast").glob("_native_cuda.*")
    code = "import _native_cuda; assert 'compute capability 90' in _native_cuda.build, _native_cuda.build"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(module.parent)}, check=True)
    if sys.platform == "linux" and shutil.which("nm") and shutil.which("ldd"):
        linked = subprocess.run(["ldd", module], capture_output=True, text=True, check=True).stdout
        assert not [name for name in ("torch", "cuda", "not found") if name in linked.replace(str(tmp_path), "")]
        command = ["nm", "-D", "--defined-only", "--format=posix", str(module)]
        exported = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        assert exported[0] == "PyInit__native_cuda"
        assert "cudaMalloc" not in exported


def test_none_builds_nothing_and_a_misspelt_mode_is_refused(tmp_path: Path) -> None:
    assert build(tmp_path, "none", PATH=path_without("nvcc"))[0::2] == (0, set())
    status, output, _ = build(tmp_path, "strickt")
    assert status != 0
    assert "it can be auto, strict, cpu, none" in output
