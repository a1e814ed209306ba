"""`report.html`: a run, or several side by side, as one self-contained page.

Everything is read from run folders, so the page that a run writes while it goes on and the one that
`spf-kit report RUN` rebuilds come from the same functions.
"""

from spf_kit.report.build import PAGE, compare, rebuild

__all__ = ["PAGE", "compare", "rebuild"]
