"""Whole evaluations, on a tiny model: rows against each protocol called by hand, and runs that stop and go on."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import clipfast
from clipfast.data.datasets import Dataset, Sample, Target, open_dataset
from clipfast.data.geometry import InputSpec
from clipfast.data.scenes import Scenes
from clipfast.errors import ImageError, InputError
from clipfast.metrics.base import figures
from clipfast.metrics.boxes import BoxGScoreCam
from clipfast.metrics.chosen import DEFAULT_METHODS, DEFAULT_PROTOCOLS
from clipfast.metrics.evaluate import Evaluator, evaluate
from clipfast.metrics.evaluation import Evaluation, merged
from clipfast.metrics.localisation import EnergyPointingGame, Gini, PointingGame
from clipfast.metrics.page import write_page
from clipfast.metrics.perturbation import Classes, Confidence, CurvesCosine, CurvesGradEclip, CurvesRise
from clipfast.metrics.registry import ALIASES, PROTOCOLS, build_protocol, label, listed, offered, parse
from clipfast.metrics.rows import Shard
from clipfast.metrics.stability import StabilitySsim
from clipfast.models.model import Model

SPEC = InputSpec(size=(64, 64), patch=(16, 16))


class Few(Dataset):
    """Scenes of 96 x 80 pixels with one to three targets; of `broken` samples the picture cannot be read."""

    offers = frozenset({"labels", "masks", "boxes", "captions"})

    def __init__(self, count: int = 7, broken: tuple[int, ...] = (), offers: frozenset[str] | None = None):
        self.scenes = Scenes(count, seed=3, size=(96, 80))
        self.classes = sorted({name for scene in self.scenes for name in scene.names} | {"dog", "cat", "bus"})
        self.name, self.broken = "few", broken
        if offers is not None:
            self.offers = offers

    def __len__(self) -> int:
        return len(self.scenes)

    def _sample(self, index: int) -> Sample:
        scene = self.scenes[index]
        if index in self.broken:
            raise ImageError(f"scene {index} is damaged.")
        assert self.classes is not None
        targets = [
            Target(
                name,
                self.classes.index(name),
                scene.mask(name),
                [tuple(map(float, o.box)) for o in scene.objects if o.name == name],  # type: ignore[misc]
            )
            for name in scene.names
        ]
        return Sample(f"scene{index}", Image.fromarray(scene.image), targets, [scene.caption])


@pytest.fixture
def model(build_clip: Any, tokenizer: Any) -> Model:
    return clipfast.load(build_clip().double(), tokenizer=tokenizer, preprocess=SPEC)


def by_hand(model: Model, data: Few, method: str, measure: Any) -> dict[str, torch.Tensor]:
    """Columns of all pairs, each measured on its own."""
    explainer = clipfast.Explainer(model, method)
    # Texts' last bits depend on which are encoded together, and those of maps, which order equal pixels, on them.
    evaluator = Evaluator(model, data, [method], ["gini"])
    parts = []
    for number, sample in enumerate(data):
        asked, _ = evaluator._asked(method, [f"a photo of a {target.text}." for target in sample.targets])
        out = explainer(sample.image, asked)
        for p, target in enumerate(sample.targets):
            # Not explained on its own: the last bit of a map decides between equal pixels.
            one = replace(out, maps=out.maps[:, p : p + 1], scores=out.scores[:, p : p + 1])
            parts.append(measure(one, sample, target, number))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def on_picture(protocol: Any) -> Any:
    def measure(out: Any, sample: Sample, target: Target, number: int) -> Any:
        return protocol.measure(out.resize(0), torch.from_numpy(target.mask)[None])

    return measure


def on_model(protocol: Any, model: Model, data: Few, classes: bool) -> Any:
    from clipfast.metrics.zero_shot import class_embeddings

    tower, _ = model.towers()

    def measure(out: Any, sample: Sample, target: Target, number: int) -> Any:
        what = model.encode_texts([f"a photo of a {target.text}."])
        if classes:
            names = class_embeddings(model, data.classes or [], "photo")
            what = Classes(names, float(tower.logit_scale), torch.tensor([target.label]))
        if isinstance(protocol, CurvesGradEclip):
            return protocol.measure(tower.encode, what, [sample.image], [out.resize(0)], model.spec, first=number)
        x = clipfast.data.geometry.normalize(
            clipfast.data.geometry.prepare(sample.image, model.spec)[0][None], model.spec, tower.dtype, tower.device
        )
        return protocol.measure(tower.encode, what, x, out.maps)

    return measure


@pytest.mark.parametrize("method", ["grad_eclip", "tclip"])
def test_rows_are_what_each_protocol_gives_by_itself(model: Model, method: str) -> None:
    data = Few(5)
    names = [
        "pointing_game",
        "energy_pointing_game",
        "gini",
        "deletion+insertion/rise:steps=4",
        "confidence/m2ib",
        "deletion+insertion/cosine:steps=4",
        "deletion+insertion/grad_eclip:steps=10:every=5",
        "box/gscorecam",
    ]
    found = evaluate(model, data, [method], names, batch=5)
    curves = (CurvesRise(steps=4), CurvesCosine(steps=4), CurvesGradEclip(steps=10, every=5))
    hands = {
        "pointing_game": on_picture(PointingGame()),
        "energy_pointing_game": on_picture(EnergyPointingGame()),
        "gini": lambda out, *_: Gini().measure(out.maps),
        names[3]: on_model(curves[0], model, data, True),
        names[4]: on_model(Confidence(), model, data, False),
        names[5]: on_model(curves[1], model, data, False),
        names[6]: on_model(curves[2], model, data, True),
        "box/gscorecam": lambda out, sample, target, _: BoxGScoreCam().measure(
            out.resize(0), [torch.tensor(target.boxes)]
        ),
    }
    with torch.no_grad():
        for name, measure in hands.items():
            table, expected = found.tables[method][name], by_hand(model, data, method, measure)
            assert set(table.columns) == set(expected)
            for column, values in expected.items():
                torch.testing.assert_close(table.columns[column], values.double(), atol=1e-9, rtol=1e-9, equal_nan=True)
    table = found.tables[method]["gini"]
    assert table.keys == [f"scene{i}" for i, sample in enumerate(data) for _ in sample.targets]
    assert table.texts == [f"a photo of a {t.text}." for sample in data for t in sample.targets]
    scores = [s for sample in data for s in clipfast.Explainer(model)(
        sample.image, [f"a photo of a {t.text}." for t in sample.targets]).scores[0].tolist()]  # fmt: skip
    assert table.scores == pytest.approx(scores, abs=1e-9)


def test_figures_resample_images(model: Model) -> None:
    found = evaluate(model, Few(6), ["mask_clip"], ["gini"], seed=4)
    table = found.tables["mask_clip"]["gini"]
    groups = torch.tensor([int(key[5:]) for key in table.keys])
    assert found.figures("mask_clip", "gini") == figures(Gini(), table.columns, groups=groups, seed=4)


def test_a_stopped_run_goes_on_and_finds_the_same(model: Model, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"methods": ["grad_eclip", "rise:masks=20"], "protocols": ["gini", "confidence/m2ib"],
                                "shard": 3}  # fmt: skip
    whole = evaluate(model, Few(7), **settings)

    class Stop(Exception):
        pass

    done = 0

    def stop(count: int) -> None:
        nonlocal done
        done += count
        if done > 7:
            raise Stop

    with pytest.raises(Stop):
        evaluate(model, Few(7), out=tmp_path, progress=stop, **settings)
    assert not list(tmp_path.rglob("*.part"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    assert len(before) == 2
    again = Evaluator(model, Few(7), out=tmp_path, **settings)
    assert again.left() == 2 * 7 - 2 * 3
    counted: list[int] = []
    found = again(counted.append)
    assert sum(counted) == 8
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    for method in settings["methods"]:
        for protocol in settings["protocols"]:
            a, b = found.tables[method][protocol], whole.tables[method][protocol]
            assert (a.keys, a.numbers, a.texts, a.scores) == (b.keys, b.numbers, b.texts, b.scores)
            assert all(torch.equal(a.columns[name], b.columns[name]) for name in b.columns)
            assert found.figures(method, protocol) == whole.figures(method, protocol)
    assert Evaluator(model, Few(7), out=tmp_path, **settings).left() == 0


def test_what_changes_the_maps_is_measured_anew_and_nothing_else(
    model: Model, build_clip: Any, tokenizer: Any, tmp_path: Path
) -> None:
    def left(
        model: Model = model,
        data: Dataset | None = None,
        methods: Any = ("grad_eclip",),
        protocols: Any = ("gini",),
        **options: Any,
    ) -> int:
        return Evaluator(model, data or Few(4), methods, protocols, out=tmp_path, shard=2, **options).left()

    evaluate(model, Few(4), ["grad_eclip"], ["gini"], out=tmp_path, shard=2)
    assert left() == 0
    assert left(limit=3) == 0
    assert left(methods=["grad_eclip", "mask_clip"]) == 4
    assert left(methods={"grad_eclip": {"layers": 2}}) == 4
    assert left(protocols=["gini", "pointing_game"]) == 4
    assert left(prompt="a {}") == 4
    assert left(resize="squash") == 4
    assert left(seed=1) == 0, "nothing of this draws at random"
    other = clipfast.load(build_clip(seed=1).double(), tokenizer=tokenizer, preprocess=SPEC)
    assert left(other) == 4
    # More samples: what is there of them stays.
    evaluate(model, Few(5), ["grad_eclip"], ["gini"], out=tmp_path, shard=2)
    assert left(data=Few(6)) == 2

    class Others(Few):
        def _sample(self, index: int) -> Sample:
            sample = super()._sample(index)
            return Sample(f"other{index}", sample.image, sample.targets, sample.captions)

    assert left(data=Others(4)) == 4


def test_a_smaller_limit_leaves_the_rows_of_a_larger_one(model: Model, tmp_path: Path) -> None:
    large = evaluate(model, Few(6), ["grad_eclip"], ["gini"], out=tmp_path, shard=4)
    large.save(tmp_path)
    # The further protocol is measured on three of the four samples of the first file.
    small = evaluate(model, Few(6), ["grad_eclip"], ["gini", "pointing_game"], limit=3, out=tmp_path, shard=4)
    assert Evaluator(model, Few(6), ["grad_eclip"], ["gini"], out=tmp_path, shard=4).left() == 0
    both = ["gini", "pointing_game"]
    assert Evaluator(model, Few(6), ["grad_eclip"], both, limit=3, out=tmp_path, shard=4).left() == 0
    assert Evaluator(model, Few(6), ["grad_eclip"], both, out=tmp_path, shard=4).left() == 6
    assert Evaluation.load(tmp_path).figures("grad_eclip", "gini") == large.figures("grad_eclip", "gini")
    small.save(tmp_path)
    assert Evaluation.load(tmp_path).figures("grad_eclip", "gini") == small.figures("grad_eclip", "gini")


def test_a_further_protocol_adds_columns_to_the_same_files(model: Model, tmp_path: Path) -> None:
    first = evaluate(model, Few(4), ["grad_eclip"], ["gini"], out=tmp_path)
    both = evaluate(model, Few(4), ["grad_eclip"], ["gini", "pointing_game"], out=tmp_path)
    (path,) = tmp_path.rglob("*.parquet")
    shard = Shard.read(path)
    assert set(shard.columns) == {"gini", "pointing_game"}
    assert torch.equal(shard.columns["gini"]["gini"], first.tables["grad_eclip"]["gini"].columns["gini"])
    assert both.tables["grad_eclip"]["gini"].columns.keys() == {"gini"}


def test_seeds_are_given_to_what_draws(model: Model) -> None:
    methods = ["rise", "rise:seed=5", "grad_eclip"]
    runs = [Evaluator(model, Few(2), methods, ["deletion/grad_eclip"], seed=seed) for seed in (0, 7)]
    assert [run.methods["rise"]["seed"] for run in runs] == [0, 7]
    assert [run.methods["rise:seed=5"]["seed"] for run in runs] == [5, 5]
    assert [next(iter(run.protocols.values())).seed for run in runs] == [0, 7]  # type: ignore[attr-defined]


def test_samples_that_cannot_be_read_are_left_out(model: Model, tmp_path: Path) -> None:
    found = evaluate(model, Few(5, broken=(0, 3)), ["grad_eclip", "mask_clip"], ["gini"], out=tmp_path, shard=2)
    assert len(found.errors) == 2
    assert "scene 3 is damaged" in found.errors["sample 3"]
    keys = found.tables["mask_clip"]["gini"].keys
    assert set(keys) == {"scene1", "scene2", "scene4"}
    assert found.tables["grad_eclip"]["gini"].keys == keys
    with pytest.raises(InputError, match="none of the 2 samples"):
        evaluate(model, Few(2, broken=(0, 1)), ["grad_eclip"], ["gini"])


def test_captions_are_asked_where_there_are_no_targets(model: Model) -> None:
    class Captioned(Few):
        def _sample(self, index: int) -> Sample:
            sample = super()._sample(index)
            return Sample(sample.key, sample.image, [], [*sample.captions, "a dog"])

    data = Captioned(4, offers=frozenset({"captions"}))
    found = evaluate(model, data, ["grad_eclip"], ["deletion+insertion/cosine:steps=3"])
    table = found.tables["grad_eclip"]["deletion+insertion/cosine:steps=3"]
    assert table.texts == [text for sample in data for text in (sample.captions[0], "a dog")]
    with pytest.raises(InputError, match=r"pointing_game needs masks.*fit it: gini"):
        evaluate(model, data, ["grad_eclip"], ["pointing_game"])
    assert set(offered(data.offers)) == {n for n, entry in PROTOCOLS.items() if entry.needs <= {"captions"}}


def test_an_evaluation_comes_back_from_its_file(model: Model, tmp_path: Path) -> None:
    protocols = ["pointing_game:tolerance=5", "segmentation/mask_iou", "confidence/gradcam++", "deletion/rise:steps=3"]
    found = evaluate(model, Few(5), ["grad_eclip", "mask_clip"], protocols, out=tmp_path, shard=2)
    found.save(tmp_path)
    back = Evaluation.load(tmp_path)
    assert back.protocols == found.protocols
    assert back.methods == found.methods
    for method, own in found.tables.items():
        for protocol, table in own.items():
            again = back.tables[method][protocol]
            assert (again.keys, again.texts) == (table.keys, table.texts)
            for name, column in table.columns.items():
                torch.testing.assert_close(again.columns[name], column, atol=0, rtol=0, equal_nan=True)
    (path, *_) = tmp_path.rglob("000002.parquet")
    path.unlink()
    with pytest.raises(InputError, match="lacks rows"):
        Evaluation.load(tmp_path)
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(InputError, match="is not what"):
        Evaluation.load(tmp_path)


def test_differences_need_the_same_pairs(model: Model) -> None:
    a = evaluate(model, Few(6), ["grad_eclip", "mask_clip"], ["energy_pointing_game"])
    b = evaluate(model, Few(6), ["grad_eclip"], ["energy_pointing_game"])
    (same,) = a.differences("grad_eclip", b, "grad_eclip", "energy_pointing_game")
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    (other,) = a.differences("mask_clip", b, "grad_eclip", "energy_pointing_game")
    columns = [e.tables[m]["energy_pointing_game"].columns["share"] for e, m in ((a, "mask_clip"), (b, "grad_eclip"))]
    assert other.value == pytest.approx(float((columns[0] - columns[1]).mean()))
    fewer = evaluate(model, Few(5), ["grad_eclip"], ["energy_pointing_game"])
    with pytest.raises(InputError, match="same samples"):
        a.differences("grad_eclip", fewer, "grad_eclip", "energy_pointing_game")


def test_curves_have_the_mean_and_a_band_over_images(model: Model) -> None:
    name = "deletion+insertion/rise:steps=4"
    found = evaluate(model, Few(6), ["grad_eclip"], [name, "gini"])
    curves = found.curves("grad_eclip", name)
    assert set(curves) == {"deletion", "insertion"}
    assert found.curves("grad_eclip", "gini") == {}
    table = found.tables["grad_eclip"][name]
    for at, mean, band in zip(*vars(curves["insertion"]).values(), strict=True):
        column = table.columns[f"insertion {at:.3f}"]
        assert mean == pytest.approx(float(column.mean()))
        sums = [float((column[torch.tensor(table.numbers) == n] - mean).sum()) for n in range(6)]
        assert band == pytest.approx(1.96 * math.sqrt(sum(s * s for s in sums)) / len(column))
    steps = "deletion+insertion/grad_eclip:steps=4:every=2"
    by_step = evaluate(model, Few(2), ["grad_eclip"], [steps]).curves("grad_eclip", steps)
    assert by_step["deletion top-5"].at == [0, 0.5, 1]


def test_parts_become_one(model: Model) -> None:
    fast = evaluate(model, Few(6), ["grad_eclip", "mask_clip"], ["gini"])
    slow = evaluate(model, Few(6), ["grad_eclip", "rise:masks=10"], ["gini", "confidence/m2ib"], limit=2)
    whole = merged([fast, slow])
    assert list(whole.methods) == ["grad_eclip", "mask_clip", "rise:masks=10"]
    assert list(whole.protocols) == ["gini", "confidence/m2ib"]
    assert whole.tables["grad_eclip"]["gini"] is fast.tables["grad_eclip"]["gini"]
    assert whole.tables["grad_eclip"]["confidence/m2ib"].samples == 2
    assert whole.best("confidence/m2ib", 0) <= {"grad_eclip", "rise:masks=10"}
    with pytest.raises(InputError, match="are two"):
        merged([fast, evaluate(model, Few(2), ["grad_eclip"], ["gini"], seed=1)])


def test_examples_are_the_ends_of_a_figure_and_the_page_shows_them(model: Model, tmp_path: Path) -> None:
    evaluator = Evaluator(model, Few(6), ["grad_eclip", "tclip"], ["pointing_game", "energy_pointing_game"])
    found = evaluator()
    assert found.telling() == ("energy_pointing_game", "share", "higher")
    shown = evaluator.examples(found, 2)
    for name, (best, worst) in shown.items():
        column = found.tables[name]["energy_pointing_game"].columns["share"]
        assert [one.value for one in best] == column.sort(descending=True).values[:2].tolist()
        assert [one.value for one in worst] == column.sort().values[:2].tolist()
        assert all(one.heat.shape == (96, 80) for one in best + worst)
    found.errors["a<b"] = "a<b: <script>alert(1)</script>"
    page = write_page(tmp_path / "page.html", found, shown).read_text()
    assert page.count("<img") == 8
    assert "alert(1)" in page
    assert "<script>alert" not in page
    assert "http" not in page.replace("http-equiv", "")
    for name in ("grad_eclip", "tclip"):
        (one,) = found.figures(name, "energy_pointing_game")
        assert f"{one.value:.3f}</" in page


def test_protocols_by_name() -> None:
    assert build_protocol("deletion+insertion/rise", steps=28) == CurvesRise(steps=28)
    assert build_protocol("deletion/rise:steps=28") == CurvesRise(steps=28)
    assert build_protocol("confidence/gradcam++") == Confidence(drop="relative")
    assert [label(Confidence()), label(Confidence("relative"))] == ["confidence/m2ib", "confidence/gradcam++"]
    assert label(PointingGame(tolerance=15)) == "pointing_game:tolerance=15"
    assert build_protocol(label(BoxGScoreCam(threshold=0.5))) == BoxGScoreCam(threshold=0.5)
    assert label(StabilitySsim(sigmas=(1, 5))) == "stability/ssim:sigmas=1,5"
    assert build_protocol("stability/ssim:sigmas=1,5") == StabilitySsim(sigmas=(1, 5))
    assert build_protocol(label(StabilitySsim(sigmas=(2.5,)))) == StabilitySsim(sigmas=(2.5,))
    assert listed("gini, stability/ssim:sigmas=1, 5,gini,mmel:theta=-1,.5,+2:alpha=1,rise,") == [
        "gini",
        "stability/ssim:sigmas=1, 5",
        "mmel:theta=-1,.5,+2:alpha=1",
        "rise",
    ]
    assert parse("mmel:theta=-1,.5,+2:alpha=1") == ("mmel", {"theta": (-1, 0.5, 2), "alpha": 1})
    assert parse("a:b=1:c=0.5:d=none:e=True:f=x") == ("a", {"b": 1, "c": 0.5, "d": None, "e": True, "f": "x"})
    for name in PROTOCOLS:
        assert label(build_protocol(name)) == name
    assert set(ALIASES.values()) <= set(PROTOCOLS)
    for name in DEFAULT_PROTOCOLS:
        build_protocol(name)
    assert set(DEFAULT_METHODS) <= set(clipfast.methods.METHODS)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pointing_gam", "did you mean 'pointing_game'"),
        ("pointing_game:tolerence=3", "did you mean 'tolerance'"),
        ("pointing_game:tolerance", "NAME=VALUE"),
        ("pointing_game:tolerance=x", "cannot take"),
        ("gini:a=1", "it has none"),
        ("confidence/gradcam++:drop=absolute", "it has none"),
    ],
)
def test_protocols_that_there_are_not(name: str, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        build_protocol(name)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"methods": ["grad_eclp"]}, "did you mean 'grad_eclip'"),
        ({"methods": ["grad_cam++"]}, "cannot explain images with"),
        ({"methods": []}, "no method"),
        ({"protocols": []}, "no protocol"),
        ({"limit": 0}, "at least 1"),
        ({"prompt": "a dog"}, "must hold {}"),
    ],
)
def test_settings_that_cannot_be_used(model: Model, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Evaluator(model, Few(2), **settings)


def test_rows_need_pyarrow(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"need pyarrow: pip install"):
        Evaluator(model, Few(2), ["grad_eclip"], ["gini"], out=tmp_path)
    assert evaluate(model, Few(2), ["grad_eclip"], ["gini"]).samples == 2


def test_scenes_by_the_demo_model() -> None:
    """The real thing, small: what names a thing finds it more often than chance would."""
    found = evaluate("demo", open_dataset("scenes:1", limit=12), ["grad_eclip"], ["pointing_game"])
    (hit,) = found.figures("grad_eclip", "pointing_game")
    assert hit.value > 0.5
