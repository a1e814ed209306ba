"""The folders that the studio may touch: those given at its start, and nothing that leads out of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from spf_kit.errors import UserError


class Folders:
    """An allow-list. Links and `..` are followed before a path is judged, so neither leads out."""

    def __init__(self, roots: Sequence[Path]) -> None:
        """Raises UserError for a root that is no folder."""
        for root in roots:
            if not root.is_dir():
                raise UserError(f"the folder {str(root)!r} does not exist: give the studio one that does")
        self.roots = tuple(dict.fromkeys(root.resolve() for root in roots))

    def allows(self, path: str | Path) -> bool:
        """Whether `path`, followed to its end, lies in one of the folders. It need not exist."""
        try:
            real = _real(path)
        except (OSError, ValueError):  # such as a zero byte
            return False
        return any(real.is_relative_to(root) for root in self.roots)

    def check(self, path: str | Path) -> Path:
        """`path` as an absolute path without links. Raises UserError if it leads outside."""
        if not self.allows(path):
            raise UserError(
                f"{str(path)!r} is outside the studio's folders "
                f"({', '.join(map(str, self.roots))}): start the studio with that folder, as "
                f"spf-kit studio FOLDER"
            )
        return _real(path)

    def model(self, source: str) -> str:
        """A base model as the command line takes it: names and hub ids pass, paths must lie inside.

        Raises UserError if it leads outside.
        """
        if _is_name(source):
            return source
        return str(self.check(source))


def _real(path: str | Path) -> Path:
    return Path(os.path.realpath(os.path.expanduser(path)))


def _is_name(source: str) -> bool:
    """`embedded`, `embedded:NAME` or a hub id `owner/name`, that no file here is called."""
    if source.split(":")[0] == "embedded":
        return True
    plain = not source.startswith((".", "/", "~", "\\")) and "\\" not in source and ".." not in source
    return plain and source.count("/") <= 1 and not os.path.exists(source)
