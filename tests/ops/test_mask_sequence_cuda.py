"""The CUDA half of mask_sequence, its threads run one by one on the CPU: every index and every value, without a GPU.

With a GPU and a built `_native_cuda`, the same cases run there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from clipfast import native
from clipfast.ops import dispatch
from clipfast.ops import mask_sequence as op
from clipfast.ops.dispatch import Op, backend
from clipfast.ops.mask_sequence import Noise, mask_sequence, rank_map

ROOT = Path(__file__).parents[2]
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The bindings of `_native_cuda` around the kernel compiled as C++."""
    compiler = shutil.which("c++")
    pybind11 = pytest.importorskip("pybind11")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    source = (ROOT / "csrc/cuda/mask_sequence.cu").read_text()
    source, launches = re.subn(
        r"(\w+<[^;]*?>)\s*<<<(.*?), (\w+), 0, stream>>>\((.*?)\);",
        r"launch(\2, \3, [&] { \1(\4); });",
        source,
        flags=re.DOTALL,
    )
    assert launches == 2
    (folder / "mask_sequence.cpp").write_text(source)
    target = folder / f"_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [Path(__file__).parent / "cuda_on_cpu", ROOT / "csrc/cuda", ROOT / "csrc", pybind11.get_include()]
    includes.append(sysconfig.get_path("include"))
    command = [compiler, "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden"]
    command += ["-DCLIPFAST_CUDA", "-DCLIPFAST_MODULE=_emulated", "-DCLIPFAST_ABI=1", '-DCLIPFAST_BUILT_WITH="a test"']
    command += [*(f"-I{path}" for path in includes), str(folder / "mask_sequence.cpp"), str(ROOT / "csrc/bindings.cpp")]
    subprocess.run([*command, "-o", str(target)], check=True)
    spec = importlib.util.spec_from_file_location("_emulated", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cases() -> dict[str, dict[str, Any]]:
    g = torch.Generator().manual_seed(0)
    uint8 = torch.randint(0, 256, (2, 3, 10, 16), generator=g, dtype=torch.uint8)
    ranks = rank_map(torch.rand(2, 2, 10, 16, generator=g))
    steps = torch.linspace(0, 1, 19)
    base: dict[str, Any] = {"images": uint8, "order": ranks, "fractions": steps, "mean": MEAN, "std": STD}
    odd = torch.randn(2, 3, 7, 11, generator=g)
    return {
        "whole groups": base,
        "insertion of another image": base | {"mode": "insertion", "fill": torch.rand(2, 3, 10, 16, generator=g)},
        "noise": base | {"fill": Noise(2**63 + 1, first=9)},
        "odd plane": {"images": odd, "order": rank_map(torch.rand(2, 3, 7, 11, generator=g)), "fractions": steps[:5]},
        "window within chunks": base | {"window": (13, 47), "fill": "mean"},
        "strided": base
        | {"images": uint8.contiguous(memory_format=torch.channels_last), "order": ranks.mT.contiguous().mT},
        "float64 images, int64 ranks": base | {"images": odd.double()[..., :5], "order": ranks.long()[..., :7, :5]},
        "float16 images, bfloat16 fill": base | {"images": uint8.half() / 255, "fill": uint8.flip(0).bfloat16()},
    }


def check(case: str, dtype: torch.dtype, to: Callable[[Tensor], Tensor], offset: int) -> None:
    arguments: dict[str, Any] = {
        k: to(v) if isinstance(v, Tensor) and k != "fractions" else v for k, v in cases()[case].items()
    }
    with backend("torch"):
        expected = mask_sequence(**arguments, dtype=dtype)
    memory = to(torch.full((expected.numel() + 64,), torch.nan, dtype=dtype))
    out = memory[offset : offset + expected.numel()].view(expected.shape)
    with backend("native"):
        mask_sequence(**arguments, out=out)
    assert torch.equal(out, expected)
    assert memory[:offset].isnan().all()
    assert memory[offset + expected.numel() :].isnan().all()


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases())
@pytest.mark.parametrize("offset", [16, 17])
def test_the_kernel_run_on_the_cpu_equals_the_definition(
    case: str, dtype: torch.dtype, offset: int, emulated: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnCpu(op.NativeCuda):
        devices = frozenset({"cpu"})

        def missing(self) -> list[str]:
            return []

        def run(self, inputs: op.Inputs) -> Tensor:
            self.call(emulated, inputs, lane=0)
            return inputs.out

    monkeypatch.setattr(dispatch, "_ops", {})
    monkeypatch.setattr(op, "_op", Op("mask_sequence", OnCpu(), op.Torch()))
    check(case, dtype, lambda tensor: tensor, offset)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.skipif(native.problem("_native_cuda") is not None, reason="the CUDA module is not built here")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases())
@pytest.mark.parametrize("offset", [16, 17])
def test_the_kernel_on_a_gpu_equals_the_definition(case: str, dtype: torch.dtype, offset: int) -> None:
    check(case, dtype, lambda tensor: tensor.cuda(), offset)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("arch", [80, 90])
def test_nvcc_keeps_it_in_registers(arch: int, tmp_path: Path) -> None:
    """What ptxas says of each kernel, held to the recorded figures; CLIPFAST_RECORD=1 records them anew."""
    command = ["nvcc", "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v"]
    command += ["-o", str(tmp_path / "kernel.cubin"), str(ROOT / "csrc/cuda/mask_sequence.cu")]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    kernels = re.findall(
        r"entry function '\w*?(write_items\w+?)Ev.*?(\d+) bytes spill stores.*?Used (\d+) registers",
        log,
        flags=re.DOTALL,
    )
    assert len(kernels) == 8
    figures = {f"{name}, sm_{arch}": {"registers": int(r), "spilled": int(s)} for name, s, r in kernels}
    # 64 registers a thread let a multiprocessor hold 1,024 threads, worth a spilled word; float64 may take more.
    limits = {name: 72 if "Idd" in name else 64 for name in figures}
    assert all(f["registers"] <= limits[name] and f["spilled"] <= 8 for name, f in figures.items())
    version = re.search(
        r"release ([\d.]+)", subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    )
    assert version is not None
    table = ROOT / "benchmarks/results/kernels/mask_sequence.json"
    known = json.loads(table.read_text()) if table.exists() else {"nvcc": version[1], "kernels": {}}
    if os.environ.get("CLIPFAST_RECORD"):
        known["kernels"].update(figures)
        table.write_text(json.dumps(known | {"nvcc": version[1]}, indent=2, sort_keys=True) + "\n")
    elif known["nvcc"] == version[1]:
        assert {name: known["kernels"][name] for name in figures} == figures
