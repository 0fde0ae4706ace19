from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from clipfast.data.scenes import Scenes


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten scenes of 32 pixels with their captions beside them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, scene in enumerate(Scenes(10, seed=2)):
        Image.fromarray(scene.image).resize((32, 32)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(scene.caption)
    return folder
