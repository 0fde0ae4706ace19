"""Fine-tuning of image towers, on a copy unless told otherwise: adversarial (AFT, FARE), or guided by explanations."""
