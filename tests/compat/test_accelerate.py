"""Other libraries with and without `accelerate`: the same numbers, fewer images encoded, and nothing left behind."""

from __future__ import annotations

import copy
import io
import threading
import warnings

import captum.attr as captum
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.metrics import infidelity
from pytorch_grad_cam import GradCAM, LayerCAM
from torch import Tensor, nn

import clipfast
from clipfast.compat import accelerate as module
from clipfast.compat.accelerate import LIBRARIES, Library, accelerate, accelerated, libraries
from clipfast.errors import InputError, ModelError

# captum and pytorch-grad-cam warn of what they do by themselves.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        "Input Tensor 0 did not",
        "Setting forward, backward",
        "Multiple",
        "The",
        "Minimum",
        "Attempting",
        "You are",
    )
]
GRID = (4, 4)


@pytest.fixture
def clip(build_clip):
    return build_clip().double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def score(clip):
    """A score as people write it: a lambda around encode_image."""
    text = F.normalize(torch.linspace(-1, 1, 24, dtype=torch.float64)[None], dim=-1)
    return lambda image: (F.normalize(clip.encode_image(image), dim=-1) @ text.T)[:, 0]


def cells() -> Tensor:
    """A feature for each patch, (1, 1, 64, 64)."""
    return torch.arange(16).reshape(1, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)


def block(clip, i: int):
    return clip.visual.transformer.resblocks[i]


CAPTUM = {
    "IntegratedGradients": lambda f, m: captum.IntegratedGradients(f),
    "Saliency": lambda f, m: captum.Saliency(f),
    "InputXGradient": lambda f, m: captum.InputXGradient(f),
    "LayerIntegratedGradients, last norm": lambda f, m: captum.LayerIntegratedGradients(f, block(m, -1).ln_1),
    "LayerIntegratedGradients, block 1": lambda f, m: captum.LayerIntegratedGradients(f, block(m, 1)),
    "LayerIntegratedGradients, mlp of 0": lambda f, m: captum.LayerIntegratedGradients(f, block(m, 0).mlp),
    "LayerGradCam": lambda f, m: captum.LayerGradCam(f, block(m, -1).ln_1),
    "LayerActivation": lambda f, m: captum.LayerActivation(f, block(m, 1).ln_2),
    "LayerConductance": lambda f, m: captum.LayerConductance(f, block(m, 2)),
    "LayerGradientXActivation, patches": lambda f, m: captum.LayerGradientXActivation(f, m.visual.conv1),
}


@pytest.mark.parametrize("name", CAPTUM)
def test_captum_gives_the_same(clip, x, name):
    method = CAPTUM[name](score(clip), clip)
    expected = method.attribute(x)
    with accelerate("captum", model=clip) as (replay,):
        found = method.attribute(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)
    assert found.requires_grad == expected.requires_grad
    assert (replay.calls > 1) == ("patches" not in name)


@pytest.mark.parametrize("options", [{}, {"internal_batch_size": 6}, {"return_convergence_delta": True}])
def test_options_of_integrated_gradients(clip, x, options):
    method = captum.IntegratedGradients(score(clip))
    expected = method.attribute(x, n_steps=5, baselines=0.5, **options)
    with accelerate("captum", model=clip):
        found = method.attribute(x, n_steps=5, baselines=0.5, **options)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("kind", ["FeatureAblation", "KernelShap", "ShapleyValueSampling"])
def test_captum_by_perturbation(clip, x, kind):
    method = getattr(captum, kind)(score(clip))
    found = []
    for on in (False, True):
        torch.manual_seed(0)
        np.random.seed(0)
        options = {"n_samples": 4} if kind != "FeatureAblation" else {}
        if on:
            with accelerate("captum", model=clip) as (replay,):
                found.append(method.attribute(x, feature_mask=cells(), **options))
            assert replay.rows >= len(x)
        else:
            found.append(method.attribute(x, feature_mask=cells(), **options))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_noise_tunnels_reach_the_wrapped_methods(clip, x):
    method = captum.NoiseTunnel(captum.Saliency(score(clip)))
    torch.manual_seed(3)
    expected = method.attribute(x, nt_samples=3, stdevs=0.1)
    with accelerate("captum", model=clip) as (replay,):
        torch.manual_seed(3)
        found = method.attribute(x, nt_samples=3, stdevs=0.1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)
    assert replay.rows == 1 + 9


def test_a_layers_path_encodes_each_image_once(clip, x):
    method = captum.LayerIntegratedGradients(score(clip), block(clip, -1).ln_1)
    with accelerate("captum", model=clip) as (replay,):
        replay.encoded = 0
        method.attribute(x, n_steps=20, internal_batch_size=3)
    # The images and the baseline's one black image, where the library itself runs 22 times as many.
    assert replay.encoded == len(x) + 1


class Cosines(nn.Module):
    """What pytorch-grad-cam is given: a module around the model, a column for each text."""

    def __init__(self, clip):
        super().__init__()
        self.clip = clip
        self.register_buffer("texts", F.normalize(torch.randn(24, 3, dtype=torch.float64), dim=0))

    def forward(self, image: Tensor) -> Tensor:
        return F.normalize(self.clip.encode_image(image), dim=-1) @ self.texts


