"""What AFT and FARE do to the demo model's maps, accuracy and robustness, beside the trends that AFT's paper reports.

    python scripts/study_aft.py            an hour or so on a core; stopped, it goes on where it was
    python scripts/study_aft.py --quick    all of it on a handful of scenes, to see that it works

Trainings and what was measured of them are kept in runs/study-aft; figures, page and curves go to docs/studies.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import matplotlib
import torch
from matplotlib.figure import Figure

from clipfast.data.datasets.rendered import RenderedScenes
from clipfast.data.inputs import prepare_one
from clipfast.errors import InputError
from clipfast.finetune.adversary import Adversary, perturb
from clipfast.finetune.recipe import aft_objective, betas_of, fare_objective
from clipfast.finetune.settings import Settings
from clipfast.finetune.train import Trainer
from clipfast.metrics.base import Columns, Protocol, compare
from clipfast.metrics.evaluate import evaluate
from clipfast.metrics.evaluation import Evaluation
from clipfast.metrics.robust import RobustAccuracy
from clipfast.metrics.zero_shot import ZeroShot
from clipfast.models.load import load
from clipfast.models.model import Model
from clipfast.versions import machine, versions
from clipfast.view.files import write_file

# Of 1e-3, 3e-4, 1e-4 and 3e-5, after 16 steps: at the first two perturbed embeddings were further away than before.
LR, BATCH, PGD_STEPS = 1e-4, 8, 2
SIGMAS, RADII, ATTACK_STEPS = (2, 8), (4 / 255, 8 / 255), 10
METHODS = {"saliency": "simple gradients", "grad_cam": "Grad-CAM", "grad_eclip": "Grad-ECLIP"}
# A protocol, its figure, and what the page calls it; the paper has all of them rise.
MAPS = {
    "pointing": ("pointing_game", "hit", "pointing game"),
    "energy": ("energy_pointing_game", "share", "energy on the object"),
    "ap": ("segmentation/chefer", "AP", "AP"),
    "ssim": (f"stability/ssim:sigmas={','.join(map(str, SIGMAS))}", "SSIM", "SSIM under noise"),
    "gini": ("gini", "gini", "Gini index"),
}
# What the page calls them, and what the paper has them do as eps grows.
ACCURACIES = {
    "clean": ("zero-shot accuracy", "falls"),
    **{f"robust {255 * radius:g}": (f"accuracy under attack, {255 * radius:g}/255", "rises") for radius in RADII},
    "moved": ("way of attacked embeddings, 8/255", "falls"),
}


@dataclass(frozen=True)
class Moved(Protocol):
    """How far FARE's attack takes embeddings from the frozen tower's: squared distances."""

    name: ClassVar[str] = "moved"
    source: ClassVar[str] = "the outer loss of FARE"
    figures: ClassVar[Mapping[str, str]] = {"distance": "lower"}

    def measure(self, model: Model, scenes: RenderedScenes) -> Columns:
        """A column, "distance", of the scenes."""
        frozen, tuned = load("demo", device="cpu"), model.module.visual
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.spec.mean, model.spec.std))
        x = torch.stack([prepare_one(scene.image, model.spec).pixels for scene in scenes]).float() / 255
        with torch.no_grad():
            target = frozen.module.visual((x - mean) / std)
        adversary = replace(Adversary.fare(8 / 255), steps=ATTACK_STEPS, step_size=2 / 255)
        found = perturb(
            lambda pixels: tuned((pixels - mean) / std),
            lambda z: (z - target).square().sum(-1),
            x,
            adversary,
            torch.Generator().manual_seed(0),
        )
        with torch.no_grad():
            moved = (tuned((x + found.delta - mean) / std) - target).square().sum(-1)
        return {"distance": moved.double()}


_ATTACK = RobustAccuracy(RADII, steps=ATTACK_STEPS, targets=0, batch=20, templates="bare")
_ACCURACY: dict[str, tuple[Protocol, str]] = {
    "clean": (ZeroShot("bare"), "top-1"),
    **{f"robust {255 * radius:g}": (_ATTACK, f"robust {255 * radius:g}/255") for radius in RADII},
    "moved": (Moved(), "distance"),
}
KINDS = {"aft": "AFT", "fare": "FARE"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small training of each kind")
    parser.add_argument("--images", type=int, default=1200, help="scenes of a training")
    parser.add_argument("--eps", type=float, nargs="+", default=[2, 4, 8], help="in 255ths")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each kind and eps")
    parser.add_argument("--test", type=int, default=32, help="scenes whose maps are measured")
    parser.add_argument("--runs", type=Path, default=Path("runs/study-aft"), help="folder of the trainings")
    parser.add_argument("--out", type=Path, default=Path("docs/studies"), help="folder of figures and page")
    given = parser.parse_args()
    if given.quick:
        given.images, given.eps, given.test = 2 * BATCH, [4], 4

    base = load("demo", device="cpu")
    before = given.runs / f"base-{given.test}"
    found = {"base": measured(base, before, given.test)}
    for seed in range(given.seeds):
        for eps in sorted(given.eps, reverse=True):
            for kind in KINDS:
                folder = given.runs / f"{kind}-{eps:g}-{seed}-{given.images}"
                tuned = trained(kind, eps, seed, given.images, base, folder)
                name = f"{kind} {eps:g} {seed}"
                found[name] = measured(tuned, folder / f"measured-{given.test}", given.test, before)
                print(name, json.dumps(found[name]["figures"]), flush=True)
    content = {
        "settings": {
            "images": given.images,
            "eps": given.eps,
            "seeds": given.seeds,
            "test": given.test,
            "lr": LR,
            "batch": BATCH,
            "pgd_steps": PGD_STEPS,
            "attack_steps": ATTACK_STEPS,
        },
        "versions": versions(),
        "machine": machine(),
        "found": found,
    }
    write_file(given.out / "aft.json", json.dumps(content, indent=1).encode())
    draw(content, given.out / "aft.svg")
    print(write_file(given.out / "aft.md", page(content).encode()))


def trained(kind: str, eps: float, seed: int, images: int, base: Model, folder: Path) -> Model:
    """The demo model after one pass over scenes that neither it nor a test has seen; goes on where it was stopped."""
    # Steps as long as the radius: two of them reach any corner of the box from anywhere in it.
    inner = {"steps": PGD_STEPS, "step_size": eps / 255}
    objective = aft_objective(eps=eps / 255, **inner) if kind == "aft" else fare_objective(eps / 255, **inner)
    betas = betas_of("paper" if kind == "aft" else "released")
    settings = Settings(epochs=1, batch=BATCH, lr=LR, betas=betas, seed=seed, save_every=25, workers=1)
    done = Trainer(objective, base, f"scenes:{1000 + seed}:{images}", settings, folder).run()
    if not done.summary["complete"]:
        raise SystemExit("stopped; the same command goes on from there.")
    log = done.summary["this_run"]
    if log["steps"]:
        print(f"{folder.name}: {log['seconds']:.0f} s, {log['images_per_second']:.1f} images/s", flush=True)
    return done.model()


def measured(model: Model, folder: Path, test: int, base: Path | None = None) -> dict[str, Any]:
    """Figures by "METHOD MEASURE", and for a tuned model the paired differences to the base; kept in the folder."""
    scenes = RenderedScenes(7, test)
    protocols = [protocol for protocol, *_ in MAPS.values()]
    evaluation = evaluate(model, scenes, list(METHODS), protocols, prompt="{}", templates="bare", out=folder)
    evaluation.save(folder)
    before = None if base is None else Evaluation.load(base)
    figures: dict[str, float] = {}
    differences: dict[str, list[float]] = {}
    for method in METHODS:
        for measure, (protocol, figure, _) in MAPS.items():
            label = next(name for name in evaluation.protocols if name.split(":")[0] == protocol.split(":")[0])
            own = {one.name: one.value for one in evaluation.figures(method, label)}
            figures[f"{method} {measure}"] = own[figure]
            if before is not None:
                one = next(d for d in evaluation.differences(method, before, method, label) if d.name == figure)
                differences[f"{method} {measure}"] = [one.value, one.low, one.high]
    own, known = accuracies(model, folder, test), accuracies(model, base or folder, test)
    for key, columns in own.items():
        protocol, figure = _ACCURACY[key]
        figures[key] = protocol.summary(columns)[figure]
        if base is not None:
            one = next(d for d in compare(protocol, columns, known[key]) if d.name == figure)
            differences[key] = [one.value, one.low, one.high]
    figures["moved"] /= _ACCURACY["moved"][0].summary(known["moved"])["distance"]
    return {"figures": figures, "differences": differences}


def accuracies(model: Model, folder: Path, test: int) -> dict[str, Columns]:
    """Columns by each key of ACCURACIES, of scenes of one thing; kept in the folder."""
    single = RenderedScenes(8, 4 * test, objects=1)
    found = {
        "clean": kept(folder / "clean.json", lambda: ZeroShot("bare").measure(model, single)),
        "moved": kept(folder / "moved.json", lambda: Moved().measure(model, RenderedScenes(8, test, objects=1))),
    }
    try:
        attacked = kept(folder / "attacked.json", lambda: replace(_ATTACK, count=test).measure(model, single))
    except InputError as error:
        print(f"left out: {error}", flush=True)
        return found
    return found | dict.fromkeys((key for key in ACCURACIES if key.startswith("robust")), attacked)


def kept(path: Path, measure: Callable[[], Columns]) -> Columns:
    """What was measured before, else measured now."""
    if not path.exists():
        columns = {name: column.tolist() for name, column in measure().items()}
        write_file(path, json.dumps(columns).encode())
    return {n: torch.tensor(c, dtype=torch.float64) for n, c in json.loads(path.read_text()).items()}


def averaged(content: Mapping[str, Any], kind: str, key: str) -> list[float]:
    """A figure at eps 0 (the model before) and at each eps, means over seeds."""
    found, settings = content["found"], content["settings"]
    values = [found["base"]["figures"][key]]
    for eps in settings["eps"]:
        values.append(fmean(found[f"{kind} {eps:g} {seed}"]["figures"][key] for seed in range(settings["seeds"])))
    return values


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Curves of all figures against eps."""
    eps = [0, *content["settings"]["eps"]]
    known = [key for key in ACCURACIES if key in content["found"]["base"]["figures"]]
    panels: dict[str, dict[str, str]] = {
        title: {f"{method} {measure}": name for method, name in METHODS.items()}
        for measure, (_, _, title) in MAPS.items()
    }
    panels["accuracy"] = {key: ACCURACIES[key][0] for key in known}
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(2, 3).flat, panels.items(), strict=True):
        for number, (key, name) in enumerate(lines.items()):
            for kind, style in (("aft", "-o"), ("fare", "--s")):
                label = name if kind == "aft" else None
                axes.plot(eps, averaged(content, kind, key), style, color=f"C{number}", label=label, markersize=4)
        axes.set(title=title, xlabel="eps · 255 (0: before)", xticks=eps)
        axes.spines[["top", "right"]].set_visible(False)
        if title in (MAPS["ap"][2], "accuracy"):
            axes.legend(fontsize=8, frameon=False)
    figure.suptitle("AFT (solid) and FARE (dashed) of the demo model")
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "aft"}):
        figure.savefig(path, metadata={"Date": None})


