"""HTML pages about runs."""

from mvlm.report.comparison import write_comparison
from mvlm.report.page import write_report

__all__ = ["write_comparison", "write_report"]
