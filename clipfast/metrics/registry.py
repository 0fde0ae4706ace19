"""The protocols by name, and how each measures the maps of a method: what `clipfast eval` chooses from.

A protocol is written as its name and, behind colons, parameters that are not the defaults: "pointing_game:tolerance=9".
A name from a paper that means one half of a protocol ("deletion/rise") stands for the whole of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from clipfast.errors import InputError, nearest
from clipfast.methods import parameter_value
from clipfast.metrics import work
from clipfast.metrics.base import Protocol
from clipfast.metrics.boxes import BoxGScoreCam, MaxBoxAcc
from clipfast.metrics.infidelity import Completeness, Infidelity
from clipfast.metrics.localisation import (
    EnergyPointingGame,
    Gini,
    MaskIou,
    PointingGame,
    PrecisionAt,
    SegmentationChefer,
)
from clipfast.metrics.occlusion import Occlusion
from clipfast.metrics.perturbation import Confidence, CurvesCosine, CurvesGradEclip, CurvesRise
from clipfast.metrics.road import Road
from clipfast.metrics.sanity import ClassSensitivity, SanityCascade, SanityWordCascade
from clipfast.metrics.stability import StabilitySsim
from clipfast.metrics.typographic import PastedWord
from clipfast.metrics.words import WordConfidence, WordCurvesCosine, WordCurvesRetrieval
from clipfast.metrics.work import Measure, Work

Side = Literal["image", "text"]


@dataclass(frozen=True)
class Entry:
    """A protocol that can be had by name: its class, what is preset, and what it needs of a data set.

    side: whether it measures maps of images or values of words. runs_model: whether it runs the model on changed
    inputs. again: whether it has each image explained again. whole: whether it takes all samples at once.
    """

    kind: type[Protocol]
    measure: Measure
    needs: frozenset[str] = frozenset()
    preset: Mapping[str, Any] = field(default_factory=dict)
    side: Side = "image"
    runs_model: bool = False
    again: bool = False
    whole: bool = False


_MASKS, _BOXES, _LABELS = frozenset({"masks"}), frozenset({"boxes"}), frozenset({"labels"})
_CAPTIONS = frozenset({"captions"})
_on_classes, _on_texts = work.on_inputs(Work.labels), work.on_inputs(Work.own_texts)

PROTOCOLS: dict[str, Entry] = {
    "pointing_game": Entry(PointingGame, work.on_masks, _MASKS),
    "energy_pointing_game": Entry(EnergyPointingGame, work.on_masks, _MASKS),
    "segmentation/chefer": Entry(SegmentationChefer, work.on_masks, _MASKS),
    "segmentation/mask_iou": Entry(MaskIou, work.on_masks, _MASKS),
    "precision@threshold": Entry(PrecisionAt, work.on_masks, _MASKS),
    "box/gscorecam": Entry(BoxGScoreCam, work.on_boxes, _BOXES),
    "box/max": Entry(MaxBoxAcc, work.on_boxes, _BOXES),
    "gini": Entry(Gini, work.on_grid),
    "deletion+insertion/rise": Entry(CurvesRise, _on_classes, _LABELS, runs_model=True),
    "deletion+insertion/cosine": Entry(CurvesCosine, _on_texts, runs_model=True),
    "deletion+insertion/grad_eclip": Entry(CurvesGradEclip, work.on_originals, _LABELS, runs_model=True),
    "occlusion": Entry(Occlusion, _on_texts, runs_model=True),
    "infidelity": Entry(Infidelity, work.on_perturbed, runs_model=True),
    "road": Entry(Road, work.on_perturbed, runs_model=True),
    "completeness": Entry(Completeness, work.on_baselines, runs_model=True),
    "stability/ssim": Entry(StabilitySsim, work.on_noise, again=True),
    "sanity/cascade": Entry(SanityCascade, work.on_copies, again=True),
    "sanity/class_sensitivity": Entry(ClassSensitivity, work.on_absent, _LABELS, again=True),
    "typographic": Entry(PastedWord, work.on_pasted, _LABELS, again=True),
    "confidence/m2ib": Entry(Confidence, work.on_confidence, runs_model=True),
    "confidence/gradcam++": Entry(Confidence, work.on_confidence, preset={"drop": "relative"}, runs_model=True),
    "deletion+insertion/words": Entry(WordCurvesCosine, work.on_words, _CAPTIONS, side="text", runs_model=True),
    "deletion+insertion/retrieval": Entry(
        WordCurvesRetrieval, work.on_gallery, _CAPTIONS, side="text", runs_model=True, whole=True
    ),
    "confidence/words": Entry(WordConfidence, work.on_words, _CAPTIONS, side="text", runs_model=True),
    "sanity/cascade/words": Entry(SanityWordCascade, work.on_word_copies, _CAPTIONS, side="text", again=True),
}

ALIASES = {
    **{f"{half}/{kind}": f"deletion+insertion/{kind}"
       for half in ("deletion", "insertion") for kind in ("rise", "cosine", "grad_eclip", "words", "retrieval")},
    "energy": "energy_pointing_game",
    "mask_iou": "segmentation/mask_iou",
    "precision": "precision@threshold",
    "confidence": "confidence/m2ib",
    "class_sensitivity": "sanity/class_sensitivity",
    "BoxAcc": "box/gscorecam",
    "MaxBoxAcc": "box/max",
}  # fmt: skip

# A comma between items, but not one that a number follows: no name begins with one, so it goes on with a value.
_BETWEEN = re.compile(r",(?!\s*[-+]?\.?\d)")


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
    several = {one.name for one in fields(entry.kind) if isinstance(one.default, tuple)}  # type: ignore[arg-type]
    given = {k: (v,) if k in several and isinstance(v, int | float) else v for k, v in given.items()}
    try:
        return entry.kind(**entry.preset, **given)
    except TypeError as error:
        raise InputError(f"{name} cannot take {spelled(given)[1:]}: {error}.") from error


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
    return name + spelled({k: v for k, v in protocol.parameters().items() if v != plain[k]})


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """A name and the parameters behind it: "mmel:steps=8:heads=single" -> ("mmel", {"steps": 8, "heads": "single"}).

    A value of several numbers has commas between them: "occlusion:fractions=0.1,0.2".

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


def listed(text: str) -> list[str]:
    """Names with commas between them, each once, as the command line takes them; values may hold commas, too.

    >>> listed("gini, occlusion:fractions=0.1,0.2, occlusion")
    ['gini', 'occlusion:fractions=0.1,0.2', 'occlusion']
    """
    return list(dict.fromkeys(part.strip() for part in _BETWEEN.split(text) if part.strip()))


def offered(offers: Iterable[str], sides: Iterable[Side] = ("image", "text")) -> list[str]:
    """The protocols of these sides that need no more of a data set than it offers."""
    have, wanted = set(offers), set(sides)
    return [name for name, entry in PROTOCOLS.items() if entry.needs <= have and entry.side in wanted]


def spelled(parameters: Mapping[str, Any]) -> str:
    """Parameters as `parse` reads them, each behind a colon."""
    return "".join(f":{name}={_value(value)}" for name, value in parameters.items())


def _value(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ",".join(str(one) for one in value)
    return "none" if value is None else str(value)
