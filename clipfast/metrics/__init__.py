"""What attribution maps are measured by: named protocols."""

from clipfast.metrics.typographic import Typographic, paste_word, typographic

__all__ = ["Typographic", "paste_word", "typographic"]