@pytest.mark.parametrize("kind", [GradCAM, LayerCAM])
@pytest.mark.parametrize("layer", [lambda m: block(m, -1).ln_1, lambda m: block(m, 0)])
def test_grad_cam_gives_the_same(clip, x, kind, layer):
    wrapper = Cosines(clip)
    targets = [lambda row: row[1]] * len(x)

    def maps() -> np.ndarray:
        with kind(
            wrapper, [layer(clip)], reshape_transform=lambda t: t[:, 1:].transpose(1, 2).unflatten(2, GRID)
        ) as cam:
            return cam(x, targets)

    expected = maps()
    assert any(p.grad is not None for p in clip.parameters())
    clip.zero_grad(set_to_none=True)
    with accelerate("pytorch_grad_cam", model=clip) as (replay,):
        found = maps()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert replay.calls == 2


def test_a_frozen_model_works_with_grad_cam_where_it_did_not(clip, x):
    clip.requires_grad_(False)
    cam = GradCAM(
        Cosines(clip),
        [block(clip, -1).ln_1],
        reshape_transform=lambda t: t[:, 1:].transpose(1, 2).unflatten(2, GRID),
    )
    with accelerate("pytorch-grad-cam", model=clip):
        assert cam(x, [lambda row: row[0]] * 3).shape == (3, 64, 64)


def test_everything_is_what_it_was(clip, x):
    before = [(kind, name, vars(kind)[name]) for library in LIBRARIES.values() for kind in library.classes()
              for name in library.methods if name in vars(kind)]  # fmt: skip
    assert before
    assert "forward" not in vars(clip.visual)
    with accelerate(model=clip), accelerate("captum", model=clip):
        assert "captum.attr._core.saliency.Saliency.attribute" in accelerated()
        with pytest.raises(ZeroDivisionError), accelerate("quantus", model=clip):
            raise ZeroDivisionError
        assert captum.Saliency.attribute is not next(v for k, n, v in before if k is captum.Saliency)
        assert "forward" in vars(clip.visual)
    assert all(vars(kind)[name] is original for kind, name, original in before)
    assert "forward" not in vars(clip.visual)
    assert accelerated() == []


def test_a_forward_of_the_users_own_comes_back(clip):
    def own(image: Tensor) -> Tensor:
        return type(clip.visual).forward(clip.visual, image)

    clip.visual.forward = own
    with accelerate("captum", model=clip):
        assert clip.visual.forward is not own
    assert clip.visual.forward is own


def test_outside_of_the_libraries_the_model_is_itself(clip, x):
    expected = clip.encode_image(x)
    with accelerate("captum", model=clip) as (replay,):
        calls = replay.calls
        assert torch.equal(clip.encode_image(x), expected)
        clip.encode_image(x).sum().backward()
        assert replay.calls == calls
    assert clip.visual.conv1.weight.grad is not None


def test_copies_and_saved_models_have_forwards_of_their_own(clip, x):
    with accelerate("captum", model=clip) as (replay,):
        other = copy.deepcopy(clip)
        stream = io.BytesIO()
        torch.save(clip, stream)
        with torch.no_grad():
            other.visual.proj.zero_()
        calls = replay.calls
        assert captum.Saliency(score(other)).attribute(x).abs().max() == 0
        assert replay.calls == calls
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    assert torch.equal(loaded.encode_image(x), clip.encode_image(x))


def test_changed_weights_are_seen(clip, x):
    method = captum.LayerGradCam(score(clip), block(clip, -1).ln_1)
    with accelerate("captum", model=clip):
        before = method.attribute(x)
        with torch.no_grad():
            block(clip, 0).mlp.c_fc.weight.mul_(2)
        found = method.attribute(x)
    assert not torch.allclose(found, before)
    torch.testing.assert_close(found, method.attribute(x), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("why", ["size", "tokens", "dropout", "patch hook"])
def test_what_the_stand_in_cannot_do_runs_as_before(clip, x, why):
    f, inputs = score(clip), x
    if why == "size":
        with accelerate("captum", model=clip), pytest.raises(RuntimeError):
            captum.Saliency(f).attribute(x[..., :48])
        return
    if why == "tokens":
        clip.visual.output_tokens = True
        f = lambda image: clip.visual(image)[0].sum(-1)  # noqa: E731
    if why == "dropout":
        block(clip, 0).mlp.append(nn.Dropout(0.5))
        clip.train()
    seen: list[int] = []
    warnings.simplefilter("always")
    if why == "patch hook":
        clip.visual.conv1.register_forward_hook(lambda m, i, o: seen.append(1))
    with warnings.catch_warnings(record=True) as warned, accelerate("captum", model=clip) as (replay,):
        calls = replay.calls
        captum.Saliency(f).attribute(inputs)
        assert replay.calls == calls
    assert any("not accelerated" in str(w.message) for w in warned) == (why in ("tokens", "dropout"))
    assert bool(seen) == (why == "patch hook")


def test_a_tower_that_was_read_wrongly_is_left_alone(clip, x, monkeypatch):
    monkeypatch.setattr(type(clip.visual), "_pool", lambda self, h: (self.ln_post(h[:, 1]), h))
    warnings.simplefilter("always")
    with warnings.catch_warnings(record=True) as seen, accelerate("captum", model=clip) as (replay,):
        assert "forward" not in vars(clip.visual)
        calls = replay.calls
        captum.Saliency(score(clip)).attribute(x)
    assert replay.calls == calls
    assert "not accelerated" in str(seen[0].message)


def test_threads_share_one_stand_in(clip, x):
    method = captum.LayerIntegratedGradients(score(clip), block(clip, 1).ln_1)
    plain = captum.IntegratedGradients(score(clip))
    expected, results = plain.attribute(x, n_steps=4), {}

    def work(i: int) -> None:
        with accelerate("captum", model=clip):
            results[i] = plain.attribute(x, n_steps=4)

    # Hooks belong to a module, not to a thread: only methods without them can run side by side, with or without this.
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.allclose(results[i], expected, rtol=1e-9, atol=1e-14) for i in range(4))
    assert "forward" not in vars(clip.visual) and accelerated() == []
    method.attribute(x, n_steps=2)


