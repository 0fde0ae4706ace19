from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from clipfast.bench.compare import compare
from clipfast.bench.report import OURS, Report, Row, merged_encodes
from clipfast.errors import InputError


def rows(seed: int, *, speed: float = 1.0, **ratios: float) -> tuple[Row, ...]:
    """Nine rounds of each method on a machine whose speed drifts by tens of percent from round to round."""
    draw = np.random.default_rng(seed)
    found = []
    for method, ratio in ratios.items():
        encode = 0.1 / speed * np.exp(0.3 * draw.standard_normal(9))
        seconds = encode * ratio * np.exp(0.04 * draw.standard_normal(9))
        found.append(Row(method, OURS, 4, 10, "float32", "auto", 1e-6, 1e-4, None, tuple(seconds), tuple(encode)))
    return tuple(found)


def report(*found: Row, **about: Any) -> Report:
    plain = {"machine": {}, "versions": {}, "settings": {}, "seconds": 1.0}
    return Report(**{"model": "demo", "device": "cpu", **plain, **about}, rows=found)


def test_a_regression_by_two_is_found_and_nothing_else() -> None:
    old = report(*rows(0, grad_eclip=1.0, mmel=1.1, mask_clip=0.9))
    new = report(*rows(1, speed=3.0, grad_eclip=2.0, mmel=1.1, mask_clip=0.45))
    found = {change.method: change for change in compare(old, new)}
    assert {name: change.verdict for name, change in found.items()} == {
        "grad_eclip": "slower",
        "mmel": "same",
        "mask_clip": "faster",
    }
    assert found["grad_eclip"].factor == pytest.approx(2, rel=0.08)
    assert found["grad_eclip"].low < found["grad_eclip"].factor < found["grad_eclip"].high


@pytest.mark.parametrize("seed", range(20))
def test_noise_and_another_clock_are_no_regression(seed: int) -> None:
    old, new = report(*rows(seed, grad_eclip=1.0)), report(*rows(seed + 100, speed=0.4, grad_eclip=1.0))
    assert [change.verdict for change in compare(old, new)] == ["same"]
    assert [change.verdict for change in compare(old, old, tolerance=0)] == ["same"]


def test_maps_that_became_wrong_are_a_regression() -> None:
    (row,) = rows(0, grad_eclip=1.0)
    wrong = dataclasses.replace(row, reason="its maps are wrong", seconds=(), encode=())
    (change,) = compare(report(row), report(wrong))
    assert (change.verdict, change.regressed, change.factor) == ("wrong", True, None)
    with pytest.raises(InputError, match="nothing in common"):
        compare(report(wrong), report(row))


def test_two_models_are_not_compared() -> None:
    found = rows(0, grad_eclip=1.0)
    with pytest.raises(InputError, match="compare runs of one"):
        compare(report(*found), report(*found, model="ViT-B-16:random"))


def test_figures_by_hand() -> None:
    row = Row(
        *("grad_eclip", OURS, 4, 10, "float32", "auto", 1e-6, 1e-4, None),
        seconds=(1.0, 2.0, 4.0),
        encode=(2.0, 2.0, 2.0),
        product=(0.5, 1.0, 1.0),
        multiplications=600,
        product_multiplications=1000,
    )
    f = row.figures()
    assert (f["p50"], f["ratio"], f["ratio_low"], f["ratio_high"], f["rounds"]) == (2.0, 1.0, 0.5, 2.0, 3)
    # Linear between ranks: 0.95 of the way over two steps is nine tenths of the second.
    assert f["p95"] == pytest.approx(2 + 0.9 * 2)
    assert f["p99"] == pytest.approx(2 + 0.98 * 2)
    assert (f["images_per_second"], f["maps_per_second"]) == (2.0, 20.0)
    # 600 a second and 300, 150; the product does 2000 and 1000, 1000: shares 0.3, 0.3, 0.15.
    assert f["share_of_peak"] == pytest.approx(0.3)


def test_times_of_one_encode_are_put_together() -> None:
    one = Row("encode", "the model", 1, 0, "float32", "auto", seconds=(1.0,), encode=(1.0,), product=(3.0,))
    two = dataclasses.replace(one, seconds=(2.0, 3.0), encode=(2.0, 3.0), product=(1.0, 1.0))
    other = dataclasses.replace(one, batch=2)
    merged = merged_encodes([dataclasses.replace(one, multiplications=7), other, two])
    assert [(row.batch, row.seconds, row.multiplications) for row in merged] == [
        (1, (1.0, 2.0, 3.0), 7),
        (2, (1.0,), None),
    ]
