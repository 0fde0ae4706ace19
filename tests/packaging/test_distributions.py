"""The sdist, the wheel built from it, and what is in them. They are built once, with the tools of this environment."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build")
    # From a copy: building leaves files in the tree, and those of an earlier build must not slip in.
    tree = tmp_path_factory.mktemp("tree") / "clipfast"
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=unwanted)
    return built("sdist", tree, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="session")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("from_sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return built("wheel", next(folder.iterdir()), folder)


def built(kind: str, tree: Path, folder: Path) -> Path:
    mode = "none" if shutil.which("c++") is None else "cpu"
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(folder), str(tree)]
    result = subprocess.run(command, env=os.environ | {"CLIPFAST_BUILD": mode}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return next(folder.glob("*.tar.gz" if kind == "sdist" else "*.whl"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's files."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def data_files() -> set[str]:
    suffixes = {".safetensors", ".png", ".webp", ".json", ".txt", ".html", ".css", ".js", ".typed"}
    return {str(p.relative_to(ROOT)) for p in (ROOT / "clipfast").rglob("*") if p.suffix in suffixes}


def sources() -> set[str]:
    return {str(p.relative_to(ROOT)) for p in (ROOT / "clipfast").rglob("*.py")}


def test_the_sdist_holds_what_a_build_needs_and_real_files_only(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert all(member.isfile() or member.isdir() for member in members)
    names = {member.name.split("/", 1)[1] for member in members if member.isfile()}
    native = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert {"CMakeLists.txt", "LICENSE", "pyproject.toml", "setup.py", "clipfast/kernels/README.md"} <= names
    assert native | sources() | data_files() <= names
    assert not [name for name in names if name.startswith((".", "tests/", "benchmarks/", "scripts/", "docs/"))]
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_the_wheel_holds_the_package_its_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        links = [info.filename for info in archive.infolist() if (info.external_attr >> 16) & 0o170000 == 0o120000]
    assert sources() | data_files() | {"clipfast/kernels/README.md"} <= names
    assert not links
    assert {name.split("/")[0] for name in names} == {"clipfast", "clipfast-0.1.0.dist-info"}
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".h", ".pyc"))]


def test_the_wheel_says_what_it_is(installed: Path) -> None:
    info = installed / "clipfast-0.1.0.dist-info"
    metadata = Parser().parsestr((info / "METADATA").read_text())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    requirements = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert "torch>=2.11" in requirements
    assert [r for r in requirements if r.startswith("triton") and "linux" in r]
    entry_points = configparser.ConfigParser()
    entry_points.read(info / "entry_points.txt")
    assert entry_points["console_scripts"]["clipfast"] == "clipfast.cli:main"
    assert "Apache License" in (info / "licenses/LICENSE").read_text()


@needs_compiler
def test_the_installed_wheel_works_outside_the_tree(installed: Path, tmp_path: Path) -> None:
    code = (
        "import clipfast, clipfast.kernels, clipfast.native as n, torch\n"
        f"assert clipfast.__file__.startswith({str(installed)!r}), clipfast.__file__\n"
        "assert n.problem('_native') is None, n.problem('_native')\n"
        "from clipfast.ops.dispatch import backend\n"
        "from clipfast.ops.mask_sequence import mask_sequence\n"
        "x = torch.rand(1, 3, 8, 8)\n"
        "with backend('native'): out = mask_sequence(x, x[:, :1], [0.0, 1.0])\n"
        "assert torch.equal(out[0], x[0]) and not out[1].any()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(installed)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


@needs_compiler
def test_the_native_module_links_no_torch_and_no_cuda_and_exports_one_symbol(installed: Path) -> None:
    if sys.platform != "linux" or shutil.which("nm") is None or shutil.which("ldd") is None:
        pytest.skip("needs nm and ldd")
    (module,) = (installed / "clipfast").glob("_native.*")
    links_and_symbols(module, "_native")


def links_and_symbols(module: Path, name: str) -> None:
    linked = subprocess.run(["ldd", module], capture_output=True, text=True, check=True).stdout
    for library in ("torch", "c10", "cuda", "nvrtc", "stdc++", "gomp", "not found"):
        assert library not in linked, linked
    needed = subprocess.run(["nm", "-D", "--undefined-only", module], capture_output=True, text=True, check=True).stdout
    assert not [s for s in ("torch", "c10", "at::", "cuda", "cuLaunch") if s in needed]
    command = ["nm", "-D", "--defined-only", "--format=posix", str(module)]
    exported = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[0] for line in exported] == [f"PyInit_{name}"]


def test_setup_lists_every_package() -> None:
    text = (ROOT / "setup.py").read_text()
    listed = set(text.split("PACKAGES = [", 1)[1].split("]", 1)[0].replace('"', "").replace(",", "").split())
    folders = {p.parent for p in (ROOT / "clipfast").rglob("*.py")} | {ROOT / "clipfast/kernels"}
    assert listed == {".".join(folder.relative_to(ROOT).parts) for folder in folders}


def test_kernels_is_a_relative_link_without_an_init_file() -> None:
    assert (ROOT / "clipfast/kernels").readlink() == Path("../kernels")
    assert not (ROOT / "kernels/__init__.py").exists()


def test_a_package_called_kernels_is_found_from_the_repository_root(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("mine = True\n")
    code = "import kernels, clipfast.kernels; assert kernels.mine; assert kernels is not clipfast.kernels"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)}, check=True)
