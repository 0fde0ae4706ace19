"""Builds clipfast: the Python packages, and the native modules when there is a compiler for them.

CLIPFAST_BUILD says what must be built:

    auto     (default) whatever this machine can build; what fails is reported and left out
    strict   everything; whatever fails, or has no compiler, is an error
    cpu      the CPU module, which must build; CUDA is not tried
    none     pure Python

CLIPFAST_CUDA_ARCHITECTURES names the GPUs to compile for: "80;90" unless said otherwise. CMake's own CMAKE_BUILD_TYPE
chooses another build than Release.

PyTorch is not imported here and no module links to it: one build serves every torch, and isolated builds work.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "strict", "cpu", "none")

# Written out: clipfast/kernels has no __init__.py (see kernels/README.md), and the flat layout cannot be discovered.
# tests/packaging holds this list against the tree.
PACKAGES = [
    "clipfast",
    "clipfast.bench",
    "clipfast.cli",
    "clipfast.compat",
    "clipfast.data",
    "clipfast.data.datasets",
    "clipfast.engine",
    "clipfast.finetune",
    "clipfast.kernels",
    "clipfast.methods",
    "clipfast.metrics",
    "clipfast.models",
    "clipfast.ops",
    "clipfast.view",
]
DATA = ["*.safetensors", "*.png", "*.webp", "*.json", "*.txt", "*.html", "*.css", "*.js"]


class CMakeExtension(Extension):
    """A native module that CMakeLists.txt builds under its own name."""

    def __init__(self, module: str):
        super().__init__(f"clipfast.{module}", sources=[], optional=False)
        self.module = module


class CMakeBuild(build_ext):
    """One configure and build for each module, so that one's failure leaves the other standing."""

    def run(self) -> None:
        mode = build_mode()
        built = []
        for extension in self.extensions:
            try:
                self.build_module(extension.module)
                built.append(extension)
            except CompileError as error:
                if mode in ("strict", "cpu"):
                    raise
                self.warn(f"clipfast.{extension.module} is left out: {error}. `clipfast doctor` lists what is there.")
                if self.inplace:
                    # A module left over from an earlier build would pass for this one.
                    (ROOT / "clipfast" / self.artifact(extension.module).name).unlink(missing_ok=True)
        self.extensions = built
        if self.inplace:
            self.copy_extensions_to_source()

    def artifact(self, module: str) -> Path:
        """Where setuptools expects the module to be built."""
        return Path(self.build_lib).resolve() / self.get_ext_filename(f"clipfast.{module}")

    def build_module(self, module: str) -> None:
        missing = [name for name in ("cmake", "ninja", "pybind11") if importlib.util.find_spec(name) is None]
        if missing:
            raise CompileError(f"this environment has no {', '.join(missing)}")
        artifact = self.artifact(module)
        folder = Path(self.build_temp).resolve() / module
        settings = {
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": artifact.parent,
            "CLIPFAST_MODULE": module,
            "Python_EXECUTABLE": sys.executable,
            **self.tools(),
        }
        if module == "_native_cuda":
            settings["CMAKE_CUDA_COMPILER"] = find_nvcc()
            settings["CMAKE_CUDA_ARCHITECTURES"] = os.environ.get("CLIPFAST_CUDA_ARCHITECTURES", "80;90")
        # A cache of another compiler or interpreter would win over the settings given now.
        shutil.rmtree(folder, ignore_errors=True)
        artifact.unlink(missing_ok=True)
        call(
            cmake_program(),
            "-S",
            ROOT,
            "-B",
            folder,
            "-G",
            "Ninja",
            *(f"-D{key}={value}" for key, value in settings.items()),
        )
        call(cmake_program(), "--build", folder)
        if not artifact.exists():
            raise CompileError(f"the build ended without {artifact.name}")

    def tools(self) -> dict[str, object]:
        """The build tools of the Python environment, never those that happen to be first on PATH."""
        import ninja
        import pybind11

        return {"CMAKE_MAKE_PROGRAM": Path(ninja.BIN_DIR, "ninja"), "pybind11_DIR": pybind11.get_cmake_dir()}


def cmake_program() -> Path:
    import cmake

    return Path(cmake.CMAKE_BIN_DIR, "cmake")


def call(*command: object) -> None:
    words = [str(word) for word in command]
    try:
        subprocess.run(words, check=True)
    except subprocess.CalledProcessError as error:
        raise CompileError(f"`{Path(words[0]).name} {words[1]}` ended with status {error.returncode}") from error


def find_nvcc() -> Path:
    """nvcc from CUDACXX, the PATH, or CUDA_HOME."""
    named = os.environ.get("CUDACXX")
    if named:
        return Path(named)
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc") or (home and shutil.which("nvcc", path=str(Path(home, "bin"))))
    if not found:
        raise CompileError("there is no nvcc: put it on PATH, or name it in CUDACXX or CUDA_HOME")
    return Path(found)


def build_mode() -> str:
    mode = os.environ.get("CLIPFAST_BUILD", "auto")
    if mode not in MODES:
        raise SetupError(f"CLIPFAST_BUILD is {mode!r}; it can be {', '.join(MODES)}")
    return mode


def modules() -> list[CMakeExtension]:
    mode = build_mode()
    if mode == "none" or not (ROOT / "csrc").is_dir():
        return []
    # CUDA first: a strict build that lacks nvcc says so at once.
    return [CMakeExtension(name) for name in (["_native"] if mode == "cpu" else ["_native_cuda", "_native"])]


setup(
    packages=PACKAGES,
    package_data={"clipfast": ["py.typed", *(f"**/{pattern}" for pattern in DATA)], "clipfast.kernels": ["*.md"]},
    include_package_data=False,
    ext_modules=modules(),
    cmdclass={"build_ext": CMakeBuild},
)
