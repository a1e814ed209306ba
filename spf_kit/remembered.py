"""What a plugin remembers of each picture, and how several processes come to remember the same."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping

from torch import Tensor


class Remembered(UserDict[str, Tensor]):
    """A tensor on the CPU for each picture, by `sample_id`: a plugin's attribute, `_maps = Remembered()`.

    A picture is seen by another process each time. The trainer hands what one has put in here to all others
    after each batch, so that every process remembers what a single one would.
    """

    def __init__(self, initial: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(initial or {})
        self._new: dict[str, Tensor] = {}

    def __setitem__(self, sample_id: str, value: Tensor) -> None:
        super().__setitem__(sample_id, value)
        if hasattr(self, "_new"):  # not what it begins with
            self._new[sample_id] = value

    def take_new(self) -> dict[str, Tensor]:
        """What was put in since the last call."""
        new, self._new = self._new, {}
        return new

    def learn(self, others: Mapping[str, Tensor]) -> None:
        """Take in what another process has put in; it is not passed on."""
        self.data.update(others)
