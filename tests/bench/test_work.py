from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

import clipfast
from clipfast.bench.cases import CHEAP, Setting, bound, chosen, relative
from clipfast.bench.memory import resident_peak
from clipfast.bench.peers import PEERS, peers_of
from clipfast.bench.timer import paired
from clipfast.bench.work import Product, joules, multiplications
from clipfast.errors import InputError
from clipfast.methods import METHODS


@pytest.fixture
def model(build_clip: Any) -> Any:
    return clipfast.load(build_clip(layers=3))


def test_multiplications_of_an_encode_by_hand(model: Any) -> None:
    # Width 32, 3 blocks, MLP 128, 4 x 4 patches of 16 x 16 and the class token, embedding 24.
    tokens, width, batch = 17, 32, 2
    block = tokens * (4 * width * width + 2 * width * 128) + 2 * tokens * tokens * width
    by_hand = batch * (16 * 3 * 16 * 16 * width + 3 * block + width * 24)
    setting = Setting.of(model, batch, 1)
    before = torch.backends.mha.get_fastpath_enabled()
    assert multiplications(setting.encode()) == by_hand
    assert torch.backends.mha.get_fastpath_enabled() == before
    # Two products of 17 x 17 x 32 and the last block's MLP for the pooled token only.
    assert multiplications(setting.explain("grad_eclip", 1)) < 1.1 * by_hand


def test_the_roofline_is_a_product(one_thread: None) -> None:
    roof = Product.on(torch.device("cpu"), torch.float32)
    assert multiplications(roof) == roof.multiplications == 512**3
    torch.testing.assert_close(roof(), roof.a @ roof.b)
    assert joules(roof, torch.device("cpu")) is None


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from Linux's /proc")
def test_the_peak_of_resident_memory_sees_what_is_freed_again() -> None:
    def call() -> torch.Tensor:
        return torch.ones(24_000_000).sum()

    call()
    added, result = resident_peak(call)
    assert float(result) == 24_000_000
    # Above 32 MB the allocator always gives memory back, whatever was freed before.
    assert 90e6 < added < 130e6


def test_functions_take_turns() -> None:
    order: list[str] = []
    timings = paired({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2, warmup=1)
    assert order == ["a", "b"] * 3
    assert len(timings["b"].seconds) == 2
    assert timings["a"].ratio == 1


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_every_peer_agrees_with_the_definition_and_leaves_the_model_alone(peer: Any, model: Any) -> None:
    if peer.version is None:
        pytest.skip(f"{peer.distribution} is not installed")
    setting = Setting.of(model, 2, 2)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.module.named_parameters()}
    method = "integrated_gradients:steps=3" if peer.method == "integrated_gradients" else peer.method
    assert peer in peers_of(method, model.towers()[0])
    found = peer.call(model.module, setting.x, setting.texts, method)()
    exact = peer.shown(setting.exact(peer.ours(method), 2, 2), model.spec.size)
    assert found.shape == exact.shape
    assert relative(found, exact) < 1e-5
    assert not any(module._forward_hooks for module in model.module.modules())
    for name, p in model.module.named_parameters():
        assert p.requires_grad == before[name][0]
        assert torch.equal(p, before[name][1])


def test_parameters_of_ones_own_have_no_peer(model: Any) -> None:
    assert peers_of("grad_cam:layer=0", model.towers()[0]) == []


def test_which_methods(model: Any) -> None:
    tower, _ = model.towers()
    quick, everything = chosen(None, tower), chosen("all", tower)
    assert set(quick) < set(everything)
    assert chosen(None, tower, full=True) == everything
    assert {label.split(":")[0] for label in everything} < set(METHODS)
    assert chosen("rise, rise:masks=9", tower) == [f"rise:masks={CHEAP['rise']['masks']}", "rise:masks=9"]
    for wrong in ("grad_eclipse", "rise:mask=3", "grad_cam++", " , "):
        with pytest.raises(InputError):
            chosen(wrong, tower)


def test_the_error_is_relative_and_half_precision_may_miss_more() -> None:
    exact = torch.tensor([3.0, 4.0])
    assert relative(exact + torch.tensor([0.0, 0.5]), exact) == pytest.approx(0.1)
    assert relative(torch.zeros(2), torch.zeros(2)) != relative(torch.zeros(2), torch.zeros(2))
    assert bound("grad_eclip", torch.bfloat16) > bound("grad_eclip", torch.float32)
    assert bound("m2ib:steps=4", torch.float32) > bound("grad_eclip", torch.float32)
