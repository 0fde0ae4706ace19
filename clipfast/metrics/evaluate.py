"""Every method by every protocol over a data set: what `clipfast eval` runs.

    found = evaluate("demo", open_dataset("scenes:1", limit=50), ["grad_eclip", "mmel"], ["pointing_game"])
    found.figures("mmel", "pointing_game")

A sample's maps are made once for each method and measured by all protocols. With `out` the rows are written as they
come (see `metrics.rows`), and the same call goes on where an earlier one was stopped; the figures are the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from clipfast.api import Explainer, Texts
from clipfast.data.arrow import pyarrow
from clipfast.data.datasets import Dataset, Sample, Target
from clipfast.data.geometry import normalize
from clipfast.data.inputs import prepare_one
from clipfast.data.upright import read_sample
from clipfast.errors import ImageError, InputError, TextError
from clipfast.methods import build_method
from clipfast.metrics.base import Protocol
from clipfast.metrics.chosen import Methods, chosen_methods, chosen_protocols
from clipfast.metrics.evaluation import Evaluation, Table
from clipfast.metrics.registry import Side, entry_of, parse
from clipfast.metrics.rows import Seconds, Shard, fingerprint, rows_path, rows_paths, slug
from clipfast.metrics.work import WordWork, Work
from clipfast.metrics.zero_shot import Templates, class_embeddings, default_templates
from clipfast.models.digest import weights_digest
from clipfast.models.load import load
from clipfast.models.model import Model, Precision
from clipfast.versions import versions

# Samples whose pictures and maps on their own pixels are in memory at once; texts that a batch of images is worth.
_AT_ONCE, _TEXTS = 8, 8

Job = tuple[str, Side]
"""A method's label, and what of it is measured: maps of images or values of words, each with rows of their own."""


@dataclass(frozen=True)
class Example:
    """A pair that a method did best or worst on: heat (H, W) in 0..1 over the picture, and the figure's value."""

    key: str
    text: str
    value: float
    picture: Image.Image
    heat: Tensor
    palette: str
    mask: Tensor | None


