"""`clipfast words`: what each word of a text does for its score with an image."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from clipfast.cli.console import print_json, stdout
from clipfast.cli.options import (
    Device,
    Json,
    MethodName,
    ModelName,
    Precision,
    Pretrained,
    Resize,
    Set,
    Texts,
    build_explainer,
    build_for_words,
    warn_of_demo,
)
from clipfast.errors import InputError, TextError


def words(
    image: Annotated[str | None, typer.Argument(metavar="IMAGE", help="An image file.")] = None,
    sentences: Annotated[list[str] | None, typer.Argument(metavar="TEXT", help="The texts to explain.")] = None,
    texts: Texts = None,
    as_json: Json = False,
    model: ModelName = "demo",
    pretrained: Pretrained = None,
    device: Device = None,
    precision: Precision = None,
    resize: Resize = None,
    method: MethodName = "grad_eclip",
    parameters: Set = None,
) -> None:
    """Colour words: which of them make a text match an image (green) or keep it from matching (red).

    clipfast words scene.png "a dog on the left"
    clipfast words photo.jpg "a dog on a beach" "a cat on a sofa" -m ViT-B-16:openai
    clipfast words photo.jpg "a dog on a beach" -m ViT-B-16:openai --json

    Values are signed where the method tells for from against, unless --set signed=false keeps only what speaks for the
    score; other methods colour by how much a word counts, in one colour.
    """
    prompts = [*(sentences or []), *(texts or [])]
    if image is None:
        raise InputError('name an image and a text, for example: clipfast words photo.jpg "a dog on the left"')
    if not prompts:
        raise TextError(f'say which text, for example: clipfast words {shlex.quote(image)} "a dog on the left"')
    swapped = next((text for text in prompts if not Path(image).exists() and Path(text).is_file()), None)
    if swapped is not None:
        raise InputError(f"the image comes first: clipfast words {shlex.quote(swapped)} {shlex.quote(image)}")
    from clipfast.data.images import read_image
    from clipfast.view.words import legend, terminal

    picture = read_image(image)
    explainer = build_explainer(model, pretrained, device, precision, resize, method, parameters)
    warn_of_demo(model)
    found = build_for_words(explainer, parameters).words(picture, prompts)
    if as_json:
        texts_found = [
            {
                "text": each.text,
                "score": each.score,
                "words": each.pairs(),
                "tokens": list(zip(each.tokens, each.token_values.tolist(), strict=True)),
                **each.extras,
            }
            for each in found
        ]
        print_json({"model": explainer.model.name, "method": method, "image": image, "texts": texts_found})
        return
    console = stdout()
    signed = any(each.signed for each in found)
    form = "+.2g" if signed else ".2g"
    for each in found:
        line = Text.assemble((f"{each.score:.3f}", "bold"), "  ", terminal(each.pairs(), signed=signed))
        console.print(line, soft_wrap=True)
        values = "  ".join(f"{word} {value:{form}}" for word, value in each.pairs())
        more = "".join(f"; {name} {value:.2g}" for name, value in each.extras.items())
        console.print(Text(" " * 7 + values + more, style="dim"), soft_wrap=True)
    console.print(legend(signed), style="dim", soft_wrap=True)