def test_several_models_at_once(build_clip, x):
    models = [build_clip(seed=seed).double() for seed in (0, 1)]
    with accelerate("captum", model=models) as replays:
        for model, replay in zip(models, replays, strict=True):
            captum.Saliency(score(model)).attribute(x)
            assert replay.rows == 1 + len(x)


def test_errors_say_what_would_be_right(clip, build_resnet, monkeypatch):
    with pytest.raises(InputError, match="did you mean 'captum'"), accelerate("captun", model=clip):
        pass
    resnet = build_resnet()
    with pytest.raises(ModelError, match="no VisionTransformer with a class token"), accelerate("captum", model=resnet):
        pass
    monkeypatch.setitem(module.LIBRARIES, "captum", Library("captum", "captum", ("captum.attr:Nothing",), ("x",)))
    with pytest.raises(InputError, match="built differently"), accelerate("captum", model=clip):
        pass
    monkeypatch.setitem(module.LIBRARIES, "captum", Library("no_such_package", "captum", (), ()))
    with pytest.raises(InputError, match="pip install captum"), accelerate("captum", model=clip):
        pass
    assert "forward" not in vars(clip.visual)


class Literal(nn.Module):
    """max(0, max(0, a) - 1 - max(0, b)), whose path integral from 0 to (3, 1) is known."""

    def forward(self, v: Tensor) -> Tensor:
        return F.relu(F.relu(v[:, 0]) - 1 - F.relu(v[:, 1]))


@pytest.mark.parametrize("on", [False, True])
def test_other_models_are_untouched(clip, on):
    def run() -> None:
        v = torch.tensor([[3.0, 1.0]])
        found = captum.IntegratedGradients(Literal()).attribute(v, n_steps=500)
        torch.testing.assert_close(found, torch.tensor([[1.5, -0.5]]), rtol=0, atol=0.05)
        linear = nn.Linear(3, 1, bias=False)
        linear.weight.data = torch.tensor([[4.0, 6.0, 2.0]])
        inputs = torch.tensor([[20.0, 50.0, 30.0]])
        torch.testing.assert_close(
            captum.FeatureAblation(linear).attribute(inputs), torch.tensor([[80.0, 300.0, 60.0]])
        )
        conv = nn.Conv2d(1, 1, 3, bias=False)
        conv.weight.data.fill_(1.0)
        net = nn.Sequential(conv, nn.Flatten())
        image = torch.arange(16.0).reshape(1, 1, 4, 4)
        cam = captum.LayerGradCam(net, conv).attribute(image, target=0)
        torch.testing.assert_close(cam, conv(image) * 0.25)
        attribution = captum.Saliency(linear).attribute(inputs)
        score_ = infidelity(linear, lambda v: (torch.ones_like(v), torch.zeros_like(v)), inputs, attribution)
        torch.testing.assert_close(score_, (attribution.sum() - linear(inputs)[0]).square())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if on:
            with accelerate("captum", "pytorch_grad_cam", model=clip):
                run()
        else:
            run()


def test_what_is_there_is_said(clip, monkeypatch):
    monkeypatch.setitem(module.LIBRARIES, "gone", Library("gone", "no-such-distribution", (), ()))
    monkeypatch.setitem(module.LIBRARIES, "changed", Library("captum", "captum", ("captum.attr:Nothing",), ("x",)))
    with accelerate("captum", model=clip):
        found = {one["library"]: one for one in libraries()}
    assert found["captum"]["known"]
    assert "captum.attr._core.saliency.Saliency.attribute" in found["captum"]["wrapped"]
    assert found["gone"]["version"] is None
    assert not found["gone"]["known"]
    assert "no captum.attr:Nothing" in found["changed"]["reason"]
    assert not found["quantus"]["wrapped"]


def test_the_demo_model_by_its_name_in_python():
    demo = clipfast.load("demo")
    with accelerate("captum", model=demo) as (replay,):
        assert replay.model is demo
