"""Everything that needs a GPU, in one command and under ten minutes: make gpu-check, or python benchmarks/gpu_check.py.

It builds the native modules where they are not built, checks every fast path of every op against its definition in
float64 (fresh random inputs, poisoned outputs, NaN around inputs, odd strides, more than 2^31 elements), runs checks
under compute-sanitizer where that is installed, times every op against its definition, torch.compile and the floor that
memory and arithmetic set, and explains whole images beside open_clip encoding them.

Results go to benchmarks/results/<gpu>.json as they come, so that an end before the end loses little, and parts may run
one after another (--parts). A speed is only reported of an op whose checks all passed. Exit status: 0 when all passed,
1 when something failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# A plain checkout on a machine where nothing can be installed works as well.
sys.path[:0] = [str(Path(__file__).parent)] if str(ROOT) in sys.path else [str(Path(__file__).parent), str(ROOT)]

import torch  # noqa: E402
from gpu_cases import Check, Speed, checks, huge_checks, poisoned, speeds  # noqa: E402
from paired import machine  # noqa: E402
from torch import Tensor  # noqa: E402

from clipfast.ops.dispatch import backend, table  # noqa: E402

PARTS = ("checks", "huge", "sanitizer", "methods", "speed", "end-to-end")
# What the checks of the largest results need; smaller GPUs leave them out and say so.
HUGE_BYTES = 40e9
SWEEP = [(64, 16, 128, 4, 3), (64, 64, 32, 4, 4), (64, 128, 64, 8, 3), (128, 64, 64, 4, 3), (128, 128, 64, 8, 3)]


class Clock:
    """The time that is left, so that the run ends before whoever waits for it gives up."""

    def __init__(self, minutes: float):
        self.start = time.perf_counter()
        self.seconds = 60 * minutes

    @property
    def spent(self) -> float:
        return time.perf_counter() - self.start

    def has(self, seconds: float) -> bool:
        return self.seconds - self.spent >= seconds


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check needs a CUDA GPU, and PyTorch finds none here: run it on a machine that has one.")
        return 2
    device, clock = torch.device(options.device), Clock(options.minutes)
    seed = options.seed if options.seed is not None else time.time_ns() % 2**32
    path = options.results or ROOT / "benchmarks" / "results" / f"{slug(device)}.json"
    if options.child:
        rows = run_checks(list(checks(device, tiny=options.tiny)), seed, device)
        return 0 if verdict({"checks": rows}) else 1

    report = resumed(path, describe(device))
    report |= {"date": datetime.date.today().isoformat(), "seed": seed, "build": build(), "backends": backends()}
    save(path, report)
    if "checks" in options.parts:
        report["checks"] = run_checks(list(checks(device, tiny=options.tiny)), seed, device)
        save(path, report)
    if "huge" in options.parts:
        report["huge"] = run_huge(seed, device)
        save(path, report)
    if "sanitizer" in options.parts:
        report["sanitizer"] = sanitize(clock)
        save(path, report)
    if "speed" in options.parts:
        run_speed(device, report, clock, options, path)
    if "methods" in options.parts:
        run_rows("methods", device, report, clock, options, path)
    if "end-to-end" in options.parts:
        run_rows("end_to_end", device, report, clock, options, path)
    report |= {"passed": verdict(report), "seconds": round(clock.spent, 1)}
    save(path, report)
    print(f"{'passed' if report['passed'] else 'FAILED'} in {clock.spent:.0f} s: {path}")
    return 0 if report["passed"] else 1


def resumed(path: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """The results that are there of this commit on this machine, to which other parts are added; else new ones."""
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        if found.get("machine") == machine:
            return found
    return {"machine": machine}


def verdict(report: dict[str, Any]) -> bool:
    """Whether everything that ran passed."""
    rows = [
        row
        for part in ("checks", "huge", "methods", "end_to_end")
        for row in report.get(part, [])
        if isinstance(row, dict)
    ]
    failed = [row for row in rows if not row.get("passed", True)]
    failed += [row for row in report.get("speed", []) if "raised" in row]
    return not failed and not report.get("sanitizer", "").startswith("failed")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}"
    )
    parser.add_argument("--minutes", type=float, default=9.5, help="begin nothing that would end later (default 9.5)")
    parser.add_argument("--rounds", type=int, default=20, help="interleaved rounds of each timing (default 20)")
    parser.add_argument("--seed", type=int, help="repeat a run's random inputs; by default they are fresh")
    parser.add_argument("--results", type=Path, help="where the figures go (default benchmarks/results/<gpu>.json)")
    parser.add_argument("--sweep", action="store_true", help="time other tiles of spatial_attribution as well")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a look at the script itself")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: checks alone, for its own test")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def slug(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, and the versions of what runs on it."""
    found = machine() | {"cuda": torch.version.cuda, "triton": None, "open_clip": None}
    for name in ("triton", "open_clip"):
        if importlib.util.find_spec(name) is not None:
            found[name] = getattr(importlib.import_module(name), "__version__", "unknown")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 1e9, 1),
        }
    return found


