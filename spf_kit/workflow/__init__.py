"""What the commands do, as functions. Each takes the console that it reports to; none parses options."""

from spf_kit.workflow.base import load_base
from spf_kit.workflow.loras import evaluate, inspect, merge, sample, share
from spf_kit.workflow.runs import dry_run, report, train

__all__ = ["dry_run", "evaluate", "inspect", "load_base", "merge", "report", "sample", "share", "train"]
