"""Reports: what run folders say, as one self-contained page; reads files only, never a model."""

from __future__ import annotations

from fedpeat.report.comparison import comparison_markdown, render_comparison, write_comparison
from fedpeat.report.load import load_run
from fedpeat.report.page import render_report, write_report
from fedpeat.report.records import RunData
from fedpeat.report.status_server import StatusServer
from fedpeat.report.watching import RunWatcher

__all__ = [
    "RunData",
    "RunWatcher",
    "StatusServer",
    "comparison_markdown",
    "load_run",
    "render_comparison",
    "render_report",
    "write_comparison",
    "write_report",
]
