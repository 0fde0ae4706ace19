"""What attribution maps are measured by: named protocols."""

from clipfast.metrics.boxes import BoxGScoreCam, MaxBoxAcc
from clipfast.metrics.calibrate import Calibration, Calibrator, calibrate
from clipfast.metrics.class_entropy import ClassEntropy
from clipfast.metrics.dissection import ClipDissect, Dissection
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
from clipfast.metrics.network_dissection import NetworkDissect
from clipfast.metrics.occlusion import Occlusion
from clipfast.metrics.orders import AtRandom, ByMaps
from clipfast.metrics.probe import LinearHead, fit_probe, zero_shot_head
from clipfast.metrics.regions import Regions
from clipfast.metrics.registry import PROTOCOLS, build_protocol
from clipfast.metrics.roar import Roar
from clipfast.metrics.robust import RobustAccuracy
from clipfast.metrics.sanity import ClassSensitivity, SanityCascade, SanityWordCascade, spearman
from clipfast.metrics.stability import StabilitySsim, map_ssim, ssim
from clipfast.metrics.typographic import PastedWord, Typographic, paste_word, typographic
from clipfast.metrics.words import Sentences, WordConfidence, WordCurvesCosine, WordCurvesRetrieval
from clipfast.metrics.zero_shot import ZeroShot, class_embeddings

__all__ = [
    "PROTOCOLS",
    "AtRandom",
    "BoxGScoreCam",
    "ByMaps",
    "Calibration",
    "Calibrator",
    "ClassEntropy",
    "ClassSensitivity",
    "ClipDissect",
    "Completeness",
    "Dissection",
    "EnergyPointingGame",
    "Evaluation",
    "Evaluator",
    "Gini",
    "Infidelity",
    "LinearHead",
    "MaskIou",
    "MaxBoxAcc",
    "NetworkDissect",
    "Occlusion",
    "PastedWord",
    "PointingGame",
    "PrecisionAt",
    "Regions",
    "Roar",
    "RobustAccuracy",
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
    "calibrate",
    "class_embeddings",
    "evaluate",
    "fit_probe",
    "map_ssim",
    "paste_word",
    "spearman",
    "ssim",
    "typographic",
    "zero_shot_head",
]
