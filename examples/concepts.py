"""Concept decomposition: what each part of a phrase lights up, what their sum does, and what the phrase adds to a part.

python examples/concepts.py                                  a rendered scene, with the demo model
python examples/concepts.py photo.jpg "brown toy" "toy" "brown" -m ViT-B-16:openai

A map is linear in the direction of its text until ReLU, so directions can be added and subtracted before a map is asked
for: one pass over the image (attribution features) serves every combination.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

import clipfast
from clipfast.data.scenes import render
from clipfast.view import grid, save_image

SCENE, PHRASE, PARTS = 10128, "yellow balloon", ["balloon", "yellow"]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("image", nargs="?", help="an image file; without one, a rendered scene")
    options.add_argument("phrase", nargs="?", default=PHRASE)
    options.add_argument("parts", nargs="*", default=PARTS, help="its parts; the first is what the rest describe")
    options.add_argument("-m", "--model", default="demo")
    options.add_argument("-o", "--out", type=Path, default=Path("concepts.png"))
    chosen = options.parse_args()

    picture = Image.open(chosen.image).convert("RGB") if chosen.image else scene()
    print(save_image(sheet(picture, chosen.phrase, chosen.parts or [chosen.phrase], chosen.model), chosen.out))


def sheet(picture: Image.Image, phrase: str, parts: list[str], model: str) -> Image.Image:
    """Two rows: the maps of the phrase, its parts and their sum; then, signed, what the phrase adds to each part."""
    loaded = clipfast.load(model)
    embeddings = loaded.encode_texts([phrase, *parts])
    whole, single = embeddings[:1], embeddings[1:]
    together = F.normalize(single.sum(0, keepdim=True), dim=-1)
    maps = clipfast.Explainer(loaded).features([picture]).maps(torch.cat((whole, single, together)))
    names = [phrase, *parts, " + ".join(f'"{part}"' for part in parts)]

    # Embeddings are made unit, which changes a difference's scale, not its picture.
    signed = clipfast.Explainer(loaded, signed=True).features([picture])
    heat = signed.maps(F.normalize(torch.cat((whole, whole - single, whole - together)), dim=-1)).resize(0)
    heat = 0.5 + 0.5 * heat / heat.abs().amax((-2, -1), keepdim=True)
    changes = [f'"{phrase}", signed', *(f'"{phrase}" - "{part}"' for part in parts), "the phrase less the sum"]
    above = grid([picture], [maps.resize(0, normalize=True)], [names], scores=[maps.scores[0].tolist()], cell=200)
    below = grid([picture], [heat], [changes], cell=200, colormap="signed")
    both = Image.new("RGB", (above.width, above.height + below.height), "white")
    both.paste(above, (0, 0))
    both.paste(below, (0, above.height))
    return both


def scene(side: int = 96, enlarged: int = 5) -> Image.Image:
    """Two things of one name in two colours."""
    things = ["car", "balloon", "apple", "heart", "star", "umbrella"]
    drawn = render(SCENE, size=side, objects=(2, 3), repeat=1.0, only=things, distractors=0)
    return Image.fromarray(drawn.image).resize((side * enlarged, side * enlarged), Image.Resampling.BICUBIC)


if __name__ == "__main__":
    main()
