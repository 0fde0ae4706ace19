"""The protocols by name, and how each measures the maps of a method: what `clipfast eval` chooses from.

A protocol is written as its name and, behind colons, parameters that are not the defaults: "pointing_game:tolerance=9".
A name from a paper that means one half of a protocol ("deletion/rise") stands for the whole of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipfast.api import Explainer, Texts
from clipfast.data.datasets import Target
from clipfast.data.geometry import Geometry, normalize
from clipfast.data.inputs import prepare_one
from clipfast.errors import InputError, nearest
from clipfast.methods import parameter_value
from clipfast.metrics.base import Columns, Protocol
from clipfast.metrics.boxes import BoxGScoreCam, MaxBoxAcc
from clipfast.metrics.infidelity import Infidelity
from clipfast.metrics.localisation import (
    EnergyPointingGame,
    Gini,
    MaskIou,
    PointingGame,
    PrecisionAt,
    SegmentationChefer,
)
from clipfast.metrics.occlusion import Occlusion
from clipfast.metrics.perturbation import Classes, Clock, Confidence, CurvesCosine, CurvesGradEclip, CurvesRise
from clipfast.metrics.sanity import SanityCascade
from clipfast.metrics.stability import StabilitySsim


@dataclass
class Work:
    """A few samples with one method's maps, as protocols measure them; rows are pairs of a sample and a target.

    numbers: of the samples in the data set. targets: P_i of each sample. asked: P_i prompts as the explainer was asked.
    maps: (P_i, h, w), on the method's grid; geometries bring them to the pictures. texts: (P_i, E), unit. classes:
    (K, E), unit, or None. batch: how many masked images go through the model at once.
    """

    explainer: Explainer
    numbers: list[int]
    pictures: list[Image.Image]
    targets: list[list[Target]]
    asked: list[Texts]
    maps: list[Tensor]
    geometries: list[Geometry]
    texts: list[Tensor]
    classes: Tensor | None
    batch: int = 32
    clock: Clock = field(default_factory=Clock)

    def __len__(self) -> int:
        return sum(len(some) for some in self.targets)

    def encode(self, x: Tensor) -> Tensor:
        """Unit embeddings of normalised images."""
        return self.explainer.model.towers(self.explainer.precision)[0].encode(x)

    @cached_property
    def inputs(self) -> list[Tensor]:
        """Each picture as the model sees it, normalised, (1, 3, H, W); without pixels that no whole patch covers."""
        tower = self.explainer.model.towers(self.explainer.precision)[0]
        found = []
        for picture in self.pictures:
            prepared = prepare_one(picture, self.explainer.spec)
            height, width = prepared.geometry.covered
            x = normalize(prepared.pixels[None], self.explainer.spec, tower.dtype, tower.device)
            found.append(x[..., :height, :width])
        return found

    @cached_property
    def on_inputs(self) -> list[Tensor]:
        """The maps (P_i, h, w) over exactly what `inputs` shows."""
        return [
            m[..., : g.covered[0], : g.covered[1]] if tuple(m.shape[-2:]) == g.input else m
            for m, g in zip(self.maps, self.geometries, strict=True)
        ]

    @cached_property
    def on_pictures(self) -> list[Tensor]:
        """The maps on the pictures' own pixels, (P_i, H_i, W_i)."""
        return [g.to_image(m).cpu() for m, g in zip(self.maps, self.geometries, strict=True)]

    def labels(self, rows: Sequence[int]) -> Classes:
        """The classes that the targets of these samples are."""
        assert self.classes is not None
        own = [target.label for i in rows for target in self.targets[i]]
        scale = float(self.explainer.model.towers(self.explainer.precision)[0].logit_scale)
        return Classes(self.classes, scale, torch.tensor(own, device=self.classes.device))


Measure = Callable[[Any, Work], Columns]


@dataclass(frozen=True)
class Entry:
    """A protocol that can be had by name: its class, what is preset, and what it needs of a data set."""

    kind: type[Protocol]
    measure: Measure
    needs: frozenset[str] = frozenset()
    preset: Mapping[str, Any] = field(default_factory=dict)
    runs_model: bool = False


def _on_masks(protocol: Any, work: Work) -> Columns:
    masks = [
        torch.stack([torch.from_numpy(_mask(target, picture)) for target in targets])
        for targets, picture in zip(work.targets, work.pictures, strict=True)
    ]
    return _together(
        [(tuple(m.shape[1:]), k.dtype) for m, k in zip(work.on_pictures, masks, strict=True)],
        work,
        lambda rows: protocol.measure(
            torch.cat([work.on_pictures[i] for i in rows]), torch.cat([masks[i] for i in rows])
        ),
    )


