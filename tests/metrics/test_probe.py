"""The linear probe against its definition: optimality by autograd, two classes, penalties, directions, samples."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import clipfast
from clipfast import Explainer
from clipfast.data.datasets import Dataset, Sample, Target
from clipfast.data.datasets.rendered import RenderedScenes
from clipfast.data.scenes import names
from clipfast.errors import ImageError, InputError
from clipfast.metrics import probe
from clipfast.metrics.probe import (
    L2,
    Encoded,
    LinearHead,
    encode,
    fit_held_out,
    fit_probe,
    hold_out,
    zero_shot_head,
)
from clipfast.metrics.zero_shot import ZeroShot


def clusters(classes: int = 3, each: int = 20, spread: float = 0.6, seed: int = 0) -> Encoded:
    """Unit vectors around one direction a class, all of them far to one side."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 8, generator=torch.Generator().manual_seed(99)) + 2
    labels = torch.arange(classes * each) % classes
    z = centres[labels] + spread * torch.randn(len(labels), 8, generator=generator)
    return Encoded(F.normalize(z, dim=-1), labels, torch.arange(len(labels)), [f"class {k}" for k in range(classes)])


def objective(weight: Tensor, bias: Tensor, encoded: Encoded, l2: float) -> Tensor:
    """The definition, in the variables it is penalised in: z centred, of unit variance over all dimensions."""
    z = encoded.z.double()
    z = z - z.mean(0)
    z = z / z.square().mean().sqrt()
    return F.cross_entropy(z @ weight.T + bias, encoded.labels) + l2 / 2 * weight.square().sum()


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("l2", [1.0, 1e-2])
def test_no_other_head_is_better(classes: int, l2: float) -> None:
    encoded = clusters(classes)
    head = fit_probe(encoded, l2=l2)
    assert head.l2 == l2 and head.weight.shape == (classes, 8) and head.weight.dtype == torch.float64
    z = encoded.z.double()
    scale = (z - z.mean(0)).square().mean().sqrt()
    weight = (head.weight * scale).requires_grad_()
    bias = (head.bias + head.weight @ z.mean(0)).detach().requires_grad_()
    loss = objective(weight, bias, encoded, l2)
    loss.backward()
    assert float(weight.grad.abs().max()) < 1e-4 and float(bias.grad.abs().max()) < 1e-4
    # The same logits, written with and without the centring.
    assert torch.allclose(head.logits(encoded.z), ((z - z.mean(0)) / scale) @ weight.T + bias, atol=1e-9)
    # Another solver, from another start.
    w, b = torch.zeros(classes, 8).double().requires_grad_(), torch.zeros(classes).double().requires_grad_()
    solver = torch.optim.LBFGS([w, b], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        value = objective(w, b, encoded, l2)
        value.backward()
        return value

    solver.step(closure)
    assert torch.allclose(w, weight, atol=2e-3)
    assert abs(float((objective(w, b, encoded, l2) - loss).detach())) < 1e-7


def test_probabilities_hits_and_accuracy() -> None:
    head = LinearHead(
        torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]]), torch.tensor([0.0, 1.0, 0.0]), ["a", "b", "c"]
    )
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert torch.allclose(head.probabilities(z)[0], torch.tensor([2.0, 1.0, 2.0]).softmax(0))
    # "a" and "c" are equally likely: the lower label counts.
    assert head.hits(z, torch.tensor([0, 1])).tolist() == [True, True]
    assert head.hits(z, torch.tensor([2, 1])).tolist() == [False, True]
    assert head.accuracy(Encoded(z, torch.tensor([2, 1]), torch.arange(2), ["a", "b", "c"])) == 0.5


def test_directions_are_unit_and_know_no_common_shift() -> None:
    head = fit_probe(clusters(4), l2=0.01)
    assert torch.allclose(head.directions.norm(dim=-1), torch.ones(4).double())
    shifted = LinearHead(head.weight + torch.randn(8).double(), head.bias, head.classes)
    assert torch.allclose(shifted.directions, head.directions, atol=1e-9)
    z = clusters(4).z
    assert torch.allclose(shifted.probabilities(z), head.probabilities(z), atol=1e-9)


