"""Attribution methods by name: a tower goes in, maps come out."""

from __future__ import annotations

from typing import Any

from clipfast.errors import InputError, nearest
from clipfast.methods.attention import Attention, Rollout
from clipfast.methods.base import Method
from clipfast.methods.chefer import Chefer
from clipfast.methods.clip_surgery import ClipSurgery
from clipfast.methods.gem import Gem
from clipfast.methods.grad_cam import GradCam
from clipfast.methods.grad_eclip import GradEclip
from clipfast.methods.group_cam import GroupCam
from clipfast.methods.integrated_gradients import IntegratedGradients
from clipfast.methods.kernel_shap import KernelShap
from clipfast.methods.leave_one_out import LeaveOneOut
from clipfast.methods.legrad import LeGrad
from clipfast.methods.library_cam import GradCamPlusPlus, LayerCam, XGradCam
from clipfast.methods.m2ib import M2IB
from clipfast.methods.mask_clip import MaskClip
from clipfast.methods.mga_clip import MgaClip
from clipfast.methods.mmel import Mmel
from clipfast.methods.rise import Rise
from clipfast.methods.saliency import Saliency, SmoothGrad
from clipfast.methods.score_cam import GScoreCam, ScoreCam
from clipfast.methods.tclip import Tclip

METHODS: dict[str, type[Method]] = {
    "grad_eclip": GradEclip,
    "tclip": Tclip,
    "mmel": Mmel,
    "mga_clip": MgaClip,
    "grad_cam": GradCam,
    "integrated_gradients": IntegratedGradients,
    "saliency": Saliency,
    "smooth_grad": SmoothGrad,
    "mask_clip": MaskClip,
    "clip_surgery": ClipSurgery,
    "gem": Gem,
    "attention": Attention,
    "rollout": Rollout,
    "chefer": Chefer,
    "legrad": LeGrad,
    "m2ib": M2IB,
    "score_cam": ScoreCam,
    "gscore_cam": GScoreCam,
    "group_cam": GroupCam,
    "rise": Rise,
    "kernel_shap": KernelShap,
    "leave_one_out": LeaveOneOut,
    "grad_cam++": GradCamPlusPlus,
    "xgrad_cam": XGradCam,
    "layer_cam": LayerCam,
}


def parameter_value(text: str) -> Any:
    """A parameter's value from text: numbers, several with commas, true, false and none; all else stays text."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    several = [parameter_value(part.strip()) for part in text.split(",")] if "," in text else []
    return tuple(several) if several and all(type(one) in (int, float) for one in several) else text


def build_method(name: str, parameters: dict[str, Any]) -> Method:
    """The method called `name`. Raises InputError for an unknown name or parameter, with the nearest known ones."""
    if name not in METHODS:
        raise InputError(f"there is no method {name!r}: {nearest(str(name), METHODS)}")
    build = METHODS[name]
    known = build.parameters()
    for parameter in parameters:
        if parameter not in known:
            raise InputError(f"{name} has no parameter {parameter!r}: {nearest(parameter, known)}")
    return build(**parameters)
