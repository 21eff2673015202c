"""The report of a run, computed from its folder alone."""

from halfbyte.report.compare import compare_runs
from halfbyte.report.make import ReportFiles, make_report

__all__ = ["ReportFiles", "compare_runs", "make_report"]
