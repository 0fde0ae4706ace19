"""Pictures of explanations: overlays, contact sheets, coloured words and the HTML report. Plain data in, files out."""

from __future__ import annotations

from clipfast.view.figure import grid
from clipfast.view.files import save_image, write_file
from clipfast.view.overlay import overlay
from clipfast.view.report import ReportItem, write_report

__all__ = ["ReportItem", "grid", "overlay", "save_image", "write_file", "write_report"]