def _mask(target: Target, picture: Image.Image) -> np.ndarray:
    """A target's mask; without object where it has none, which does not count."""
    return np.zeros((picture.height, picture.width), bool) if target.mask is None else np.ascontiguousarray(target.mask)


def _on_boxes(protocol: Any, work: Work) -> Columns:
    return _together(
        [tuple(m.shape[1:]) for m in work.on_pictures],
        work,
        lambda rows: protocol.measure(
            torch.cat([work.on_pictures[i] for i in rows]),
            [torch.tensor(target.boxes or [], dtype=torch.float64) for i in rows for target in work.targets[i]],
        ),
    )


def _on_grid(protocol: Any, work: Work) -> Columns:
    return _together(
        [tuple(m.shape[1:]) for m in work.maps],
        work,
        lambda rows: protocol.measure(torch.cat([work.maps[i] for i in rows])),
    )


def _on_inputs(with_what: Callable[[Work, Sequence[int]], Any]) -> Measure:
    """A measure that runs the model on masked inputs, for `with_what` (classes or texts) of some samples."""

    def measure(protocol: Any, work: Work) -> Columns:
        return _together(
            [(m.shape, x.shape) for m, x in zip(work.on_inputs, work.inputs, strict=True)],
            work,
            lambda rows: protocol.measure(
                work.encode,
                with_what(work, rows),
                torch.cat([work.inputs[i] for i in rows]),
                torch.stack([work.on_inputs[i] for i in rows]),
                batch=work.batch,
                clock=work.clock,
            ),
        )

    return measure


def _on_originals(protocol: Any, work: Work) -> Columns:
    tower = work.explainer.model.towers(work.explainer.precision)[0]
    return _each(
        work,
        lambda i: protocol.measure(
            work.encode,
            work.labels([i]),
            [work.pictures[i]],
            [work.on_pictures[i]],
            work.explainer.spec,
            first=work.numbers[i],
            batch=work.batch,
            dtype=tower.dtype,
            device=tower.device,
            clock=work.clock,
        ),
    )


def _on_perturbed(protocol: Any, work: Work) -> Columns:
    """By sample, for a protocol whose draws depend on a sample's number."""
    return _each(
        work,
        lambda i: protocol.measure(
            work.encode,
            work.texts[i],
            work.inputs[i],
            work.on_inputs[i][None],
            first=work.numbers[i],
            batch=work.batch,
            clock=work.clock,
        ),
    )


def _on_noise(protocol: Any, work: Work) -> Columns:
    return _each(
        work,
        lambda i: protocol.measure(work.explainer, work.pictures[i], work.asked[i], first=work.numbers[i]),
    )


def _on_copies(protocol: Any, work: Work) -> Columns:
    """All samples in one call, since every call copies and randomises the model; as strings, which it encodes anew."""
    pictures = [picture for picture, own in zip(work.pictures, work.targets, strict=True) for _ in own]
    texts = [target.text for own in work.targets for target in own]
    columns: Columns = protocol.measure(work.explainer, pictures, texts, pairs=True)
    return columns


def _each(work: Work, measure: Callable[[int], Columns]) -> Columns:
    """Columns of all rows, where samples are measured one by one."""
    parts = [measure(i) for i in range(len(work.pictures))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _together(keys: Sequence[Any], work: Work, measure: Callable[[list[int]], Columns]) -> Columns:
    """Columns of all rows, where samples of one key are measured in one call."""
    starts = np.cumsum([0, *(len(some) for some in work.targets)])
    found: Columns = {}
    for key in dict.fromkeys(keys):
        samples = [i for i, other in enumerate(keys) if other == key]
        rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in samples])
        for name, column in measure(samples).items():
            found.setdefault(name, torch.full((len(work),), torch.nan, dtype=torch.float64))[rows] = column.double()
    return found


def _own_texts(work: Work, rows: Sequence[int]) -> Tensor:
    return torch.stack([work.texts[i] for i in rows])


_MASKS, _BOXES, _LABELS = frozenset({"masks"}), frozenset({"boxes"}), frozenset({"labels"})

