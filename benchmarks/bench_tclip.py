"""TCLIP beside what it explains: encoding one image and ten sentences with the model's own calls."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from claims import claim

import clipfast

SENTENCES = [
    "a photo of a dog",
    "a brown dog chasing a red ball on the beach",
    "two cats asleep on an old sofa by the window",
    "a man riding a bicycle through a busy street at night",
    "a plate of spaghetti with tomato sauce and basil",
    "the Eiffel Tower seen from a boat on the Seine",
    "children flying kites in a green field under a cloudy sky",
    "a close-up of a bumblebee on a sunflower",
    "an airplane landing in heavy rain",
    "a whiteboard covered with handwritten equations",
]


@pytest.fixture(scope="module")
def module() -> Any:
    torch.manual_seed(0)
    return open_clip.create_model("ViT-B-16").eval().requires_grad_(False)


def test_one_view(module: Any) -> None:
    tokenizer = open_clip.get_tokenizer("ViT-B-16")
    model = clipfast.load(module, tokenizer=tokenizer)
    x, ids = torch.randn(1, 3, 224, 224), tokenizer(SENTENCES)

    def encode() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return module.encode_image(x, normalize=True), module.encode_text(ids, normalize=True)

    def tclip(**parameters: Any) -> clipfast.Attribution:
        # A new explainer each time, which has encoded no text yet; ids are made within, too.
        return clipfast.explain(x, SENTENCES, model=model, method="tclip", **parameters)

    def tclip_of_known_texts() -> clipfast.Attribution:
        return known(x, SENTENCES)

    known = clipfast.Explainer(model, "tclip")
    image, texts = encode()
    torch.testing.assert_close(tclip().scores, image @ texts.T, rtol=0, atol=1e-5)
    double = clipfast.load(open_clip.create_model("ViT-B-16").double().eval(), tokenizer=tokenizer)
    double.module.load_state_dict(module.state_dict())
    errors = {}
    for aggregate, name in {"eot": "tclip", "words": "tclip, aggregate='words'"}.items():
        exact, found = (
            clipfast.explain(values, SENTENCES, model=m, method="tclip", threshold="none", aggregate=aggregate).maps
            for values, m in ((x.double(), double), (x, model))
        )
        errors[name] = float((found - exact).norm() / exact.norm())  # type: ignore[operator, union-attr]
        assert errors[name] < 1e-5
    claim(
        "tclip",
        "TCLIP, 1 view, ViT-B/16, 1 image, 10 sentences",
        "encode_image and encode_text of the same",
        {
            "encode": encode,
            "encode, the texts' padding trimmed": lambda: (module.encode_image(x), model.encode_texts(SENTENCES)),
            "tclip": tclip,
            "tclip, aggregate='words'": lambda: tclip(aggregate="words"),
            "tclip, aggregate='max'": lambda: tclip(aggregate="max"),
            "tclip, and every word's map": lambda: tclip(words=True),
            "tclip, texts encoded before": tclip_of_known_texts,
        },
        at_most={"tclip": 1.05, "tclip, aggregate='words'": 1.05, "tclip, aggregate='max'": 1.05},
        errors=errors,
        notes="errors: of the cosines before the threshold. clipfast trims the texts' padding, the model's encode_text "
        "runs all 77 positions.",
    )


def test_25_views(module: Any) -> None:
    x, texts = torch.randn(1, 3, 224, 224), F.normalize(torch.randn(10, 512), dim=-1)
    explainer = clipfast.Explainer(module, "tclip", views=25)

    def encode() -> None:
        with torch.no_grad():
            for _ in range(25):
                module.encode_image(x)

    claim(
        "tclip_views",
        "TCLIP, 25 views, ViT-B/16, 1 image, 10 prompts",
        "25 calls of encode_image",
        {"encode": encode, "tclip": lambda: explainer(x, texts)},
        at_most={"tclip": 1.05},
        repeats=7,
    )
