from __future__ import annotations

from typing import Any

import pytest
from paired import machine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rounds", type=int, default=7, help="interleaved rounds of bench_explain; what fewer than 7 find is not kept"
    )


def pytest_benchmark_update_machine_info(config: object, machine_info: dict[str, Any]) -> None:
    """What `paired.machine` says, in place of the host's name and all else that the plugin collects."""
    machine_info.clear()
    machine_info.update(machine())


def pytest_benchmark_update_json(config: object, benchmarks: object, output_json: dict[str, Any]) -> None:
    """Only the figures of `paired`: the plugin's own clock covers whole interleaved runs, which means nothing."""
    figures = {one["fullname"].removeprefix("benchmarks/"): one["extra_info"] for one in output_json["benchmarks"]}
    kept = {"machine": output_json["machine_info"], "datetime": output_json["datetime"], "figures": figures}
    output_json.clear()
    output_json.update(kept)
