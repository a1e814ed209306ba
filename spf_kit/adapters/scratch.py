"""Memory for blocks of a weight that is used again: fresh pages cost more than the arithmetic in them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Scratch:
    """Tensors by name, for one thread. What a name held before is overwritten."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A contiguous tensor of no particular values, valid until the name is asked for again."""
        size, key = math.prod(shape), (name, dtype)
        held = self._held.get(key)
        if held is None or held.numel() < size:
            held = self._held[key] = torch.empty(size, dtype=dtype)
        return held[:size].view(*shape)
