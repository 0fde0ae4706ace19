"""The maps of a run as files that other programs read.

    OUT/png/NAME--PROMPT.png       a map on its image's pixels, 8-bit grey, from its least value (0) to its greatest
    OUT/overlay/NAME--PROMPT.png   the same in colours over the picture
    OUT/npy/NAME.npy               {"keys": prompts (P,), "cam": (P, h, w), "high_res": (P, height, width)}, float16 in
                                   0..1, as weakly supervised segmentation keeps its maps (Ahn et al., CVPR 2019)
    OUT/labels/NAME.png            each pixel's strongest prompt, counted from 1; 0 where none reaches the threshold
    OUT/rle/SHARD.json             the masks of maps above the threshold: a COCO data set for each shard
    OUT/webdataset/SHARD.tar       NAME.npy (maps (P, h, w) float16, to be multiplied by the scale in NAME.json) and
                                   NAME.json, to go with the images' own tars

NAME is the image's key, with what file systems may not take replaced. Every file appears whole or not at all, and what
is there already is left alone, so that an export that was stopped goes on.
"""

from __future__ import annotations

import io
import json
import re
import secrets
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from clipfast.data.images import is_image
from clipfast.data.keys import Numbering, numbered
from clipfast.engine.base import Failure
from clipfast.engine.pictures import Pictures
from clipfast.engine.reader import Run
from clipfast.errors import ClipfastError, InputError, nearest
from clipfast.metrics.rows import slug
from clipfast.results import Attribution
from clipfast.view.files import encode_image, write_file

KINDS = ("png", "overlay", "npy", "labels", "rle", "webdataset")
# File systems take names of 255 bytes: an image's, a prompt's, and an ending.
_NAME_BYTES = 100
_EIGHT_BITS = 255


