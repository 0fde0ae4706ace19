"""Neurons against hooks on the model's own modules, their concepts against loops, and neurons that were planted."""

from __future__ import annotations

import copy
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import clipfast
from clipfast.data import prepare
from clipfast.data.datasets import Dataset, Sample, Target
from clipfast.data.datasets.rendered import RenderedScenes
from clipfast.data.geometry import InputSpec, normalize
from clipfast.errors import ImageError, InputError
from clipfast.metrics import dissection, network_dissection
from clipfast.metrics.base import figures
from clipfast.metrics.dissection import ClipDissect, Dissection, Neurons
from clipfast.metrics.network_dissection import NetworkDissect


@pytest.mark.parametrize("block", [0, 1, -1])
@pytest.mark.parametrize("layer", ["mlp", "residual"])
def test_neurons_are_those_of_the_models_own_modules(build_clip, block: int, layer: str) -> None:
    module = build_clip(ls_init_value=0.5)
    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found, z = Neurons(block, layer).read(clipfast.load(module, device="cpu").towers()[0], x)
    seen = []
    hooked = copy.deepcopy(module).visual
    own = hooked.transformer.resblocks[block]
    (own.mlp.gelu if layer == "mlp" else own).register_forward_hook(lambda m, i, out: seen.append(out))
    with torch.no_grad():
        embedding = F.normalize(hooked(x), dim=-1)
    assert found.shape == (3, 17, 128 if layer == "mlp" else 32)
    assert torch.allclose(found, seen[0], atol=1e-5) and torch.allclose(z, embedding, atol=1e-5)
    assert Neurons(block, layer).count(clipfast.load(module, device="cpu").towers()[0]) == found.shape[2]


def naive_soft_wpmi(p: Tensor, q: Tensor, c: ClipDissect) -> Tensor:
    """Equations 3 and 7 of the paper, picture by picture."""
    given = torch.zeros(q.shape[1], p.shape[1], dtype=torch.float64)
    for k in range(q.shape[1]):
        strongest = sorted(range(len(q)), key=lambda i: (-float(q[i, k]), i))[: c.top]
        for m in range(p.shape[1]):
            for rank, i in enumerate(strongest):
                exponents = [math.exp(c.scale * float(v)) for v in p[i]]
                share = exponents[m] / sum(exponents)
                weight = c.first - rank / c.top * (c.first - c.last)
                given[k, m] += math.log(1 + weight * (share - 1) + 1e-7)
    mean = [math.log(sum(math.exp(float(v)) for v in column) / len(column)) for column in given.T]
    return given - c.prior * torch.tensor(mean, dtype=torch.float64)


def naive_cosine(p: Tensor, q: Tensor, cubed: bool) -> Tensor:
    found = torch.zeros(q.shape[1], p.shape[1], dtype=torch.float64)
    for k in range(q.shape[1]):
        for m in range(p.shape[1]):
            a, b = q[:, k].double().numpy(), p[:, m].double().numpy()
            if cubed:
                a, b = (a - a.mean()) ** 3, (b - b.mean()) ** 3
                found[k, m] = (a * b).sum() / max(np.linalg.norm(a), 1e-3) / max(np.linalg.norm(b), 1e-3)
            elif np.linalg.norm(a) > 0:
                found[k, m] = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    return found


