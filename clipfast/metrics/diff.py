"""What a fine-tuning changed: the same pictures and texts through two checkpoints.

    found = diff("ViT-B-16:openai", "runs/finetune/model", open_dataset("imagenet_s:/data/imagenet-s", limit=200))
    found.change("pointing_game", "hit").difference
    found.save("runs/diff")

Both are asked in the same words and measured by the same protocols on the same pictures, so that every difference is a
paired one. What is measured here are only the distances between the two:

    drift    f_before . f_after, the cosine of a picture's, or a text's, two unit embeddings
    SSIM     of the two maps of a pair, each from its least to its greatest value (`stability.map_ssim`)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipfast.data.datasets import Dataset, Sample
from clipfast.errors import ImageError, InputError
from clipfast.methods import METHODS
from clipfast.metrics.base import Columns, Difference, Protocol, compare, figures
from clipfast.metrics.chosen import DEFAULT_METHODS, able
from clipfast.metrics.class_entropy import ClassEntropy
from clipfast.metrics.comparison import Change, Comparison, Values
from clipfast.metrics.dissection import ClipDissect
from clipfast.metrics.evaluation import Evaluation
from clipfast.metrics.held import Asked, Held
from clipfast.metrics.map_pairs import Keeping, cards, map_likeness, only_table
from clipfast.metrics.probe import Encoded, LinearHead, encode, fit_probe, hold_out, zero_shot_head
from clipfast.metrics.registry import entry_of, offered, parse
from clipfast.metrics.robust import RobustAccuracy
from clipfast.metrics.samples import batches, only_label
from clipfast.metrics.zero_shot import Templates, ZeroShot, default_templates
from clipfast.models.demo import DemoTokenizer
from clipfast.models.load import load
from clipfast.models.model import Model, Precision
from clipfast.view.diff_page import Histogram

DEFAULT_PROTOCOLS = (
    "pointing_game",
    "energy_pointing_game",
    "segmentation/chefer",
    "deletion+insertion/rise:steps=10",
    "stability/ssim",
    "gini",
)
_WITHOUT_LABELS = "deletion+insertion/cosine:steps=10"
# A neuron is described by its strongest pictures: several times as many should be there to choose from.
_TOP, _TIMES = 100, 5
# The share of each class's pictures that a probe does not see.
_HELD_OUT = 0.2

_SIDES = ("before", "after")

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""(what is done, of how many) -> a context that gives what to call with how much was done since."""


