"""`clipfast finetune grounded`: a CLIP whose patches know what they show, taught by its own heat maps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from clipfast.cli.console import progress, stdout
from clipfast.cli.training import Training, takes_training
from clipfast.errors import InputError

if TYPE_CHECKING:
    from clipfast.finetune.checkpoint import Finetuned

_WORDS = "Captions and phrases"


@takes_training
def grounded(
    training: Training,
    phrases: Annotated[
        str | None,
        typer.Option(
            help='Where phrases come from: "textblob", "spacy:PIPELINE", "names:FILE", or "column:NAME" of the '
            "source's own; by default textblob, and of rendered scenes the things themselves.",
            rich_help_panel=_WORDS,
        ),
    ] = None,
    caption: Annotated[
        str, typer.Option(metavar="COLUMN", help="The column with the captions.", rich_help_panel=_WORDS)
    ] = "caption",
    weight: Annotated[
        float, typer.Option(min=0, help="Of the local loss; 0 is ordinary fine-tuning.", rich_help_panel="Training")
    ] = 1.0,
    freeze_text: Annotated[
        bool, typer.Option("--freeze-text", help="The text tower stays as it is.", rich_help_panel="Training")
    ] = False,
    regions: Annotated[
        str | None,
        typer.Option(
            metavar="DATASET",
            help='Classify the boxes of this data set before and after: "coco:ROOT", "scenes:SEED:COUNT".',
        ),
    ] = None,
) -> None:
    """Grounded fine-tuning (Grad-ECLIP, 2025): images with captions, and a second loss for what their phrases mark.

    clipfast finetune grounded photos/ -m ViT-B-16:openai -o runs/grounded            photos/dog.jpg beside dog.txt
    clipfast finetune grounded cc3m.parquet -m ViT-B-16:openai --regions coco:/data/coco --precision bfloat16
    clipfast finetune grounded scenes:1:2048 --lr 1e-4 --batch 64 --regions scenes:2:200

    Each image's noun phrases are pooled where the model's own Grad-ECLIP maps see them, and told apart. All else as for
    `clipfast finetune aft`.
    """
    from clipfast.data.datasets import open_dataset
    from clipfast.finetune.grounded import Grounded

    if training.compile or training.parallel != "ddp":
        raise InputError("grounded fine-tuning runs the tower by itself: leave out --compile and --parallel.")
    # Before hours of training, not after.
    dataset = None if regions is None else open_dataset(regions)
    drawn = all(source.startswith("scenes:") for source in training.sources or [])
    objective = Grounded(
        phrases or ("scenes" if drawn else "textblob"),
        weight=weight,
        freeze_text=freeze_text,
        caption=caption,
        checkpointing=training.checkpointing,
    )
    training.run(objective, judge=None if dataset is None else lambda done: _judged(done, dataset, training.as_json))


def _judged(done: Finetuned, dataset: Any, as_json: bool) -> dict[str, Any]:
    """Region classification before and after, printed unless it goes into the JSON."""
    from clipfast.metrics.regions import Regions
    from clipfast.metrics.zero_shot import default_templates

    protocol = Regions(default_templates(done.start, dataset))
    found = {}
    for name, model in (("before", done.start), ("after", done.model())):
        with progress(f"regions {name}", len(dataset)) as advance:
            found[name] = protocol.summary(protocol.measure(model, dataset, on_error="skip", progress=advance))
    if not as_json:
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column(f"regions of {dataset.name}", no_wrap=True)
        for figure in protocol.figures:
            table.add_column(f"{figure} ↑", justify="right", no_wrap=True)
        for name, figures in found.items():
            table.add_row(name, *(f"{figures[figure]:.1%}" for figure in protocol.figures))
        stdout().print(table)
        stdout().print()
    return {"regions": {"data": dataset.name, "templates": protocol.templates, **found}}
