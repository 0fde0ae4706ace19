"""Which form of an op runs: the definition in PyTorch, or a faster one where it can.

To add a backend to an op, in `clipfast/ops/X.py`:

1. The op's inputs are one frozen dataclass. A backend is a subclass of `Backend[Inputs]` that has a `name`, declares
   its limits (`devices`, `dtypes` by field of the inputs, `capability`), adds in `why_not` what those cannot say,
   reports in `missing` what this machine lacks, and does the work in `run`. What it needs (Triton, a compiled module)
   is imported inside these methods.
2. `X = Op("X", Fast(), Definition())` lists the backends, the fastest first; the definition is last, is named
   "torch", and can always run. `X(inputs)` runs the first that can.

3. `@registered(fake)` makes a function of tensors that ends in `X(inputs)` an operator of torch.library as well.

A user names a backend with `with clipfast.backend("native"):` or, for a process, with CLIPFAST_BACKEND. An op that
has a backend of that name then runs it or raises BackendError with every reason; an op that has none of that name
chooses as ever, and its log says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, ClassVar, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from clipfast.errors import BackendError, InputError, nearest

Inputs = TypeVar("Inputs")
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

NAMES = ("auto", "torch", "triton", "native")

_log = logging.getLogger("clipfast")
_said: set[str] = set()
_named: ContextVar[str | None] = ContextVar("clipfast_backend", default=None)
_ops: dict[str, Op[Any]] = {}


class Backend(Generic[Inputs]):
    """One way to run an op. Class attributes declare the limits; `None` or an absent field is no limit."""

    name: ClassVar[str]
    devices: ClassVar[frozenset[str] | None] = None
    dtypes: ClassVar[Mapping[str, frozenset[torch.dtype]]] = {}
    capability: ClassVar[tuple[int, int]] = (0, 0)

    def missing(self) -> list[str]:
        """What this machine lacks to run the backend at all; empty when it lacks nothing."""
        return []

    def version(self) -> str:
        """What would run: the version of the library, or how the module was built."""
        return f"torch {torch.__version__}"

    def why_not(self, inputs: Inputs) -> list[str]:
        """Every reason why these inputs cannot be run here; empty when they can."""
        reasons = self.missing()
        for field, tensor in _tensors(inputs):
            device = tensor.device
            if self.devices is not None and device.type not in self.devices:
                reasons.append(f"{field} is on {device.type}, not on {_one_of(self.devices)}")
            elif device.type == "cuda" and torch.cuda.get_device_capability(device) < self.capability:
                reasons.append(
                    f"the GPU of {field} is older than compute capability {'.'.join(map(str, self.capability))}"
                )
            if tensor.dtype not in self.dtypes.get(field, {tensor.dtype}):
                reasons.append(f"{field} is {_short(tensor.dtype)}, not {_one_of(map(_short, self.dtypes[field]))}")
        return reasons

    def run(self, inputs: Inputs) -> Tensor:
        """The op's result; called only when `why_not` has no reason."""
        raise NotImplementedError


class Triton(Backend[Inputs]):
    """A backend that launches Triton kernels: on NVIDIA GPUs, or on the CPU where TRITON_INTERPRET=1 interprets them.

    Subclasses launch in `launch`, which finds the inputs' GPU current.
    """

    name = "triton"
    devices = frozenset({"cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"})
    capability = (8, 0)

    def missing(self) -> list[str]:
        return list(_triton_problems("cuda" in self.devices))

    def version(self) -> str:
        return f"triton {importlib.metadata.version('triton')}"

    def why_not(self, inputs: Inputs) -> list[str]:
        reasons = super().why_not(inputs)
        if torch.is_grad_enabled():
            reasons += [f"{field} requires a gradient" for field, t in _tensors(inputs) if t.requires_grad]
        if len({t.device for _, t in _tensors(inputs)}) > 1:
            reasons.append("the tensors are on several devices")
        return reasons

    def run(self, inputs: Inputs) -> Tensor:
        device = next(t.device for _, t in _tensors(inputs))
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return self.launch(inputs)

    def launch(self, inputs: Inputs) -> Tensor:
        """The op's result; called only when `why_not` has no reason, on the inputs' GPU."""
        raise NotImplementedError