class Differ:
    """A comparison, checked and ready to run; arguments as for `diff`, and raises as it does for what can be seen now.

    names: what the two are called, by default as they were given.
    """

    def __init__(
        self,
        before: Any,
        after: Any,
        dataset: Dataset | None = None,
        *,
        images: Any = None,
        texts: Sequence[str] = (),
        method: str | None = None,
        protocols: Iterable[str | Protocol] | None = None,
        limit: int | None = None,
        concepts: Sequence[str] = (),
        groups: Mapping[str, Sequence[str]] | None = None,
        robust: int | RobustAccuracy | None = None,
        probe: bool = False,
        show: int = 12,
        seed: int = 0,
        batch: int = 32,
        precision: Precision = None,
        resize: str | None = None,
        prompt: str | None = None,
        templates: Templates | None = None,
        names: tuple[str, str] | None = None,
    ):
        if (images is None) != (not texts):
            raise InputError("pictures and the texts they are asked for go together: give both, or neither.")
        asked = None if images is None else Asked(images, texts)
        if dataset is None:
            if asked is None:
                raise InputError("there is nothing to compare on: give a data set, or pictures and texts.")
            dataset, prompt = asked, "{}"
        self.models: tuple[Model, Model] = (load(before), load(after))
        self.names = names or _names(before, after, self.models)
        self.seed, self.precision, self.show = seed, precision, show
        demo = any(isinstance(model.tokenizer, DemoTokenizer) for model in self.models)
        self.templates = templates or ("bare" if demo else default_templates(self.models[0], dataset))
        self.prompt = prompt or ("{}" if demo else "a photo of a {}.")
        for model in self.models if texts else ():
            model.encode_texts(list(texts), precision)
        count = len(dataset) if limit is None else min(limit, len(dataset))
        self.held = Held(dataset, max(count, 0))
        if protocols is None:
            protocols = [name for name in DEFAULT_PROTOCOLS if parse(name)[0] in offered(dataset.offers)]
            protocols += [] if "labels" in dataset.offers else [_WITHOUT_LABELS]
        self.method = self._method(method)
        options = {"seed": seed, "batch": batch, "precision": precision, "resize": resize, "templates": self.templates}
        self._evaluators = self._both(self.held, protocols, prompt=self.prompt, **options)
        for name, protocol in self._evaluators[0].protocols.items():
            if entry_of(protocol)[1].side != "image":
                raise InputError(f"{name} measures words, and maps of pictures are what is compared here.")
        self._shown = self._evaluators
        if asked is not None and dataset is not asked:
            self._shown = self._both(Held(asked, len(asked)), ["gini"], prompt="{}", **options)
        self.concepts, self.groups, self.probe = list(concepts), groups, probe
        if probe and dataset.classes is None:
            raise InputError(f"a probe tells classes apart, and {dataset.name} has none.")
        if isinstance(robust, int):
            robust = RobustAccuracy(count=robust, templates=self.templates, seed=seed)
        self.robust = robust
        if robust is not None:
            robust.check(dataset)

    def _method(self, given: str | None) -> str:
        towers = [model.towers(self.precision)[0] for model in self.models]
        both = [name for name in METHODS if all(name in able(tower, ["image"]) for tower in towers)]
        if given is None:
            return next(name for name in (*DEFAULT_METHODS, *both) if name in both)
        if parse(given)[0] in METHODS and parse(given)[0] not in both:
            raise InputError(f"{parse(given)[0]} cannot explain images with both models; can: {', '.join(both)}.")
        return given

    def _both(self, dataset: Dataset, protocols: Iterable[str | Protocol], **options: Any) -> list[Keeping]:
        chosen = list(protocols)
        found = [Keeping(model, dataset, [self.method], chosen, **options) for model in self.models]
        for one in found:
            one.kept = {}
        return found

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, progress: Progress | None = None) -> Comparison:
        """Measure both, and compare. progress: see `Progress`."""
        started = time.perf_counter()
        self._progress: Progress = progress or (lambda what, count: nullcontext(lambda done: None))
        # First, because whether every class has pictures enough is only seen here.
        probes = self._probes() if self.probe else None
        before, after = self._evaluated(self._evaluators)
        table = only_table(before)
        found = Comparison(
            *self.names,
            data=self.held.name,
            samples=len(self.held),
            pairs=len(table.keys),
            seed=self.seed,
            prompt=self.prompt,
            templates=before.templates,
            method=self.method,
            parameters=before.methods[self.method]["parameters"],
            errors=before.errors | after.errors,
        )
        ssim = self._compare_maps(found, before, after)
        drift = self._compare_embeddings(found, table.texts)
        if self.held.classes is not None and "labels" in self.held.offers:
            self._compare_predictions(found, self.held.classes)
        if probes is not None:
            self._compare_probes(found, *probes)
        if self.concepts:
            self._compare_neurons(found)
        if self.robust is not None:
            self._compare_robustness(found, self.robust)
        shown = (before, after)
        if self._shown is not self._evaluators:
            shown, drift, ssim = self._evaluated(self._shown), None, {}
            found.errors |= shown[0].errors | shown[1].errors
        found.cards = cards(self._shown, shown, self._chosen(ssim), drift)
        found.seconds = time.perf_counter() - started
        return found

    def _evaluated(self, evaluators: Sequence[Keeping]) -> tuple[Evaluation, Evaluation]:
        found = []
        for evaluator, name in zip(evaluators, _SIDES, strict=True):
            with self._progress(f"maps {name}", evaluator.left()) as advance:
                found.append(evaluator(advance))
        return found[0], found[1]

    def _each(self, what: str, count: int, run: Callable[[Model, Callable[[int], None]], Any]) -> tuple[Any, Any]:
        """What `run` gives of either model, with its progress shown."""
        found = []
        for model, name in zip(self.models, _SIDES, strict=True):
            with self._progress(f"{what} {name}", count) as advance:
                found.append(run(model, advance))
        return found[0], found[1]

    def _compare_maps(self, found: Comparison, before: Evaluation, after: Evaluation) -> dict[int, Tensor]:
        """Enter the protocols' figures, scores and the maps' SSIM; the last by sample, (P_i,)."""
        for label, protocol in before.protocols.items():
            found.protocols[label] = protocol
            pairs = (one.figures(self.method, label) for one in (before, after))
            differences = after.differences(self.method, before, self.method, label)
            found.changes += [Change(label, *three) for three in zip(*pairs, differences, strict=True)]
        one, other = only_table(before), only_table(after)
        cosines, theirs = (torch.tensor(table.scores, dtype=torch.float64) for table in (one, other))
        self._enter(found, "similarity", Values("cosine"), {"cosine": cosines}, {"cosine": theirs}, one.groups)
        about = "Cosines of pictures with what they are asked for."
        found.histograms.append(Histogram.of("Similarity", about, theirs, cosines))
        a, b = (evaluator.kept for evaluator in self._evaluators)
        ssim = {number: map_likeness(a[number], b[number]) for number in dict.fromkeys(one.numbers)}
        values = torch.cat(list(ssim.values()))
        self._enter_between(found, "SSIM of the maps", values, one.groups)
        found.histograms.append(Histogram.of("SSIM of the maps", "Of a pair before and after; 1: no change.", values))
        return ssim

    def _compare_embeddings(self, found: Comparison, texts: Sequence[str]) -> Tensor | None:
        """Enter the drift, which is returned for pictures (N,), NaN for those that cannot be read."""
        sizes = [model.towers(self.precision)[0].embed_dim for model in self.models]
        if sizes[0] != sizes[1]:
            found.notes.append(
                f"Embeddings of {sizes[0]} and {sizes[1]} dimensions have no common space, so no drift is measured."
            )
            return None
        drift = _cosine(*self._each("embeddings", len(self.held), self._embeddings))
        self._enter_between(found, "drift of pictures, cosine", drift)
        about = "Cosine of a picture's embedding before with its embedding after; 1: no drift."
        found.histograms.append(Histogram.of("Drift of pictures", about, drift))
        asked = list(dict.fromkeys(texts))
        self._enter_between(
            found, "drift of texts, cosine", _cosine(*(m.encode_texts(asked, self.precision) for m in self.models))
        )
        return drift

    def _embeddings(self, model: Model, advance: Callable[[int], None]) -> Tensor:
        tower, _ = model.towers(self.precision)
        z = torch.full((len(self.held), tower.embed_dim), torch.nan, dtype=torch.float64)
        for batch in batches(model, self.held, precision=self.precision, on_error="skip", progress=advance):
            z[batch.numbers] = tower.encode(batch.inputs(model, self.precision)).double().cpu()
        return z

    def _compare_predictions(self, found: Comparison, classes: Sequence[str]) -> None:
        """Enter zero-shot accuracy, and how sure the two are of pictures of one class."""
        options: dict[str, Any] = {"precision": self.precision, "on_error": "skip"}
        zero_shot = ZeroShot(self.templates)
        before, after = self._each(
            "zero-shot", len(self.held), lambda m, advance: zero_shot.measure(m, self.held, progress=advance, **options)
        )
        told = before["top-1"].isfinite() & after["top-1"].isfinite()
        before, after = ({name: column[told] for name, column in one.items()} for one in (before, after))
        if bool(told.any()):
            self._enter(found, zero_shot.name, zero_shot, before, after)
        moved = after["top-1"] - before["top-1"]
        found.counts |= {
            "pictures that became right": int((moved > 0).sum()),
            "pictures that became wrong": int((moved < 0).sum()),
        }
        if len(classes) < 2 or not any(only_label(sample) is not None for sample in self._readable()):
            found.notes.append("class_entropy is of pictures of exactly one class, and there is none.")
            return
        entropy = ClassEntropy(self.groups)
        heads = [zero_shot_head(model, classes, self.templates, self.precision) for model in self.models]
        before, after = (
            entropy.measure(model, self.held, head, **options) for model, head in zip(self.models, heads, strict=True)
        )
        self._enter(found, entropy.name, entropy, before, after)
        for title, figure in (("Class entropy", "entropy share"), ("Class entropy within groups", "within share")):
            if bool(before[figure].isfinite().any()):
                about = "Of zero-shot probabilities, as a share of the largest possible; 0: sure of one class."
                found.histograms.append(Histogram.of(title, about, after[figure], before[figure]))

    def _probes(self) -> tuple[tuple[LinearHead, Encoded], tuple[LinearHead, Encoded]]:
        """Either model's linear probe, and the samples that were held out from it: the same for both."""

        def fit(model: Model, advance: Callable[[int], None]) -> tuple[LinearHead, Encoded]:
            found = encode(model, self.held, precision=self.precision, on_error="skip", progress=advance)
            fitted, kept = hold_out(found.labels, _HELD_OUT, self.seed)
            return fit_probe(found.select(fitted), seed=self.seed), found.select(kept)

        return self._each("linear probe", len(self.held), fit)

    def _compare_probes(
        self, found: Comparison, before: tuple[LinearHead, Encoded], after: tuple[LinearHead, Encoded]
    ) -> None:
        """Enter the probes' accuracy on what was held out, and how sure they are of it."""
        both = (before, after)
        hits = [{"accuracy": head.hits(one.z, one.labels).double()} for head, one in both]
        self._enter(found, "linear probe", Values("accuracy", "higher"), hits[0], hits[1])
        entropy = ClassEntropy(self.groups)
        columns = [entropy.columns(head.probabilities(one.z), one.labels, one.classes) for head, one in both]
        self._enter(found, f"{entropy.name}, linear probe", entropy, columns[0], columns[1])

    def _compare_neurons(self, found: Comparison) -> None:
        """Enter how well a concept describes each neuron, by the judgement of the model before."""
        readable = sum(1 for _ in self._readable())
        protocol = ClipDissect(top=max(1, min(_TOP, readable // _TIMES)))
        before, after = self._each(
            "neurons",
            len(self.held),
            lambda model, advance: protocol.measure(
                model,
                self.held,
                self.concepts,
                judge=self.models[0],
                precision=self.precision,
                on_error="skip",
                progress=advance,
            ),
        )
        self._enter(found, protocol.name, protocol, before, after)
        about = f"soft-WPMI of each neuron's best of {len(self.concepts):,} concepts."
        found.histograms.append(Histogram.of("Dissection", about, after["score"], before["score"]))
        if len(before["concept"]) == len(after["concept"]):
            other = int((before["concept"] != after["concept"]).sum())
            found.counts[f"neurons with another concept, of {len(before['concept']):,}"] = other

    def _compare_robustness(self, found: Comparison, protocol: RobustAccuracy) -> None:
        before, after = self._each(
            "attacks",
            min(protocol.count, len(self.held)) * protocol.runs,
            lambda model, advance: protocol.attack(
                model, self.held, precision=self.precision, on_error="skip", progress=advance
            ),
        )
        self._enter(found, protocol.name, protocol, before.columns, after.columns)

    def _enter(
        self,
        found: Comparison,
        label: str,
        protocol: Protocol,
        before: Columns,
        after: Columns,
        groups: Tensor | None = None,
    ) -> None:
        """A protocol's figures of columns before and after, but for those that are NaN in both."""
        found.protocols[label] = protocol
        values = [figures(protocol, columns, groups=groups, seed=self.seed) for columns in (before, after)]
        differences: Sequence[Difference | None] = [None] * len(values[0])
        if values[0][0].count == values[1][0].count:
            differences = compare(protocol, after, before, groups=groups, seed=self.seed)
        found.changes += [
            Change(label, a, b, difference)
            for a, b, difference in zip(*values, differences, strict=True)
            if not (a.value != a.value and b.value != b.value)
        ]

    def _enter_between(self, found: Comparison, name: str, values: Tensor, groups: Tensor | None = None) -> None:
        known = values.isfinite()
        protocol = Values(name)
        columns = {name: values[known]}
        own = None if groups is None else groups[known]
        found.between[name] = figures(protocol, columns, groups=own, seed=self.seed)[0]

    def _readable(self) -> Iterator[Sample]:
        for number in range(len(self.held)):
            with suppress(ImageError):
                yield self.held[number]

    def _chosen(self, ssim: Mapping[int, Tensor]) -> dict[int, str]:
        """Which samples are shown, and why."""
        asked = self._shown[0]
        if isinstance(asked.dataset, Held) and isinstance(asked.dataset.whole, Asked):
            return dict.fromkeys(list(asked.kept)[: self.show], "")
        order = sorted(ssim, key=lambda number: float(ssim[number].mean()))
        most = order[: (self.show + 1) // 2]
        rest = sorted(order[len(most) :])
        drawn = torch.randperm(len(rest), generator=torch.Generator().manual_seed(self.seed))[: self.show - len(most)]
        chosen = dict.fromkeys(most, "Maps that changed most, by SSIM")
        return chosen | dict.fromkeys([rest[i] for i in sorted(drawn.tolist())], "Drawn at random from the others")


def diff(before: Any, after: Any, dataset: Dataset | None = None, **options: Any) -> Comparison:
    """Compare two checkpoints on the same pictures and texts.

    before, after: what `clipfast.load` takes, of the same architecture or not. dataset: what is measured on; or
    images, texts: pictures that are each asked for all texts, and measured on where there is no data set.
    method: one of `clipfast methods`, parameters behind colons, "mmel:beta=0.5"; by default the first quick one that
        explains both. protocols: names or protocols of maps; by default those of `DEFAULT_PROTOCOLS` that fit the data.
    limit: of samples. show: how many pictures the page shows: half of them those whose maps changed most.
    concepts: words by which neurons are described, see `ClipDissect`; the model before judges both. groups: of classes,
        see `ClassEntropy`. robust: a number of pictures, or a `RobustAccuracy`, to attack them.
    probe: fit a linear probe to either tower's embeddings, and measure it on a fifth of each class that is held out.
    seed, batch, precision, resize, prompt, templates: see `evaluate`. prompt and templates are the same for both.

    Samples that cannot be read are left out (`Comparison.errors`). Drift is measured where the two have embeddings of
    the same size, and says something where they share a space, as a model and its fine-tuning do.

    Raises InputError for what does not fit together, and as `evaluate` and `RobustAccuracy.attack` do.
    """
    return Differ(before, after, dataset, **options)()


def _names(before: Any, after: Any, models: tuple[Model, Model]) -> tuple[str, str]:
    """What the two are called: as they were given, numbered where they are called alike."""
    one, other = (
        str(given) if isinstance(given, str | Path) else model.name
        for given, model in zip((before, after), models, strict=True)
    )
    return (one, other) if one != other else (f"{one} (1)", f"{other} (2)")


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of unit rows (N, E): (N,) float64; of equal ones 1 exactly."""
    return 1 - (a.double() - b.double()).square().sum(-1).cpu() / 2
