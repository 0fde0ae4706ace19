"""The images of a run, from its source opened again: the run keeps none itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from clipfast.data.images import read_image
from clipfast.engine.base import Failure, Shard, Source
from clipfast.engine.reader import Run
from clipfast.engine.sources import open_source
from clipfast.engine.tars import Tars
from clipfast.errors import ClipfastError, InputError


class Pictures:
    """A run's images, by key. images: where its source lies now, if not where the run found it.

    Raises InputError where the source cannot be opened.
    """

    def __init__(self, run: Run, images: str | Path | None):
        about = run.config.source
        place = about.get("place") if images is None else images
        if not place or place == "-":
            raise InputError(
                "overlays need the images, and the run does not say where they are: name them with --images."
            )
        try:
            self._source: Source = open_source(
                place,
                shard_size=about.get("shard_size") or 1000,
                image_column=about.get("image_column"),
                key_column=about.get("key_column"),
            )
        except (ClipfastError, OSError) as error:
            raise InputError(
                f"overlays need the images: {str(error).rstrip('.')}; name with --images where they are now."
            ) from error
        self._all: dict[str, Callable[[], bytes]] | None = None
        self._shards: dict[str | int, Shard] = {}
        for shard in self._source.shards():
            self._shards |= {shard.id: shard, shard.number: shard}

    def of(self, marker: dict[str, Any], keys: Iterable[str]) -> Callable[[str], Image.Image]:
        """What gives the pictures of a shard by their keys, each once. It raises InputError for one that is gone."""
        shard = self._shards.get(marker["shard"]) or self._shards.get(marker["number"])
        items = iter(()) if shard is None else self._source.items(shard)
        wanted = set(keys)
        waiting: dict[str, Callable[[], bytes]] = {}

        def picture(key: str) -> Image.Image:
            while key not in waiting and (item := next(items, None)) is not None:
                if not isinstance(item, Failure) and item.key in wanted:
                    waiting[item.key] = item.read
            read = waiting.pop(key, None) or self._elsewhere().get(key)
            if read is None:
                raise InputError(f"{key} is no longer where the run found it.")
            return read_image(read(), name=key)

        return picture

    def _elsewhere(self) -> dict[str, Callable[[], bytes]]:
        """All images by key: where files came or went, the source is cut into shards at other places than it was."""
        if self._all is None:
            every = () if isinstance(self._source, Tars) else self._source.shards()
            items = (item for shard in every for item in self._source.items(shard))
            self._all = {item.key: item.read for item in items if not isinstance(item, Failure)}
        return self._all
