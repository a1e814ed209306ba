"""Updates of a weight some rows at a time: memory for a block, whatever the size of the weight.

A row is what one output reads: a weight (o, i, h, w) has o rows of k = i h w values. Blocks fit into a core's
cache, so that a weight is read from memory once, whatever is added to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from spf_kit.adapters.lora import LoraLayer
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
    """All that is added to one weight, ready for blocks of its rows. In float32.

    LoRAs without magnitudes are one product, their factors side by side: one pass over a block for all.
    """

    def __init__(self, parts: Iterable[tuple[Update, float]], shape: Shape, blocks: Blocks) -> None:
        """Layers with their factors. `blocks` are read only for DoRA's magnitudes of inputs, whose norms need
        all rows.

        Raises ValueError if a layer does not fit the weight's shape.
        """
        self._shape, plain = shape, list[tuple[LoraLayer, float]]()
        self._others: list[tuple[Update, float]] = []
        self._doras: list[tuple[Update, float, Tensor | None]] = []
        for layer, factor in parts:
            layer.check(shape)
            if isinstance(layer, LoraLayer) and layer.dora_scale is None:
                plain.append((layer, factor))
                continue
            layer = layer.to(torch.float32)
            if layer.dora_scale is None:
                self._others.append((layer, factor))
            else:
                columns = self._factor_of_inputs(layer, blocks) if layer.dora_axis == 1 else None
                self._doras.append((layer, factor, columns))
        if plain:
            self._others.insert(0, (_side_by_side(plain), 1.0))
        # the share of W that DoRAs replace: W + f (m (W + U) / |W + U| - W) begins as (1 - f) W
        self._replaced = sum(factor for _, factor, _ in self._doras)
        self.reads_weight = bool(self._doras) or any(layer.depends_on_weight for layer, _ in self._others)

    def changed(self, weight: Tensor, first: int, scratch: Scratch) -> Tensor:
        """W + sum of factor * (W' - W) for the rows (n, k) from `first` on: in the place of `weight`, where
        that is not read any more, else in memory of `scratch`."""
        total = weight
        if self.reads_weight:
            total = torch.mul(weight, 1 - self._replaced, out=scratch("total", weight.shape))
        self._add(total, weight, first, scratch)
        return total

    def add(self, total: Tensor, weight: Tensor, first: int, scratch: Scratch) -> None:
        """total += sum of factor * (W' - W) in place, for the rows from `first` on; both are (n, k).

        `weight` is not changed, and not read unless `reads_weight`.
        """
        if self._replaced:
            total.sub_(weight, alpha=self._replaced)
        self._add(total, weight, first, scratch)

    def _add(self, total: Tensor, weight: Tensor, first: int, scratch: Scratch) -> None:
        """What `add` adds, without what DoRAs take away from W."""
        for layer, factor in self._others:
            layer.add_rows(total, weight, first, factor, scratch)
        for layer, factor, columns in self._doras:
            changed = self._sum(layer, weight, first, scratch)
            if columns is not None:
                blocks = (len(total), len(columns), -1)
                total.view(blocks).addcmul_(changed.view(blocks), columns[:, None], value=factor)
                continue
            assert layer.dora_scale is not None
            norms = torch.linalg.vector_norm(changed, dim=1, keepdim=True).clamp_min_(EPSILON)
            magnitudes = layer.dora_scale.view(-1, 1)[first : first + len(changed)]
            total.addcmul_(changed, magnitudes / norms, value=factor)

    def _sum(self, layer: Update, weight: Tensor, first: int, scratch: Scratch) -> Tensor:
        """W + U."""
        changed = scratch("changed", weight.shape).copy_(weight)
        layer.add_rows(changed, weight, first, 1.0, scratch)
        return changed

    def _factor_of_inputs(self, layer: Update, blocks: Blocks) -> Tensor:
        """m / |W + U| for magnitudes of the inputs, (i,)."""
        inputs = self._shape[1]
        squares = torch.zeros(inputs)
        scratch = Scratch()
        for first, weight in blocks():
            changed = self._sum(layer, weight, first, scratch).view(len(weight), inputs, -1)
            squares += changed.square_().sum(dim=(0, 2))
        assert layer.dora_scale is not None
        return layer.dora_scale.reshape(-1) / squares.sqrt_().clamp_min_(EPSILON)


def _side_by_side(layers: Sequence[tuple[LoraLayer, float]]) -> LoraLayer:
    """sum_j f_j s_j up_j down_j = [f_1 s_1 up_1, ...] [down_1; ...], (o, R) and (R, k) with alpha = R."""
    up = torch.cat([layer.up.flatten(1).float() * (layer.scale * factor) for layer, factor in layers], dim=1)
    down = torch.cat([layer.down.flatten(1).float() for layer, _ in layers])
    return LoraLayer(down, up, float(len(down)))
