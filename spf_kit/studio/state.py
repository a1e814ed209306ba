"""What the studio's pages share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from spf_kit.studio.folders import Folders
from spf_kit.studio.kept_base import KeptBase


@dataclass(frozen=True)
class Studio:
    """One studio: the folders that it may touch, and the one in which runs lie.

    Nothing of a page is kept here: two open pages, or one that was closed, must find the same on the disk.
    """

    folders: Folders
    runs: Path  # run folders lie in it, as `runs/NAME` on the command line

    def run(self, name: str) -> Path:
        """The run folder `runs/NAME`. Raises UserError if the name leads outside."""
        return self.folders.check(self.runs / name)

    @cached_property
    def base(self) -> KeptBase:
        """The base model of all pages that draw."""
        return KeptBase(self.folders)
