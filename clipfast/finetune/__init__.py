"""Fine-tuning of image towers, on a copy unless told otherwise: adversarial (AFT, FARE), or guided by explanations."""

from clipfast.finetune.checkpoint import Finetuned
from clipfast.finetune.recipe import aft, fare
from clipfast.finetune.settings import Settings
from clipfast.finetune.train import Trainer

__all__ = ["Finetuned", "Settings", "Trainer", "aft", "fare"]
