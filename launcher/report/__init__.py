"""A run as one page: how it has learned, how fast, where its time has gone, and what went wrong."""

from launcher.report.page import RunReport, write_report

__all__ = ["RunReport", "write_report"]