@pytest.mark.parametrize("chunk", [1, 150, 1 << 24])
def test_similarities_are_those_of_loops(chunk: int, monkeypatch) -> None:
    monkeypatch.setattr(dissection, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(14, 5, generator=generator, dtype=torch.float64) - 0.3
    q = torch.randn(14, 7, generator=generator, dtype=torch.float64)
    q[:, 2] = 0  # a dead neuron: ties throughout
    q[3:6, 4] = q[3, 4]
    for protocol in (ClipDissect(top=6), ClipDissect(top=14, scale=40, prior=0.6, first=0.9, last=0.2)):
        assert torch.allclose(protocol.scores(p, q), naive_soft_wpmi(p, q, protocol), atol=1e-9)
    for name, cubed in (("cosine", False), ("cosine_cubed", True)):
        found = ClipDissect(similarity=name).scores(p, q)
        assert torch.allclose(found, naive_cosine(p, q, cubed), atol=1e-12) and not found[2].any()


def test_the_defaults_are_the_published_ones() -> None:
    c = ClipDissect()
    assert (c.top, c.scale, c.prior, c.first, c.last) == (100, 10, 1, 0.998, 0.97)
    # A picture wholly of its word adds ln(1 + 1e-7); one without it ln(1 - w + 1e-7).
    one = ClipDissect(top=2, scale=1e4, prior=0).scores(
        torch.tensor([[1.0, 0], [0, 1]]).double(), torch.tensor([[2.0], [1]])
    )
    assert one[0].tolist() == pytest.approx([math.log(1 - 0.984 + 1e-7) + 1e-7, math.log(1 - 0.998 + 1e-7) + 1e-7])


@pytest.mark.parametrize("similarity", ["soft_wpmi", "cosine", "cosine_cubed"])
def test_neurons_that_follow_a_word_are_found(similarity: str) -> None:
    generator = torch.Generator().manual_seed(1)
    p = 0.1 * torch.rand(300, 12, generator=generator)
    p[torch.arange(300), torch.arange(300) % 12] += 0.3
    planted = torch.tensor([3, 0, 11, 7])
    q = p[:, planted] + 0.02 * torch.randn(300, 4, generator=generator)
    found = Dissection(ClipDissect(similarity=similarity, top=20).scores(p, q), [f"word {m}" for m in range(12)])
    assert found.columns()["concept"].tolist() == planted.tolist()
    assert [row[0][0] for row in found.best()] == ["word 3", "word 0", "word 11", "word 7"]
    assert all(a >= b >= c for (_, a), (_, b), (_, c) in found.best(3))
    assert found.best()[1][0][1] == pytest.approx(float(found.columns()["score"][1]))


def with_planted_neuron(word: str, scenes: list[Sample]) -> clipfast.models.model.Model:
    """The demo model with a hidden unit of the last block that was fitted to answer to one thing."""
    model = clipfast.load("demo", device="cpu")
    module = copy.deepcopy(model.module)
    own = module.visual.transformer.resblocks[-1]
    seen = []
    handle = own.ln_2.register_forward_hook(lambda m, i, out: seen.append(out[:, 0]))
    x = normalize(torch.stack([prepare(one.image, model.spec)[0] for one in scenes]), model.spec)
    with torch.no_grad():
        module.visual(x)
        handle.remove()
        y = torch.cat(seen)
        wanted = torch.tensor([3.0 if one.targets[0].text == word else -3.0 for one in scenes])
        centred = y - y.mean(0)
        row = torch.linalg.solve(
            centred.T @ centred + 0.1 * torch.eye(y.shape[1]), centred.T @ (wanted - wanted.mean())
        )
        own.mlp.c_fc.weight[5] = row
        own.mlp.c_fc.bias[5] = wanted.mean() - y.mean(0) @ row
    return clipfast.load(module, tokenizer=model.tokenizer, preprocess=model.spec, device="cpu")


def test_a_planted_neuron_of_the_demo_model() -> None:
    scenes = RenderedScenes(21, 24, objects=1)
    scenes._scenes.only = scenes.classes[:6]
    samples, words = list(scenes), scenes.classes
    counts = Counter(one.targets[0].text for one in samples)
    ((word, count),) = counts.most_common(1)
    assert count >= 3
    model, judge = with_planted_neuron(word, samples), clipfast.load("demo", device="cpu")
    pictures, done = [one.image for one in samples], []
    protocol = ClipDissect(top=count)
    found = protocol.dissect(model, pictures, words, judge=judge, progress=done.append)
    assert found.scores.shape == (768, 64) and sum(done) == 24
    assert found.best()[5][0][0] == word
    columns = ClipDissect(similarity="cosine_cubed").measure(model, pictures, words, judge=judge)
    assert float(columns["concept"][5]) == words.index(word) and len(columns["score"]) == 768
    assert figures(ClipDissect(), columns, resamples=3)[0].count == 768


def test_a_folder_of_pictures_by_hand(tmp_path: Path) -> None:
    model = clipfast.load("demo", device="cpu")
    scenes = RenderedScenes(5, 6)
    for i, one in enumerate(scenes):
        one.image.save(tmp_path / f"{i}.png")
    (tmp_path / "9.png").write_bytes(b"not a picture")
    protocol, words = ClipDissect(block=1, layer="residual", top=3), ["dog", "cat", "moon"]
    with pytest.raises(ImageError, match=r"9\.png"):
        protocol.dissect(model, tmp_path, words)
    found = protocol.dissect(model, tmp_path, words, on_error="skip")
    tower, _ = model.towers()
    x = normalize(torch.stack([prepare(one.image, model.spec)[0] for one in scenes]), model.spec)
    with torch.no_grad():
        h = tower.run(tower.embed(x), 0, 2)
        cosines = tower.encode(x) @ model.encode_texts(words).T
    assert torch.allclose(found.scores, naive_soft_wpmi(cosines, h[:, 0], protocol).float(), atol=1e-3)
    with pytest.raises(InputError, match="top=100 pictures, and there are 6"):
        ClipDissect().dissect(model, [one.image for one in scenes], words)


class Reds(Dataset):
    """Dark pictures of 64 x 64 pixels with a red block of patches and a blue one; ignored stripes where asked for."""

    offers = frozenset({"labels", "masks"})
    name, classes = "reds", ["nothing", "red", "blue"]

    def __init__(self, count: int, ignore: bool = False, gaps: bool = False):
        self.count, self.ignore, self.gaps = count, ignore, gaps

    def __len__(self) -> int:
        return self.count

    def _sample(self, index: int) -> Sample:
        if self.gaps and index == 2:
            raise ImageError("torn")
        rng = np.random.default_rng(index)
        pixels = rng.integers(0, 30, (64, 64, 3), np.uint8)
        rows = rng.permutation(4)[:2] * 16
        targets = []
        # Each colour differs from patch to patch, or patches would tie.
        for label, row, channel in ((1, rows[0], 0), (2, rows[1], 2)):
            left = int(rng.integers(3)) * 16
            pixels[row : row + 16, left : left + 32, channel] = rng.integers(180, 256, (16, 32), np.uint8)
            mask = np.zeros((64, 64), np.int8)
            mask[row : row + 16, left : left + 32] = 1
            if self.ignore:
                mask[:, left + 10 : left + 20] = -1
            targets.append(Target(self.classes[label], label, mask))
        if self.gaps and index == 3:
            targets = []
        return Sample(str(index), Image.fromarray(pixels), targets, [])


def colours(build_clip):
    """A small CLIP whose first two residual channels are how red and how blue a patch is; no block writes to them."""
    module = build_clip(no_ln_pre=True, layers=1)
    with torch.no_grad():
        visual, block = module.visual, module.visual.transformer.resblocks[0]
        for neuron, channel in ((0, 0), (1, 2)):
            visual.conv1.weight[neuron] = 0
            visual.conv1.weight[neuron, channel] = 1 / 256
            visual.positional_embedding[:, neuron] = visual.class_embedding[neuron] = 0
            for layer in (block.attn.out_proj, block.mlp.c_proj):
                layer.weight[neuron] = layer.bias[neuron] = 0
    return clipfast.load(module, preprocess=InputSpec((64, 64), (16, 16)), device="cpu")


def naive_iou(model, dataset, protocol: NetworkDissect, keep: list[int]) -> Tensor:
    """The definition: pixel sets of the first neurons, one neuron, class and picture after the other."""
    tower, _ = model.towers()
    neurons = Neurons(protocol.block, protocol.layer)
    maps = []
    for i in keep:
        pixels, _ = prepare(dataset[i].image, model.spec)
        values = neurons.read(tower, normalize(pixels[None], model.spec))[0][0, 1:]
        maps.append(values.T.unflatten(1, tower.grid))
    every = torch.stack(maps).transpose(0, 1).flatten(1)[:12]  # (D, N n)
    allowed = int(protocol.quantile * every.shape[1])
    ordered = [sorted(row.tolist(), reverse=True) for row in every]
    thresholds = [(row[allowed - 1] + row[allowed]) / 2 for row in ordered]
    found = torch.zeros(len(every), len(dataset.classes), dtype=torch.float64)
    for k in range(len(every)):
        for c in range(len(dataset.classes)):
            both = either = 0
            for own, i in zip(maps, keep, strict=True):
                image = dataset[i].image
                size = (image.height, image.width)
                active = F.interpolate(own[None, k : k + 1], size, mode="bilinear")[0, 0] > thresholds[k]
                masks = [torch.from_numpy(t.mask) for t in dataset[i].targets if t.label == c]
                mask = masks[0] if masks else torch.zeros(size, dtype=torch.int8)
                both += int((active & (mask == 1)).sum())
                either += int(((active | (mask == 1)) & (mask != -1)).sum())
            found[k, c] = both / either if either else 0
    return found


@pytest.mark.parametrize(("ignore", "gaps"), [(False, False), (True, True)])
def test_iou_is_that_of_pixel_sets(build_clip, ignore: bool, gaps: bool, monkeypatch) -> None:
    monkeypatch.setattr(network_dissection, "_PIXELS", 5 * 64 * 64)
    model, dataset = colours(build_clip), Reds(6, ignore, gaps)
    keep = [0, 1, 4, 5] if gaps else list(range(6))
    for protocol in (NetworkDissect(layer="residual", quantile=0.1), NetworkDissect(quantile=0.03)):
        found = protocol.dissect(model, dataset, on_error="skip")
        want = naive_iou(model, dataset, protocol, keep)
        assert torch.allclose(found.scores[:12], want, atol=2e-3) and int((want > 0).sum()) > 8
        assert not found.scores[:, 0].any()


def test_planted_map_neurons(build_clip) -> None:
    model, done = colours(build_clip), []
    # Two of sixteen patches have the colour; what is bilinear between them and others has it in part.
    protocol = NetworkDissect(layer="residual", quantile=0.13)
    found = protocol.dissect(model, Reds(30), progress=done.append)
    assert sum(done) == 60
    assert min(found.scores[0, 1], found.scores[1, 2]) > 0.35 > 0.1 > max(found.scores[0, 2], found.scores[1, 1])
    columns = protocol.measure(model, Reds(30))
    assert columns["concept"][:2].tolist() == [1, 2] and columns["detector"][:2].tolist() == [1, 1]
    values = {figure.name: figure.value for figure in figures(protocol, columns, resamples=3)}
    assert values["detector"] == float((columns["score"] > 0.04).double().mean())


def test_the_highest_values_are_enough_for_the_quantile() -> None:
    generator = torch.Generator().manual_seed(0)
    for quantile in (0.001, 0.1, 0.9):
        # Ties, and fewer pictures than were announced.
        values = torch.randint(400, (900, 3, 16), generator=generator).float()
        highest = network_dissection._Highest(quantile, 1000)
        for one in values:
            highest.add(one)
        rows = values.transpose(0, 1).flatten(1).sort(dim=1, descending=True).values
        at = int(quantile * 900 * 16)
        want = (rows[:, at - 1] + rows[:, at]) / 2
        assert torch.equal(highest.threshold("data"), want)
        assert ((rows > want[:, None]).double().mean(1) <= quantile).all()


def test_what_cannot_be_dissected(build_clip, build_resnet) -> None:
    with pytest.raises(InputError, match="did you mean 'residual'"):
        Neurons(layer="residuals")
    with pytest.raises(InputError, match="did you mean 'cosine'"):
        ClipDissect(similarity="cosin")
    for wrong in ({"top": 0}, {"first": 0.5, "last": 0.9}, {"first": 1.2}):
        with pytest.raises(InputError, match="top must be"):
            ClipDissect(**wrong)
    with pytest.raises(InputError, match="same pictures"):
        ClipDissect().scores(torch.zeros(3, 2), torch.zeros(4, 2))
    for quantile in (0, 1, float("nan")):
        with pytest.raises(InputError, match="quantile"):
            NetworkDissect(quantile=quantile)
    model = colours(build_clip)
    with pytest.raises(InputError, match="block=3 is no block"):
        NetworkDissect(block=3).dissect(model, Reds(2))
    unmasked = Reds(2)
    unmasked.offers = frozenset({"labels"})
    with pytest.raises(InputError, match="no masks"):
        NetworkDissect().dissect(model, unmasked)
    with pytest.raises(InputError, match="no sample with a mask"):
        NetworkDissect().dissect(model, Reds(0))
    resnet = clipfast.load(build_resnet(), preprocess=InputSpec((96, 96), (32, 32)), device="cpu")
    with pytest.raises(InputError, match="tokens of a vision transformer, and this is a ResNet"):
        NetworkDissect().dissect(resnet, Reds(2))
