from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from clipfast import native
from clipfast.errors import BackendError, InputError
from clipfast.ops import dispatch
from clipfast.ops.dispatch import Backend, Op, backend, chosen, table


@dataclasses.dataclass(frozen=True)
class Double:
    x: Tensor
    times: int = 1


class Definition(Backend[Double]):
    name = "torch"

    def run(self, inputs: Double) -> Tensor:
        return inputs.x * 2


class Fast(Backend[Double]):
    name = "native"
    devices = frozenset({"cpu"})
    dtypes: ClassVar = {"x": frozenset({torch.float32})}

    def why_not(self, inputs: Double) -> list[str]:
        return super().why_not(inputs) + (["x is not contiguous"] if not inputs.x.is_contiguous() else [])

    def run(self, inputs: Double) -> Tensor:
        return inputs.x + inputs.x


class Absent(Backend[Double]):
    name = "triton"

    def missing(self) -> list[str]:
        return ["Triton is not installed"]


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Op[Double]:
    monkeypatch.setattr(dispatch, "_ops", dict(dispatch._ops))
    monkeypatch.setattr(dispatch, "_said", set())
    monkeypatch.delenv("CLIPFAST_BACKEND", raising=False)
    return Op("double", Absent(), Fast(), Definition())


def test_auto_takes_the_first_that_can(double: Op[Double]) -> None:
    assert isinstance(double.choose(Double(torch.ones(2))), Fast)
    assert isinstance(double.choose(Double(torch.ones(2, dtype=torch.float64))), Definition)
    assert double(Double(torch.ones(2))).tolist() == [2, 2]


def test_auto_says_once_what_it_passes_over(double: Op[Double], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "clipfast"):
        for _ in range(3):
            double(Double(torch.ones(2)))
    assert caplog.messages == ["double passes over triton: Triton is not installed"]


def test_a_named_backend_runs_or_raises_with_inputs_and_every_reason(double: Op[Double]) -> None:
    with backend("native"):
        assert isinstance(double.choose(Double(torch.ones(2))), Fast)
        with pytest.raises(BackendError) as error:
            double(Double(torch.ones(4, 3, dtype=torch.float64).T))
    assert str(error.value) == (
        "double of x (3, 4) float64 on cpu cannot run as asked: "
        "native (cpu): x is float64, not float32; x is not contiguous."
    )
    with backend("triton"), pytest.raises(BackendError, match="Triton is not installed"):
        double(Double(torch.ones(2)))


def test_a_tensor_elsewhere_is_a_reason(double: Op[Double]) -> None:
    assert Fast().why_not(Double(torch.ones(2, device="meta"))) == ["x is on meta, not on cpu"]


def test_an_op_without_the_named_backend_chooses_its_own(double: Op[Double], caplog: pytest.LogCaptureFixture) -> None:
    single = Op("single", Definition())
    with backend("native"), caplog.at_level(logging.INFO, "clipfast"):
        assert isinstance(single.choose(Double(torch.ones(2))), Definition)
    assert caplog.messages == ["single has no native backend and chooses among its own"]


def test_blocks_nest_and_restore(double: Op[Double]) -> None:
    with backend("native"):
        with backend("torch"):
            assert chosen() == "torch"
        with pytest.raises(KeyError), backend("auto"):
            raise KeyError
        assert chosen() == "native"
    assert chosen() == "auto"


def test_a_block_holds_in_its_own_thread_alone(double: Op[Double]) -> None:
    seen = []
    with backend("native"):
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_the_environment_names_one_and_a_block_wins(double: Op[Double], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPFAST_BACKEND", "torch")
    assert isinstance(double.choose(Double(torch.ones(2))), Definition)
    with backend("native"):
        assert isinstance(double.choose(Double(torch.ones(2))), Fast)
    with backend("auto"):
        assert isinstance(double.choose(Double(torch.ones(2))), Fast)
    monkeypatch.setenv("CLIPFAST_BACKEND", "tirton")
    with pytest.raises(InputError, match=r"CLIPFAST_BACKEND 'tirton'.*did you mean 'triton'"):
        double(Double(torch.ones(2)))


def test_an_unknown_name_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="did you mean 'native'"), backend("natve"):
        pass