def test_the_penalty_is_chosen_on_what_was_held_out() -> None:
    encoded = clusters(4, each=15, spread=1.5)
    fitted, kept = hold_out(encoded.labels, 0.2, seed=3)
    losses = {}
    for l2 in L2:
        head = fit_probe(encoded.select(fitted), l2=l2)
        losses[l2] = float(F.cross_entropy(head.logits(encoded.z[kept]), encoded.labels[kept]))
    best = min(losses, key=losses.__getitem__)
    # At neither end of the grid, or the choice would not be seen.
    assert best not in (L2[0], L2[-1])
    chosen, held = fit_probe(encoded, seed=3), fit_held_out(encoded, seed=3)
    assert chosen.l2 == held.l2 == best
    assert torch.equal(held.weight, fit_probe(encoded.select(fitted), l2=best).weight)
    assert torch.equal(chosen.weight, fit_probe(encoded, l2=best).weight)
    assert not torch.equal(fit_held_out(encoded, seed=4).weight, held.weight)


def test_what_is_held_out() -> None:
    labels = torch.tensor([0] * 10 + [1] * 3 + [2] + [3] * 2)
    fitted, kept = hold_out(labels, 0.2, seed=0)
    assert sorted([*fitted.tolist(), *kept.tolist()]) == list(range(16))
    assert torch.bincount(labels[kept], minlength=4).tolist() == [2, 1, 0, 1]
    assert hold_out(labels, 0.2, seed=0)[1].tolist() == kept.tolist()
    assert any(hold_out(labels, 0.2, seed=s)[1].tolist() != kept.tolist() for s in range(1, 4))
    assert torch.bincount(labels[hold_out(labels, 0.99, seed=0)[1]], minlength=4).tolist() == [9, 2, 0, 1]
    for share in (0, 1, -0.5, float("nan")):
        with pytest.raises(InputError, match="between 0 and 1"):
            hold_out(labels, share, seed=0)


def test_the_same_embedding_for_all_says_nothing() -> None:
    encoded = Encoded(torch.ones(6, 4) / 2, torch.tensor([0, 0, 0, 0, 1, 1]), torch.arange(6), ["a", "b"])
    head = fit_probe(encoded, l2=0.1)
    assert torch.allclose(head.probabilities(encoded.z)[:, 0], torch.tensor(4 / 6).double(), atol=1e-4)


def test_what_cannot_be_fitted() -> None:
    encoded = clusters(3, each=4)
    with pytest.raises(InputError, match="two or more classes"):
        fit_probe(Encoded(encoded.z, torch.zeros(12).long(), encoded.numbers, ["a"]))
    with pytest.raises(InputError, match="none of d: give more"):
        fit_probe(Encoded(encoded.z, encoded.labels, encoded.numbers, ["a", "b", "c", "d"]))
    with pytest.raises(InputError, match="none of d, e, f and 2 more"):
        fit_probe(Encoded(encoded.z, encoded.labels, encoded.numbers, list("abcdefgh")))
    for l2 in (0, -1, float("inf"), float("nan")):
        with pytest.raises(InputError, match="l2"):
            fit_probe(encoded, l2=l2)
    one = clusters(3, each=1)
    for fit in (fit_probe, fit_held_out):
        with pytest.raises(InputError, match="no class has two samples"):
            fit(one)
    assert fit_probe(one, l2=0.1).accuracy(one) == 1
    broken = Encoded(encoded.z.clone(), encoded.labels, encoded.numbers, encoded.classes)
    broken.z[3, 2] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        fit_probe(broken)


class Listed(Dataset):
    """Samples that the test makes up."""

    offers = frozenset({"labels"})

    def __init__(self, samples: list[Sample | ImageError], classes: list[str] | None):
        self.samples, self.classes, self.name, self.opened = samples, classes, "listed", 0

    def __len__(self) -> int:
        return len(self.samples)

    def _sample(self, index: int) -> Sample:
        self.opened += 1
        found = self.samples[index]
        if isinstance(found, ImageError):
            raise found
        return found


