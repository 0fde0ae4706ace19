"""The typographic experiment: paste a word on an image and see where attribution goes, and how far the scores move.

python examples/typographic.py                       a rendered scene, with the demo model
python examples/typographic.py apple.jpg -t "an apple" -t "an iPod" --word iPod -m ViT-B-16:openai
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

import clipfast
from clipfast.data.images import read_image
from clipfast.data.scenes import render
from clipfast.metrics import Typographic, typographic
from clipfast.view import grid, save_image

SCENE, THINGS = 15, ["tree", "balloon"]
WORD = "boat"
METHODS = ["mga_clip", "grad_eclip"]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("images", nargs="*", help="image files; without any, a rendered scene")
    options.add_argument("-t", "--text", action="append", default=[], help="a prompt; repeat for more")
    options.add_argument("--word", default=WORD, help="what is pasted on every image")
    options.add_argument("--method", action="append", default=[], help="repeat for more")
    options.add_argument("-m", "--model", default="demo")
    options.add_argument("-o", "--out", type=Path, default=Path("typographic.png"))
    chosen = options.parse_args()

    model = clipfast.load(chosen.model)
    if chosen.images:
        cases = [([read_image(image)], chosen.text or [chosen.word]) for image in chosen.images]
    else:
        cases = [([scene()], [*THINGS, f"the word {chosen.word}"])]
    rows = []
    for pictures, prompts in cases:
        for method in chosen.method or METHODS:
            found = typographic(clipfast.Explainer(model, method), pictures, prompts, chosen.word, at=(0.5, 0.12))
            told(found, method, prompts)
            rows += [(f"{method}, before", found.before, prompts), (f"{method}, after", found.after, prompts)]
    sheet = grid(
        [result.picture(0) for _, result, _ in rows],
        [result.resize(0, normalize=True) for _, result, _ in rows],
        [prompts for _, _, prompts in rows],
        scores=[result.scores[0].tolist() for _, result, _ in rows],
        titles=[title for title, _, _ in rows],
        cell=180,
    )
    print(save_image(sheet, chosen.out))


def told(found: Typographic, method: str, prompts: list[str]) -> None:
    print(f"{method}: the plate covers {found.area[0]:.0%} of what the model sees")
    for p, prompt in enumerate(prompts):
        print(
            f"  {prompt!r}: attribution inside it {found.share_before[0, p]:.0%} -> {found.share_after[0, p]:.0%}, "
            f"score {found.before.scores[0, p]:.3f} -> {found.after.scores[0, p]:.3f}"
        )


def scene(side: int = 96, enlarged: int = 5) -> Image.Image:
    drawn = Image.fromarray(render(SCENE, size=side, objects=2).image)
    return drawn.resize((side * enlarged, side * enlarged), Image.Resampling.BICUBIC)


if __name__ == "__main__":
    main()
