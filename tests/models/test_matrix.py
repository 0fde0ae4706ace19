"""One model of every family as open_clip builds it; `make test-matrix` takes all of them, and other releases."""

from __future__ import annotations

import os

import open_clip
import pytest
from matrix import check

FEW = (
    "ViT-B-32",
    "ViT-B-16-quickgelu",
    "ViT-M-16-alt",
    "coca_ViT-B-32",
    "ViT-L-14-CLIPA",
    "RN50",
)
ALL = bool(os.environ.get("CLIPFAST_EVERY_MODEL"))


@pytest.mark.parametrize("name", open_clip.list_models() if ALL else FEW)
def test_as_its_own_modules(name):
    record = check(name)
    if "refused" in record:
        pytest.xfail(record["refused"])
