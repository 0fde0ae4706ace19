"""`clipfast probe`: a linear classifier on a frozen tower, and maps of its classes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipfast.cli.console import note, print_json, print_paths, progress, shown, status, stdout
from clipfast.cli.folders import staging
from clipfast.cli.options import (
    Device,
    Json,
    MethodName,
    ModelName,
    Out,
    Precision,
    Pretrained,
    Set,
    check_device,
    parse_parameters,
    warn_of_demo,
)
from clipfast.errors import TextError

if TYPE_CHECKING:
    from torch import Tensor

    from clipfast.api import Explainer
    from clipfast.data.datasets import Sample
    from clipfast.metrics.base import Figure
    from clipfast.metrics.probe import Encoded, LinearHead
    from clipfast.view.report import ReportItem

_WEIGHTS, _FILE, _PAGE = "probe.safetensors", "probe.json", "report.html"
_SIDE = 1024


def probe(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help='A folder of class folders, or "NAME:FOLDER" of a data set.')
    ],
    model: ModelName = "demo",
    limit: Annotated[int | None, typer.Option("--limit", "-n", min=1, help="Samples at most.")] = None,
    held: Annotated[float, typer.Option(min=0.01, max=0.9, help="The share of each class that is held out.")] = 0.2,
    show: Annotated[int, typer.Option(min=1, help="Held-out pictures whose maps are drawn.")] = 12,
    top: Annotated[int, typer.Option(min=1, help="Classes a picture: the likeliest.")] = 3,
    out: Out = None,
    as_json: Json = False,
    seed: Annotated[int, typer.Option(min=0, help="Of what is held out.")] = 0,
    split: Annotated[str | None, typer.Option(help="Part of the data set, such as train.")] = None,
    pretrained: Pretrained = None,
    device: Device = None,
    precision: Precision = None,
    method: MethodName = "grad_eclip",
    parameters: Set = None,
) -> None:
    """Fit a linear probe to a frozen image tower, and map what its classes see.

    clipfast probe data/birds -m ViT-B-16:openai
    clipfast probe imagenette:/data/imagenette2 --split train -m tuned.pt

    Accuracy is of pictures that were held out, beside that of zero-shot classification on the same ones. Writes
    probe.safetensors (weight, bias and the classes' directions, which explain like texts), probe.json and report.html
    to runs/probe, runs/probe-2 and so on, or to --out.
    """
    options = parse_parameters(method, parameters or [])
    check_device(device)
    import torch

    from clipfast.api import Explainer
    from clipfast.data.datasets import DATASETS, open_dataset
    from clipfast.metrics.probe import encode, fit_probe, hold_out, zero_shot_head
    from clipfast.metrics.zero_shot import default_templates
    from clipfast.models.load import load
    from clipfast.view.report import write_report

    named = data.partition(":")[0].lower().replace("-", "_") in DATASETS
    dataset = open_dataset(data if named else f"folder:{data}", split=split, limit=limit)
    status(f"loading {model if pretrained is None else f'{model}:{pretrained}'} ...")
    loaded = load(model, pretrained, device=device)
    if not data.startswith("scenes"):
        warn_of_demo(model)
    explainer = Explainer(loaded, method, precision=precision, **options)  # type: ignore[arg-type]
    with staging(out, "probe") as stage:
        with progress("encoding", len(dataset)) as advance:
            encoded = encode(loaded, dataset, precision=precision, on_error="skip", progress=advance)  # type: ignore[arg-type]
        fitted, kept = hold_out(encoded.labels, held, seed)
        # Of the pictures that are fitted some choose the penalty, so that none of the others had a say in it.
        head = fit_probe(encoded.select(fitted), seed=seed)
        unseen = encoded.select(kept)
        heads = {"linear probe": head}
        try:
            heads["zero-shot"] = zero_shot_head(loaded, encoded.classes, default_templates(loaded, dataset))
        except TextError as failure:
            note(f"zero-shot accuracy is left out: {failure}")
        accuracy = {name: _accuracy(one, unseen, seed) for name, one in heads.items()}
        status("maps ...")
        started = time.perf_counter()
        # Evenly over what was held out, which often lies class by class.
        drawn = unseen.select(torch.linspace(0, len(unseen) - 1, min(show, len(unseen))).long())
        numbers, probabilities = drawn.numbers.tolist(), head.probabilities(drawn.z)
        items = [_item(explainer, dataset[n], head, p, top) for n, p in zip(numbers, probabilities, strict=True)]
        document = {
            "model": loaded.name,
            "data": dataset.name,
            "classes": encoded.classes,
            "l2": head.l2,
            "fitted": len(encoded) - len(unseen),
            "accuracy": {
                name: {"value": one.value, "low": one.low, "high": one.high, "count": one.count}
                for name, one in accuracy.items()
            },
        }
        _save(stage.path / _WEIGHTS, head)
        (stage.path / _FILE).write_text(json.dumps(document, ensure_ascii=False, indent=1), encoding="utf-8")
        write_report(
            stage.path / _PAGE,
            items,
            method=method,
            model=loaded.name,
            seconds=time.perf_counter() - started,
            title="Classes of a linear probe",
        )
        folder = stage.publish()
    if as_json:
        print_json({**document, "folder": str(folder), "report": str(folder / _PAGE)})
        return
    console = stdout()
    for name, one in accuracy.items():
        console.print(f"{name}: {one.value:.3f}  95 % interval {one.low:.3f} to {one.high:.3f}", soft_wrap=True)
    console.print(
        f"{len(unseen):,} held-out pictures of {len(encoded.classes)} classes, {len(encoded) - len(unseen):,} fitted, "
        f"penalty {head.l2:g}",
        style="dim",
        soft_wrap=True,
    )
    typer.echo(f"the probe is {shown(folder / _WEIGHTS)}, one page with maps of its classes:")
    print_paths(folder / _PAGE)


def _accuracy(head: LinearHead, unseen: Encoded, seed: int) -> Figure:
    from clipfast.metrics.base import figures
    from clipfast.metrics.comparison import Values

    columns = {"accuracy": head.hits(unseen.z, unseen.labels).double()}
    return figures(Values("accuracy", "higher"), columns, seed=seed)[0]


def _item(explainer: Explainer, sample: Sample, head: LinearHead, probabilities: Tensor, top: int) -> ReportItem:
    """A picture with the maps of the classes that the probe finds likeliest (K,)."""
    from clipfast.data.images import read_image
    from clipfast.view.report import ReportItem

    order = probabilities.sort(descending=True, stable=True).indices[:top]
    picture = read_image(sample.image)
    result = explainer(picture, head.directions[order])
    picture = picture.copy()
    picture.thumbnail((_SIDE, _SIDE))
    heat, palette = result.drawable(0, list(range(len(order))), _SIDE)
    return ReportItem(
        title=f"{sample.key}: {' and '.join(target.text for target in sample.targets)}",
        image=picture,
        prompts=[head.classes[k] for k in order.tolist()],
        heat=heat.cpu(),
        scores=result.scores[0].tolist(),
        extras={"probability": probabilities[order].tolist()},
        palette=palette,
    )


def _save(path: Path, head: LinearHead) -> None:
    from safetensors.torch import save_file

    tensors = {"weight": head.weight, "bias": head.bias, "directions": head.directions}
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, {"classes": json.dumps(head.classes)})
