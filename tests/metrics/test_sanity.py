"""Rank correlation against scipy; maps of randomised copies against copies randomised by hand; two classes' maps."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor, nn

from clipfast import Explainer, load
from clipfast.data.datasets import open_dataset
from clipfast.data.scenes import render
from clipfast.errors import InputError, ModelError
from clipfast.metrics.evaluate import evaluate
from clipfast.metrics.sanity import (
    ClassSensitivity,
    SanityCascade,
    SanityWordCascade,
    parts,
    randomized,
    spearman,
)
from clipfast.metrics.stability import map_ssim

TOP_DOWN = ["projection", "block 2", "block 1", "block 0", "embedding"]


def test_rank_correlation_is_scipy_s_ties_and_all() -> None:
    generator = torch.Generator().manual_seed(0)
    for values in (50, 4, 2):
        a, b = torch.randint(values, (2, 40, 23), generator=generator).float()
        expected = [spearmanr(x, y).statistic for x, y in zip(a.numpy(), b.numpy(), strict=True)]
        assert spearman(a, b).tolist() == pytest.approx(expected, abs=1e-12)
    c = torch.randn(5, 1000, dtype=torch.float64, generator=generator)
    d = c + torch.randn(5, 1000, dtype=torch.float64, generator=generator)
    expected = [spearmanr(x, y).statistic for x, y in zip(c.numpy(), d.numpy(), strict=True)]
    assert spearman(c, d).tolist() == pytest.approx(expected, abs=1e-12)
    # Not contiguous, and the rows one by one.
    one_by_one = torch.cat([spearman(c[i : i + 1], d[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(spearman(c.T.contiguous().T, d), one_by_one, rtol=0, atol=1e-12)


def test_extremes_of_rank_correlation() -> None:
    a = torch.tensor([[3.0, 1, 2, 7]])
    assert spearman(a, a.exp()).tolist() == pytest.approx([1], abs=1e-15)
    assert spearman(a, -a).tolist() == pytest.approx([-1], abs=1e-15)
    constant = torch.full((1, 4), 2.0)
    assert spearman(a, constant).tolist() == [0] and spearman(constant, a).tolist() == [0]
    assert spearman(constant, 3 * constant).tolist() == [1]
    assert spearman(a[:, :1], a[:, 1:2]).tolist() == [1]
    for x, y in ((a, a[:, :3]), (a[0], a[0]), (a[:, :0], a[:, :0]), (a, torch.full((1, 4), torch.nan))):
        with pytest.raises(InputError, match="rank correlation compares"):
            spearman(x, y)


@pytest.mark.parametrize("side", ["image", "text"])
def test_parts_are_all_of_a_tower_once(build_clip, build_resnet, side) -> None:
    plain = build_clip(ls_init_value=0.1)
    custom = CustomTextCLIP(
        24,
        CLIPVisionCfg(image_size=32, patch_size=16, layers=3, width=32, head_width=8),
        CLIPTextCfg(context_length=8, vocab_size=50, width=32, heads=4, layers=3),
    )
    for module in (plain, custom):
        found = parts(module, side)
        assert list(found) == TOP_DOWN
        names = [name for some in found.values() for name in some]
        own = [n for n, _ in module.named_parameters() if n.startswith("visual.") == (side == "image")]
        assert sorted(names) == sorted(n for n in own if not n.startswith("logit"))
        assert all("resblocks.1." in name for name in found["block 1"])
    embedding = {"image": {"conv1", "class_embedding", "ln_pre", "positional_embedding"},
                 "text": {"token_embedding", "positional_embedding"}}[side]  # fmt: skip
    assert {n.removeprefix("visual.").split(".")[0] for n in parts(plain, side)["embedding"]} == embedding
    if side == "image":
        found = parts(build_resnet(), side)
        expected = ["projection", "layer4.1", "layer4.0", "layer3.0", "layer2.1", "layer2.0", "layer1.0", "embedding"]
        assert list(found) == expected
        assert all(name.startswith("visual.attnpool.") for name in found["projection"])
        assert all(name.startswith(("visual.conv", "visual.bn")) for name in found["embedding"])
    with pytest.raises(ModelError, match="no blocks on its image side"):
        parts(nn.Linear(2, 2), "image")


def rho(a: Tensor, b: Tensor) -> float:
    """scipy's correlation of two maps, and the rule for constant ones."""
    flat = [bool(m.max() == m.min()) for m in (a, b)]
    return float(all(flat)) if any(flat) else float(spearmanr(a.flatten(), b.flatten()).statistic)


