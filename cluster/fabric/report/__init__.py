"""What was found and measured, as one HTML page, as a picture, and as text for terminals."""

from cluster.fabric.report.data import ReportData
from cluster.fabric.report.page import write_report
from cluster.fabric.report.terminal import heat_map

__all__ = ["ReportData", "heat_map", "write_report"]
