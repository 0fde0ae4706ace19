"""`clipfast run`: heat maps of a whole data set."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from clipfast.cli.console import error, note, print_json, print_paths, progress, shown, status, stdout
from clipfast.cli.group import INTERRUPTED
from clipfast.cli.options import (
    Device,
    Json,
    MethodName,
    ModelName,
    Precision,
    Pretrained,
    Resize,
    Set,
    Texts,
    check_device,
    parse_parameters,
    warn_of_demo,
)
from clipfast.errors import InputError, OutputError, nearest

if TYPE_CHECKING:
    from clipfast.engine.engines import Engine
    from clipfast.engine.totals import Totals
    from clipfast.engine.watch import Watch

STOPPED = 1
_ENGINES = ("local", "ray")
_SOURCE, _WHAT, _RESULTS, _WHERE = "Source", "Texts", "Results", "Machines"


def run(
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="SOURCE", help="A folder, a pattern, a list, a table, tars, or hf:FOLDER."),
    ] = None,
    texts: Texts = None,
    texts_from: Annotated[
        str | None,
        typer.Option(
            "--texts",
            metavar="FROM",
            help='A file with one text a line; "caption", beside each image; "column:NAME" of a table; '
            '"classes:FILE", names of classes.',
            rich_help_panel=_WHAT,
        ),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(help='What a class is asked as, "a photo of a {}."; repeat for more.', rich_help_panel=_WHAT),
    ] = None,
    top: Annotated[
        int | None, typer.Option(min=1, help="Only each image's best-scoring texts.", rich_help_panel=_WHAT)
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to; the same again goes on.")] = Path(
        "maps"
    ),
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", min=1, help="The first images only.", rich_help_panel=_SOURCE)
    ] = None,
    shard_size: Annotated[
        int, typer.Option(min=1, help="Images a shard; a tar is always one.", rich_help_panel=_SOURCE)
    ] = 1000,
    image_column: Annotated[
        str | None, typer.Option(help="The column of a table that holds the images.", rich_help_panel=_SOURCE)
    ] = None,
    key_column: Annotated[
        str | None, typer.Option(help="The column of a table that names them.", rich_help_panel=_SOURCE)
    ] = None,
    features: Annotated[
        bool,
        typer.Option("--features", help="Keep attribution features, for `clipfast ask`.", rich_help_panel=_RESULTS),
    ] = False,
    feature_codec: Annotated[
        str | None,
        typer.Option(metavar="CODEC", help="How features are kept, such as int8 or rank:32.", rich_help_panel=_RESULTS),
    ] = None,
    maps: Annotated[
        str,
        typer.Option(metavar="CODEC", help="How maps are kept: float16, float32 or uint8.", rich_help_panel=_RESULTS),
    ] = "float16",
    exact: Annotated[
        bool,
        typer.Option("--exact-pil", help="Decode as Pillow does, to the last bit; slower.", rich_help_panel=_RESULTS),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew in a folder of another run.", rich_help_panel=_RESULTS)
    ] = False,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Do shards again in which images failed.", rich_help_panel=_RESULTS)
    ] = False,
    max_error_rate: Annotated[
        float,
        typer.Option(min=0, max=1, help="Stop where a larger share of images fails.", rich_help_panel=_RESULTS),
    ] = 0.1,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Say what there is to do, and about how long it takes.")
    ] = False,
    as_json: Json = False,
    model: ModelName = "demo",
    pretrained: Pretrained = None,
    device: Device = None,
    precision: Precision = None,
    resize: Resize = None,
    method: MethodName = "grad_eclip",
    parameters: Set = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads that decode, in each process.", rich_help_panel=_WHERE)
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images that go through the model at once.", rich_help_panel=_WHERE)
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Processes, by default one a GPU; with Ray, workers.", rich_help_panel=_WHERE),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Do one part of N, from 0; by default as RANK and WORLD_SIZE or Slurm's variables say.",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    engine: Annotated[str, typer.Option(help='"local" or "ray".', rich_help_panel=_WHERE)] = "local",
    address: Annotated[
        str | None, typer.Option(help="Of the Ray cluster; by default one on this machine.", rich_help_panel=_WHERE)
    ] = None,
    cpus: Annotated[float, typer.Option(min=0, help="CPUs a Ray worker.", rich_help_panel=_WHERE)] = 1,
    gpus: Annotated[
        float | None,
        typer.Option(min=0, help="GPUs a Ray worker; by default one where there are any.", rich_help_panel=_WHERE),
    ] = None,
) -> None:
    """Draw heat maps of a whole data set; stop at any time, and go on with the same command.

    clipfast run photos/ -t "a dog" -t "a cat" -o maps
    clipfast run 'laion/{00000..00099}.tar' --texts caption -m ViT-B-16:openai --features
    clipfast run list.parquet --texts column:label --dry-run
    clipfast run photos/ --texts classes:names.txt --top 5
    clipfast run photos/ -t "a dog" --shard 0/4

    Writes shards of maps, their errors and a summary to maps/, or to --out: `clipfast.open_run` reads them, `clipfast
    export` makes pictures of them. Leaves with 0 when all shards are done, 1 when it stopped before, 130 after Ctrl-C.
    """
    check_device(device)
    from clipfast.engine.engines import part_of
    from clipfast.engine.run import FEATURES
    from clipfast.engine.run import run as run_all
    from clipfast.engine.texts import Prompts
    from clipfast.engine.totals import RunError

    if not sources:
        raise InputError('name a source of images, for example: clipfast run photos/ -t "a dog"')
    part, origin = part_of(shard)
    prompts = Prompts.parse(texts, texts_from, top=top, template=template, demo=model == "demo")
    options: dict[str, Any] = parse_parameters(method, parameters or [])
    if origin is not None:
        note(f"part {part[0]} of {part[1]}, counted from 0, as {origin} say.")
    warn_of_demo(model)
    status(f"loading {model if pretrained is None else f'{model}:{pretrained}'} ...")
    kept: bool | str = (feature_codec or FEATURES) if features or feature_codec else False
    with ExitStack() as stack:
        watch = _watch(stack, out)
        try:
            found = run_all(
                sources[0] if len(sources) == 1 else sources,
                prompts,
                out,
                model=model,
                pretrained=pretrained,
                method=method,
                maps=maps,
                features=kept,
                exact=exact,
                device=device,
                precision=precision,  # type: ignore[arg-type]
                resize=resize,
                shard_size=shard_size,
                limit=limit,
                image_column=image_column,
                key_column=key_column,
                workers=workers,
                batch=batch,
                processes=processes,
                part=part,
                overwrite=overwrite,
                retry_errors=retry_errors,
                max_error_rate=max_error_rate,
                dry=dry,
                engine=_engine(engine, address, processes, cpus, gpus),
                watch=watch,
                **options,
            )
        except (RunError, OutputError) as failure:
            stack.close()
            error(str(failure))
            raise typer.Exit(STOPPED) from None
        except KeyboardInterrupt:
            stack.close()
            if not (out / "run.json").exists():
                raise
            error(f"stopped; the shards so far are in {shown(out)}/, and the same command goes on from there.")
            raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print_json({**found, "folder": str(out)})
    elif dry:
        _print_estimate(found, sources)
    else:
        _print(found, out)


def _engine(name: str, address: str | None, workers: int | None, cpus: float, gpus: float | None) -> Engine | None:
    if name == "local":
        if address is not None:
            raise InputError("--address is for --engine ray.")
        return None
    if name != "ray":
        raise InputError(f"--engine {name}: {nearest(name, _ENGINES)}")
    from clipfast.engine.engines import on_ray

    return on_ray(address, workers=workers, cpus=cpus, gpus=gpus)


def _watch(stack: ExitStack, out: Path) -> Watch:
    """Shows a run on stderr until `stack` is closed."""
    from clipfast.engine.base import Shard
    from clipfast.engine.watch import Watch

    class Shown(Watch):
        totals: Totals

        def begins(self, listed: Sequence[Shard], todo: Sequence[Shard], totals: Totals) -> None:
            self.totals = totals
            if len(todo) < len(listed):
                note(f"{len(listed) - len(todo):,} of {len(listed):,} shards are there already, in {shown(out)}/.")
            if not todo:
                return
            counts = [shard.images for shard in todo]
            known = sum(count for count in counts if count is not None)
            self.advance = stack.enter_context(progress("explaining", None if None in counts else known, self._detail))

        def images(self, finished: int) -> None:
            self.advance(finished)

        def shard(self, totals: Totals) -> None:
            self.totals = totals

        def stops(self) -> None:
            os.write(2, b"\nstopping after the shard at hand; Ctrl-C once more stops at once.\n")

        def _detail(self) -> str:
            shares = [f"{part} {self.totals.share(part):.0%}" for part in ("decode", "model")]
            failed = [f"{self.totals.errors:,} failed"] if self.totals.errors else []
            return ", ".join((shares if self.totals.seconds else []) + failed)

    return Shown()


def _print(summary: dict[str, Any], out: Path) -> None:
    console = stdout()
    now = summary["this_run"]
    line = f"{summary['maps']:,} maps of {summary['images']:,} images, {_size(summary['bytes'])}"
    if now["images_per_second"]:
        line += (
            f"; {now['images'] + now['errors']:,} images in {_time(now['seconds'])}, {now['images_per_second']:.1f}/s "
            f"(decoding {now['decode_share']:.0%}, model {now['model_share']:.0%})"
        )
    console.print(line, soft_wrap=True)
    if not summary["complete"]:
        console.print(f"{summary['shards']:,} of {summary['listed']:,} shards are done; the others are other parts'.")
    for reason, count in list(summary["reasons"].items())[:3]:
        note(f"{count:,} failed: {reason}")
    if summary["errors"]:
        have = "image has" if summary["errors"] == 1 else "images have"
        typer.echo(f"{summary['errors']:,} {have} no map; errors.jsonl says why. All is in:")
    print_paths(out)


def _print_estimate(found: dict[str, Any], sources: Sequence[str]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column()
    about = "" if found["exact"] else "about "
    images = "unknown" if found["images"] is None else f"{about}{found['images']:,}"
    rate, per_image = found["images_per_second"], found["bytes_per_image"]
    rows = {
        "source": " ".join(shlex.quote(source) for source in sources[:3]) + (" ..." if len(sources) > 3 else ""),
        "images": images + ("" if found["bytes"] is None else f", about {_size(found['bytes'])}"),
        "shards": f"{found['shards']:,}" + (f", of which {found['done']:,} are done" if found["done"] else ""),
        "sample": f"{found['sample']} images" + (f", {found['failed']} of them failed" if found["failed"] else "")
        + ("" if rate is None else f", {rate:.1f} a second"),
        "time": "unknown" if found["seconds"] is None else f"about {_time(found['seconds'])}",
        "storage": "unknown" if found["storage"] is None else f"about {_size(found['storage'])}, "
        f"{per_image:,.0f} bytes an image",
    }  # fmt: skip
    for name, value in rows.items():
        table.add_row(name, value)
    stdout().print(table)


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    raise AssertionError


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