def build() -> str:
    """Builds the native modules in place where one is missing; what came of it."""
    missing = [name for name in ("_native", "_native_cuda") if importlib.util.find_spec(f"clipfast.{name}") is None]
    if not missing:
        return "was there"
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=ROOT,
        env=os.environ | {"CLIPFAST_BUILD": "strict"},
        capture_output=True,
        text=True,
    )
    importlib.invalidate_caches()
    return "built here" if result.returncode == 0 else f"failed: {(result.stdout + result.stderr)[-2000:]}"


def backends() -> list[dict[str, Any]]:
    return [{"op": r.op, "backend": r.backend, "version": r.version, "lacks": list(r.reasons)} for r in table()]


def run_checks(makes: list[Callable[[], Check]], seed: int, device: torch.device) -> list[dict[str, Any]]:
    """One row a check; a fast path that raises has failed."""
    rows = []
    for number, make in enumerate(makes):
        torch.manual_seed(seed + number)
        row: dict[str, Any] = {"seed": seed + number}
        try:
            check = make()
            row |= {"op": check.op, "case": check.case, "backend": check.fast, "bound": check.bound}
            row |= compare(check)
        except Exception as error:
            row |= {"passed": False, "raised": "".join(traceback.format_exception_only(error)).strip()[-500:]}
            row.setdefault("op", getattr(make, "func", make).__name__)
        print(
            f"  {'ok' if row['passed'] else 'FAILED':6} {row['op']} {row.get('case', '')}"
            f" {row.get('raised') or format(row['error'], '.1e')}",
            flush=True,
        )
        rows.append(row)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def run_huge(seed: int, device: torch.device) -> list[dict[str, Any]] | str:
    if torch.cuda.mem_get_info()[0] < HUGE_BYTES:
        return f"left out: less than {HUGE_BYTES / 1e9:.0f} GB are free"
    return run_checks(list(huge_checks(device)), seed, device)


def run_speed(
    device: torch.device, report: dict[str, Any], clock: Clock, options: argparse.Namespace, path: Path
) -> None:
    wrong = {row["op"] for row in report.get("checks", []) if not row["passed"]}
    # What is left after this must do for the models.
    kept = 240 if "end-to-end" in options.parts else 0
    report["ceilings"], report["speed"] = ceilings(device), []
    for make in speeds(device, tiny=options.tiny):
        report["speed"].append(time_case(make, report["ceilings"], wrong, clock, options.rounds, kept))
        save(path, report)
    if options.sweep:
        report["sweep"] = sweep(device, clock, options.rounds)
        save(path, report)


def run_rows(
    part: str, device: torch.device, report: dict[str, Any], clock: Clock, options: argparse.Namespace, path: Path
) -> None:
    """The rows that gpu_<part>.py yields, kept and printed as they come."""
    if importlib.util.find_spec("open_clip") is None:
        report[part] = [{"left_out": "open_clip is not installed"}]
        return
    report[part] = []
    for row in importlib.import_module(f"gpu_{part}").run(device, clock, options.rounds):
        report[part].append(row)
        print("  " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        save(path, report)


def compare(check: Check) -> dict[str, Any]:
    """The relative error of the fast path, and whether it kept to its bound and to its own memory."""
    with backend(check.fast), poisoned():
        found = check.run()
    exact = check.exact()
    assert found.shape == exact.shape, f"{tuple(found.shape)} instead of {tuple(exact.shape)}"
    error = relative(found, exact)
    untouched = check.untouched()
    return {"error": error, "untouched": untouched, "passed": error <= check.bound and untouched}


def relative(found: Tensor, exact: Tensor) -> float:
    """Relative L2 distance in float64; infinite where anything is not finite."""
    difference = (found.double() - exact.double()).norm()
    error = float(difference / exact.double().norm().clamp(min=1e-300)) if difference != 0 else 0.0
    return error if error == error else float("inf")


def sanitize(clock: Clock) -> str:
    """compute-sanitizer over the small checks: reads and writes out of bounds, without PyTorch's allocator between."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        return "not installed"
    if not clock.has(120):
        return "left out: no time"
    command = [program, "--tool", "memcheck", "--error-exitcode", "9", "--launch-timeout", "60", sys.executable]
    command += [str(Path(__file__)), "--child", "--tiny", "--parts", "checks"]
    try:
        result = subprocess.run(
            command,
            env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            capture_output=True,
            text=True,
            timeout=100,
        )
    except subprocess.TimeoutExpired:
        return "left out: it took longer than 100 s"
    said = (result.stdout + result.stderr)[-1500:]
    if "ERROR SUMMARY" not in said and "Device not supported" in result.stdout + result.stderr:
        return "does not support this device"
    if result.returncode == 9:
        return f"failed: {said}"
    return "clean" if result.returncode == 0 else f"did not run ({result.returncode}): {said}"


def ceilings(device: torch.device) -> dict[str, float]:
    """What this GPU reaches: bytes a second of a large copy, operations a second of large products."""
    source, target = torch.randn(2, 2**29, device=device)
    found = {"bytes": 2 * source.nbytes / gpu_seconds({"copy": partial(target.copy_, source)}, 10)["copy"]}
    size = 8192
    for unit, dtype in (("bfloat16", torch.bfloat16), ("tf32", torch.float32)):
        left, right = torch.randn(2, size, size, device=device).to(dtype)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        found[unit] = 2 * size**3 / gpu_seconds({"product": partial(torch.mm, left, right)}, 10)["product"]
        torch.set_float32_matmul_precision(before)
    print("  " + ", ".join(f"{name} {value:.3g}/s" for name, value in found.items()), flush=True)
    return found


def gpu_seconds(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds on the GPU of each, taking turns, with a cold L2 cache."""
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    for _ in range(2):
        for function in functions.values():
            function()
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            # Long enough to hide from the clock how slowly Python queues the work.
            for _ in range(4):
                flush.zero_()
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            function()
            pair[1].record()
            marks[name].append(pair)
        torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) / 1e3 for name, pairs in marks.items()}