def sample(number: int, *labels: int) -> Sample:
    pixels = torch.randint(256, (6, 6, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy()).resize((64, 64))
    return Sample(str(number), image, [Target(f"class {label}", label) for label in labels], [])


def test_features_of_samples_of_one_class(build_clip, tmp_path: Path, monkeypatch) -> None:
    module = build_clip()
    model = clipfast.load(module, device="cpu")
    damaged = Sample("damaged", tmp_path / "gone.jpg", [Target("class 0", 0)], [])
    torn = ImageError("this one is torn")
    listed = Listed([sample(0, 1), sample(1), sample(2, 0, 1), damaged, sample(3, 2, 2), torn], ["a", "b", "c"])
    done: list[int] = []
    found = encode(model, listed, on_error="skip", progress=done.append)
    assert sum(done) == 6 and found.numbers.tolist() == [0, 4] and found.labels.tolist() == [1, 2]
    for row, number in zip(found.z, (0, 3), strict=True):
        x = torch.stack([one.pixels for one in probe.batches(model, Listed([sample(number)], None))])[0]
        x = clipfast.data.geometry.normalize(x, model.spec)
        with torch.no_grad():
            assert torch.allclose(row, module.encode_image(x, normalize=True)[0], atol=1e-6)
    # Made once, and again after the weights changed.
    opened = listed.opened
    assert encode(model, listed, on_error="skip") is found and listed.opened == opened
    with torch.no_grad():
        module.visual.proj.mul_(torch.linspace(0.5, 2, 24))
    again = encode(model, listed, on_error="skip")
    assert again is not found and not torch.allclose(again.z, found.z, atol=1e-3)
    with pytest.raises(ImageError, match=r"gone\.jpg|torn"):
        encode(model, listed)
    with pytest.raises(InputError, match="no classes"):
        encode(model, Listed([sample(0, 1)], None))
    with pytest.raises(InputError, match="exactly one class"):
        encode(model, Listed([sample(0), sample(1, 0, 1)], ["a", "b"]))


def test_nothing_is_kept_of_data_that_is_gone(build_clip) -> None:
    model = clipfast.load(build_clip(), device="cpu")
    listed = Listed([sample(0, 1), sample(1, 0)], ["a", "b"])
    encode(model, listed)
    assert len(probe._cache[model]) == 1
    del listed
    gc.collect()
    assert len(probe._cache[model]) == 0


def test_the_demo_models_probe_and_its_maps() -> None:
    model = clipfast.load("demo", device="cpu")
    some = ["dog", "banana", "bus", "guitar"]
    scenes = RenderedScenes(7, 48, objects=1)
    scenes._scenes.only = some
    scenes.classes, scenes._labels = some, {name: i for i, name in enumerate(some)}
    encoded = encode(model, scenes)
    head = fit_probe(encoded.select(torch.arange(32)))
    assert head.accuracy(encoded.select(torch.arange(32, 48))) > 0.9
    # A class of the probe is asked for like a text: its map lies on the object.
    inside = []
    explainer = Explainer(model)
    for i in range(32, 38):
        target = scenes[i].targets[0]
        heat = explainer(scenes[i].image, head.directions[[target.label]].float()).resize(0)[0]
        inside.append(float(heat[torch.from_numpy(target.mask)].sum() / heat.sum()) / float(target.mask.mean()))
    assert min(inside) > 1 and sum(inside) / len(inside) > 2
    zero_shot = zero_shot_head(model, some, "bare")
    columns = ZeroShot("bare").measure(model, scenes)
    assert zero_shot.logits(encoded.z).argmax(-1).tolist() == columns["prediction"].tolist()
    assert zero_shot.accuracy(encoded) == float(columns["top-1"].mean())
    assert len(zero_shot_head(model, names(), "bare").classes) == 64
