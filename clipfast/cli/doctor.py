"""`clipfast doctor`: what is installed, what this machine has, and what runs where."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from clipfast.cli.console import print_json, stdout
from clipfast.cli.options import Json

_PACKAGES = (
    *("clipfast", "torch", "triton", "open_clip_torch", "torchvision", "numpy", "pillow", "safetensors"),
    *("typer", "rich", "matplotlib"),
)


def doctor(as_json: Json = False) -> None:
    """Show versions, devices and which form of each op can run here, with the reasons where one cannot.

    clipfast doctor
    clipfast doctor --json
    """
    report = examine()
    if as_json:
        print_json(report)
    else:
        _print(stdout(), report)


def examine() -> dict[str, Any]:
    """Everything the command shows, as plain data."""
    import torch

    from clipfast import native
    from clipfast.compat.accelerate import libraries
    from clipfast.errors import InputError
    from clipfast.models.demo import WEIGHTS
    from clipfast.models.model import multiplies_bfloat16
    from clipfast.ops import dispatch
    from clipfast.versions import cpu_name

    try:
        chosen = dispatch.chosen()
    except InputError as failure:
        chosen = str(failure)
    devices = [
        {
            "device": "cpu",
            "name": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gb": _gigabytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
            "bfloat16": multiplies_bfloat16(torch.device("cpu")),
        }
    ]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        devices.append(
            {
                "device": f"cuda:{i}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gb": _gigabytes(properties.total_memory),
                "bfloat16": multiplies_bfloat16(torch.device("cuda", i)),
            }
        )
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": "Apple GPU", "bfloat16": False})
    modules = {}
    for name in ("_native", "_native_cuda"):
        problem = native.problem(name)
        modules[f"clipfast.{name}"] = {
            "built": problem is None,
            "about": str(native.module(name).build) if problem is None else problem,
        }
    return {
        "python": f"{platform.python_version()} on {platform.platform()}",
        "versions": {name: _version(name) for name in _PACKAGES},
        "cuda": {"torch_built_for": torch.version.cuda, "available": torch.cuda.is_available()},
        "devices": devices,
        "native": modules,
        "backend": chosen,
        "backends": [
            {
                "op": row.op,
                "backend": row.backend,
                "available": row.available,
                "version": row.version,
                "reasons": list(row.reasons),
            }
            for row in dispatch.table()
        ],
        "libraries": libraries(),
        "demo_weights": WEIGHTS.is_file(),
    }


def _print(console: Console, report: dict[str, Any]) -> None:
    versions = _rows(console, "Versions")
    versions.add_row("python", report["python"])
    for name, version in report["versions"].items():
        versions.add_row(name, version or Text("not installed", style="yellow"))
    console.print(versions)

    devices = _rows(console, "Devices")
    for device in report["devices"]:
        facts = [device["name"]]
        if "capability" in device:
            facts.append(f"compute capability {device['capability']}")
        if "threads" in device:
            facts.append(f"{device['cores']} cores, {device['threads']} used")
        if "memory_gb" in device:
            facts.append(f"{device['memory_gb']} GB")
        facts.append("bfloat16 native" if device["bfloat16"] else "bfloat16 emulated, so slow")
        devices.add_row(device["device"], Text(", ".join(facts)))
    if not report["cuda"]["available"]:
        built = report["cuda"]["torch_built_for"]
        why = "torch was built without CUDA" if built is None else f"torch was built for CUDA {built}, and finds no GPU"
        devices.add_row("cuda", Text(why, style="dim"))
    console.print(devices)

    modules = _rows(console, "Native modules")
    for name, module in report["native"].items():
        modules.add_row(name, _mark(module["built"], module["about"]))
    console.print(modules)

    backends = _rows(console, "Ops, the fastest backend first")
    for row in report["backends"]:
        about = row["version"] if row["available"] else "; ".join(row["reasons"])
        backends.add_row(f"{row['op']}: {row['backend']}", _mark(row["available"], about))
    backends.add_row("CLIPFAST_BACKEND", Text(report["backend"]))
    console.print(backends)

    others = _rows(console, "Libraries that clipfast.accelerate knows")
    for other in report["libraries"]:
        about = other["reason"] or "not installed"
        if other["known"]:
            about = (
                f"{other['version']}, {len(other['wrapped'])} methods wrapped now"
                if other["wrapped"]
                else other["version"]
            )
        others.add_row(other["library"], _mark(other["known"], about))
    console.print(others)

    demo = _rows(console, "Demo model")
    demo.add_row("weights", _mark(report["demo_weights"], "in the package" if report["demo_weights"] else "missing"))
    console.print(demo)


def _rows(console: Console, title: str) -> Table:
    console.print(Text(title, style="bold"))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    return table


def _mark(good: bool, text: str) -> Text:
    return Text.assemble(("yes  ", "green") if good else ("no   ", "yellow"), text)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _gigabytes(count: int) -> float:
    return round(count / 1e9, 1)