def page(content: Mapping[str, Any]) -> str:
    """The figures as a page; its words follow from the numbers."""
    settings, found = content["settings"], content["found"]
    names = {"base": "demo model"} | {
        f"{kind} {eps:g}": f"{KINDS[kind]}, {eps:g}/255" for kind in KINDS for eps in settings["eps"]
    }
    tables = []
    for method, title in METHODS.items():
        rows = [f"| {title} | {' | '.join(m[2] for m in MAPS.values())} |", f"| --- |{' ---: |' * len(MAPS)}"]
        for name, words in names.items():
            rows.append(f"| {words} | {' | '.join(_cell(content, name, f'{method} {m}') for m in MAPS)} |")
        tables.append("\n".join(rows))
    known = [key for key in ACCURACIES if key in found["base"]["figures"]]
    rows = [f"| | {' | '.join(ACCURACIES[key][0] for key in known)} |", f"| --- |{' ---: |' * len(known)}"]
    rows += [f"| {words} | {' | '.join(_cell(content, name, key) for key in known)} |" for name, words in names.items()]
    tables.append("\n".join(rows))
    trends = "\n".join(f"- {line}" for line in [*_maps_in_words(content), *_rest_in_words(content, known)])
    seeds, test, images = settings["seeds"], settings["test"], f"{settings['images']:,}"
    newline = "\n\n"
    times = f"{seeds} trainings" if seeds > 1 else "one training"
    return f"""# AFT and FARE on the demo model

The demo model's image tower after AFT (the paper's recipe) and FARE, at several eps: one pass over {images} rendered
scenes, {times} of each kind and eps, AdamW at {settings["lr"]:g} (by short trials), batches of {settings["batch"]},
{settings["pgd_steps"]} inner steps of eps. Maps are measured on {test} scenes with exact masks, accuracies on
{4 * test} scenes of one thing, {test} of them under attack; no training has seen any. Accuracy is attacked by APGD on
the cross-entropy with {settings["attack_steps"]} steps, far fewer than it is usually published with, so that it is an
upper bound. The way of attacked embeddings is FARE's loss, in percent of the model's before.

![Curves](aft.svg)

{newline.join(tables)}

Bold: the paired bootstrap interval (95 %, over scenes) of the difference to the model before leaves out zero, in every
training. Of so many, some would by chance.

## Beside the paper's trends

The paper reports for CLIP ViT-B/16 on ImageNet-S, before and after AFT: pointing game 25.8 to 71.2 with simple
gradients, 51.0 to 74.0 with Grad-CAM, 86.6 to 87.4 with Grad-ECLIP; AP 34.5 to 59.9, 49.2 to 62.3, 76.8 to 78.3; maps
that stay more alike under noise; sparser maps; some accuracy lost, more the larger eps, and robustness gained. Here:

{trends}

What this can and cannot say: a model of 3 M parameters and drawings on calm backgrounds, {images} images where the
paper has 2.6 million. It shows whether the trainer does what its objective asks, and which of the paper's effects
appear at this size. It does not say what AFT does to a CLIP of photographs.

`make study-aft` makes this page; [aft.json](aft.json) has every training's figures.
"""


