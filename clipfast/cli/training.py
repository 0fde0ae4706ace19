"""What the commands of `clipfast finetune` share: their options, progress, and what is printed in the end."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from clipfast.cli.console import error, note, print_json, print_paths, progress, shown, status, stdout
from clipfast.cli.group import INTERRUPTED
from clipfast.cli.options import Device, Json, ModelName, Pretrained, check_device
from clipfast.errors import InputError, OutputError

if TYPE_CHECKING:
    from clipfast.finetune.checkpoint import Finetuned
    from clipfast.finetune.log import Follow
    from clipfast.finetune.objective import Objective

    Judge = Callable[[Finetuned], Mapping[str, Any]]

STOPPED = 1
_SOURCE, _TRAINING, _MACHINE = "Source", "Training", "Machine"


@dataclass(frozen=True)
class Training:
    """The options of every fine-tuning; its fields are options of each command that `takes_training`."""

    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="SOURCE", help='What `clipfast run` reads, or rendered scenes, "scenes:SEED:COUNT".'),
    ] = None
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write to, else runs/NAME; the same again goes on.")
    ] = None
    as_json: Json = False
    model: ModelName = "demo"
    pretrained: Pretrained = None
    device: Device = None
    epochs: Annotated[float, typer.Option(help="Times over the images.", rich_help_panel=_TRAINING)] = 2
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps, in the place of epochs.", rich_help_panel=_TRAINING)
    ] = None
    batch: Annotated[int, typer.Option(min=1, help="Images a step, of all processes.", rich_help_panel=_TRAINING)] = 128
    micro: Annotated[
        int | None,
        typer.Option(min=1, help="Of these, how many go through the model at once.", rich_help_panel=_TRAINING),
    ] = None
    lr: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=_TRAINING)] = 1e-5
    warmup: Annotated[
        int | None, typer.Option(min=0, help="Steps of warm-up; by default 7 % of all.", rich_help_panel=_TRAINING)
    ] = None
    weight_decay: Annotated[float, typer.Option(min=0, help="Of AdamW.", rich_help_panel=_TRAINING)] = 1e-4
    clip: Annotated[
        float | None, typer.Option(help="Largest norm of the gradient; by default any.", rich_help_panel=_TRAINING)
    ] = None
    precision: Annotated[
        str | None, typer.Option(help='"float32", "bfloat16" (autocast) or "auto".', rich_help_panel=_TRAINING)
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="Of order and noise.", rich_help_panel=_TRAINING)] = 0
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", min=1, help="The first images only.", rich_help_panel=_SOURCE)
    ] = None
    shuffle: Annotated[
        int, typer.Option(min=1, help="Images shuffled together, of tars and tables.", rich_help_panel=_SOURCE)
    ] = 4096
    image_column: Annotated[
        str | None, typer.Option(help="The column of a table that holds the images.", rich_help_panel=_SOURCE)
    ] = None
    key_column: Annotated[
        str | None, typer.Option(help="The column of a table that names them.", rich_help_panel=_SOURCE)
    ] = None
    checkpointing: Annotated[
        bool,
        typer.Option("--checkpointing", help="Less memory for more time: blocks run twice.", rich_help_panel=_MACHINE),
    ] = False
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile what trains.", rich_help_panel=_MACHINE)] = (
        False
    )
    parallel: Annotated[
        str, typer.Option(help='Of several processes (torchrun): "ddp" or "fsdp".', rich_help_panel=_MACHINE)
    ] = "ddp"
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that decode.", rich_help_panel=_MACHINE)] = None
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.", rich_help_panel=_MACHINE)] = 500
    log_every: Annotated[
        int, typer.Option(min=1, help="Steps between lines of log.jsonl.", rich_help_panel=_MACHINE)
    ] = 10
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="TensorBoard's files beside the log.", rich_help_panel=_MACHINE)
    ] = False

    def run(self, objective: Objective, judge: Judge | None = None, **settings: Any) -> None:
        """Train with its progress on stderr, and say what it came to; leaves with 130 where it was stopped.

        judge: called when all steps are done; what it finds goes beside the summary. settings: that differ from
        `Settings`' defaults and are no options.

        Raises InputError, ModelError as `Trainer` does.
        """
        if not self.sources:
            raise InputError(f"name a source of images, for example: clipfast finetune {objective.name} photos/")
        check_device(self.device)
        from clipfast.finetune.parallel import own_device
        from clipfast.finetune.settings import Settings
        from clipfast.finetune.train import Trainer
        from clipfast.models.load import load

        own = {field.name for field in fields(Settings)}
        chosen = Settings(**{k: v for k, v in vars(self).items() if k in own}, **settings)
        out = self.out or Path("runs", objective.name)
        first = os.environ.get("RANK", "0") == "0"
        if first:
            status(f"loading {self.model if self.pretrained is None else f'{self.model}:{self.pretrained}'} ...")
        loaded = load(self.model, self.pretrained, device=self.device or own_device())
        options = {name: getattr(self, name) for name in ("limit", "shuffle", "image_column", "key_column")}
        images = self.sources[0] if len(self.sources) == 1 else self.sources
        trainer = Trainer(objective, loaded, images, chosen, out, **options)
        with ExitStack() as stack:
            try:
                done = trainer.run(_follow(stack, out) if first else None)
            except OutputError as failure:
                stack.close()
                error(str(failure))
                raise typer.Exit(STOPPED) from None
        if first:
            found = judge(done) if judge is not None and done.summary["complete"] else {}
            _tell({**done.summary, **found}, out, done.path, self.as_json)
        if not done.summary["complete"]:
            raise typer.Exit(INTERRUPTED)


def takes_training(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose first parameter is a `Training` and whose others are options, as typer reads it.

    The fields of `Training` become options beside its own.
    """
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    shared = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hint)
        for field, hint in zip(fields(Training), get_type_hints(Training, include_extras=True).values(), strict=True)
    ]
    parameters = [*shared[:3], *(one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own), *shared[3:]]

    @wraps(command)
    def told(**options: Any) -> None:
        training = Training(**{one.name: options.pop(one.name) for one in shared})
        command(training, **options)

    told.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    told.__annotations__ = {one.name: one.annotation for one in parameters}
    return told


