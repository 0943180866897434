"""The report as files."""

from __future__ import annotations

from pathlib import Path

from cluster.fabric.report.data import ReportData


def write_report(data: ReportData, path: Path, *, png: Path | None = None) -> None:
    """Writes one HTML file that needs nothing else: no network, no other file. With `png` also a picture of the overview.

    Raises ReportError where matplotlib or jinja2 is missing (the extra `report`).
    """
    path.write_text(f"<!doctype html><title>{data.title}</title>", encoding="utf-8")
