"""A run's folder, read: by image, as arrays, as a data set for torch, or as attribution features.

run = clipfast.open_run("maps")
run["photos/dog.jpg"].resize(0)        # an Attribution of one image: its maps, on its own pixels
for keys, maps in run.maps("a dog"):   # all maps of a prompt, (N, h, w) at a time
    ...
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from clipfast.engine.base import Failure
from clipfast.engine.config import RunConfig
from clipfast.engine.folder import RunFolder
from clipfast.engine.stored import FeatureRows, RowReader, Rows, embeddings_of, features_of, geometry, rows_of
from clipfast.engine.totals import Totals
from clipfast.engine.writer import FEATURES, SHARDS
from clipfast.errors import InputError, nearest
from clipfast.methods.base import Relu
from clipfast.results import Attribution, Features

if TYPE_CHECKING:
    from clipfast.models.model import Model

# Files kept open, each with its latest row group.
_OPEN = 32


def open_run(folder: str | Path) -> Run:
    """The results of a data-set run, as far as they are committed.

    Raises InputError for a folder without a run, or one whose run.json or markers are damaged.
    """
    return Run(folder)


class Run:
    """The committed images of a run: those of every shard with a marker of the run's configuration, in their order.

    config: what the maps depend on. prompts: the texts that all images are asked; empty where each has its own.

    Opening reads the markers alone (2,000 in 0.2 s), files are opened when they are asked for. The first look-up by key
    reads the keys of all shards (3 ms a shard of 1,000 images) and keeps 16 bytes an image; look-ups by number and
    iteration do without. Pickling keeps nothing open, and every process opens files of its own.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        config = RunFolder(self.folder).config() if self.folder.is_dir() else None
        if config is None:
            raise InputError(f"{self.folder} holds no run: name a folder that `clipfast run` wrote, with its run.json.")
        self.config: RunConfig = config
        self.markers = _markers(self.folder, config.digest)
        self._ends = np.cumsum([marker["images"] for marker in self.markers], dtype=np.int64)
        self._files: OrderedDict[tuple[str, int], RowReader] = OrderedDict()
        self._offsets: dict[int, np.ndarray] = {}
        self._index: tuple[np.ndarray, np.ndarray] | None = None
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict(), "_index": None, "_process": -1}

    def __repr__(self) -> str:
        return (
            f"<Run of {self.config.method} on {self.config.model}: {len(self):,} images, "
            f"{len(self.markers):,} shards in {self.folder}>"
        )

    @property
    def prompts(self) -> list[str]:
        return list(self.config.prompts.get("texts", ()))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def keys(self) -> Iterator[str]:
        """The images' keys, in order."""
        for shard in range(len(self.markers)):
            yield from self.shard_keys(shard)

    def shard_keys(self, shard: int) -> list[str]:
        """The keys of one shard's images, by its place in `markers`."""
        if not self.markers[shard]["images"]:
            return []
        keys = self._file(SHARDS, shard).keys()
        if len(keys) != self.markers[shard]["images"]:
            raise InputError(f"{self._path(SHARDS, shard)} is damaged: it holds {len(keys)} images, its marker says "
                             f"{self.markers[shard]['images']}.")  # fmt: skip
        return keys

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._number(key) is not None

    def __iter__(self) -> Iterator[Attribution]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, image: str | int) -> Attribution:
        """One image, by its key or number: an Attribution of B = 1 with its prompts (those it was explained for).

        Raises InputError for a key that has no maps, IndexError for a number that is none.
        """
        rows = self.rows(image)
        return Attribution(
            maps=torch.from_numpy(rows.maps)[None],
            scores=torch.from_numpy(rows.scores.copy())[None],
            texts=self.texts(rows),
            sources=[None],
            geometries=[geometry(rows.geometry[0])],
            method=self.config.method,
            model=self.config.model,
            seconds=0.0,
        )

    def rows(self, image: str | int) -> Rows:
        """The same as plain arrays: one row a prompt."""
        shard, number = self._place(image)
        file = self._file(SHARDS, shard)
        # Files are closed when others are wanted; where their images begin need not be read again then.
        if shard in self._offsets:
            file.offsets = self._offsets[shard]
        self._offsets[shard] = file.offsets
        return next(rows_of(file.image(number), file.codec))

    def texts(self, rows: Rows) -> list[str]:
        """What each of these rows was asked."""
        if rows.texts is not None:
            return rows.texts
        prompts = self.prompts
        return [prompts[p] for p in rows.prompts.tolist()]

    def arrays(self) -> Iterator[Rows]:
        """All rows in order, about a thousand at a time; those of one grid together."""
        for shard in self._with_rows():
            file = self._file(SHARDS, shard)
            for table in file.groups():
                yield from rows_of(table, file.codec)

    def maps(self, prompt: str | int) -> Iterator[tuple[list[str], np.ndarray]]:
        """The maps of one prompt, by its text or number: keys, and maps (N, h, w) float32, some at a time.

        Raises InputError for a prompt that the run does not have.
        """
        known = self.prompts
        if isinstance(prompt, str) and known:
            if prompt not in known:
                raise InputError(f"the run was not asked for {prompt!r}: {nearest(prompt, known)}")
            prompt = known.index(prompt)
        elif isinstance(prompt, int) and known and not 0 <= prompt < len(known):
            raise InputError(f"prompt {prompt} is none of the run's {len(known)}, counted from 0.")
        for rows in self.arrays():
            if isinstance(prompt, str):
                wanted = np.array([text == prompt for text in rows.texts or ()], bool)
            else:
                wanted = rows.prompts == prompt
            if wanted.any():
                yield [rows.keys[i] for i in np.flatnonzero(wanted)], rows.maps[wanted]

    def torch_dataset(self) -> TorchMaps:
        """The images as a map-style data set for `torch.utils.data.DataLoader`, with any number of workers."""
        return TorchMaps(self)

    def features(self, keys: Iterable[str | int], model: Model | None = None) -> Features:
        """The attribution features of some images, which give the maps of any text without the image tower.

        model: with it, `Features.maps` takes strings; without, embeddings (P, E). Raises InputError for a run that kept
        none, for no image, or for images of different grids.
        """
        places = [self._place(key) for key in keys]
        if not places:
            raise InputError("there is no image to take features of: name at least one key.")
        found = []
        for shard, number in places:
            file = self._feature_file(shard)
            found.append(next(features_of(file.image(number), file.codec, file.about["relu"])))
        if len({rows.grid for rows in found}) > 1:
            raise InputError("features of images with different grids cannot be put together: take one at a time.")
        return self.as_features(found, model)

    def feature_rows(self) -> Iterator[FeatureRows]:
        """The attribution features of all images in order, some at a time; images of one grid together.

        Raises InputError for a run that kept none.
        """
        for shard in self._with_rows():
            file = self._feature_file(shard)
            for table in file.groups():
                yield from features_of(table, file.codec, file.about["relu"])

    def embeddings(self) -> Iterator[np.ndarray]:
        """The unit embeddings of all images in order, (N, E) float32 some at a time, without their features.

        Raises InputError for a run that kept none.
        """
        for shard in self._with_rows():
            for column in self._feature_file(shard).column("embedding"):
                yield embeddings_of(column)

    def as_features(self, rows: list[FeatureRows], model: Model | None = None) -> Features:
        """Rows of one grid as `Features`; model: see `features`."""

        def stack(name: str) -> Tensor:
            return torch.from_numpy(np.concatenate([getattr(one, name) for one in rows]))

        geometries = [geometry(row) for one in rows for row in one.geometry]
        return Features(
            values=stack("values"),
            weights=stack("weights"),
            embeddings=stack("embeddings"),
            grid=rows[0].grid,
            relu=cast(Relu, rows[0].relu),
            sources=[None] * len(geometries),
            geometries=list(geometries),
            method=self.config.method,
            model=self.config.model,
            encode=None if model is None else model.encode_texts,
        )

    def errors(self) -> list[Failure]:
        """The images without maps, and why."""
        return [Failure(error["key"], error["reason"]) for marker in self.markers for error in marker["errors"]]

    def summary(self) -> dict[str, Any]:
        """What is committed: images, maps, errors and their reasons, bytes, seconds."""
        return Totals.of(self.markers).to_json()

    def _with_rows(self) -> Iterator[int]:
        return (shard for shard, marker in enumerate(self.markers) if marker["images"])

    def _place(self, image: str | int) -> tuple[int, int]:
        """The shard of an image and its number there."""
        if isinstance(image, str):
            number = self._number(image)
            if number is None:
                reasons = {failure.key: failure.reason for failure in self.errors()}
                why = f": {reasons[image]}" if image in reasons else "."
                raise InputError(f"the run has no maps of {image!r}{why}")
        else:
            number = image + len(self) if image < 0 else image
            if not 0 <= number < len(self):
                raise IndexError(f"image {image} is none of the run's {len(self)}")
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - (int(self._ends[shard - 1]) if shard else 0)

    def _number(self, key: str) -> int | None:
        """The number of an image in the run, None for a key that it does not have."""
        if self._index is None:
            # Hashes instead of the keys themselves: a tenth of the memory.
            found = np.fromiter(map(hash, self.keys()), np.int64, len(self))
            order = np.argsort(found, kind="stable")
            self._index = found[order], order
        hashes, order = self._index
        at = int(np.searchsorted(hashes, hash(key)))
        while at < len(hashes) and hashes[at] == hash(key):
            number = int(order[at])
            if self.rows(number).keys[0] == key:
                return number
            at += 1
        return None

    def _path(self, kind: str, shard: int) -> Path:
        return self.folder / kind / f"{self.markers[shard]['shard']}.parquet"

    def _feature_file(self, shard: int) -> RowReader:
        if self.config.features is None:
            raise InputError(f"the run in {self.folder} kept no features: run it with --features.")
        return self._file(FEATURES, shard)

    def _file(self, kind: str, shard: int) -> RowReader:
        if self._process != os.getpid():
            self._files, self._process = OrderedDict(), os.getpid()
        place = kind, shard
        if place not in self._files:
            while len(self._files) >= _OPEN:
                self._files.popitem(last=False)[1].close()
            self._files[place] = RowReader(self._path(*place), "maps" if kind == SHARDS else "features")
        self._files.move_to_end(place)
        return self._files[place]