def _follow(stack: ExitStack, out: Path) -> Follow:
    """Shows a fine-tuning on stderr until `stack` is closed."""
    from clipfast.finetune.log import Follow

    class Shown(Follow):
        told: Mapping[str, Any] = {}

        def starts(self, steps: int, done: int, batch: int) -> None:
            self.batch = batch
            if done:
                note(f"{done:,} of {steps:,} steps are done already, in {shown(out)}/.")
            self.advance = stack.enter_context(progress("fine-tuning", (steps - done) * batch, self._detail))

        def step(self, record: Mapping[str, Any]) -> None:
            self.told = {**self.told, **record}
            self.advance(self.batch)

        def stops(self) -> None:
            os.write(2, b"\nstopping after the step at hand; Ctrl-C once more stops at once.\n")

        def _detail(self) -> str:
            terms = ("loss", "clean_cosine", "adversarial_cosine")
            words = [f"{name.replace('_', ' ')} {self.told[name]:.3g}" for name in terms if name in self.told]
            counts = ("failed", "skipped", "nan_gradients")
            return ", ".join([*words, *(f"{self.told[n]:,} {n.replace('_', ' ')}" for n in counts if self.told.get(n))])

    return Shown()


def _tell(summary: Mapping[str, Any], out: Path, model: Path, as_json: bool) -> None:
    if as_json:
        print_json({**summary, "folder": str(out), "model": str(model)})
    if not summary["complete"]:
        error(f"stopped after step {summary['step']:,} of {summary['steps']:,}; the same command goes on from there.")
    if as_json or not summary["complete"]:
        return
    now = summary["this_run"]
    line = f"{summary['steps']:,} steps, {summary['images']:,} images"
    if now["steps"]:
        line += f"; {now['steps']:,} steps in {now['seconds']:,.0f} s, {now['images_per_second']:.1f} images/s"
    else:
        line += "; complete already"
    stdout().print(line, soft_wrap=True)
    for name, words in (
        ("failed", "images could not be read, counted each time; errors.jsonl says why"),
        ("skipped", "steps were skipped for gradients that were NaN or infinite"),
        ("nan_gradients", "gradients of pixels were NaN and counted as zero"),
    ):
        if summary.get(name):
            note(f"{summary[name]:,} {words}.")
    print_paths(out / "log.jsonl", model)
