"""Updates of a weight some rows at a time: memory for a block, whatever the size of the weight.

A row is what one output reads: a weight (o, i, h, w) has o rows of k = i h w values. Blocks fit into a core's
cache, so that a weight is read from memory once, whatever is added to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from spf_kit.adapters.parts import Shape
from spf_kit.adapters.scratch import Scratch
from spf_kit.adapters.update import EPSILON, Update

BLOCK = 2**18  # values of a block, about; 1 MB in float32

Blocks = Callable[
    [], Iterable[tuple[int, Tensor]]
]  # (first row, these rows of W as (n, k) float32), in order


def row_ranges(shape: Shape, layers: Iterable[Update]) -> Iterator[range]:
    """Blocks of rows of a weight of this shape, none of which cuts through what a layer must see whole."""
    together = math.lcm(*(layer.rows_together for layer in layers))
    outputs = shape[0] if shape else 1
    count = together * max(1, BLOCK // (together * max(1, math.prod(shape[1:]))))
    for first in range(0, outputs, count):
        yield range(first, min(first + count, outputs))


class Adder:
    """One layer of a file, ready to be added to blocks of rows of a weight. All in float32.

    Raises ValueError if the layer does not fit the weight's shape.
    """

    def __init__(self, layer: Update, shape: Shape, blocks: Blocks) -> None:
        """`blocks` are read only for DoRA's magnitudes of inputs, whose norms need all rows."""
        layer.check(shape)
        self._layer, self._shape = layer.to(torch.float32), shape
        self._columns = self._factor_of_inputs(blocks) if layer.dora_axis == 1 else None
        self.reads_weight = layer.dora_scale is not None or layer.depends_on_weight

    def add(self, total: Tensor, weight: Tensor, first: int, factor: float, scratch: Scratch) -> None:
        """total += factor * (W' - W) for the rows from `first` on, in place; both are (n, k), these rows.

        `weight` is not changed, and not read unless `reads_weight`.
        """
        layer = self._layer
        if layer.dora_scale is None:
            layer.add_rows(total, weight, first, factor, scratch)
            return
        changed = self._changed(weight, first, scratch)
        if self._columns is not None:
            changed.view(len(changed), len(self._columns), -1).mul_(self._columns[:, None])
        else:
            norms = torch.linalg.vector_norm(changed, dim=1, keepdim=True).clamp_min_(EPSILON)
            changed.mul_(layer.dora_scale.reshape(-1, 1)[first : first + len(changed)] / norms)
        total.add_(changed.sub_(weight), alpha=factor)

    def _changed(self, weight: Tensor, first: int, scratch: Scratch) -> Tensor:
        """W + U."""
        changed = scratch("changed", weight.shape).copy_(weight)
        self._layer.add_rows(changed, weight, first, 1.0, scratch)
        return changed

    def _factor_of_inputs(self, blocks: Blocks) -> Tensor:
        """m / |W + U| for magnitudes of the inputs, (i,)."""
        inputs = self._shape[1]
        squares = torch.zeros(inputs)
        scratch = Scratch()
        for first, weight in blocks():
            changed = self._changed(weight, first, scratch).view(len(weight), inputs, -1)
            squares += changed.square_().sum(dim=(0, 2))
        assert self._layer.dora_scale is not None
        return self._layer.dora_scale.reshape(-1) / squares.sqrt_().clamp_min_(EPSILON)