class Export:
    """Writes the images of a run into a folder when it is called.

    kinds: of `KINDS`. threshold: 0..1 of a map's own range, from which "labels" and "rle" count a pixel.
    images: for "overlay", where the run's source lies now, if not where the run found it. overwrite: write again what
    is there.

    Raises InputError for an unknown kind or a threshold outside 0..1, for "labels" of a run without shared texts, and
    for "overlay" where the source cannot be opened.
    """

    def __init__(
        self,
        run: Run,
        out: str | Path,
        kinds: Sequence[str],
        *,
        threshold: float = 0.4,
        images: str | Path | None = None,
        overwrite: bool = False,
    ):
        for kind in kinds:
            if kind not in KINDS:
                raise InputError(f"there is no export called {kind!r}: {nearest(kind, KINDS)}")
        if not kinds:
            raise InputError(f"there is nothing to export: choose among {', '.join(KINDS)}.")
        if not 0 <= threshold <= 1:
            raise InputError(f"threshold={threshold} must lie in 0..1.")
        if "labels" in kinds and not run.prompts:
            raise InputError("labels need texts that all images share: the images of this run have texts of their own.")
        if "rle" in kinds:
            _coco()
        self.run, self.out = run, Path(out).expanduser()
        self.kinds = tuple(dict.fromkeys(kinds))
        self.threshold, self.overwrite = threshold, overwrite
        self.written = dict.fromkeys(self.kinds, 0)
        self.errors: list[Failure] = []
        self._pictures = Pictures(run, images) if "overlay" in kinds else None
        self._names = Numbering(str.lower)

    def __call__(
        self, limit: int | None = None, progress: Callable[[int], None] = lambda images: None
    ) -> dict[str, int]:
        """Export all images, or the first `limit`; returns how many files of each kind were written.

        `errors` then holds the images whose picture could not be had. progress: called with the images done since.
        """
        left = len(self.run) if limit is None else min(limit, len(self.run))
        first = 0
        for number, marker in enumerate(self.run.markers):
            count = min(marker["images"], left)
            if count:
                self._shard(marker, self.run.shard_keys(number)[:count], first, progress)
            first += marker["images"]
            left -= count
        return self.written

    def _shard(self, marker: dict[str, Any], keys: list[str], first: int, progress: Callable[[int], None]) -> None:
        numbers = range(first, first + len(keys))
        names = [self._names(safe_name(key)) for key in keys]
        stem = marker["shard"] if len(keys) == marker["images"] else f"{marker['shard']}-first-{len(keys)}"
        for kind, ending, write in (("rle", "json", self._rle), ("webdataset", "tar", self._tar)):
            path = self.out / kind / f"{stem}.{ending}"
            if kind in self.kinds and self._wanted(path):
                with _whole(path) as part:
                    write(part, numbers, names)
                self.written[kind] += 1
        pictures = None if self._pictures is None else self._pictures.of(marker, keys)
        for number, key, name in zip(numbers, keys, names, strict=True):
            self._image(number, key, name, pictures)
            progress(1)

    def _image(self, number: int, key: str, name: str, pictures: Callable[[str], Image.Image] | None) -> None:
        """The files of one image's own."""
        attribution = self.run[number]
        prompts = numbered((_short(slug(prompt)) for prompt in attribution.prompts(0)), str.lower)
        if "png" in self.kinds:
            self._each_prompt("png", name, prompts, partial(_grey, attribution))
        if pictures is not None:
            try:
                self._each_prompt("overlay", name, prompts, _Overlay(attribution, partial(pictures, key)))
            except (ClipfastError, OSError) as error:
                self.errors.append(Failure(key, str(error)))
        for kind, ending, encode in (("npy", "npy", _npy), ("labels", "png", self._labels)):
            path = self.out / kind / f"{name}.{ending}"
            if kind in self.kinds and self._wanted(path):
                write_file(path, encode(attribution, self.run.rows(number).prompts))
                self.written[kind] += 1

    def _wanted(self, path: Path) -> bool:
        return self.overwrite or not path.exists()

    def _each_prompt(self, kind: str, name: str, prompts: list[str], draw: Callable[[int], Image.Image]) -> None:
        for p, prompt in enumerate(prompts):
            path = self.out / kind / f"{name}--{prompt}.png"
            if self._wanted(path):
                write_file(path, encode_image(draw(p)))
                self.written[kind] += 1

    def _labels(self, attribution: Attribution, prompts: np.ndarray) -> bytes:
        best: np.ndarray | None = None
        for p, prompt in enumerate(prompts.tolist()):
            heat = _spread(attribution, p)
            if best is None:
                best = np.full(heat.shape, self.threshold, np.float32)
                labels = np.zeros(heat.shape, np.int32)
            # Of equal ones the first; the threshold itself counts, but nothing where there is no heat at all.
            stronger = (heat > best) | ((heat == best) & (labels == 0) & (heat > 0))
            best[stronger], labels[stronger] = heat[stronger], prompt + 1
        if len(self.run.prompts) <= _EIGHT_BITS:
            picture = Image.fromarray(labels.astype(np.uint8))
        else:
            # As ImageNet-S keeps its 919 classes: the label is R + 256 G.
            picture = Image.fromarray(np.stack([labels % 256, labels // 256, 0 * labels], -1).astype(np.uint8))
        return encode_image(picture)

    def _rle(self, part: Path, numbers: range, names: list[str]) -> None:
        coco = _coco()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        categories = {text: i + 1 for i, text in enumerate(self.run.prompts)}
        for number in numbers:
            attribution, rows = self.run[number], self.run.rows(number)
            height, width = (int(side) for side in rows.geometry[0, :2])
            images.append({"id": len(images) + 1, "file_name": rows.keys[0], "height": height, "width": width})
            for p, text in enumerate(attribution.prompts(0)):
                heat = _spread(attribution, p)
                packed = coco.encode(np.asfortranarray((heat >= self.threshold) & (heat > 0), np.uint8))
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": len(images),
                        "category_id": categories.setdefault(text, len(categories) + 1),
                        "segmentation": {"size": [height, width], "counts": packed["counts"].decode()},
                        "area": int(coco.area(packed)),
                        "bbox": coco.toBbox(packed).tolist(),
                        "iscrowd": 0,
                        "score": float(rows.scores[p]),
                    }
                )
        named = [{"id": number, "name": text} for text, number in categories.items()]
        data = {"images": images, "annotations": annotations, "categories": named}
        part.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")

    def _tar(self, part: Path, numbers: range, names: list[str]) -> None:
        with tarfile.open(part, "w") as tar:
            for number, name in zip(numbers, names, strict=True):
                rows = self.run.rows(number)
                about = {
                    "key": rows.keys[0],
                    "prompts": self.run.texts(rows),
                    "scores": rows.scores.tolist(),
                    "size": rows.geometry[0, :2].astype(int).tolist(),
                    "box": rows.geometry[0, 2:6].tolist(),
                }
                stream = io.BytesIO()
                scale = np.abs(rows.maps).max(initial=0)
                # float16 has nothing below 6e-8: one scale for all keeps the maps comparable.
                about["scale"] = float(scale) if scale > 0 and np.isfinite(scale) else 1.0
                np.save(stream, (rows.maps / np.float32(about["scale"])).astype(np.float16))
                # A sample's name ends at its first dot, and so must not hold one.
                stem = str(PurePosixPath(name).with_name(PurePosixPath(name).name.replace(".", "_")))
                for ending, data in (("npy", stream.getvalue()), ("json", json.dumps(about).encode())):
                    # A time of 0 keeps the bytes the same, and the header short.
                    member = tarfile.TarInfo(f"{stem}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def safe_name(key: str) -> str:
    """A key as a path below a folder: only letters, digits, "_", "-" and "." in its parts, no picture's ending.

    >>> safe_name("../train/a b.jpg"), safe_name("/etc/./x:y")
    ('_/train/a_b', 'etc/_/x_y')
    """
    parts = [re.sub(r"[^\w.-]+", "_", part).lstrip(".") or "_" for part in key.split("/") if part] or ["_"]
    if is_image(Path(parts[-1])):
        parts[-1] = parts[-1].rpartition(".")[0]
    return "/".join(_short(part) for part in parts)


def _short(name: str) -> str:
    return name.encode()[:_NAME_BYTES].decode(errors="ignore")


def _spread(attribution: Attribution, prompt: int) -> np.ndarray:
    """One map on its image's pixels, in 0..1: (height, width) float32. Not finite ones are nothing."""
    geometry = attribution.geometries[0]
    assert geometry is not None
    unit = attribution.normalized()[0][prompt]
    return np.nan_to_num(geometry.to_image(unit).numpy(), nan=0, posinf=0, neginf=0).clip(0, 1)


def _grey(attribution: Attribution, prompt: int) -> Image.Image:
    return Image.fromarray(np.rint(_spread(attribution, prompt) * 255).astype(np.uint8))


class _Overlay:
    """Draws maps over a picture, which is read when the first is wanted."""

    def __init__(self, attribution: Attribution, read: Callable[[], Image.Image]):
        self._attribution, self._read = attribution, read
        self._picture: Image.Image | None = None

    def __call__(self, prompt: int) -> Image.Image:
        from clipfast.view.overlay import overlay

        if self._picture is None:
            self._picture = self._read()
        heat, palette = self._attribution.drawable(0, [prompt])
        return overlay(self._picture, heat[0], colormap=palette)


def _npy(attribution: Attribution, prompts: np.ndarray) -> bytes:
    unit = np.nan_to_num(attribution.normalized()[0].numpy())
    high = np.stack([_spread(attribution, p).astype(np.float16) for p in range(len(prompts))])
    stream = io.BytesIO()
    data: Any = {"keys": prompts.astype(np.int64), "cam": unit.astype(np.float16), "high_res": high}
    np.save(stream, data, allow_pickle=True)
    return stream.getvalue()


def _coco() -> Any:
    try:
        from pycocotools import mask
    except ImportError:
        raise InputError("COCO masks need pycocotools: pip install 'clipfast[metrics]'.") from None
    return mask


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place in the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
