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
from clipfast.data.images import read_image
from clipfast.errors import ImageError, InputError
from clipfast.methods import METHODS, build_method
from clipfast.metrics.base import Protocol
from clipfast.metrics.evaluation import Evaluation, Table
from clipfast.metrics.registry import Work, build_protocol, entry_of, label, offered, parse
from clipfast.metrics.rows import Seconds, Shard, fingerprint, slug
from clipfast.metrics.zero_shot import Templates, class_embeddings, default_templates
from clipfast.models.digest import weights_digest
from clipfast.models.load import load
from clipfast.models.model import Model, Precision
from clipfast.versions import versions

DEFAULT_METHODS = ("grad_eclip", "tclip", "mmel", "mga_clip", "mask_clip", "gem", "clip_surgery", "rollout", "grad_cam")
"""Those that cost about one pass of the tower, or a few."""
DEFAULT_PROTOCOLS = (
    "pointing_game",
    "energy_pointing_game",
    "segmentation/mask_iou",
    "deletion+insertion/rise:steps=10",
    "confidence/m2ib",
)

# Samples whose pictures and maps on their own pixels are in memory at once.
_AT_ONCE = 8

Methods = Mapping[str, Mapping[str, Any]] | Iterable[str]


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

    Raises InputError for an unknown method, protocol or parameter, a method that does not explain images with this
    model, a protocol that needs more than the data set offers, and a missing pyarrow where `out` is given.
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
        self.methods = self._checked(methods)
        self.protocols = self._chosen(protocols)
        self.out = None if out is None else Path(out)
        if self.out is not None:
            pyarrow()
        self._explainers = {
            name: Explainer(self.model, parse(name)[0], precision=precision, resize=resize, **parameters)
            for name, parameters in self.methods.items()
        }
        self._marks = {name: self._mark(protocol) for name, protocol in self.protocols.items()}
        self._embeddings: dict[str, Tensor] = {}
        digest = weights_digest(self.model.module)
        self._folders = {name: self._folder(name, digest) for name in self.methods}
        self.fingerprint = fingerprint(methods=self._folders, protocols=self._marks)
        """Of everything but the number of samples."""
        self._shards = {(name, start): self._read(name, start) for start in self._starts() for name in self.methods}

    def left(self) -> int:
        """How many pairs of a method and a sample are still to be measured."""
        return sum(self._stop(start) - start for (name, start), found in self._shards.items() if self._missing(found))

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, progress: Callable[[int], None] | None = None) -> Evaluation:
        """Measure what is left, and return all; progress: called with how much of `left` was done since."""
        started = time.perf_counter()
        for start in self._starts():
            todo = [name for name in self.methods if self._missing(self._shards[name, start])]
            samples = self._samples(start) if todo else {}
            for name in todo:
                self._shards[name, start] = self._measured(name, start, samples, progress)
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
            table = found.tables[name][protocol]
            column = table.columns[figure]
            rows = [int(i) for i in column.argsort(descending=better == "higher", stable=True) if not column[i].isnan()]
            best, worst = rows[:count], rows[count:][-count:][::-1]
            shown[name] = ([self._example(name, table, figure, i) for i in best],
                           [self._example(name, table, figure, i) for i in worst])  # fmt: skip
        return shown

    def _example(self, name: str, table: Table, figure: str, row: int) -> Example:
        number = table.numbers[row]
        targets = self._targets(self.dataset[number])
        at = row - table.numbers.index(number)
        picture = read_image(self.dataset[number].image)
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

    def _checked(self, methods: Methods | None) -> dict[str, dict[str, Any]]:
        """Labels and parameters of methods that can explain images with this model."""
        tower, _ = self.model.towers(self.precision)
        if methods is None:
            methods = [name for name in DEFAULT_METHODS if isinstance(tower, METHODS[name].reads)]
        given = methods if isinstance(methods, Mapping) else {name: {} for name in methods}
        found = {}
        for label_, parameters in given.items():
            name, written = parse(label_)
            both = {**written, **parameters}
            method = build_method(name, both)
            if "image" not in method.sides() or not isinstance(tower, method.reads):
                having = [n for n, m in METHODS.items() if "image" in m.sides() and isinstance(tower, m.reads)]
                raise InputError(f"{name} cannot explain images with {self.model.name}; can: {', '.join(having)}.")
            if "seed" in method.parameters():
                both.setdefault("seed", self.seed)
            found[label_] = both
        if not found:
            raise InputError("there is no method to evaluate: name at least one.")
        return found

    def _chosen(self, protocols: Iterable[str | Protocol] | None) -> dict[str, Protocol]:
        fitting = offered(self.dataset.offers)
        if protocols is None:
            protocols = [name for name in DEFAULT_PROTOCOLS if parse(name)[0] in fitting]
        found: dict[str, Protocol] = {}
        for given in protocols:
            protocol = given if isinstance(given, Protocol) else self._seeded(given)
            name, entry = entry_of(protocol)
            if lacking := entry.needs - self.dataset.offers:
                raise InputError(
                    f"{name} needs {' and '.join(sorted(lacking))}, which {self.dataset.name} does not have; "
                    f"these protocols fit it: {', '.join(fitting)}."
                )
            found[label(protocol)] = protocol
        if not found:
            raise InputError("there is no protocol to evaluate by: name at least one.")
        return found

    def _seeded(self, name: str) -> Protocol:
        protocol = build_protocol(name)
        own = "seed" in protocol.parameters() and "seed" not in parse(name)[1]
        return replace(protocol, seed=self.seed) if own else protocol  # type: ignore[type-var]

    def _mark(self, protocol: Protocol) -> str:
        name, entry = entry_of(protocol)
        asked = {"templates": self.templates} if "labels" in entry.needs else {}
        return fingerprint(protocol=name, parameters=protocol.parameters(), **asked)

    def _folder(self, name: str, digest: str) -> str:
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
        )
        return f"rows/{slug(name)}-{mark}"

    def _starts(self) -> range:
        return range(0, self.count, self.shard)

    def _stop(self, start: int) -> int:
        return min(start + self.shard, self.count)

    def _read(self, name: str, start: int) -> Shard | None:
        """The rows that are there, if they are of the samples that are asked for."""
        if self.out is None:
            return None
        path = self.out / self._folders[name] / f"{start:06d}.parquet"
        if not path.exists():
            return None
        found = Shard.read(path)
        stop = self._stop(start)
        if found.stop < stop:
            return None
        found = found.upto(stop)
        # A data set with another limit may have other samples under the same numbers.
        ends = {0, len(found.keys) // 2, len(found.keys) - 1} if found.keys else set()
        return found if all(self._key(found.numbers[i]) == found.keys[i] for i in ends) else None

    def _key(self, number: int) -> str:
        """The key of a sample; empty for one that cannot be read."""
        try:
            return self.dataset[number].key
        except ImageError:
            return ""

    def _missing(self, found: Shard | None) -> list[str]:
        return [name for name, mark in self._marks.items() if found is None or found.marks.get(name) != mark]

    def _samples(self, start: int) -> dict[int, Sample | ImageError]:
        found: dict[int, Sample | ImageError] = {}
        for number in range(start, self._stop(start)):
            try:
                found[number] = self.dataset[number]
            except ImageError as error:
                found[number] = error
        return found

    def _targets(self, sample: Sample) -> list[Target]:
        """What is asked of a sample: its targets in the words of `prompt`, or else its captions."""
        named = [replace(target, text=self.prompt.replace("{}", target.text)) for target in sample.targets]
        return named or [Target(caption) for caption in sample.captions]

    def _measured(
        self,
        name: str,
        start: int,
        samples: Mapping[int, Sample | ImageError],
        progress: Callable[[int], None] | None,
    ) -> Shard:
        """One method's rows of some samples; columns that are there already are kept."""
        old = self._shards[name, start]
        missing = self._missing(old)
        shard = Shard(start, self._stop(start))
        parts: dict[str, list[dict[str, Tensor]]] = {protocol: [] for protocol in missing}
        shard.measure = {protocol: Seconds() for protocol in missing}
        numbers = list(samples)
        for at in range(0, len(numbers), _AT_ONCE):
            some = numbers[at : at + _AT_ONCE]
            work = self._explained(name, {number: samples[number] for number in some}, shard)
            for protocol in missing if work is not None else []:
                assert work is not None
                begun, before = time.perf_counter(), work.clock.forwards
                parts[protocol].append(entry_of(self.protocols[protocol])[1].measure(self.protocols[protocol], work))
                shard.measure[protocol].add(work.clock.forwards - before, time.perf_counter() - begun)
            if progress is not None:
                progress(len(some))
        for protocol, own in parts.items():
            if own:
                shard.columns[protocol] = {
                    column: torch.cat([part[column].double().cpu() for part in own]) for column in own[0]
                }
        shard.marks = {protocol: self._marks[protocol] for protocol in missing}
        if old is not None and (old.keys, old.texts) == (shard.keys, shard.texts):
            shard.columns = old.columns | shard.columns
            shard.measure = old.measure | shard.measure
            shard.marks = old.marks | shard.marks
        if self.out is not None:
            shard.write(self.out / self._folders[name] / f"{start:06d}.parquet")
        return shard

    def _explained(self, name: str, samples: Mapping[int, Sample | ImageError], shard: Shard) -> Work | None:
        """The maps of a few samples, entered in the shard as rows; None where nothing is asked of any of them."""
        numbers, keys, pictures, targets = [], [], [], []
        for number, sample in samples.items():
            try:
                if isinstance(sample, ImageError):
                    raise sample
                picture, own = read_image(sample.image), self._targets(sample)
            except ImageError as error:
                shard.errors[getattr(sample, "key", f"sample {number}")] = str(error)
                continue
            if own:
                numbers.append(number)
                keys.append(sample.key)
                pictures.append(picture)
                targets.append(own)
        if not numbers:
            return None
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
        for number, key, prompts, values in zip(numbers, keys, texts, scores, strict=True):
            shard.keys += [key] * len(prompts)
            shard.numbers += [number] * len(prompts)
            shard.texts += prompts
            shard.scores += values.tolist()
        return Work(
            explainer=explainer,
            numbers=numbers,
            pictures=pictures,
            targets=targets,
            asked=list(asked),
            maps=maps,
            geometries=[g for g in geometries if g is not None],
            texts=list(embeddings),
            classes=self._classes(),
            batch=self.batch,
        )

    def _asked(self, name: str, texts: Sequence[str]) -> tuple[Texts, Tensor]:
        """Texts as a method takes them, and their unit embeddings (P, E), encoded once for all methods."""
        new = [text for text in dict.fromkeys(texts) if text not in self._embeddings]
        if new:
            self._embeddings.update(zip(new, self.model.encode_texts(new, self.precision), strict=True))
        embeddings = torch.stack([self._embeddings[text] for text in texts])
        reads = build_method(parse(name)[0], self.methods[name]).reads_words
        return (list(texts) if reads else embeddings), embeddings

    def _classes(self) -> Tensor | None:
        if not any("labels" in entry_of(protocol)[1].needs for protocol in self.protocols.values()):
            return None
        assert self.dataset.classes is not None
        return class_embeddings(self.model, self.dataset.classes, self.templates, self.precision)

    def _evaluation(self, seconds: float) -> Evaluation:
        tables: dict[str, dict[str, Table]] = {}
        explain: dict[str, float] = {}
        errors: dict[str, str] = {}
        for name in self.methods:
            shards = [found for start in self._starts() if (found := self._shards[name, start]) is not None]
            read = sum(one.stop - one.start - len(one.errors) for one in shards)
            explain[name] = sum(one.explain.total for one in shards) / max(read, 1)
            for one in shards:
                errors |= one.errors
            tables[name] = {
                protocol: Table.of(shards, protocol, self._folders[name], self._marks[protocol], self.count)
                for protocol in self.protocols
            }
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
    prompt: what is asked of a target, with {} for its name; "a photo of a {}." and, of the demo model, the name alone.
        Samples without targets are asked for their captions. templates: of the classes, see `zero_shot`.
    progress: called with the number of samples done since the last call, summed over methods.

    A pair's followed class is its own label, since it is its own prompt that the map explains. Samples that cannot be
    read are left out of all methods alike (`Evaluation.errors`).

    Raises as `Evaluator`, and InputError where no sample can be used.
    """
    return Evaluator(model, dataset, methods, protocols, **options)(progress)
