"""The command line. Nothing heavy is imported until a command needs it, so that help comes at once."""

from __future__ import annotations

from typing import Annotated

import typer

from clipfast.cli.ask import ask
from clipfast.cli.bench import bench
from clipfast.cli.demo import demo
from clipfast.cli.diff import diff
from clipfast.cli.doctor import doctor
from clipfast.cli.eval import evaluate
from clipfast.cli.explain import explain
from clipfast.cli.export import export
from clipfast.cli.finetune import finetune
from clipfast.cli.group import Commands
from clipfast.cli.methods import methods
from clipfast.cli.models import models
from clipfast.cli.probe import probe
from clipfast.cli.robust import robust
from clipfast.cli.run import run
from clipfast.cli.words import words

app = typer.Typer(cls=Commands, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
for command in (explain, words, demo):
    app.command()(command)
app.command()(run)
app.command()(ask)
app.command()(export)
app.command("eval")(evaluate)
for measuring in (diff, robust, probe):
    app.command()(measuring)
app.command()(bench)
app.add_typer(finetune, name="finetune")
for listing in (models, methods, doctor):
    app.command()(listing)


@app.callback(invoke_without_command=True)
def clipfast(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Explain CLIP: which patches of an image and which words of a text make their score what it is.

    clipfast demo                         a page of heat maps, made offline in seconds
    clipfast explain dog.jpg -t "a dog"   heat maps of your own pictures
    clipfast explain --help               all about a command
    """
    if version:
        from clipfast import __version__

        typer.echo(f"clipfast {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Run the command line and leave with its exit code: 0, 2 for bad input, 130 when interrupted."""
    app(prog_name="clipfast")
