"""TCLIP against loops over tokens, patches and views on the module itself, with scikit-learn's mixture."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

import clipfast
from clipfast.errors import InputError, TextError
from clipfast.methods.tclip import Tclip
from clipfast.models.openclip import image_tower

TEXTS = ["a dog", "a red car next to two small birds", "brown toy"]


class Pieces:
    """Words of up to three letters a piece: "brown" is "bro" and "wn</w>"; the end of text is the largest id."""

    def __init__(self, vocab_size: int = 300, context_length: int = 20):
        self.context_length, self.sot, self.eot = context_length, vocab_size - 2, vocab_size - 1
        self.decoder: dict[int, str] = {}
        self.ids: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        ids = []
        for word in text.lower().split():
            pieces = [word[i : i + 3] for i in range(0, len(word), 3)]
            for piece in [*pieces[:-1], pieces[-1] + "</w>"]:
                ids.append(self.ids.setdefault(piece, len(self.ids) + 1))
                self.decoder[ids[-1]] = piece
        return ids

    def __call__(self, texts: list[str]) -> Tensor:
        ids = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            tokens = [self.sot, *self.encode(text), self.eot]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids


def positions(text: str) -> list[list[int]]:
    """Where the pieces of each word are, counted by hand: one piece for each three letters, the start before all."""
    found, at = [], 1
    for word in text.split():
        pieces = -(-len(word) // 3)
        found.append(list(range(at, at + pieces)))
        at += pieces
    return found


def module_tokens(module: torch.nn.Module, ids: Tensor) -> Tensor:
    """Every position's unit state, padding and all: (P, 20, E)."""
    x = module.token_embedding(ids) + module.positional_embedding
    x = module.transformer(x, attn_mask=module.attn_mask)
    return F.normalize(module.ln_final(x) @ module.text_projection, dim=-1)


def module_patches(module: torch.nn.Module, x: Tensor) -> Tensor:
    """Every patch's unit state: (B, n, E)."""
    v = module.visual
    return F.normalize(v.ln_post(v.transformer(v._embeds(x))) @ v.proj, dim=-1)[:, 1:]


