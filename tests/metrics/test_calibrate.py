"""Calibrating on the demo model and a few scenes: what is chosen, by what, and what is reported of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clipfast.data.datasets import open_dataset
from clipfast.errors import InputError
from clipfast.metrics import calibrate
from clipfast.metrics.base import compare
from clipfast.metrics.calibrate import Calibrator, Half, Objective, grid_of
from clipfast.metrics.evaluate import evaluate
from clipfast.metrics.localisation import EnergyPointingGame
from clipfast.metrics.perturbation import CurvesCosine, CurvesGradEclip, CurvesRise
from clipfast.metrics.registry import build_protocol
from clipfast.models.load import load

# A power puts more of a map on its peak.
FEW, GRID = "energy_pointing_game", {"contrast": (1.0, 4.0), "alpha": (2.0, 0.5)}


@pytest.fixture(scope="module")
def model() -> Any:
    return load("demo")


@pytest.fixture(scope="module")
def scenes() -> Any:
    return open_dataset("scenes:1", limit=7)


def test_the_best_of_one_half_is_reported_on_the_other(model: Any, scenes: Any) -> None:
    found = calibrate(model, scenes, "mmel", GRID, FEW)
    assert list(found.settings) == [
        "mmel",
        "mmel:contrast=1.0:alpha=0.5",
        "mmel:contrast=4.0:alpha=2.0",
        "mmel:contrast=4.0:alpha=0.5",
    ]
    whole = evaluate(model, scenes, list(found.settings), [FEW])
    even = torch.tensor(whole.tables["mmel"][FEW].numbers) % 2 == 0
    values = {name: whole.tables[name][FEW].columns["share"] for name in found.settings}
    for name, one in found.values.items():
        assert one.value == pytest.approx(float(values[name][even].mean()), abs=1e-6)
    assert found.best == max(values, key=lambda name: float(values[name][even].mean()))
    assert found.best != "mmel", "else there is nothing to see here"
    assert found.difference is not None
    gain = values[found.best][~even] - values["mmel"][~even]
    assert found.difference.value == pytest.approx(float(gain.mean()), abs=1e-6)
    by = {name: found.reported_on.tables[name][FEW] for name in found.reported}
    a, b = by[found.best], by["mmel"]
    (expected,) = compare(EnergyPointingGame(), a.columns, b.columns, groups=a.groups)
    assert found.difference == expected
    assert found.flags == f"--method {found.best.replace(':', ' --set ')}"
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["objective"] == {"share": "higher"}
    assert document["samples"] == {"to choose by": 4, "to report by": 3}


def test_a_stopped_calibration_goes_on(model: Any, scenes: Any, tmp_path: Path) -> None:
    settings = ("mmel", {"alpha": (0, 2, 8)}, "energy_pointing_game")
    whole = calibrate(model, scenes, *settings)

    class Stop(Exception):
        pass

    def stop(count: int) -> None:
        raise Stop

    first = Calibrator(model, scenes, *settings, out=tmp_path)
    # Three settings on 4 scenes, and at most two on the 3 others.
    assert first.left() == 3 * 4 + 2 * 3
    with pytest.raises(Stop):
        first(stop)
    counted: list[int] = []
    again = Calibrator(model, scenes, *settings, out=tmp_path)
    assert again.left() == first.left() > 0
    found = again(counted.append)
    assert sum(counted) in (3 * 4 + 3, 3 * 4 + 2 * 3)
    assert found.values == whole.values
    assert (found.best, found.reported, found.difference) == (whole.best, whole.reported, whole.difference)
    assert Calibrator(model, scenes, *settings, out=tmp_path).left() == 0
    assert Calibrator(model, scenes, "mmel", {"alpha": (0, 2, 4, 8)}, settings[2], out=tmp_path)._choosing.left() == 4
    assert found.save(tmp_path).name == "calibration.json"


def test_no_better_setting_is_no_difference(model: Any, scenes: Any) -> None:
    found = calibrate(model, scenes, "grad_eclip", {"signed": (True,)}, "deletion+insertion/rise:steps=1")
    # One step takes all pixels at once: every order is as good, and the default comes first.
    assert (found.best, found.difference, list(found.reported)) == ("grad_eclip", None, ["grad_eclip"])
    assert found.flags == "--method grad_eclip"
    assert found.to_json()["difference"] is None


def test_words_are_calibrated_by_protocols_of_words(model: Any, scenes: Any) -> None:
    found = calibrate(model, scenes, "mmel:mode=paper", {"theta": (1, (0, 1, 2))}, "deletion/words:steps=2")
    assert list(found.settings) == ["mmel:mode=paper", "mmel:mode=paper:theta=0,1,2"]
    assert found.flags.startswith("--method mmel --set mode=paper")


def test_halves_are_every_second_sample(scenes: Any) -> None:
    first, second = Half(scenes, 0, 7), Half(scenes, 1, 7)
    assert [s.key for s in first] == [scenes[i].key for i in (0, 2, 4, 6)]
    assert [s.key for s in second] == [scenes[i].key for i in (1, 3, 5)]
    assert first.name != second.name
    assert first.offers == scenes.offers


def test_objectives() -> None:
    assert Objective(CurvesCosine()).figures == {"insertion - deletion": "higher"}
    assert Objective(CurvesGradEclip()).figures == {"insertion top-1 - deletion top-1": "higher"}
    assert Objective(EnergyPointingGame()).figures == {"share": "higher"}
    assert Objective(build_protocol("confidence/m2ib")).figures == {"drop": "lower"}
    columns = {"deletion": torch.tensor([0.1, 0.3]), "insertion": torch.tensor([0.5, 0.9])}
    assert Objective(CurvesRise()).summary(columns)["insertion - deletion"] == pytest.approx(0.5)


def test_the_default_grid_is_mmel_s(model: Any) -> None:
    grid = grid_of("mmel", model)
    assert set(grid) == {"alpha", "temperature", "theta"}
    assert len(grid["theta"][1]) == model.towers()[0].depth
    assert len(grid_of("mmel", model, "text")["theta"][1]) == model.towers()[1].depth
    assert len(Calibrator(model, open_dataset("scenes:1", limit=2)).settings) == 5 * 3 * 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("grad_eclip",), "there is no grid for grad_eclip: give values of its parameters, which are heads"),
        (("mmel", {"alfa": (1,)}), "did you mean 'alpha'"),
        (("mmel", {"alpha": ()}), "must have values"),
        (("mmel:alpha=1", {"alpha": (1, 2)}), "must not be set"),
        (("mmel", {"alpha": (2,)}), "nothing but mmel itself"),
        (("mmel", {"alpha": (-1, 2)}), "at least 0"),
        (("mask_clip", {"times_kk": (True,)}, "deletion/words"), "does not explain texts"),
        (("mml",), "did you mean 'mmel'"),
    ],
)
def test_what_cannot_be_calibrated_is_said(model: Any, scenes: Any, arguments: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Calibrator(model, scenes, *arguments)


def test_one_sample_is_too_few(model: Any, scenes: Any) -> None:
    with pytest.raises(InputError, match="two samples at least"):
        Calibrator(model, scenes, limit=1)