def _cell(content: Mapping[str, Any], name: str, key: str) -> str:
    found, seeds = content["found"], content["settings"]["seeds"]
    if name == "base":
        return f"{found['base']['figures'][key]:.3f}"
    own = [found[f"{name} {seed}"] for seed in range(seeds)]
    value = f"{fmean(one['figures'][key] for one in own):.3f}"
    return f"**{value}**" if all(_sign(one, key) for one in own) else value


def _sign(one: Mapping[str, Any], key: str) -> int:
    """1 or -1 where a training's difference to the base has an interval on one side of zero, else 0."""
    if key not in one["differences"]:
        return 0
    _, low, high = one["differences"][key]
    return (low > 0) - (high < 0)


def _maps_in_words(content: Mapping[str, Any]) -> list[str]:
    """For each measure of maps, what AFT did to each method's, and how FARE compares."""
    settings, found = content["settings"], content["found"]
    runs = [(eps, seed) for eps in settings["eps"] for seed in range(settings["seeds"])]
    lines = []
    for measure, (_, _, title) in MAPS.items():
        parts = []
        for method, name in METHODS.items():
            key = f"{method} {measure}"
            signs = [_sign(found[f"aft {eps:g} {seed}"], key) for eps, seed in runs]
            before, *after = averaged(content, "aft", key)
            seen = _verdict(signs)
            parts.append(f"with {name} it {seen}, {before:.3f} to {', '.join(f'{value:.3f}' for value in after)}")
        lines.append(
            f"**{title[0].upper()}{title[1:]}** after AFT (eps {_listed(settings['eps'])}): {'; '.join(parts)}."
        )
    ahead = {
        name: fmean(averaged(content, "aft", f"{m} pointing")[1:])
        - fmean(averaged(content, "fare", f"{m} pointing")[1:])
        for m, name in METHODS.items()
    }
    words = ", ".join(f"{100 * gain:+.1f} with {name}" for name, gain in ahead.items())
    lines.append(
        f"**AFT less FARE**, pointing game in points, mean over eps: {words}; not tested. The paper has AFT ahead."
    )
    return lines