PROTOCOLS: dict[str, Entry] = {
    "pointing_game": Entry(PointingGame, _on_masks, _MASKS),
    "energy_pointing_game": Entry(EnergyPointingGame, _on_masks, _MASKS),
    "segmentation/chefer": Entry(SegmentationChefer, _on_masks, _MASKS),
    "segmentation/mask_iou": Entry(MaskIou, _on_masks, _MASKS),
    "precision@threshold": Entry(PrecisionAt, _on_masks, _MASKS),
    "box/gscorecam": Entry(BoxGScoreCam, _on_boxes, _BOXES),
    "box/max": Entry(MaxBoxAcc, _on_boxes, _BOXES),
    "gini": Entry(Gini, _on_grid),
    "deletion+insertion/rise": Entry(CurvesRise, _on_inputs(Work.labels), _LABELS, runs_model=True),
    "deletion+insertion/cosine": Entry(CurvesCosine, _on_inputs(_own_texts), runs_model=True),
    "deletion+insertion/grad_eclip": Entry(CurvesGradEclip, _on_originals, _LABELS, runs_model=True),
    "occlusion": Entry(Occlusion, _on_inputs(_own_texts), runs_model=True),
    "infidelity": Entry(Infidelity, _on_perturbed, runs_model=True),
    "stability/ssim": Entry(StabilitySsim, _on_noise),
    "sanity/cascade": Entry(SanityCascade, _on_copies),
    "confidence/m2ib": Entry(Confidence, _on_inputs(_own_texts), runs_model=True),
    "confidence/gradcam++": Entry(Confidence, _on_inputs(_own_texts), preset={"drop": "relative"}, runs_model=True),
}

ALIASES = {
    **{f"{half}/{kind}": f"deletion+insertion/{kind}"
       for half in ("deletion", "insertion") for kind in ("rise", "cosine", "grad_eclip")},
    "energy": "energy_pointing_game",
    "mask_iou": "segmentation/mask_iou",
    "precision": "precision@threshold",
    "confidence": "confidence/m2ib",
    "BoxAcc": "box/gscorecam",
    "MaxBoxAcc": "box/max",
}  # fmt: skip


def build_protocol(name: str, **parameters: Any) -> Protocol:
    """The protocol of a name or alias: `build_protocol("deletion+insertion/rise", steps=28)`.

    The name may carry parameters itself, "pointing_game:tolerance=15". Raises InputError for an unknown name or
    parameter, with the nearest known ones, and as the protocol does for a value that it cannot use.
    """
    name, written = parse(name)
    name = ALIASES.get(name, name)
    if name not in PROTOCOLS:
        raise InputError(f"there is no protocol {name!r}: {nearest(name, [*PROTOCOLS, *ALIASES])}")
    entry = PROTOCOLS[name]
    given = written | parameters
    known = [one.name for one in fields(entry.kind)]  # type: ignore[arg-type]
    for parameter in given:
        if parameter not in known or parameter in entry.preset:
            free = [one for one in known if one not in entry.preset]
            end = nearest(parameter, free) if free else "it has none."
            raise InputError(f"{name} has no parameter {parameter!r}: {end}")
    try:
        return entry.kind(**entry.preset, **given)
    except TypeError as error:
        raise InputError(f"{name} cannot take {_spelled(given)[1:]}: {error}.") from error


def entry_of(protocol: Protocol) -> tuple[str, Entry]:
    """The name under which a protocol is registered, and its entry. Raises InputError for a class that is not."""
    fitting = [
        (name, entry)
        for name, entry in PROTOCOLS.items()
        if type(protocol) is entry.kind and all(getattr(protocol, k) == v for k, v in entry.preset.items())
    ]
    if fitting:
        return max(fitting, key=lambda found: len(found[1].preset))
    raise InputError(f"{type(protocol).__name__} is not registered in clipfast.metrics.PROTOCOLS.")


def label(protocol: Protocol) -> str:
    """What reports call a protocol: its name, and behind it what differs from the defaults."""
    name, entry = entry_of(protocol)
    plain = entry.kind(**entry.preset).parameters()
    return name + _spelled({k: v for k, v in protocol.parameters().items() if v != plain[k]})


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """A name and the parameters behind it: "mmel:steps=8:heads=single" -> ("mmel", {"steps": 8, "heads": "single"}).

    Raises InputError where something behind a colon is not NAME=VALUE.
    """
    name, *assignments = (part.strip() for part in text.split(":"))
    parameters = {}
    for assignment in assignments:
        parameter, equals, value = assignment.partition("=")
        if not equals or not parameter:
            raise InputError(f"{text!r}: behind {name!r} should come NAME=VALUE, not {assignment!r}.")
        parameters[parameter] = parameter_value(value)
    return name, parameters


def offered(offers: Iterable[str]) -> list[str]:
    """The protocols that need no more of a data set than it offers."""
    return [name for name, entry in PROTOCOLS.items() if entry.needs <= set(offers)]


def _spelled(parameters: Mapping[str, Any]) -> str:
    return "".join(f":{name}={str(value).lower() if value is None else value}" for name, value in parameters.items())
