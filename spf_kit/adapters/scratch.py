"""Memory for blocks of a weight that is used again: fresh pages cost more than the arithmetic in them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Scratch:
    """Tensors by name, for one thread. What a name held before is overwritten."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """A contiguous tensor of no particular values, valid until the name is asked for again."""
        view = self._views.get((name, shape, dtype))
        return self._view(name, shape, dtype) if view is None else view

    def _view(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        held = self._held.get((name, dtype))
        if held is None or held.numel() < size:
            held = self._held[name, dtype] = torch.empty(size, dtype=dtype)
            self._views.clear()  # which keep what was held
        view = self._views[name, shape, dtype] = held[:size].view(shape)
        return view