def _verdict(signs: list[int], expected: str = "rises", by: str = "in the paper") -> str:
    up, down = signs.count(1), signs.count(-1)
    if up and down:
        return "rises and falls"
    if not up and not down:
        return "cannot be told from no change"
    seen = "rises" if up else "falls"
    said = "as" if seen == expected else "unlike"
    return f"{seen}, {said} {by} (beyond chance in {up + down} of {len(signs)})"


def _rest_in_words(content: Mapping[str, Any], known: list[str]) -> list[str]:
    """What happens to accuracies."""
    settings, found = content["settings"], content["found"]
    lines = []
    for key in known:
        title, expected = ACCURACIES[key]
        parts = []
        for kind, name in KINDS.items():
            before, *after = averaged(content, kind, key)
            runs = [f"{kind} {eps:g} {seed}" for eps in settings["eps"] for seed in range(settings["seeds"])]
            values = ", ".join(f"{100 * value:.1f}" for value in after)
            by = "the objective asks" if key == "moved" else "in the paper"
            seen = _verdict([_sign(found[run], key) for run in runs], expected, by)
            parts.append(f"after {name} it {seen}, {100 * before:.1f} to {values} %")
        lines.append(f"**{title[0].upper()}{title[1:]}**: {'; '.join(parts)}.")
    return lines


def _listed(eps: list[float]) -> str:
    return ", ".join(f"{one:g}" for one in eps) + "/255"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
