"""M2IB against its published loop: a hook that adds noise to a block's output, whole towers, torch's Adam."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.errors import InputError
from clipfast.methods.m2ib import M2IB
from clipfast.models.openclip import image_tower, text_tower


def naive(encode, block: nn.Module, shape, noise, texts: Tensor, *, beta=0.1, lr=1.0, steps=10) -> Tensor:
    """The capacity of the last forward pass for each text, (P, N, D); encode() makes the copies' embeddings."""
    found = []
    for t in texts:
        alpha = torch.full(shape, 5.0, dtype=torch.float64, requires_grad=True)
        adam = torch.optim.Adam([alpha], lr=lr)
        for step in range(steps):
            kept = {}

            def bottleneck(module, args, x, kept=kept, eps=noise[step], alpha=alpha):
                through = torch.sigmoid(alpha)
                mean, variance = x * through, ((1 - through) ** 2).expand_as(x)
                kept["kl"] = -0.5 * (1 + variance.log() - mean**2 - variance)
                return mean + variance.sqrt() * eps

            hook = block.register_forward_hook(bottleneck)
            z = encode()
            hook.remove()
            loss = beta * kept["kl"].mean() - F.cosine_similarity(z, t[None], dim=-1).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
        found.append(kept["kl"].detach().mean(0))
    return torch.stack(found)


def noise_of(seed: int, steps: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).double() for _ in range(steps)]


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize(
    ("variant", "parameters"),
    [
        ({}, {}),
        ({"layers": 4, "image_size": (32, 48), "quick_gelu": True}, {"layer": 1, "seed": 3}),
        ({"ls_init_value": 0.5}, {"layer": 0, "beta": 0.02, "lr": 0.5, "steps": 4, "samples": 3}),
        ({}, {"steps": 1}),
    ],
    ids=["published", "rectangular", "layer-scale", "one step"],
)
def test_images_equal_the_published_loop(build_clip, variant, parameters):
    model = build_clip(**variant).double().requires_grad_(False)
    height, width = variant.get("image_size", (64, 64))
    x, texts = torch.randn(2, 3, height, width, dtype=torch.float64), unit(2, 24)
    method = M2IB(**parameters)
    explained = method.image(image_tower(model), x)
    found = explained.maps(texts)
    tokens = 1 + height * width // 256
    noise = noise_of(method.seed, method.steps, method.samples, tokens, 32)
    layer = 1 if method.layer is None else method.layer
    for b in range(2):
        capacity = naive(
            lambda b=b: model.encode_image(x[b : b + 1].expand(method.samples, -1, -1, -1)),
            model.visual.transformer.resblocks[layer],
            (1, tokens, 32),
            noise,
            texts,
            beta=method.beta,
            lr=method.lr,
            steps=method.steps,
        )
        torch.testing.assert_close(found[b], capacity[:, 1:].sum(-1), rtol=0, atol=1e-9)
    torch.testing.assert_close(explained.z, F.normalize(model.encode_image(x), dim=-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(explained.maps(texts.flip(0).expand(2, -1, -1)), found.flip(1), rtol=0, atol=1e-9)


def test_texts_equal_the_published_loop_without_padding(build_clip):
    model = build_clip().double().requires_grad_(False)
    ids = torch.zeros(2, 20, dtype=torch.long)
    ids[0, :7] = torch.tensor([298, 5, 9, 33, 120, 77, 299])
    ids[1, :4] = torch.tensor([298, 250, 3, 299])
    words = (ids > 0) & (ids < 298)
    images = unit(2, 24)
    method = M2IB(samples=4)
    found = method.text(text_tower(model), ids, words).maps(images)
    noise = noise_of(0, 10, 4, 20, 32)
    for b, length in enumerate((7, 4)):

        def encode(b=b, length=length):
            h = (model.token_embedding(ids[b, :length]) + model.positional_embedding[:length]).expand(4, -1, -1)
            h = model.transformer(h, attn_mask=model.attn_mask[:length, :length])
            return model.ln_final(h[:, -1]) @ model.text_projection

        cut = [eps[:, :length] for eps in noise]
        capacity = naive(encode, model.transformer.resblocks[1], (1, length, 32), cut, images).sum(-1)
        torch.testing.assert_close(found[b, :, 1 : length - 1], capacity[:, 1:-1], rtol=0, atol=1e-9)
        assert (found[b, :, 0] == 0).all() and (found[b, :, length - 1 :] == 0).all()


def test_what_the_score_needs_keeps_its_information(build_clip):
    """Without a score to keep, everything is let go alike; with it, some places keep more than others."""
    tower, x = image_tower(build_clip().double()), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    texts = unit(1, 24)
    published = M2IB().image(tower, x).maps(texts)
    indifferent = M2IB(beta=1e6).image(tower, x).maps(texts)
    assert (published >= 0).all()
    assert (indifferent < published).all()
    assert indifferent.sum() < 0.05 * published.sum()


def test_many_steps_stay_finite_in_float32(build_clip):
    """The published log (1 - sigmoid(alpha))^2 is minus infinity once alpha passes 17."""
    tower, x = image_tower(build_clip()), torch.randn(1, 3, 64, 64)
    found = M2IB(beta=0, lr=5, steps=12, samples=2).image(tower, x).maps(unit(1, 24).float())
    assert found.isfinite().all() and found.max() > 17 * 32 / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_of_the_trunk(build_clip, dtype):
    x, texts = torch.randn(2, 3, 64, 64), unit(2, 24)
    exact = M2IB().image(image_tower(build_clip().double()), x.double()).maps(texts)
    found = M2IB().image(image_tower(build_clip(), dtype), x).maps(texts.float())
    assert found.dtype == torch.float32
    assert (found - exact).norm() / exact.norm() < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("parameters", [{"layer": -1}, {"samples": 0}, {"steps": 0}, {"beta": -1.0}, {"lr": "fast"}])
def test_bad_parameters(parameters):
    with pytest.raises(InputError, match=rf"{next(iter(parameters))}=.* of M2IB"):
        M2IB(**parameters)


def test_no_block_above_the_bottleneck(build_clip):
    with pytest.raises(InputError, match="after block 2 needs a block above it: this tower has 3 blocks"):
        M2IB(layer=2).image(image_tower(build_clip()), torch.randn(1, 3, 64, 64))
