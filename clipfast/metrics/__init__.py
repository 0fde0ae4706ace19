"""What attribution maps are measured by: named protocols."""

from clipfast.metrics.boxes import BoxGScoreCam, MaxBoxAcc
from clipfast.metrics.localisation import (
    EnergyPointingGame,
    Gini,
    MaskIou,
    PointingGame,
    PrecisionAt,
    SegmentationChefer,
)
from clipfast.metrics.typographic import Typographic, paste_word, typographic
from clipfast.metrics.words import Sentences, WordConfidence, WordCurvesCosine, WordCurvesRetrieval

__all__ = [
    "BoxGScoreCam",
    "EnergyPointingGame",
    "Gini",
    "MaskIou",
    "MaxBoxAcc",
    "PointingGame",
    "PrecisionAt",
    "SegmentationChefer",
    "Sentences",
    "Typographic",
    "WordConfidence",
    "WordCurvesCosine",
    "WordCurvesRetrieval",
    "paste_word",
    "typographic",
]
