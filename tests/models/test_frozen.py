"""A frozen copy computes what the module does in evaluation, and the module never notices."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from clipfast.errors import ModelError
from clipfast.models.frozen import frozen
from clipfast.models.openclip import trained_weights


def build() -> nn.Module:
    """Batch norms with statistics of their own, dropout, a tied weight, a list of modules beside the registered one."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
            self.drop = nn.Dropout(0.5)
            self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
            self.down.weight = self.up.weight
            self.order = [self.up, self.down]
            self.shift = torch.full((8,), 0.5)
            self.register_buffer("steps", torch.arange(8))

        def forward(self, x: Tensor) -> Tensor:
            h = self.drop(self.conv(x).mean((2, 3)))
            for layer in self.order:
                h = layer(h).tanh()
            return h * self.steps + self.shift

    net = Net()
    with torch.no_grad():
        net(torch.randn(4, 3, 8, 8))  # moves the running statistics
    return net


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def evaluated(net: nn.Module, x: Tensor) -> Tensor:
    return copy.deepcopy(net).eval()(x)


def test_it_computes_what_the_module_does_in_evaluation(x):
    net = build()
    assert net.training
    found = frozen(net)(x)
    assert torch.equal(found, evaluated(net, x).detach()) and not found.requires_grad
    assert not torch.equal(found, net(x))


def test_weights_are_shared_and_casts_are_not(x):
    net = build()
    copied = frozen(net)
    own, theirs = dict(copied.state_dict()), dict(net.state_dict())
    assert own.keys() == theirs.keys()
    assert all(own[key].data_ptr() == theirs[key].data_ptr() for key in theirs)
    wide = frozen(net, torch.float64)
    assert wide.steps.dtype == torch.long and wide.conv[1].num_batches_tracked.dtype == torch.long
    assert wide.up.weight is wide.down.weight and wide.order[1] is wide.down
    expected = copy.deepcopy(net).eval().double()
    expected.shift = expected.shift.double()
    torch.testing.assert_close(wide(x.double()), expected(x.double()).detach(), rtol=0, atol=1e-14)


def test_the_module_stays_as_it_was(x):
    net = build()
    net.conv[0].weight.requires_grad_(False)
    net.drop.eval()
    net.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    net.conv.register_forward_pre_hook(lambda *_: pytest.fail("a hook ran"))
    net.conv[1].register_full_backward_hook(lambda *_: pytest.fail("a hook ran"))
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    before = {key: (t.clone(), t._version, t.requires_grad, t.data_ptr()) for key, t in tensors.items()}
    flags = {key: part.training for key, part in net.named_modules()}
    hooks = {key: {n: len(h) for n, h in vars(part).items() if "_hooks" in n} for key, part in net.named_modules()}
    x.requires_grad_()
    frozen(net)(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    for key, t in {**dict(net.named_parameters()), **dict(net.named_buffers())}.items():
        value, version, gradient, address = before[key]
        assert torch.equal(t, value) and (t._version, t.requires_grad, t.data_ptr()) == (version, gradient, address)
        assert t.grad is None
    assert flags == {key: part.training for key, part in net.named_modules()}
    assert hooks == {
        key: {n: len(h) for n, h in vars(part).items() if "_hooks" in n} for key, part in net.named_modules()
    }


def test_hooks_that_cannot_be_copied(x):
    net, lock = build(), threading.Lock()

    class Holder:
        def __init__(self) -> None:
            self.lock = lock

        def __call__(self, *_: object) -> None:
            pytest.fail("a hook ran")

    net.up.register_forward_hook(Holder())
    assert torch.equal(frozen(net)(x), evaluated(build(), x).detach())
    net.held = lock
    with pytest.raises(ModelError, match="Net cannot be copied, so that it could be run: cannot pickle"):
        frozen(net)


def test_gradients_of_the_input(x):
    net = build().double()
    net.shift = net.shift.double()
    pixels = x.double().requires_grad_()
    torch.autograd.gradcheck(frozen(net), (pixels,))


def test_gradients_reach_weights_only_in_training(x):
    net = build()
    with trained_weights():
        trained = frozen(net)
    trained(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert torch.equal(net.conv[1].running_mean, build().conv[1].running_mean)


def test_weights_made_under_inference_mode(x):
    with torch.inference_mode():
        net = build()
    expected = evaluated(build(), x)
    pixels = x.clone().requires_grad_()
    found = frozen(net)(pixels)
    torch.testing.assert_close(found, expected)
    assert torch.autograd.grad(found.sum(), pixels)[0].abs().sum() > 0


def test_many_threads(x):
    net = build()
    run, expected = frozen(net), evaluated(net, x)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, expected) for found in pool.map(lambda _: run(x), range(16)))


def test_parametrized_weights_are_computed(x):
    net = build()
    nn.utils.parametrizations.weight_norm(net.up)
    nn.utils.parametrizations.spectral_norm(net.conv[0])
    with torch.no_grad():
        net.up.parametrizations.weight.original0.mul_(2)
    assert torch.equal(frozen(net)(x), evaluated(net, x).detach())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_weights_that_a_hook_computes_are_refused():
    net = build()
    nn.utils.weight_norm(net.up)
    with pytest.raises(
        ModelError, match=r"up \(Linear\) computes its weights in a hook of WeightNorm: remove the hook"
    ):
        frozen(net)
    net = build()
    prune.l1_unstructured(net.conv[0], "weight", 2)
    with pytest.raises(ModelError, match=r"conv.0 \(Conv2d\) computes its weights in a hook of L1Unstructured"):
        frozen(net)


def test_compiled_and_scripted_modules(x):
    net = build()
    expected = evaluated(net, x)
    assert torch.equal(frozen(torch.compile(net))(x), expected)
    net.compile(backend=lambda *_: pytest.fail("it was compiled"))
    assert torch.equal(frozen(net)(x), expected)
    scripted = torch.jit.trace(nn.Linear(2, 2), torch.randn(1, 2))
    with pytest.raises(ModelError, match=r"0 \(TopLevelTracedModule\) is TorchScript"):
        frozen(nn.Sequential(scripted))


@pytest.mark.parametrize("name", ["convnext_pico", "fastvit_t8", "hgnetv2_b0"])
def test_timm_trunks(name):
    trunk = timm.create_model(name, num_classes=5)
    x = torch.randn(2, 3, 64, 96)
    assert trunk.training
    torch.testing.assert_close(frozen(trunk)(x), evaluated(trunk, x).detach())
