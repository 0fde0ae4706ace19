"""`clipfast finetune aft` and `clipfast finetune fare`: image towers whose maps are cleaner and harder to fool."""

from __future__ import annotations

from typing import Annotated

import typer

from clipfast.cli.finetune_grounded import grounded
from clipfast.cli.training import Training, takes_training

_ADVERSARY = "Adversary, in 255ths of a pixel's range"

finetune = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich", help="Fine-tune a CLIP, so that its explanations are better ones."
)

finetune.command()(grounded)

PgdSteps = Annotated[int, typer.Option(min=1, help="Steps of the inner problem.", rich_help_panel=_ADVERSARY)]
StepSize = Annotated[float, typer.Option(help="Of one of them.", rich_help_panel=_ADVERSARY)]
Captions = Annotated[
    str | None,
    typer.Option(metavar="COLUMN", help="Draw embeddings to these texts' instead: \"caption\", or a table's column."),
]


@finetune.command()
@takes_training
def aft(
    training: Training,
    recipe: Annotated[str, typer.Option(help='"paper", or "released", as its code computes it.')] = "paper",
    captions: Captions = None,
    normalize: Annotated[
        bool | None,
        typer.Option("--normalize/--no-normalize", help="Compare unit embeddings; by default as the recipe does."),
    ] = None,
    batch_norm: Annotated[
        str | None, typer.Option(help='A ResNet\'s statistics: "frozen", or "batch", as released.')
    ] = None,
    eps: Annotated[
        float | None,
        typer.Option(help="How far a pixel may move; 4, or 1 as released.", rich_help_panel=_ADVERSARY),
    ] = None,
    penalty: Annotated[
        str, typer.Option(help='"huber", "elastic_net" or "group_norm".', rich_help_panel=_ADVERSARY)
    ] = "huber",
    eta: Annotated[float, typer.Option(help="Where the Huber function turns linear.", rich_help_panel=_ADVERSARY)] = 1,
    eps2: Annotated[float, typer.Option(help="The elastic net's quadratic part.", rich_help_panel=_ADVERSARY)] = 1,
    group: Annotated[
        int, typer.Option(min=1, help="Side of a group-norm cell, pixels.", rich_help_panel=_ADVERSARY)
    ] = 14,
    sigma: Annotated[float, typer.Option(min=0, help="Of the noise.", rich_help_panel=_ADVERSARY)] = 1,
    samples: Annotated[
        int | None, typer.Option(min=0, help="Of the noise, in the outer problem.", rich_help_panel=_ADVERSARY)
    ] = None,
    pgd_steps: PgdSteps = 10,
    step_size: StepSize = 1,
) -> None:
    """Adversarial fine-tuning for interpretability (AFT, ICLR 2025): images only, no labels.

    clipfast finetune aft photos/ -m ViT-B-16:openai -o runs/aft
    clipfast finetune aft 'shards/*.tar' -m ViT-L-14:openai --precision bfloat16 --micro 32
    torchrun --nproc-per-node 8 -m clipfast finetune aft photos/ -m ViT-B-16:openai --precision bfloat16
    clipfast explain dog.jpg -t "a dog" -m runs/aft/model

    Stop it at any time: the same command goes on from the last checkpoint. Leaves with 0 when all steps are done, 130
    when it was stopped.
    """
    from clipfast.finetune.recipe import aft_objective, betas_of

    objective = aft_objective(
        recipe,  # type: ignore[arg-type]
        normalize=normalize,
        captions=captions,
        samples=samples,
        batch_norm=batch_norm,  # type: ignore[arg-type]
        penalty=penalty,
        group=group,
        steps=pgd_steps,
        sigma=sigma / 255,
        eta=eta / 255,
        eps2=eps2 / 255,
        step_size=step_size / 255,
        **({} if eps is None else {"eps": eps / 255}),
    )
    training.run(objective, betas=betas_of(recipe))


@finetune.command()
@takes_training
def fare(
    training: Training,
    captions: Captions = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Compare unit embeddings.")] = False,
    batch_norm: Annotated[
        str, typer.Option(help='A ResNet\'s statistics: "frozen", or "batch", as released.')
    ] = "batch",
    eps: Annotated[float, typer.Option(help="How far a pixel may move.", rich_help_panel=_ADVERSARY)] = 4,
    pgd_steps: PgdSteps = 10,
    step_size: StepSize = 1,
) -> None:
    """Robust CLIP (FARE, ICML 2024): embeddings of perturbed images stay where the clean ones were.

    clipfast finetune fare photos/ -m ViT-L-14:openai --eps 2 --precision bfloat16 -o runs/fare2

    All else as for `clipfast finetune aft`.
    """
    from clipfast.finetune.recipe import betas_of, fare_objective

    objective = fare_objective(
        eps / 255,
        normalize=normalize,
        captions=captions,
        batch_norm=batch_norm,  # type: ignore[arg-type]
        steps=pgd_steps,
        step_size=step_size / 255,
    )
    training.run(objective, betas=betas_of("released"))