@functools.cache
def _triton_problems(needs_gpu: bool) -> tuple[str, ...]:
    problems = []
    if importlib.util.find_spec("triton") is None:
        problems.append("Triton is not installed")
    if needs_gpu and not torch.cuda.is_available():
        problems.append("PyTorch finds no CUDA GPU")
    return tuple(problems)


class Op(Generic[Inputs]):
    """An op by name and its backends, the fastest first and the definition last."""

    def __init__(self, name: str, *backends: Backend[Inputs]):
        self.name = name
        self.backends = backends
        self._absent: set[Backend[Inputs]] = set()
        _ops[name] = self

    def __call__(self, inputs: Inputs) -> Tensor:
        return self.choose(inputs).run(inputs)

    def choose(self, inputs: Inputs) -> Backend[Inputs]:
        """The backend that runs these inputs: the first that can, or the one the user named.

        Raises BackendError when the named one cannot.
        """
        wanted = chosen()
        candidates = [b for b in self.backends if b.name == wanted]
        if wanted != "auto" and not candidates:
            _say_once(f"{self.name} has no {wanted} backend and chooses among its own")
        refusals = []
        for backend in candidates or self.backends:
            if not candidates and backend in self._absent:
                continue
            reasons = backend.why_not(inputs)
            if not reasons:
                return backend
            refusals.append(f"{label(backend)}: {'; '.join(reasons)}")
            if not candidates:
                _say_once(f"{self.name} passes over {refusals[-1]}")
                # What the machine lacks it lacks for the next call too, and asking again would cost each call.
                if backend.missing():
                    self._absent.add(backend)
        raise BackendError(f"{self.name} of {_described(inputs)} cannot run as asked: {'. '.join(refusals)}.")


def registered(
    fake: Callable[..., Any], *, mutates: Sequence[str] = ()
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Makes a function the operator `torch.ops.clipfast.<its name>`, which torch.compile keeps whole.

    fake(*arguments) returns an empty tensor like the result's; mutates names the arguments written to. Outside of
    torch.compile the function is called itself: through the library a call costs several microseconds more.
    """

    def register(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        name = f"clipfast::{function.__name__.removeprefix('_')}"
        operator = torch.library.custom_op(name, function, mutates_args=mutates)
        operator.register_fake(fake)

        @functools.wraps(function)
        def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            return operator(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

        return call

    return register


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the block, in this thread, every op that has a backend of this name runs it, or raises BackendError.

    name: "torch", "triton" or "native"; "auto" lets each op take its fastest. An unknown name raises InputError.

    >>> with backend("torch"):
    ...     chosen()
    'torch'
    """
    token = _named.set(_checked(name, "backend"))
    try:
        yield
    finally:
        _named.reset(token)


def chosen() -> str:
    """The backend the user named, for the block or the process, or "auto"."""
    return _named.get() or _checked(os.environ.get("CLIPFAST_BACKEND") or "auto", "CLIPFAST_BACKEND")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table that `clipfast doctor` prints; `reasons` is empty when the backend is available here."""

    op: str
    backend: str
    available: bool
    version: str
    reasons: tuple[str, ...]


def table() -> list[Row]:
    """Every backend of every op, and what each lacks on this machine."""
    package = importlib.import_module("clipfast.ops")
    for found in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"clipfast.ops.{found.name}")
    rows = []
    for name, op in sorted(_ops.items()):
        for one in op.backends:
            reasons = one.missing()
            rows.append(Row(name, label(one), not reasons, "" if reasons else one.version(), tuple(reasons)))
    return rows


def label(one: Backend[Any]) -> str:
    """A backend's name, with its devices where it is bound to some: "native (cuda)"."""
    return one.name if one.devices is None else f"{one.name} ({', '.join(sorted(one.devices))})"


def _checked(name: str, where: str) -> str:
    if name not in NAMES:
        raise InputError(f"{where} {name!r} is not a backend; {nearest(name, NAMES)}")
    return name


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        _log.info(message)


def _tensors(inputs: Any) -> Iterator[tuple[str, Tensor]]:
    for field in dataclasses.fields(inputs):
        value = getattr(inputs, field.name)
        if isinstance(value, Tensor):
            yield field.name, value


def _described(inputs: Any) -> str:
    return ", ".join(f"{name} {tuple(t.shape)} {_short(t.dtype)} on {t.device}" for name, t in _tensors(inputs))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _one_of(names: Any) -> str:
    return " or ".join(sorted(names))
