"""A data-set run: which shards are to do, who does them, and what is left behind.

    clipfast.run("photos/", ["a dog", "a cat"], "maps")

A run may be stopped or killed at any moment, on any machine; the same call goes on with the shards that have no marker.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from clipfast.data.arrow import pyarrow
from clipfast.engine.base import Shard, Source
from clipfast.engine.config import RunConfig
from clipfast.engine.engines import Engine, in_process, local_devices, process_starts
from clipfast.engine.estimate import estimate
from clipfast.engine.folder import SUMMARY, Part, RunFolder
from clipfast.engine.local import local_workers
from clipfast.engine.sources import open_source
from clipfast.engine.storage import feature_codec, map_codec
from clipfast.engine.texts import Prompts
from clipfast.engine.totals import RunError, Totals
from clipfast.engine.watch import Stop, Watch
from clipfast.engine.work import Job, Worker
from clipfast.errors import ClipfastError, InputError, OutputError
from clipfast.methods import build_method
from clipfast.metrics.zero_shot import Templates
from clipfast.models.model import Precision
from clipfast.versions import versions

MAX_ERROR_RATE = 0.1
FEATURES = "int8"
"""The codec of features where they are wanted and none is named; docs/scale.md says why."""
# Lost shards after which the others are not tried if none was computed.
_LOST = 3


def run(
    source: str | Path | Sequence[str] | Source,
    texts: str | Sequence[str] | Prompts | None = None,
    out: str | Path = "maps",
    *,
    model: Any = "demo",
    pretrained: str | None = None,
    method: str = "grad_eclip",
    column: str | None = None,
    templates: Templates | None = None,
    top: int | None = None,
    maps: str = "float16",
    features: bool | str = False,
    exact: bool = False,
    device: str | None = None,
    precision: Precision = None,
    resize: str | None = None,
    shard_size: int = 1000,
    limit: int | None = None,
    image_column: str | None = None,
    key_column: str | None = None,
    workers: int | None = None,
    batch: int | None = None,
    processes: int | None = None,
    part: Part = (0, 1),
    overwrite: bool = False,
    retry_errors: bool = False,
    max_error_rate: float = MAX_ERROR_RATE,
    dry: bool = False,
    engine: Engine | None = None,
    watch: Watch | None = None,
    **parameters: Any,
) -> dict[str, Any]:
    """Maps of a whole data set, in a folder that `clipfast.open_run` reads; returns what its summary.json holds.

    source: as `open_source` takes it, with shard_size, limit, image_column and key_column; or a Source. texts: asked
    of every image, or a Prompts; column: of the source, "caption" for the text beside each image, where each image
    has texts of its own; templates, top: as for `Prompts`. model, pretrained, device: as for `clipfast.load`. method,
    parameters, precision, resize: as for `Explainer`. maps, features: codecs (`storage`); features=True keeps them in
    the usual one. exact: decode as Pillow does, to the last bit. workers, batch: threads that decode, and images that
    go through the model at once; by default as many as the machine is good for. processes: on this machine, by
    default one a GPU. part: (i, n), of the shards those whose number leaves i when divided by n. overwrite: begin
    anew in a folder of another configuration. retry_errors: do those shards again in which images failed.
    max_error_rate: the share of images that may fail. dry: only look: returns what an `Estimate` holds, and writes
    nothing. engine: another one than this machine's, such as `on_ray`.

    An image that fails is recorded with its reason; the run goes on. Ctrl-C and SIGTERM let the shard at hand be
    finished; then KeyboardInterrupt is raised. Raises InputError (and ModelError, TextError) before anything is
    written, RunError where too many images fail, OutputError where results cannot be written. What is done stays.
    """
    if isinstance(texts, Prompts):
        prompts = texts
    else:
        listed = (texts,) if isinstance(texts, str) else tuple(texts or ())
        prompts = Prompts(listed, column, templates, top)
    if isinstance(source, Source):
        opened = source
        if limit is not None:
            raise InputError("limit is for a source that is opened here: pass it to open_source.")
    else:
        opened = open_source(
            source,
            shard_size=shard_size,
            limit=limit,
            columns=prompts.columns,
            image_column=image_column,
            key_column=key_column,
        )
    job = Job(
        opened,
        prompts,
        Path(out).expanduser().absolute(),
        model=_placed(model),
        pretrained=_placed(pretrained),
        device=device,
        method=method,
        parameters=parameters,
        precision=precision,
        resize=resize,
        maps=maps,
        features=FEATURES if features is True else features or None,
        exact=exact,
        workers=workers,
        batch=batch,
    )
    return run_job(
        job,
        part=part,
        whole=limit is None and not isinstance(source, Source),
        processes=processes,
        overwrite=overwrite,
        retry_errors=retry_errors,
        max_error_rate=max_error_rate,
        dry=dry,
        engine=engine,
        watch=watch,
    )


def run_job(
    job: Job,
    *,
    part: Part = (0, 1),
    whole: bool = False,
    processes: int | None = None,
    overwrite: bool = False,
    retry_errors: bool = False,
    max_error_rate: float = MAX_ERROR_RATE,
    dry: bool = False,
    engine: Engine | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """`run` for a job. whole: the source lists all there is, so that shards which it does not list are of the past."""
    watch = watch or Watch()
    check(job, part, max_error_rate)
    folder = RunFolder(job.out)
    folder.check()
    listed = job.source.shards()
    devices = local_devices(job, processes) if engine is None else []
    alone = engine is None and len(devices) == 1
    # Where others compute, the model is loaded here only to know what it is.
    first = replace(job, device=devices[0] if devices else "cpu") if job.portable else job
    explainer = first.explainer()
    if job.features is not None:
        explainer.check_features()
    if job.prompts.column is None:
        explainer.asks(job.prompts.asked(explainer))
    config = first.config(explainer)
    job = replace(job, digest=config.digest, precision=_resolved(job.precision, config.dtype))
    if dry:
        folder.check_config(config, overwrite=overwrite)
        own = [shard for shard in listed if shard.number % part[1] == part[0]]
        there = sum(1 for _ in folder.done(own, config.digest))
        return estimate(job, explainer, own, there, max(1, len(devices))).to_json()
    with Stop(watch) as stop, folder.working(part, config, overwrite=overwrite):
        if not whole:
            listed = folder.longer(listed, config.digest)
        own = [shard for shard in listed if shard.number % part[1] == part[0]]
        folder.clear(own)
        totals, fresh = Totals(), Totals()
        done: set[str] = set()
        for marker in folder.done(own, config.digest):
            if not (retry_errors and marker["errors"]):
                totals.add(marker)
                done.add(marker["shard"])
        todo = [shard for shard in own if shard.id not in done]
        watch.begins(own, todo, totals)
        totals.check(max_error_rate)
        if alone or not todo:
            outcomes = in_process(Worker(replace(job, device=first.device), explainer), todo, stop, watch.images)
        elif engine is not None:
            outcomes = engine(job, todo, stop, watch.images)
        else:
            starts = process_starts(job, devices[: len(todo)])
            outcomes = local_workers(starts, todo, stop=stop, progress=watch.images)
        # Others have models of their own.
        del explainer
        begun = time.perf_counter()
        summary: dict[str, Any] | None = None
        lost: list[Exception] = []
        try:
            with closing(outcomes):
                for _, outcome in outcomes:
                    if isinstance(outcome, Exception):
                        lost.append(outcome)
                        # One shard that kills its workers is not worth the others; what would end them all is.
                        if type(outcome) is not ClipfastError or (len(lost) == _LOST and not fresh.shards):
                            raise outcome
                        continue
                    totals.add(outcome)
                    fresh.add(outcome)
                    watch.shard(totals)
                    totals.check(max_error_rate)
        except OutputError as error:
            raise OutputError(
                f"{error} {totals.shards:,} of {len(own):,} shards are done and safe; "
                + ("make room, and the same command goes on." if error.full else "the same command goes on."),
                error.full,
            ) from error
        finally:
            folder.clear(own)
            # What made the run stop counts for more than a summary that cannot be written for the same reason.
            with suppress(OSError):
                if totals.shards == len(own):
                    folder.supersede(listed, part, whole=whole)
                summary = _summarised(folder, config, listed, fresh, time.perf_counter() - begun)
    if lost:
        which = "1 shard" if len(lost) == 1 else f"{len(lost):,} shards"
        raise RunError(f"{which} could not be computed; the same command tries again: {lost[0]}")
    if totals.shards < len(own):
        raise KeyboardInterrupt
    if summary is None:
        raise OutputError(f"{folder.path} has all maps, but its {SUMMARY} cannot be written: is the disk full?")
    if totals.errors and not totals.images:
        raise InputError(f"none of the {totals.errors:,} images could be explained: {totals.why()}")
    return summary


def check(job: Job, part: Part, max_error_rate: float) -> None:
    """Raises InputError for what can be seen to be wrong before a model is loaded."""
    pyarrow()
    build_method(job.method, dict(job.parameters))
    map_codec(job.maps)
    if job.features is not None:
        feature_codec(job.features)
    if not 0 <= part[0] < part[1]:
        raise InputError(f"part={part} must be (i, n) with i from 0 to n - 1.")
    if not 0 <= max_error_rate <= 1:
        raise InputError(f"max_error_rate={max_error_rate:g} must be a share, from 0 to 1.")


def _placed(model: Any) -> Any:
    """The path of a checkpoint as other processes and machines find it; all else as it is."""
    if isinstance(model, str | Path) and Path(model).expanduser().is_file():
        return str(Path(model).expanduser().absolute())
    return model


def _resolved(precision: Precision, dtype: str) -> Precision:
    """ "auto" as what it came to, so that it is the same on every machine."""
    if precision != "auto":
        return precision
    return "bfloat16" if dtype == "bfloat16" else None


def _summarised(
    folder: RunFolder, config: RunConfig, listed: Sequence[Shard], fresh: Totals, seconds: float
) -> dict[str, Any]:
    """summary.json and errors.jsonl, from the markers of everyone who works on the run."""
    totals = Totals()
    errors: list[dict[str, Any]] = []
    for marker in folder.done(listed, config.digest):
        totals.add(marker)
        errors += ({**error, "shard": marker["shard"]} for error in marker["errors"])
    finished = fresh.images + fresh.errors
    summary = {
        "complete": totals.shards == len(listed),
        "listed": len(listed),
        **totals.to_json(),
        "this_run": {
            "shards": fresh.shards,
            "images": fresh.images,
            "errors": fresh.errors,
            "seconds": round(seconds, 3),
            "images_per_second": round(finished / seconds, 2) if finished and seconds else None,
            "decode_share": round(fresh.share("decode"), 4),
            "model_share": round(fresh.share("model"), 4),
        },
        "model": config.model,
        "method": config.method,
        "config": config.digest,
        "versions": versions(),
        "finished": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    folder.write_summary(summary, errors)
    return summary
