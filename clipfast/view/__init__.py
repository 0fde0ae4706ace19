"""Pictures of explanations: overlays, sheets, strips, coloured words and the HTML report. Plain data in, files out."""

from __future__ import annotations

from clipfast.view.figure import grid, strip
from clipfast.view.files import save_image, write_file
from clipfast.view.overlay import overlay
from clipfast.view.report import ReportItem, Strip, write_report

__all__ = ["ReportItem", "Strip", "grid", "overlay", "save_image", "strip", "write_file", "write_report"]