def time_case(
    make: Callable[[], Speed], limits: dict[str, float], wrong: set[str], clock: Clock, rounds: int, kept: int
) -> dict[str, Any]:
    """The op, its definition and the compiled one in turn, beside the floor."""
    row: dict[str, Any] = {}
    try:
        speed = make()
        row |= {"op": speed.op, "case": speed.case}
        if speed.op in wrong:
            return row | {"left_out": "its checks failed"}
        if not clock.has(20 + kept):
            return row | {"left_out": "no time"}

        def fast() -> object:
            with backend(speed.fast):
                return speed.run()

        def defined() -> object:
            with backend("torch"):
                return speed.run()

        functions: dict[str, Callable[[], object]] = {"fast": fast, "plain": lambda: speed.plain(*speed.arguments)}
        compiled = torch.compile(speed.plain, dynamic=False)
        try:
            compiled(*speed.arguments)
            functions["compiled"] = lambda: compiled(*speed.arguments)
        except Exception as error:
            row["compiled_raised"] = "".join(traceback.format_exception_only(error)).strip()[-300:]
        seconds = gpu_seconds(functions, rounds)
        # A loop over images, or a hundred iterations over all maps: few rounds tell enough.
        seconds |= gpu_seconds({"definition": defined}, 3)
        floors = {"memory": speed.bytes / limits["bytes"], "arithmetic": speed.flops / limits[speed.unit]}
        floor = max(floors.values())
        row |= {f"{name}_us": round(1e6 * s, 1) for name, s in seconds.items()}
        row |= {"call_us": round(1e6 * call_seconds(fast), 1), "floor_us": round(1e6 * floor, 1)}
        row |= {"bound_by": max(floors, key=floors.__getitem__), "of_floor": round(floor / seconds["fast"], 3)}
        rivals = [seconds[name] for name in ("plain", "compiled") if name in seconds]
        row["speedup_over_compiled"] = round(min(rivals) / seconds["fast"], 2)
        if speed.maps:
            row["maps_per_second"] = round(speed.maps / seconds["fast"])
    except Exception as error:
        row["raised"] = "".join(traceback.format_exception_only(error)).strip()[-500:]
        row.setdefault("op", getattr(make, "func", make).__name__)
    finally:
        torch.compiler.reset()
        torch.cuda.empty_cache()
    print("  " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


def call_seconds(function: Callable[[], object], calls: int = 20) -> float:
    """Seconds from call to call when nobody waits: the larger of what the GPU and what Python takes."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def sweep(device: torch.device, clock: Clock, rounds: int) -> list[dict[str, Any]]:
    """Other tiles than the one that spatial_attribution picks, for whoever tunes it."""
    from clipfast.kernels import spatial_attribution as kernels

    rows: list[dict[str, Any]] = []
    batch, patches, width = 256, 196, 768
    for dtype in (torch.bfloat16, torch.float32):
        for prompts in (1, 100, 1000):
            v = torch.randn(batch, patches, width, device=device).to(dtype)
            g = torch.randn(prompts, width, device=device).to(dtype).expand(batch, -1, -1)
            weight = torch.rand(batch, patches, device=device)
            out = torch.empty(batch, prompts, patches, device=device)
            picked = kernels.tile(prompts, dtype == torch.float32, True)
            for cut in [picked, *(kernels.Tile(*numbers) for numbers in SWEEP)]:
                for precision in ("tf32x3", "tf32", "ieee") if dtype == torch.float32 else ("tf32x3",):
                    if not clock.has(15):
                        return rows
                    row: dict[str, Any] = {"prompts": prompts, "dtype": str(dtype), "tile": str(cut)}
                    row |= {"picked": cut is picked, "precision": precision}

                    run = partial(
                        kernels.spatial_attribution,
                        None,
                        None,
                        weight,
                        v,
                        g,
                        out,
                        relu=True,
                        precision=precision,
                        cut=cut,
                    )
                    try:
                        row["us"] = round(1e6 * gpu_seconds({"run": run}, rounds)["run"], 1)
                    except Exception as error:
                        row["raised"] = "".join(traceback.format_exception_only(error)).strip()[-200:]
                    rows.append(row)
                    print("  " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return rows


def save(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
