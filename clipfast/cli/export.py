"""`clipfast export`: a run's maps as files that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipfast.cli.console import note, print_json, print_paths, progress
from clipfast.cli.options import Json
from clipfast.errors import InputError

_SHOWN = 3


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder that `clipfast run` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to; made if missing.")],
    png: Annotated[bool, typer.Option("--png", help="Each map on its image's pixels, 8-bit grey.")] = False,
    overlay: Annotated[bool, typer.Option("--overlay", help="Each map in colours over its image.")] = False,
    npy: Annotated[
        bool, typer.Option("--npy", help='One .npy an image: {"keys", "cam", "high_res"}, float16 in 0..1.')
    ] = False,
    labels: Annotated[
        bool, typer.Option("--labels", help="One PNG an image: each pixel's strongest prompt from 1, or 0.")
    ] = False,
    rle: Annotated[bool, typer.Option("--rle", help="Masks as COCO keeps them, a JSON a shard.")] = False,
    webdataset: Annotated[bool, typer.Option("--webdataset", help="Raw maps, a tar a shard.")] = False,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Share of a map's range from which a pixel counts (--labels, --rle).")
    ] = 0.4,
    limit: Annotated[int | None, typer.Option("--limit", "-n", min=1, help="The first images only.")] = None,
    images: Annotated[
        str | None, typer.Option(help="Where the images are now, if not where the run found them (--overlay).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write again what is there already.")] = False,
    as_json: Json = False,
) -> None:
    """Write the maps of a run as pictures, masks, labels or arrays.

    clipfast export maps --overlay --limit 100 -o look
    clipfast export maps --labels --threshold 0.3 -o pseudo-labels
    clipfast export maps --rle --npy -o masks

    What is there already is left alone: an export that was stopped goes on when the same command is given again.
    """
    chosen = {"png": png, "overlay": overlay, "npy": npy, "labels": labels, "rle": rle, "webdataset": webdataset}
    kinds = [kind for kind, wanted in chosen.items() if wanted]
    if not kinds:
        raise InputError(f"say what to export: {', '.join(f'--{kind}' for kind in chosen)}.")
    from clipfast.engine.export import Export
    from clipfast.engine.reader import open_run

    opened = open_run(run)
    exporter = Export(opened, out, kinds, threshold=threshold, images=images, overwrite=overwrite)
    count = len(opened) if limit is None else min(limit, len(opened))
    with progress("exporting", count) as advance:
        written = exporter(limit, advance)
    for failure in exporter.errors[:_SHOWN]:
        note(failure.reason)
    if len(exporter.errors) > _SHOWN:
        note(f"{len(exporter.errors) - _SHOWN:,} more images have no overlay.")
    folders = [exporter.out / kind for kind in kinds]
    if as_json:
        errors = [{"key": failure.key, "reason": failure.reason} for failure in exporter.errors]
        print_json({"images": count, "files": written, "errors": errors, "folders": [str(f) for f in folders]})
        return
    files = ", ".join(f"{number:,} {kind}" for kind, number in written.items())
    typer.echo(f"{count:,} images; new files: {files}")
    print_paths(*(folder for folder in folders if folder.is_dir()))