def test_the_table_lists_every_backend_of_every_op(double: Op[Double]) -> None:
    rows = {(row.op, row.backend): row for row in table()}
    assert rows["double", "triton"].reasons == ("Triton is not installed",)
    assert not rows["double", "triton"].available
    assert rows["mask_sequence", "torch"].available
    assert rows["mask_sequence", "torch"].version == f"torch {torch.__version__}"
    assert rows["mask_sequence", "native (cpu)"].available == (native.problem("_native") is None)


def test_a_module_that_was_never_built_is_told_from_one_that_does_not_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import clipfast

    assert native.problem("_absent") is not None
    assert "was not built" in str(native.problem("_absent"))
    with pytest.raises(BackendError, match="was not built"):
        native.module("_absent")

    (folder := tmp_path / "broken").mkdir()
    (folder / "_broken.py").write_text("import a_library_that_is_not_there")
    (folder / "_old.py").write_text("abi = 0")
    monkeypatch.setattr(clipfast, "__path__", [*clipfast.__path__, str(folder)])
    assert "does not load (No module named 'a_library_that_is_not_there')" in str(native.problem("_broken"))
    assert "other sources" in str(native.problem("_old"))


def test_importing_clipfast_starts_no_cuda_and_imports_no_triton() -> None:
    code = (
        "import sys, torch, clipfast, clipfast.ops.mask_sequence, clipfast.ops.spatial_attribution\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'triton' not in sys.modules, 'triton is imported'\n"
        "assert not [m for m in sys.modules if m.startswith('clipfast._native')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class Kernel(dispatch.Triton[Double]):
    devices = frozenset({"cpu"})

    def launch(self, inputs: Double) -> Tensor:
        return inputs.x * 2


def test_triton_passes_over_gradients_and_tensors_on_several_devices() -> None:
    @dataclasses.dataclass(frozen=True)
    class Two:
        x: Tensor
        y: Tensor

    wanted = torch.ones(2, requires_grad=True)
    assert Kernel().why_not(Double(wanted)) == ["x requires a gradient"]
    with torch.no_grad():
        assert Kernel().why_not(Double(wanted)) == []
        assert Kernel().run(Double(wanted)).tolist() == [2, 2]
    backend: dispatch.Triton[Two] = dispatch.Triton()
    assert "the tensors are on several devices" in backend.why_not(Two(torch.ones(2), torch.ones(2, device="meta")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_triton_needs_a_gpu() -> None:
    backend: dispatch.Triton[Double] = dispatch.Triton()
    assert "PyTorch finds no CUDA GPU" in backend.missing()
    assert "x is on cpu, not on cuda" in backend.why_not(Double(torch.ones(2)))


def test_what_a_machine_lacks_is_asked_once(double: Op[Double], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(Absent, "why_not", lambda self, inputs: asked.append(inputs) or ["Triton is not installed"])
    for _ in range(3):
        double(Double(torch.ones(2)))
    assert len(asked) == 1
    for _ in range(2):
        with backend("triton"), pytest.raises(BackendError):
            double(Double(torch.ones(2)))
    assert len(asked) == 3


def test_a_registered_function_is_an_operator_to_the_compiler_and_itself_elsewhere() -> None:
    calls = []

    @dispatch.registered(lambda x, times: torch.empty_like(x))
    def _times(x: Tensor, times: int) -> Tensor:
        calls.append(type(x))
        return x * times

    x = torch.arange(3.0)
    assert _times(x, 3).tolist() == [0, 3, 6]
    assert torch.ops.clipfast.times(x, 3).tolist() == [0, 3, 6]
    torch.library.opcheck(torch.ops.clipfast.times.default, (x, 3))
    seen = []

    def graph(module: torch.fx.GraphModule, inputs: object) -> object:
        seen.extend(str(node.target) for node in module.graph.nodes)
        return module

    assert torch.compile(lambda x: _times(x, 3) + 1, fullgraph=True, backend=graph)(x).tolist() == [1, 4, 7]
    assert "clipfast.times.default" in seen
    assert set(calls) == {Tensor}
