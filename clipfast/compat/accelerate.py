"""`with clipfast.accelerate("captum", model=m):` other libraries, faster on one's CLIP, without a change to the code.

Inside, the entry points of the libraries' classes are wrapped, and the image tower's forward is one that can stand in
for it (`replay.Replay`). Whatever a library calls there, a lambda around `m.encode_image` or a module of the user's,
comes through that forward; all else, other models included, runs as it always does. Nothing else is touched, and on
leaving everything is what it was. Nested and concurrent uses are counted.
"""

from __future__ import annotations

import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module, metadata
from typing import Any

import torch
from torch import Tensor, nn

from clipfast.compat.replay import Replay, is_replaying, replaying
from clipfast.errors import InputError, nearest
from clipfast.metrics.road import impute
from clipfast.models.load import load
from clipfast.models.model import Model


@dataclass(frozen=True)
class Library:
    """A library that can be accelerated.

    package: what is imported; distribution: what is installed. root: of the classes whose methods are wrapped, as
    "module:Class" each, with all of their subclasses; methods: which, where a class defines them itself.
    """

    package: str
    distribution: str
    roots: tuple[str, ...]
    methods: tuple[str, ...]
    # By "module:Class.method", what makes a faster method of the one that is there.
    swaps: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)

    def version(self) -> str | None:
        """The installed version, or None."""
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return None

    def classes(self) -> list[type]:
        """The classes and their subclasses. Raises InputError for a release that is built differently."""
        found: dict[type, None] = {}
        import_module(self.package)
        for root in self.roots:
            kind = self.named(root)
            found.update(dict.fromkeys([kind, *_subclasses(kind)]))
        return list(found)

    def named(self, path: str) -> Any:
        """The class of a "module:Class". Raises InputError for a release that has none there."""
        module, _, name = path.partition(":")
        try:
            return getattr(import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise InputError(
                f"{self.distribution} {self.version()} has no {path}: it is built differently "
                "from the releases that clipfast knows, so leave it out of accelerate."
            ) from error

    def wrappers(self) -> Iterator[tuple[type, str, Callable[[Any], Any]]]:
        """Each class and method, and what makes a faster one of the one that is there."""
        for kind in self.classes():
            for name in self.methods:
                if name in vars(kind):
                    yield kind, name, _replayed
        for path, faster in self.swaps.items():
            where, _, name = path.rpartition(".")
            yield self.named(where), name, faster


def _imputed(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """pytorch-grad-cam's noisy linear imputation of pixels, with the same numbers from the same random state."""

    @functools.wraps(original)
    def call(self: Any, img: Tensor, mask: Tensor) -> Tensor:
        gone = mask == 0
        if not is_replaying() or img.dtype != torch.float32 or not 0 < int(gone.sum()) < gone.numel():
            return original(self, img, mask)
        filled = impute(img, gone)
        filled[:, gone] += self.noise * torch.randn(len(img), int(gone.sum()))
        return filled

    return call


LIBRARIES = {
    "captum": Library("captum.attr", "captum", ("captum.attr._utils.attribution:Attribution",), ("attribute",)),
    "pytorch_grad_cam": Library(
        "pytorch_grad_cam",
        "grad-cam",
        (
            "pytorch_grad_cam.base_cam:BaseCAM",
            "pytorch_grad_cam.metrics.perturbation_confidence:PerturbationConfidenceMetric",
            "pytorch_grad_cam.metrics.perturbation_confidence:AveragerAcrossThresholds",
        ),
        ("forward", "__call__"),
        {"pytorch_grad_cam.metrics.road:NoisyLinearImputer.__call__": _imputed},
    ),
    "quantus": Library("quantus", "quantus", ("quantus.metrics.base:Metric",), ("__call__",)),
    "torchcam": Library(
        "torchcam.metrics",
        "torchcam",
        ("torchcam.metrics:ClassificationMetric", "torchcam.metrics:DeletionInsertionMetric"),
        ("update",),
    ),
}


@dataclass
class _Patch:
    """An attribute that is replaced: whose, by what, what was in its place (None for nothing), how many use it."""

    owner: Any
    made: Any
    before: Any
    users: int = 0


_lock = threading.RLock()
# By the id of the class or module, and the attribute's name.
_patches: dict[tuple[int, str], _Patch] = {}


@contextmanager
def accelerate(*names: str, model: Any) -> Iterator[tuple[Replay, ...]]:
    """Run other libraries' explanations of CLIP models faster, with the same numbers.

    names: "captum", "pytorch_grad_cam", "quantus", "torchcam"; all that are installed where none is named.
    model: what `clipfast.load` takes, the very module that the libraries' forward functions run, or several of them.

    Gives a `Replay` a model, whose counters say how often it stood in. A model whose stand-in does not agree with its
    own forward on one image is left alone, with a warning.

    Raises InputError for an unknown library, one that is not installed and one that is built differently from what is
    known; ModelError for a model that has no vision transformer.
    """
    chosen = [library(name) for name in names or [name for name, known in LIBRARIES.items() if known.version()]]
    models = [load(one) for one in (model if isinstance(model, list | tuple) else [model])]
    with ExitStack() as stack:
        found = tuple(stack.enter_context(standing_in(Replay(one))) for one in models)
        for one in chosen:
            for kind, name, faster in one.wrappers():
                stack.enter_context(_patched(kind, name, faster))
        yield found


def accelerated() -> list[str]:
    """What is wrapped in this process now, as "package.Class.method"."""
    with _lock:
        kinds = [(patch.owner, name) for (_, name), patch in _patches.items() if isinstance(patch.owner, type)]
    return sorted(f"{kind.__module__}.{kind.__qualname__}.{name}" for kind, name in kinds)


def libraries() -> list[dict[str, Any]]:
    """Each library that can be accelerated: its name, version (None where it is not installed), whether its classes are
    where they are looked for, the reason where they are not, and what of it is wrapped in this process now.
    """
    found = []
    for name, known in LIBRARIES.items():
        version = known.version()
        reason = None
        if version is not None:
            try:
                list(known.wrappers())
            except (ImportError, InputError) as error:
                reason = str(error)
        now = [path for path in accelerated() if path.startswith(f"{known.package.split('.')[0]}.")]
        found.append(
            {
                "library": name,
                "version": version,
                "known": version is not None and reason is None,
                "reason": reason,
                "wrapped": now,
            }
        )
    return found


def replay_of(forward: Any) -> Replay | None:
    """A stand-in for the tower of the one CLIP that a forward function holds; None where it is or holds none.

    forward: a clipfast model, or a module that is or contains an open_clip or OpenAI CLIP. Raises InputError where it
    contains several.
    """
    if isinstance(forward, Model):
        return Replay(forward)
    found = [m for m in forward.modules() if hasattr(m, "visual")] if isinstance(forward, nn.Module) else []
    if len(found) > 1:
        raise InputError(
            f"{type(forward).__name__} holds {len(found)} CLIPs: use clipfast.accelerate and name the model."
        )
    return Replay(load(found[0])) if found else None


def library(name: str) -> Library:
    """A known library, imported. Raises InputError for an unknown one, and for one that is not installed."""
    known = LIBRARIES.get(name.replace("-", "_"))
    if known is None:
        raise InputError(f"there is no library {name!r} to accelerate: {nearest(name, LIBRARIES)}")
    try:
        import_module(known.package)
    except ImportError as error:
        raise InputError(f"{name} is not installed: pip install {known.distribution}") from error
    return known


def faster_classes(
    module: str, names: Sequence[str], package: str, faster: Callable[[Any], type]
) -> Callable[[str], type]:
    """A module's `__getattr__` that makes its classes, called `names`, of those of a library, when they are asked for.

    package: where the library has them. faster: one of its classes -> ours.
    """

    def find(name: str) -> type:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        library(package.partition(".")[0])
        kind = getattr(import_module(package), name)
        made = faster(kind)
        made.__name__ = made.__qualname__ = kind.__name__
        made.__module__, made.__doc__ = module, kind.__doc__
        # Made once, so that isinstance and pickle know it.
        return vars(sys.modules[module]).setdefault(name, made)

    return find


@contextmanager
def standing_in(replay: Replay) -> Iterator[Replay]:
    """Let `replay` be its tower's forward; where one is already, that one stays."""
    with _lock:
        reason = None if (id(replay.visual), "forward") in _patches else replay.why_not()
    if reason is not None:
        warnings.warn(f"{replay.model.name} is not accelerated: {reason}.", stacklevel=4)
        yield replay
        return
    with _patched(replay.visual, "forward", lambda _: replay) as found:
        yield found


@contextmanager
def running(replay: Replay | None) -> Iterator[None]:
    """Let `replay` stand in for what this thread runs; nothing is changed for None."""
    with ExitStack() as stack:
        if replay is not None:
            stack.enter_context(standing_in(replay))
            stack.enter_context(replaying())
        yield


@contextmanager
def _patched(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[Any]:
    """Replace an attribute by what `make` makes of it, for as long as anybody is inside; gives the one in place."""
    with _lock:
        patch = _patches.get((id(owner), name))
        if patch is None:
            before = vars(owner).get(name)
            patch = _patches[id(owner), name] = _Patch(owner, make(before), before)
            setattr(owner, name, patch.made)
        patch.users += 1
    try:
        yield patch.made
    finally:
        with _lock:
            patch.users -= 1
            if not patch.users:
                del _patches[id(owner), name]
                if patch.before is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, patch.before)


def _replayed(original: Callable[..., Any]) -> Callable[..., Any]:
    # functools.wraps leaves `__wrapped__`, through which captum's classes call one another.
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        with replaying():
            return original(*args, **kwargs)

    return call


def _subclasses(kind: type) -> list[type]:
    found: list[type] = []
    subs: list[type] = kind.__subclasses__()
    for sub in subs:
        found += [sub, *_subclasses(sub)]
    return found
