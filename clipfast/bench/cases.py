"""What is timed: a method on random images and texts, the same model's bare encode, and the maps in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.api import Explainer
from clipfast.errors import InputError
from clipfast.methods import METHODS, build_method
from clipfast.metrics.chosen import able
from clipfast.metrics.registry import listed, parse, spelled
from clipfast.models.families import AnyImageTower
from clipfast.models.model import Model, Precision
from clipfast.ops.dispatch import backend

QUICK_METHODS = ("grad_eclip", "mmel", "mask_clip", "grad_cam")
QUICK_BATCHES, QUICK_PROMPTS = (1, 4), (1, 10, 100)
FULL_BATCHES, FULL_PROMPTS = (1, 4, 32), (1, 10, 100, 1000)

CHEAP: dict[str, dict[str, Any]] = {
    "integrated_gradients": {"steps": 8},
    "smooth_grad": {"samples": 4},
    "m2ib": {"steps": 4},
    "gscore_cam": {"top": 32},
    "rise": {"masks": 64},
    "kernel_shap": {"samples": 64},
}
"""Parameters that leave methods of very many passes few enough to be timed."""

HALF_BOUND, BOUND = 2e-2, 1e-4
# Rounding that an optimiser or an argument at a kink enlarges; everything else is far below.
BOUNDS = {"m2ib": 1e-2, "gscore_cam": 1e-2, "group_cam": 1e-2}

# Images whose maps are compared with float64.
CHECKED = 2


def relative(found: Any, exact: Any) -> float:
    """Relative L2 distance of maps from the exact ones, wherever either of them is; NaN where those are all zero."""
    found, exact = (torch.as_tensor(maps).detach().double().cpu() for maps in (found, exact))
    return float((found - exact).norm() / exact.norm())


def bound(method: str, dtype: torch.dtype) -> float:
    """How far from float64 a method's maps may be before no speed is told of them."""
    return max(BOUNDS.get(parse(method)[0], BOUND), HALF_BOUND if dtype.itemsize < 4 else 0.0)


def chosen(named: str | None, tower: AnyImageTower, full: bool = False) -> list[str]:
    """Methods as `clipfast bench` takes them, with parameters; those without get their CHEAP ones, if any.

    None takes the quick ones, or all for `full`; so does "all". Raises InputError for a method or parameter that there
    is not, and for a method that cannot explain images with this tower.
    """
    fitting = able(tower, ["image"])
    if named is None or named.strip() == "all":
        names = [name for name in fitting if full or named is not None or name in QUICK_METHODS]
    else:
        names = listed(named)
    found = []
    for label in names:
        name, parameters = parse(label)
        build_method(name, parameters)
        if name not in fitting:
            raise InputError(f"{name} cannot explain images of a {tower.kind}; can: {', '.join(fitting)}.")
        found.append(label if parameters else name + spelled(CHEAP.get(name, {})))
    if not found:
        raise InputError(f"there is no method to time: name at least one of {', '.join(METHODS)}.")
    return found


@dataclass(frozen=True)
class Setting:
    """A model, normalised images x (B, 3, H, W) and unit text embeddings (P, E), random from a seed."""

    model: Model
    x: Tensor
    texts: Tensor
    # Modules by dtype, and maps in float64 by method and numbers of images and prompts.
    _modules: dict[torch.dtype, Any] = field(default_factory=dict)
    _exact: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Model, batch: int, prompts: int, seed: int = 0) -> Setting:
        """So many images of the model's own size, and texts."""
        tower, _ = model.towers()
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, 3, *model.spec.size, generator=generator)
        texts = F.normalize(torch.randn(prompts, tower.embed_dim, generator=generator), dim=-1)
        return cls(model, x.to(tower.device, tower.result_dtype), texts.to(tower.device, tower.result_dtype))

    def dtype(self, precision: Precision) -> torch.dtype:
        """The dtype of the trunk in that precision."""
        return self.model.towers(precision)[0].dtype

    def module(self, dtype: torch.dtype) -> Any:
        """The user's module, or a copy of it in another dtype."""
        own: Any = self.model.module
        if next(own.parameters()).dtype == dtype:
            return own
        if dtype not in self._modules:
            self._modules[dtype] = copy.deepcopy(own).to(dtype)
        return self._modules[dtype]

    def encode(self, precision: Precision = None, batch: int | None = None) -> Callable[[], Tensor]:
        """The model's own `encode_image` without gradients."""
        dtype = self.dtype(precision)
        module, x = self.module(dtype), self.x[:batch].to(dtype)

        def call() -> Tensor:
            with torch.no_grad():
                return module.encode_image(x)

        return call

    def explain(
        self,
        method: str,
        prompts: int,
        precision: Precision = None,
        by: str = "auto",
        batch: int | None = None,
    ) -> Callable[[], Tensor]:
        """The maps (B, P, h, w) by the public call. Raises as `clipfast.Explainer` does."""
        name, parameters = parse(method)
        explainer = Explainer(self.model, name, precision=precision, **parameters)
        x, texts = self.x[:batch], self.texts[:prompts]

        def call() -> Tensor:
            with backend(by):
                return torch.as_tensor(explainer(x, texts).maps)

        return call

    def exact(self, method: str, batch: int, prompts: int) -> Tensor:
        """The definition's maps of the first images, at most CHECKED, in float64 on the CPU."""
        images = min(batch, CHECKED)
        key = (method, images, prompts)
        if key not in self._exact:
            name, parameters = parse(method)
            module = copy.deepcopy(self.model.module).to("cpu", torch.float64)
            model = Model(module, self.model.tokenizer, self.model.spec, self.model.name)
            x, texts = (t.to("cpu", torch.float64) for t in (self.x[:images], self.texts[:prompts]))
            with backend("torch"):
                self._exact[key] = torch.as_tensor(Explainer(model, name, **parameters)(x, texts).maps)
        return self._exact[key]
