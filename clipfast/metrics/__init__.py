"""What attribution maps are measured by: named protocols."""

from clipfast.metrics.boxes import BoxGScoreCam, MaxBoxAcc
from clipfast.metrics.evaluate import Evaluator, evaluate
from clipfast.metrics.evaluation import Evaluation
from clipfast.metrics.infidelity import Completeness, Infidelity
from clipfast.metrics.localisation import (
    EnergyPointingGame,
    Gini,
    MaskIou,
    PointingGame,
    PrecisionAt,
    SegmentationChefer,
)
from clipfast.metrics.occlusion import Occlusion
from clipfast.metrics.registry import PROTOCOLS, build_protocol
from clipfast.metrics.sanity import ClassSensitivity, SanityCascade, SanityWordCascade, spearman
from clipfast.metrics.stability import StabilitySsim, map_ssim, ssim
from clipfast.metrics.typographic import Typographic, paste_word, typographic
from clipfast.metrics.words import Sentences, WordConfidence, WordCurvesCosine, WordCurvesRetrieval
from clipfast.metrics.zero_shot import ZeroShot, class_embeddings

__all__ = [
    "PROTOCOLS",
    "BoxGScoreCam",
    "ClassSensitivity",
    "Completeness",
    "EnergyPointingGame",
    "Evaluation",
    "Evaluator",
    "Gini",
    "Infidelity",
    "MaskIou",
    "MaxBoxAcc",
    "Occlusion",
    "PointingGame",
    "PrecisionAt",
    "SanityCascade",
    "SanityWordCascade",
    "SegmentationChefer",
    "Sentences",
    "StabilitySsim",
    "Typographic",
    "WordConfidence",
    "WordCurvesCosine",
    "WordCurvesRetrieval",
    "ZeroShot",
    "build_protocol",
    "class_embeddings",
    "evaluate",
    "map_ssim",
    "paste_word",
    "spearman",
    "ssim",
    "typographic",
]
