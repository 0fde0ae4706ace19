"""Reading images, and the geometry between their pixels and a model's patches."""

from __future__ import annotations

from clipfast.data.geometry import Geometry, InputSpec, normalize, prepare
from clipfast.data.images import expand, read_image

__all__ = ["Geometry", "InputSpec", "expand", "normalize", "prepare", "read_image", "spec_of"]