def thresholded(scores: Tensor, threshold: str) -> Tensor:
    """One map (n,) by scikit-learn."""
    if threshold == "none":
        return scores
    s = scores.numpy()
    z = (s - s.mean()) / s.std()
    start = np.quantile(z, [0.25, 0.75])
    mixture = GaussianMixture(
        2, covariance_type="spherical", reg_covar=1e-6, tol=1e-3, max_iter=100,
        means_init=start[:, None], weights_init=[0.5, 0.5], precisions_init=[1.0, 1.0],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(z[:, None])
    means = mixture.means_[:, 0]
    posterior = mixture.predict_proba(z[:, None])[:, int(means.argmax())]
    keep = (posterior >= 0.5) if threshold == "hard" else posterior
    return torch.from_numpy((s - (means.min() * s.std() + s.mean())).clip(min=0) * keep)


def naive_scores(module: torch.nn.Module, x: Tensor, states: Tensor, side: int) -> Tensor:
    """Cosines (h side, w side) of one image with one token: views one by one, each cell's patch looked up."""
    ph, pw = module.visual.patch_size
    height, width = x.shape[1] // ph, x.shape[2] // pw
    sums = torch.zeros(height * side, width * side, dtype=torch.float64)
    counts = torch.zeros_like(sums)
    for down in range(-(side // 2), side // 2 + 1):
        for across in range(-(side // 2), side // 2 + 1):
            rows = [min(max(r + round(down * ph / side), 0), x.shape[1] - 1) for r in range(x.shape[1])]
            columns = [min(max(c + round(across * pw / side), 0), x.shape[2] - 1) for c in range(x.shape[2])]
            patches = module_patches(module, x[:, rows][:, :, columns][None])[0].unflatten(0, (height, width))
            for row in range(height * side):
                for column in range(width * side):
                    r, c = (row - down) // side, (column - across) // side
                    if 0 <= r < height and 0 <= c < width:
                        sums[row, column] += patches[r, c] @ states
                        counts[row, column] += 1
    return sums / counts


@pytest.fixture
def module(build_clip):
    return build_clip(image_size=(48, 80), quick_gelu=True).double().requires_grad_(False)


@pytest.fixture
def model(module):
    return clipfast.load(module, tokenizer=Pieces())


@pytest.fixture
def images():
    return torch.randn(2, 3, 48, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("threshold", ["none", "soft", "hard"])
@pytest.mark.parametrize("aggregate", ["eot", "words", "max"])
def test_maps_equal_a_loop_over_tokens(module, model, images, aggregate, threshold):
    out = clipfast.explain(images, TEXTS, model=model, method="tclip", aggregate=aggregate, threshold=threshold)
    ids = model.tokenizer(TEXTS)
    tokens, patches = module_tokens(module, ids), module_patches(module, images)
    for b in range(2):
        for p, text in enumerate(TEXTS):
            words = [sum(patches[b] @ tokens[p, i] for i in word) / len(word) for word in positions(text)]
            scores = {
                "eot": patches[b] @ tokens[p, ids[p].argmax()],
                "words": sum(words) / len(words),
                "max": torch.stack(words).amax(0),
            }[aggregate]
            expected = thresholded(scores, threshold).view(3, 5)
            torch.testing.assert_close(out.maps[b, p], expected, rtol=0, atol=1e-8)
    expected = module.encode_image(images, normalize=True) @ module.encode_text(ids, normalize=True).T
    torch.testing.assert_close(out.scores, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("aggregate", ["eot", "words", "max"])
def test_pairs_are_the_diagonal(model, images, aggregate):
    explainer = clipfast.Explainer(model, "tclip", aggregate=aggregate)
    every, own = explainer(images, TEXTS[:2]), explainer(images, TEXTS[:2], pairs=True)
    torch.testing.assert_close(own.maps[:, 0], every.maps[[0, 1], [0, 1]])
    torch.testing.assert_close(own.scores[:, 0], every.scores.diagonal())


@pytest.mark.parametrize(("views", "threshold"), [(9, "none"), (25, "none"), (25, "soft")])
def test_views_equal_a_loop_over_shifts(module, model, images, views, threshold):
    side = int(views**0.5)
    states = module_tokens(module, model.tokenizer(TEXTS[:1]))[0, 2]
    found = Tclip(threshold=threshold, views=views).image(image_tower(module), images[:1]).maps(states[None])
    expected = thresholded(naive_scores(module, images[0], states, side).flatten(), threshold)
    torch.testing.assert_close(found[0, 0], expected, rtol=0, atol=1e-8)


def test_views_cut_what_no_patch_covers(build_clip):
    """A side that is no multiple of the patch: shifts reach into the rest, the maps end where the patches do."""
    module = build_clip(image_size=48).double().requires_grad_(False)
    x = torch.randn(3, 37, 55, dtype=torch.float64)
    states = F.normalize(torch.randn(24, dtype=torch.float64), dim=0)
    module.visual.positional_embedding.data = image_tower(module).positions_for((2, 3)).clone()
    found = Tclip(threshold="none", views=9).image(image_tower(build_clip(image_size=48).double()), x[None])
    assert found.patches.shape[1:3] == (6, 9)
    torch.testing.assert_close(
        found.maps(states[None])[0, 0].view(6, 9), naive_scores(module, x, states, 3), rtol=0, atol=1e-10
    )


def test_views_see_finer_than_patches(model, images):
    out = clipfast.explain(images, "a dog", model=model, method="tclip", views=25)
    assert out.maps.shape == (2, 1, 15, 25)
    assert out.resize(0).shape == (1, 48, 80)
    torch.testing.assert_close(out.scores, clipfast.explain(images, "a dog", model=model, method="tclip").scores)


@pytest.mark.parametrize("views", [1, 9])
def test_features_without_a_threshold(model, images, views):
    explainer = clipfast.Explainer(model, "tclip", threshold="none", views=views)
    torch.testing.assert_close(explainer.features(images).maps(TEXTS).maps, explainer(images, TEXTS).maps)
    with pytest.raises(InputError, match="no attribution features as it is set"):
        clipfast.Explainer(model, "tclip").features(images)


@pytest.mark.parametrize("parameters", [{}, {"aggregate": "max"}, {"threshold": "none", "views": 9}])
def test_word_maps(module, model, images, parameters):
    explainer = clipfast.Explainer(model, "tclip", **parameters)
    one, two = explainer.word_maps(images, TEXTS[:2], ["red car", "small birds", "Dog"])
    assert one.texts == ["a", "dog", "Dog"] and one.sentence == "a dog"
    assert two.texts == [*TEXTS[1].split(), "red car", "small birds"]
    torch.testing.assert_close(one.maps[:, 1], one.maps[:, 2])
    tokens = module_tokens(module, model.tokenizer(TEXTS))
    words = torch.stack([tokens[1, word].mean(0) for word in positions(TEXTS[1])])
    directions = torch.cat((words, words[1:3].mean(0)[None], words[6:8].mean(0)[None]))
    z = module.encode_image(images, normalize=True)
    torch.testing.assert_close(two.scores, z @ directions.T, rtol=0, atol=1e-10)
    side = int(parameters.get("views", 1) ** 0.5)
    for p, direction in enumerate(directions):
        for b in range(2):
            expected = naive_scores(module, images[b], direction, side).flatten()
            expected = thresholded(expected, parameters.get("threshold", "soft"))
            torch.testing.assert_close(two.maps[b, p].flatten(), expected, rtol=0, atol=1e-8)


def test_word_maps_in_the_pass_of_the_prompts(model, images):
    for aggregate in ("eot", "words"):
        explainer = clipfast.Explainer(model, "tclip", aggregate=aggregate)
        plain, together = explainer(images, TEXTS), explainer(images, TEXTS, words=True)
        torch.testing.assert_close(together.maps, plain.maps)
        assert [each.sentence for each in together.word_maps] == TEXTS and plain.word_maps == []
        for each, alone in zip(together.word_maps, explainer.word_maps(images, TEXTS), strict=True):
            assert each.texts == alone.texts
            torch.testing.assert_close(each.maps, alone.maps)


def test_word_maps_on_images_of_their_own_sizes(model):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (64, 48, 3), np.uint8), rng.integers(0, 256, (32, 96, 3), np.uint8)]
    out = clipfast.Explainer(model, "tclip", resize="keep").word_maps(images, TEXTS[0])
    assert [m.shape for m in out.maps] == [(2, 4, 3), (2, 2, 6)]
    assert [m.shape for m in out.resize()] == [(2, 64, 48), (2, 32, 96)]


def test_token_states_are_the_modules(module, model):
    ids = model.tokenizer(TEXTS)
    states, tokens = model.token_states(TEXTS), module_tokens(module, ids)
    assert states.names == [text.split() for text in TEXTS]
    torch.testing.assert_close(states.texts, module.encode_text(ids, normalize=True), rtol=0, atol=1e-12)
    torch.testing.assert_close(states.texts, model.encode_texts(TEXTS), rtol=0, atol=1e-12)
    expected = [tokens[p, word].mean(0) for p, text in enumerate(TEXTS) for word in positions(text)]
    torch.testing.assert_close(states.words, torch.stack(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda m, x: clipfast.Explainer(m, "tclip").word_maps(x, "a red car", "car red"), "'car red' is no run of"),
        (lambda m, x: clipfast.Explainer(m, "tclip", aggregate="words")(x, torch.ones(1, 24)), "pass them as strings"),
        (lambda m, x: clipfast.Explainer(m, "tclip")(x, torch.ones(1, 24), words=True), "pass them as strings"),
        (lambda m, x: clipfast.Explainer(m, "tclip")(x, TEXTS[:2], pairs=True, words=True), "leave pairs out"),
        (lambda m, x: clipfast.Explainer(m).word_maps(x, "a dog"), "no map for a single word; .* do: tclip"),
        (lambda m, x: clipfast.Explainer(m, "tclip", views=4), "odd number squared"),
        (lambda m, x: clipfast.Explainer(m, "tclip", views=5), "odd number squared"),
        (lambda m, x: clipfast.Explainer(m, "tclip", views=0), "at least 1"),
        (lambda m, x: clipfast.Explainer(m, "tclip", views=361)(x, "a dog"), "at most 16 squared"),
        (lambda m, x: clipfast.Explainer(m, "tclip", threshold="some"), "'soft', 'hard', 'none'"),
        (lambda m, x: clipfast.Explainer(m, "tclip", aggregate="mean"), "'eot', 'words', 'max'"),
    ],
)
def test_what_cannot_be_asked(model, images, ask, message):
    with pytest.raises((InputError, TextError), match=message):
        ask(model, images)


def test_half_precision_trunk(build_clip):
    tokenizer = Pieces()
    exact, half = (clipfast.load(m, tokenizer=tokenizer) for m in (build_clip().double(), build_clip()))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for aggregate in ("eot", "words"):
        parameters = {"method": "tclip", "threshold": "none", "aggregate": aggregate}
        expected = clipfast.explain(x, TEXTS, model=exact, **parameters).maps
        for precision, tolerance in ((None, 1e-5), ("bfloat16", 2e-2)):
            found = clipfast.explain(x.float(), TEXTS, model=half, precision=precision, **parameters).maps
            assert found.dtype == torch.float32
            assert (found - expected).norm() / expected.norm() < tolerance