class Evaluator:
    """An evaluation, checked and ready to run; arguments as for `evaluate`.

    Raises InputError for an unknown method, protocol or parameter, a method that explains nothing that the protocols
    measure, a protocol that needs more than the data set offers, and a missing pyarrow where `out` is given.
    """

    def __init__(
        self,
        model: Any,
        dataset: Dataset,
        methods: Methods | None = None,
        protocols: Iterable[str | Protocol] | None = None,
        *,
        limit: int | None = None,
        seed: int = 0,
        out: str | Path | None = None,
        shard: int = 50,
        batch: int = 32,
        precision: Precision = None,
        resize: str | None = None,
        prompt: str | None = None,
        templates: Templates | None = None,
    ):
        self.model: Model = load(model)
        self.dataset = dataset
        self.seed, self.shard, self.batch = seed, shard, batch
        self.precision, self.resize = precision, resize
        self.count = len(dataset) if limit is None else min(limit, len(dataset))
        if self.count < 1 or shard < 1 or batch < 1:
            raise InputError(f"limit, shard and batch must be at least 1, and {dataset.name} must hold a sample.")
        self.prompt = prompt or ("{}" if self.model.name == "demo" else "a photo of a {}.")
        if "{}" not in self.prompt:
            raise InputError(f"prompt={self.prompt!r} must hold {{}} for the name of what is asked for.")
        self.templates = templates or default_templates(self.model, dataset)
        self.protocols = chosen_protocols(protocols, dataset, seed)
        self.methods, self._jobs = chosen_methods(
            methods, self.protocols, self.model.towers(precision)[0], self.model.name, seed
        )
        self.out = None if out is None else Path(out)
        if self.out is not None:
            pyarrow()
        self._explainers = {
            name: Explainer(self.model, parse(name)[0], precision=precision, resize=resize, **parameters)
            for name, parameters in self.methods.items()
        }
        self._marks = {name: self._mark(protocol) for name, protocol in self.protocols.items()}
        self._embeddings: dict[str, Tensor] = {}
        self._images: dict[int, Tensor] = {}
        digest = weights_digest(self.model.module)
        self._folders = {job: self._folder(job, digest) for job in self._jobs}
        titles = {name if side == "image" else f"{name} ({side})": own for (name, side), own in self._folders.items()}
        self.fingerprint = fingerprint(methods=titles, protocols=self._marks)
        """Of everything but the number of samples."""
        self._shards = {(job, start): self._read(job, start) for start in self._starts() for job in self._jobs}
        self._kept: dict[Job, list[WordWork]] = {}

    @property
    def whole(self) -> int:
        """How many samples are measured in all, summed over methods and over the two sides of one."""
        return self.count * len(self._jobs)

    def left(self) -> int:
        """How many of `whole` are still to be measured."""
        return sum(self._stop(start) - start for job, start in self._shards if self._missing(job, start))

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, progress: Callable[[int], None] | None = None) -> Evaluation:
        """Measure what is left, and return all; progress: called with how much of `left` was done since."""
        started = time.perf_counter()
        for start in self._starts():
            todo = [job for job in self._jobs if self._missing(job, start)]
            samples = self._samples(start) if todo else {}
            for job in todo:
                self._shards[job, start] = self._measured(job, start, samples, progress)
        for job in self._jobs:
            self._measure_whole(job)
        return self._evaluation(time.perf_counter() - started)

    @torch.inference_mode(False)
    @torch.no_grad()
    def examples(self, found: Evaluation, count: int = 3) -> dict[str, tuple[list[Example], list[Example]]]:
        """For each method the pairs with its best and its worst values of `found.telling()`, explained once more."""
        telling = found.telling()
        if telling is None:
            return {}
        protocol, figure, better = telling
        shown = {}
        for name in self.methods:
            table = found.tables.get(name, {}).get(protocol)
            if table is None:
                continue
            column = table.columns[figure]
            rows = [int(i) for i in column.argsort(descending=better == "higher", stable=True) if not column[i].isnan()]
            best, worst = rows[:count], rows[count:][-count:][::-1]
            shown[name] = ([self._example(name, table, figure, i) for i in best],
                           [self._example(name, table, figure, i) for i in worst])  # fmt: skip
        return shown

    def _example(self, name: str, table: Table, figure: str, row: int) -> Example:
        number = table.numbers[row]
        picture, targets = self._read_targets(self.dataset[number])
        at = row - table.numbers.index(number)
        asked, _ = self._asked(name, [target.text for target in targets])
        result = self._explainers[name](picture, asked)
        heat, palette = result.drawable(0, [at])
        mask = targets[at].mask
        return Example(
            table.keys[row],
            table.texts[row],
            float(table.columns[figure][row]),
            picture,
            heat[0].cpu(),
            palette,
            None if mask is None else torch.from_numpy(mask) > 0,
        )

    def _mark(self, protocol: Protocol) -> str:
        name, entry = entry_of(protocol)
        asked: dict[str, Any] = {"templates": self.templates} if "labels" in entry.needs else {}
        if entry.whole:
            asked["samples"] = self.count
        return fingerprint(protocol=name, parameters=protocol.parameters(), **asked)

    def _folder(self, job: Job, digest: str) -> str:
        name, side = job
        method = build_method(parse(name)[0], self.methods[name])
        own = {parameter: getattr(method, parameter) for parameter in method.parameters()}
        mark = fingerprint(
            model=self.model.name,
            weights=digest,
            data=self.dataset.name,
            method=parse(name)[0],
            parameters=own,
            prompt=self.prompt,
            resize=self.resize,
            precision=self.precision,
            shard=self.shard,
            clipfast=versions()["clipfast"],
            **({} if side == "image" else {"side": side}),
        )
        return f"rows/{slug(name)}-{'' if side == 'image' else 'words-'}{mark}"

    def _starts(self) -> range:
        return range(0, self.count, self.shard)

    def _stop(self, start: int) -> int:
        return min(start + self.shard, self.count)

    def _path(self, job: Job, start: int) -> Path:
        assert self.out is not None
        return rows_path(self.out / self._folders[job], start, self._stop(start), self.shard)

    def _read(self, job: Job, start: int) -> Shard | None:
        """The rows that are there, if they are of the samples that are asked for."""
        if self.out is None:
            return None
        stop = self._stop(start)
        read = [Shard.read(path) for path in rows_paths(self.out / self._folders[job], start)]
        fitting = [one for one in (found.upto(stop) for found in read if found.stop >= stop) if self._same(one)]
        marks = {protocol: self._marks[protocol] for protocol in self._jobs[job]}
        return max(fitting, key=lambda one: len(marks.items() & one.marks.items()), default=None)

    def _same(self, found: Shard) -> bool:
        """Whether rows are of these samples: with another limit, others may have the same numbers."""
        ends = {0, len(found.keys) // 2, len(found.keys) - 1} if found.keys else set()
        return all(self._key(found.numbers[i]) == found.keys[i] for i in ends)

    def _key(self, number: int) -> str:
        """The key of a sample; empty for one that cannot be read."""
        try:
            return self.dataset[number].key
        except ImageError:
            return ""

    def _missing(self, job: Job, start: int) -> list[str]:
        """The protocols that these rows lack; of those that take all samples at once, if any rows do."""

        def lacks(protocol: str, at: int) -> bool:
            found = self._shards[job, at]
            return found is None or found.marks.get(protocol) != self._marks[protocol]

        return [
            name
            for name in self._jobs[job]
            if any(lacks(name, at) for at in (self._starts() if self._is_whole(name) else [start]))
        ]

    def _is_whole(self, protocol: str) -> bool:
        return entry_of(self.protocols[protocol])[1].whole

    def _samples(self, start: int) -> dict[int, Sample | ImageError]:
        found: dict[int, Sample | ImageError] = {}
        for number in range(start, self._stop(start)):
            try:
                found[number] = self.dataset[number]
            except ImageError as error:
                found[number] = error
        return found

    def _read_targets(self, sample: Sample) -> tuple[Image.Image, list[Target]]:
        """A sample's picture, and what is asked of it: its targets in the words of `prompt`, or else its captions."""
        picture, targets = read_sample(sample)
        named = [replace(target, text=self.prompt.replace("{}", target.text)) for target in targets]
        return picture, named or [Target(caption) for caption in sample.captions]

    def _measured(
        self,
        job: Job,
        start: int,
        samples: Mapping[int, Sample | ImageError],
        progress: Callable[[int], None] | None,
    ) -> Shard:
        """One method's rows of some samples; columns that are there already are kept."""
        old = self._shards[job, start]
        missing = self._missing(job, start)
        now = [protocol for protocol in missing if not self._is_whole(protocol)]
        shard = Shard(start, self._stop(start))
        parts: dict[str, list[dict[str, Tensor]]] = {protocol: [] for protocol in now}
        shard.measure = {protocol: Seconds() for protocol in now}
        numbers = list(samples)
        explained = self._explained if job[1] == "image" else self._worded
        for at in range(0, len(numbers), _AT_ONCE):
            some = numbers[at : at + _AT_ONCE]
            work = explained(job[0], {number: samples[number] for number in some}, shard)
            for protocol in now if work is not None else []:
                assert work is not None
                begun, before = time.perf_counter(), work.clock.forwards
                parts[protocol].append(entry_of(self.protocols[protocol])[1].measure(self.protocols[protocol], work))
                shard.measure[protocol].add(work.clock.forwards - before, time.perf_counter() - begun)
            if isinstance(work, WordWork) and len(now) < len(missing):
                self._kept.setdefault(job, []).append(replace(work, pictures=[]))
            if progress is not None:
                progress(len(some))
        for protocol, own in parts.items():
            if own:
                shard.columns[protocol] = {
                    column: torch.cat([part[column].double().cpu() for part in own]) for column in own[0]
                }
        shard.marks = {protocol: self._marks[protocol] for protocol in now}
        if old is not None and (old.keys, old.texts) == (shard.keys, shard.texts):
            shard.columns = old.columns | shard.columns
            shard.measure = old.measure | shard.measure
            shard.marks = old.marks | shard.marks
        if self.out is not None:
            shard.write(self._path(job, start))
        return shard

    def _measure_whole(self, job: Job) -> None:
        """Measure what takes all samples at once, and enter it in their rows."""
        kept = self._kept.pop(job, [])
        missing = [protocol for protocol in self._missing(job, 0) if self._is_whole(protocol)]
        if not missing:
            return
        shards = {start: self._shards[job, start] for start in self._starts()}
        work = WordWork.joined(kept) if kept else None
        for protocol in missing:
            begun = time.perf_counter()
            before = work.clock.forwards if work is not None else 0.0
            entry = entry_of(self.protocols[protocol])[1]
            columns = entry.measure(self.protocols[protocol], work) if work is not None else {}
            taken = Seconds(work.clock.forwards - before if work is not None else 0.0, time.perf_counter() - begun)
            row = 0
            for shard in shards.values():
                assert shard is not None
                rows = slice(row, row := row + len(shard.keys))
                if shard.keys:
                    shard.columns[protocol] = {name: column[rows].double().cpu() for name, column in columns.items()}
                shard.measure[protocol] = Seconds(taken.forwards / len(shards), taken.total / len(shards))
                shard.marks[protocol] = self._marks[protocol]
        for start, shard in shards.items():
            if self.out is not None and shard is not None:
                shard.write(self._path(job, start))

    def _pictures(
        self, samples: Mapping[int, Sample | ImageError], shard: Shard
    ) -> list[tuple[int, Sample, Image.Image, list[Target]]]:
        """The samples that can be read and asked for something, with their numbers; why others cannot is noted."""
        found = []
        for number, sample in samples.items():
            try:
                if isinstance(sample, ImageError):
                    raise sample
                picture, targets = self._read_targets(sample)
            except ImageError as error:
                shard.errors[getattr(sample, "key", f"sample {number}")] = str(error)
                continue
            found.append((number, sample, picture, targets))
        return found

    def _explained(self, name: str, samples: Mapping[int, Sample | ImageError], shard: Shard) -> Work | None:
        """The maps of a few samples, entered in the shard as rows; None where nothing is asked of any of them."""
        read = [one for one in self._pictures(samples, shard) if one[3]]
        if not read:
            return None
        numbers, pictures, targets = [one[0] for one in read], [one[2] for one in read], [one[3] for one in read]
        explainer = self._explainers[name]
        texts = [[target.text for target in own] for own in targets]
        begun = time.perf_counter()
        asked, embeddings = zip(*(self._asked(name, own) for own in texts), strict=True)
        if all(len(own) == 1 for own in texts) and len(texts) > 1:
            together = torch.cat(asked) if isinstance(asked[0], Tensor) else [own[0] for own in texts]
            result = explainer(pictures, together, pairs=True)
            maps, scores, geometries = list(result.maps), list(result.scores), result.geometries
        else:
            results = [explainer(picture, own) for picture, own in zip(pictures, asked, strict=True)]
            maps, scores = [one.maps[0] for one in results], [one.scores[0] for one in results]
            geometries = [one.geometries[0] for one in results]
        shard.explain.add(0.0, time.perf_counter() - begun)
        for (number, sample, *_), prompts, values in zip(read, texts, scores, strict=True):
            shard.enter(number, sample.key, prompts, values.tolist())
        return Work(
            explainer=explainer,
            numbers=numbers,
            pictures=pictures,
            targets=targets,
            asked=list(asked),
            maps=maps,
            scores=scores,
            geometries=[g for g in geometries if g is not None],
            texts=list(embeddings),
            names=self.dataset.classes,
            prompt=self.prompt,
            classes=self._classes,
            ask=lambda own: self._asked(name, own)[0],
            parameters=self._resolved()[name],
            batch=self.batch,
        )

    def _worded(self, name: str, samples: Mapping[int, Sample | ImageError], shard: Shard) -> WordWork | None:
        """The values of the words of a few samples' captions, entered in the shard as rows; None without captions."""
        read = []
        for number, sample, picture, _ in self._pictures(samples, shard):
            try:
                if sample.captions:
                    self.model.tokenize_words(sample.captions)
                    read.append((number, sample, picture))
            except TextError as error:
                shard.errors[sample.key] = f"{sample.key}: {error}"
        if not read:
            return None
        explainer = self._explainers[name]
        images = torch.stack([self._embedded(number, picture) for number, _, picture in read])
        begun = time.perf_counter()
        words = [explainer.words(z, sample.captions) for z, (_, sample, _) in zip(images, read, strict=True)]
        shard.explain.add(0.0, time.perf_counter() - begun)
        for (number, sample, _), own in zip(read, words, strict=True):
            shard.enter(number, sample.key, sample.captions, [one.score for one in own])
        return WordWork(
            explainer=explainer,
            numbers=[number for number, _, _ in read],
            pictures=[picture for _, _, picture in read],
            captions=[sample.captions for _, sample, _ in read],
            words=words,
            images=images,
            batch=_TEXTS * self.batch,
        )

    def _embedded(self, number: int, picture: Image.Image) -> Tensor:
        """The unit embedding (E,) of a sample's picture, encoded once for all methods."""
        if number not in self._images:
            tower, spec = self.model.towers(self.precision)[0], next(iter(self._explainers.values())).spec
            pixels = prepare_one(picture, spec).pixels[None]
            self._images[number] = tower.encode(normalize(pixels, spec, tower.dtype, tower.device))[0]
        return self._images[number]

    def _asked(self, name: str, texts: Sequence[str]) -> tuple[Texts, Tensor]:
        """Texts as a method takes them, and their unit embeddings (P, E), encoded once for all methods."""
        new = [text for text in dict.fromkeys(texts) if text not in self._embeddings]
        if new:
            self._embeddings.update(zip(new, self.model.encode_texts(new, self.precision), strict=True))
        embeddings = torch.stack([self._embeddings[text] for text in texts])
        reads = build_method(parse(name)[0], self.methods[name]).reads_words
        return (list(texts) if reads else embeddings), embeddings

    def _classes(self) -> Tensor:
        assert self.dataset.classes is not None
        return class_embeddings(self.model, self.dataset.classes, self.templates, self.precision)

    def _evaluation(self, seconds: float) -> Evaluation:
        tables: dict[str, dict[str, Table]] = {}
        explain: dict[str, float] = {}
        errors: dict[str, str] = {}
        for job, protocols in self._jobs.items():
            name = job[0]
            shards = [found for start in self._starts() if (found := self._shards[job, start]) is not None]
            read = sum(one.stop - one.start - len(one.errors) for one in shards)
            explain.setdefault(name, sum(one.explain.total for one in shards) / max(read, 1))
            for one in shards:
                errors |= one.errors
            tables.setdefault(name, {}).update(
                (protocol, Table.of(shards, protocol, self._folders[job], self._marks[protocol], self.count))
                for protocol in protocols
            )
        if not any(table.keys for own in tables.values() for table in own.values()):
            raise InputError(f"none of the {self.count} samples of {self.dataset.name} can be read and asked for.")
        return Evaluation(
            model=self.model.name,
            data=self.dataset.name,
            samples=self.count,
            seed=self.seed,
            prompt=self.prompt,
            templates=self.templates if isinstance(self.templates, str) else list(self.templates),
            methods={name: {"method": parse(name)[0], "parameters": own} for name, own in self._resolved().items()},
            protocols=self.protocols,
            tables=tables,
            explain=explain,
            errors=errors,
            seconds=seconds,
            out=self.out,
        )

    def _resolved(self) -> dict[str, dict[str, Any]]:
        """Each method's parameters, defaults included."""
        built = {name: build_method(parse(name)[0], own) for name, own in self.methods.items()}
        return {name: {key: getattr(method, key) for key in method.parameters()} for name, method in built.items()}


def evaluate(
    model: Any,
    dataset: Dataset,
    methods: Methods | None = None,
    protocols: Iterable[str | Protocol] | None = None,
    *,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> Evaluation:
    """Measure methods by protocols on a data set.

    model: what `clipfast.load` takes. methods: names, with parameters behind colons or as a mapping, {"grad_eclip":
        {"layers": 2}}. protocols: names, see `build_protocol`, or protocols. By default a few quick ones of both that
        fit model and data.
    limit: of samples. seed: of everything that draws at random and was not given a seed of its own.
    out: a folder for the rows, so that a stopped evaluation goes on. shard: samples a file.
    batch: masked images that go through the model at once. precision, resize: see `Explainer`.
    A method that explains one side only is measured by the protocols of that side. Protocols of words take a sample's
    captions, whatever is asked of the picture.
    prompt: what is asked of a target, with {} for its name; "a photo of a {}." and, of the demo model, the name alone.
        Samples without targets are asked for their captions. templates: of the classes, see `zero_shot`.
    progress: called with the number of samples done since the last call, summed over methods.

    A pair's followed class is its own label, since it is its own prompt that the map explains. Samples that cannot be
    read are left out of all methods alike (`Evaluation.errors`).

    Raises as `Evaluator`, and InputError where no sample can be used.
    """
    return Evaluator(model, dataset, methods, protocols, **options)(progress)
