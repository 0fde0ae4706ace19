"""Rendered scenes as a data set: masks and boxes that are exact, and no files."""

from __future__ import annotations

from typing import ClassVar

from PIL import Image

from clipfast.data.datasets.base import Dataset, Sample, Source, Target
from clipfast.data.scenes import Scenes, names


class RenderedScenes(Dataset):
    """`scenes:SEED:COUNT`: the first COUNT scenes of a benchmark seed; one target for each name that is drawn.

    objects: how many things a scene has, as for `scenes.render`. A scene's caption is true of it, its foil the same
    sentence with one thing wrong. Different seeds share no scene.
    """

    source: ClassVar[Source] = Source("Rendered scenes", "clipfast itself", "nothing: scenes:SEED or scenes:SEED:COUNT")
    offers = frozenset({"labels", "masks", "boxes", "captions"})

    def __init__(self, seed: int, count: int, objects: int | tuple[int, int] = (1, 3)):
        self.name = f"scenes:{seed}" if objects == (1, 3) else f"scenes:{seed} of {objects} objects"
        self.classes = names()
        self._labels = {name: label for label, name in enumerate(self.classes)}
        self._scenes = Scenes(count, seed, objects=objects)

    def __len__(self) -> int:
        return len(self._scenes)

    def _sample(self, index: int) -> Sample:
        scene = self._scenes[index]
        targets = [
            Target(
                name,
                self._labels[name],
                scene.mask(name),
                [
                    (float(a), float(b), float(c), float(d))
                    for a, b, c, d in (t.box for t in scene.objects if t.name == name)
                ],
            )
            for name in sorted(scene.names, key=self._labels.__getitem__)
        ]
        key = f"scene_{self._scenes.seed}_{index:06d}"
        return Sample(key, Image.fromarray(scene.image), targets, [scene.caption], [scene.foil])