class TorchMaps(torch.utils.data.Dataset[dict[str, Any]]):
    """A run's images for a DataLoader: key, prompts (P,), scores (P,), maps (P, h, w) float32, size (2,).

    size: height and width of the original image. Items stack to batches where all images have one grid and number of
    prompts.
    """

    def __init__(self, run: Run):
        self.run = run

    def __len__(self) -> int:
        return len(self.run)

    def __getitem__(self, number: int) -> dict[str, Any]:
        rows = self.run.rows(number)
        return {
            "key": rows.keys[0],
            "prompts": torch.from_numpy(rows.prompts.astype(np.int64)),
            "scores": torch.from_numpy(rows.scores.copy()),
            "maps": torch.from_numpy(rows.maps),
            "size": torch.from_numpy(rows.geometry[0, :2].astype(np.int64)),
        }


def _markers(folder: Path, digest: str) -> list[dict[str, Any]]:
    """The markers of shards of that configuration, in the order of the source."""
    found: list[dict[str, Any]] = []
    for path in sorted((folder / SHARDS).glob("[!.]*.json")):
        try:
            marker = json.loads(path.read_bytes())
            if marker["shard"] != path.stem or not isinstance(marker["files"], Mapping):
                raise ValueError("its content does not fit its name")
            if not all(isinstance(marker[name], int) for name in ("number", "images", "rows")):
                raise ValueError("its counts are no numbers")
            [(error["key"], error["reason"]) for error in marker["errors"]]
            if marker["config"] == digest:
                found.append(marker)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(
                f"{path} is no marker of a run ({reason}): remove it and run the same command again."
            ) from error
    return sorted(found, key=lambda marker: marker["number"])