def pixels(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randomize(module: Any, prefix: str, number: int, seed: int) -> None:
    """Draw the parameters whose names begin so anew, as the docstring says."""
    generator = np.random.default_rng((seed, number))
    for name, p in module.named_parameters():
        if name.startswith(prefix):
            drawn = torch.from_numpy(generator.standard_normal(tuple(p.shape), dtype=np.float32)).double()
            p.data = p.data.mean() + p.data.std(correction=0) * drawn


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("method", ["grad_eclip", "chefer"])
def test_a_cascade_is_that_of_a_model_randomised_by_hand(build_clip, alone, method) -> None:
    module = build_clip().double()
    state = {name: (t.clone(), t._version, t.data_ptr()) for name, t in module.state_dict(keep_vars=True).items()}
    texts = torch.randn(2, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = pixels(3)
    protocol = SanityCascade(alone=alone, seed=4, side=20)
    columns = protocol.measure(Explainer(load(module), method), x, texts)
    for name, t in module.state_dict(keep_vars=True).items():
        assert torch.equal(t, state[name][0]) and (t._version, t.data_ptr()) == state[name][1:]

    before = Explainer(load(module), method)(x, texts).maps.flatten(0, 1)
    copy, correlations, structures = deepcopy(module), [], []
    prefixes = [("visual.ln_post", "visual.proj"), *((f"visual.transformer.resblocks.{i}.",) for i in (2, 1, 0))]
    for number, some in enumerate(prefixes):
        if alone:
            copy = deepcopy(module)
        randomize(copy, some if len(some) > 1 else some[0], number, 4)
        after = Explainer(load(copy), method)(x, texts).maps.flatten(0, 1)
        expected = [rho(a, b) for a, b in zip(before, after, strict=True)]
        part = TOP_DOWN[number]
        assert columns[f"Spearman {part}"].tolist() == pytest.approx(expected, abs=1e-9)
        torch.testing.assert_close(columns[f"SSIM {part}"], map_ssim(before, after, 20), rtol=0, atol=1e-9)
        correlations.append(columns[f"Spearman {part}"])
        structures.append(columns[f"SSIM {part}"])
    every = torch.stack([*correlations, columns["Spearman embedding"]]).mean(0)
    torch.testing.assert_close(columns["Spearman"], every)
    torch.testing.assert_close(columns["SSIM"], torch.stack([*structures, columns["SSIM embedding"]]).mean(0))
    assert set(protocol.summary(columns)) == {"Spearman", "SSIM"}


def test_batches_and_pictures_of_several_sizes(build_clip) -> None:
    explainer = Explainer("demo", resize="keep")
    pictures = [Image.fromarray(render(seed, size=80, objects=1).image) for seed in (1, 2)]
    pictures[1] = pictures[1].resize((112, 80))
    protocol = SanityCascade()
    whole = protocol.measure(explainer, pictures, ["dog", "cat"])
    alone = [protocol.measure(explainer, picture, ["dog", "cat"]) for picture in pictures]
    for name, column in whole.items():
        torch.testing.assert_close(column, torch.cat([one[name] for one in alone]), rtol=0, atol=1e-4)


def test_one_copy_is_randomised_and_where_asked_for_restored(build_clip) -> None:
    explainer = Explainer(load(build_clip().double()), "grad_eclip")
    found = [(part, other.model.module) for part, other in randomized(explainer, "image")]
    assert [part for part, _ in found] == TOP_DOWN and len({id(module) for _, module in found}) == 1
    state = explainer.model.module.state_dict()
    for name, t in found[0][1].state_dict().items():
        drawn = name.startswith("visual.") and t.numel() > 1
        assert torch.equal(t, state[name]) != drawn, name
        if drawn and t.numel() > 1000:
            assert float(t.std() / state[name].std()) == pytest.approx(1, abs=0.1)
    # Restored, nothing but the latest part differs; and at the end nothing does.
    other = None
    for _, other in randomized(explainer, "text", alone=True):
        assert any(not torch.equal(t, state[n]) for n, t in other.model.module.state_dict().items())
    assert other is not None
    assert all(torch.equal(t, state[n]) for n, t in other.model.module.state_dict().items())


@pytest.mark.parametrize("built", [False, True])
def test_a_caller_s_inference_mode_changes_nothing(build_clip, built) -> None:
    """Whether the model was made under it, or only the cascade runs there."""
    texts = torch.randn(2, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = SanityCascade().measure(Explainer(load(build_clip().double())), pixels(2), texts)
    with torch.inference_mode(built):
        module = build_clip().double()
    with torch.inference_mode():
        found = SanityCascade().measure(Explainer(load(module)), pixels(2), texts)
    for name, column in expected.items():
        torch.testing.assert_close(found[name], column, rtol=0, atol=1e-9)


def test_half_precision_is_randomised_too(build_clip) -> None:
    module = build_clip().bfloat16()
    texts = torch.randn(2, 24, generator=torch.Generator().manual_seed(1))
    columns = SanityCascade().measure(Explainer(load(module)), pixels(2).float(), texts)
    assert columns["SSIM"].isfinite().all() and (columns["SSIM"] < 1).all()


def test_a_randomised_demo_model_says_something_else() -> None:
    pictures = [Image.fromarray(render(seed, size=96, objects=2).image) for seed in range(4)]
    columns = SanityCascade().measure(Explainer("demo"), pictures, ["dog", "car"])
    assert float(columns["Spearman"].mean()) < 0.5 and float(columns["SSIM"].mean()) < 0.7
    by_text = SanityCascade(tower="text").measure(Explainer("demo"), pictures, ["dog", "car"])
    assert by_text["Spearman"].mean() < 0.9


def test_word_maps_of_a_randomised_text_tower(build_clip, tokenizer) -> None:
    module = build_clip().double()
    explainer = Explainer(load(module, tokenizer=tokenizer), "grad_eclip")
    texts = ["a red car on a road", "boat", "two dogs in the grass"]
    x = pixels(3, 5)
    columns = SanityWordCascade(seed=2).measure(explainer, x, texts)
    copy = deepcopy(module)
    before = [explainer.words(image, text).values for image, text in zip(x, texts, strict=True)]
    for number, prefix in enumerate([("ln_final", "text_projection"), "transformer.resblocks.2."]):
        generator = np.random.default_rng((2, number))
        for name, p in copy.named_parameters():
            if name.startswith(prefix):
                drawn = torch.from_numpy(generator.standard_normal(tuple(p.shape), dtype=np.float32)).double()
                p.data = p.data.mean() + p.data.std(correction=0) * drawn
        other = Explainer(load(copy, tokenizer=tokenizer), "grad_eclip")
        for i in (0, 2):
            after = other.words(x[i], texts[i]).values
            expected = rho(before[i], after)
            assert float(columns[f"Spearman {TOP_DOWN[number]}"][i]) == pytest.approx(expected, abs=1e-9)
    assert columns["Spearman"].isnan().tolist() == [False, True, False]
    assert SanityWordCascade().summary(columns)["Spearman"] == pytest.approx(float(columns["Spearman"][[0, 2]].mean()))
    with pytest.raises(InputError, match="3 images and 2 texts"):
        SanityWordCascade().measure(explainer, x, texts[:2])
    for kind in (SanityCascade, SanityWordCascade):
        with pytest.raises(InputError, match="'image' or 'text'"):
            kind(tower="both")


def test_class_sensitivity_compares_two_maps_of_each_image(build_clip) -> None:
    explainer = Explainer(load(build_clip().double()))
    x = pixels(4, 7)
    present, absent = torch.randn(2, 4, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    absent[3] = 2 * present[3]
    columns = ClassSensitivity(side=30).measure(explainer, x, present, absent)
    for i in range(4):
        a, b = explainer(x[i], torch.stack((present[i], absent[i]))).maps[0]
        assert float(columns["Spearman"][i]) == pytest.approx(rho(a, b), abs=1e-9)
        assert float(columns["SSIM"][i]) == pytest.approx(float(map_ssim(a[None], b[None], 30)), abs=1e-9)
    assert float(columns["SSIM"][3]) == pytest.approx(1, abs=1e-9) and float(columns["SSIM"][:3].max()) < 0.99
    with pytest.raises(InputError, match="one text an image"):
        ClassSensitivity().measure(explainer, x, present[:3], absent)


def test_an_evaluation_measures_the_same() -> None:
    scenes = open_dataset("scenes:3:3")
    found = evaluate("demo", scenes, ["grad_eclip"], ["sanity/cascade:side=32"])
    alone = [
        SanityCascade(side=32).measure(Explainer("demo"), sample.image, [t.text for t in sample.targets])
        for sample in scenes
    ]
    assert any(len(sample.targets) > 1 for sample in scenes)
    for name, column in found.tables["grad_eclip"]["sanity/cascade:side=32"].columns.items():
        torch.testing.assert_close(column, torch.cat([one[name] for one in alone]), rtol=0, atol=1e-3)
