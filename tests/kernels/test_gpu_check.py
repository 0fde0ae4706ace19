"""What of `make gpu-check` runs without a GPU, so that its first run on one is not about the script."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import gpu_cases
import gpu_check
import gpu_end_to_end
import gpu_methods
import pytest
import torch

from clipfast.methods import METHODS
from clipfast.ops.dispatch import backend
from clipfast.ops.spatial_attribution import gradient_weighted

CPU = torch.device("cpu")


@pytest.mark.interpreter
def test_every_check_passes_in_the_interpreter() -> None:
    rows = gpu_check.run_checks(list(gpu_cases.checks(CPU, tiny=True)), 0, CPU)
    assert len(rows) > 30
    assert [row for row in rows if not row["passed"]] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would run")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="here Triton may run")
def test_a_fast_path_that_cannot_run_has_failed() -> None:
    (row,) = gpu_check.run_checks(list(gpu_cases.checks(CPU, tiny=True))[:1], 0, CPU)
    assert not row["passed"]
    assert "cannot run as asked" in row["raised"]


def _check(run: Callable[[], torch.Tensor], bound: float = 1e-5, untouched: bool = True) -> gpu_cases.Check:
    exact = torch.ones(3, dtype=torch.float64)
    return gpu_cases.Check("op", "case", "torch", run, lambda: exact, bound, lambda: untouched)


def test_what_is_wrong_unwritten_or_written_elsewhere_fails() -> None:
    assert gpu_check.compare(_check(lambda: torch.ones(3)))["passed"]
    assert not gpu_check.compare(_check(lambda: torch.ones(3) * 1.001))["passed"]
    assert not gpu_check.compare(_check(lambda: torch.empty(3)))["passed"]
    assert not gpu_check.compare(_check(lambda: torch.ones(1).new_empty(3)))["passed"]
    assert not gpu_check.compare(_check(lambda: torch.ones(3), untouched=False))["passed"]


def test_padding_is_nan_and_strides_are_odd() -> None:
    x = torch.randn(2, 4, 6)
    inside = gpu_cases.padded(x)
    assert torch.equal(inside, x)
    assert inside.stride() == (48, 8, 1)
    assert inside._base is not None
    assert inside._base.isnan().sum() == 4 * 6 * 8 - x.numel()
    assert torch.equal(gpu_cases.transposed(x), x)
    assert gpu_cases.transposed(x).stride() == (24, 1, 4)


@pytest.mark.parametrize("number", range(len(list(gpu_cases.speeds(CPU, tiny=True)))))
def test_what_is_timed_is_the_same_op(number: int) -> None:
    torch.manual_seed(0)
    speed = list(gpu_cases.speeds(CPU, tiny=True))[number]()
    assert speed.bytes > 0
    with backend("torch"):
        found = speed.run()
    plain = speed.plain(*speed.arguments)
    assert isinstance(plain, torch.Tensor)
    if found is None:
        # Each call added the same to zeros in place: two by now, and three with the next.
        plain, found = plain * (3 / 2), speed.plain(*speed.arguments)
    assert plain.numel() == found.numel()
    # The mixtures start and stop each in its own way, and are compared in size alone.
    if not speed.maps:
        torch.testing.assert_close(plain.view(found.shape).float(), found.float(), rtol=3e-2, atol=3e-2)


def test_a_timing_names_rivals_and_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    def cpu_seconds(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
        found = {}
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            found[name] = time.perf_counter() - start
        return found

    monkeypatch.setattr(gpu_check, "gpu_seconds", cpu_seconds)
    monkeypatch.setattr(gpu_check, "call_seconds", lambda function: cpu_seconds({"": function}, 1)[""])
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    weight, v, g = torch.rand(2, 4), torch.randn(2, 4, 8), torch.randn(3, 8)

    def make() -> gpu_cases.Speed:
        return gpu_cases.Speed(
            "op", "case", "torch", lambda: gradient_weighted(weight, v, g), lambda: v @ g.T, (), 4000, 5000.0, "tf32"
        )

    limits, clock = {"bytes": 1e9, "tf32": 1e9}, gpu_check.Clock(1)
    row = gpu_check.time_case(make, limits, set(), clock, 3, 0)
    assert "raised" not in row
    assert row["floor_us"] == 5.0
    assert row["bound_by"] == "arithmetic"
    assert {"fast_us", "plain_us", "compiled_us", "definition_us", "call_us", "speedup_over_compiled"} <= row.keys()
    assert gpu_check.time_case(make, limits, {"op"}, clock, 3, 0)["left_out"] == "its checks failed"
    assert gpu_check.time_case(make, limits, set(), gpu_check.Clock(0), 3, 0)["left_out"] == "no time"
    assert "ZeroDivisionError" in gpu_check.time_case(lambda: 1 / 0, limits, set(), clock, 3, 0)["raised"]


def test_results_are_json_and_grow_by_parts(tmp_path: Path) -> None:
    machine = gpu_check.describe(CPU)
    path = tmp_path / "folder" / "cpu.json"
    report = gpu_check.resumed(path, machine) | {"checks": [{"passed": True}], "backends": gpu_check.backends()}
    gpu_check.save(path, report)
    assert gpu_check.resumed(path, machine) == json.loads(path.read_text())
    assert gpu_check.resumed(path, machine | {"commit": "another"}) == {"machine": machine | {"commit": "another"}}
    assert gpu_check.verdict(report)
    for broken in ({"huge": [{"passed": False}]}, {"speed": [{"raised": "no"}]}, {"sanitizer": "failed: there"}):
        assert not gpu_check.verdict(report | broken)
    assert gpu_check.verdict(report | {"huge": "left out", "sanitizer": "clean"})


def test_models_are_compared_with_float64_before_they_are_timed(
    build_clip: Callable[..., torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("open_clip.create_model", lambda name, device: build_clip())
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setattr(gpu_end_to_end, "MODELS", ("tiny",))
    monkeypatch.setattr(gpu_end_to_end, "BATCHES", (2,))
    monkeypatch.setattr(gpu_end_to_end, "PROMPTS", (1, 5))
    monkeypatch.setattr(gpu_end_to_end, "BOUND", 0.2)
    error, rates = gpu_end_to_end.run(CPU, gpu_check.Clock(10), 1)
    assert error["passed"]
    assert rates["explain_5_over_encode"] > 0
    monkeypatch.setattr(gpu_end_to_end, "BOUND", 0.0)
    (error,) = gpu_end_to_end.run(CPU, gpu_check.Clock(10), 1)
    assert not error["passed"]


def test_every_method_is_compared_with_float64_before_it_is_timed(
    build_clip: Callable[..., torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("open_clip.create_model", lambda name: build_clip(image_size=32))
    monkeypatch.setattr(gpu_methods, "BATCH", 2)
    monkeypatch.setattr(
        gpu_methods, "METHODS", {name: METHODS[name] for name in ("grad_eclip", "rise", "leave_one_out")}
    )
    rows = {row["method"]: row for row in gpu_methods.run(CPU, gpu_check.Clock(10), 3)}
    assert list(rows) == ["grad_eclip", "rise"]
    assert all(row["passed"] and row["error"] < 1e-4 and row["over_encode"] > 0 for row in rows.values())
    monkeypatch.setattr(gpu_methods, "BOUND", 0.0)
    assert not any(row["passed"] or "over_encode" in row for row in gpu_methods.run(CPU, gpu_check.Clock(10), 3))
    assert all("left_out" in row for row in gpu_methods.run(CPU, gpu_check.Clock(0), 3))
