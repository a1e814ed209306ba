"""How large an adapter's update is: Frobenius norms at strength 1, by block."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from spf_kit.adapters.index import IndexedLayer, LayerKey
from spf_kit.adapters.layers import load_layer
from spf_kit.adapters.loha import LohaLayer
from spf_kit.adapters.lokr import LokrLayer
from spf_kit.adapters.low_rank import square, square_of_product
from spf_kit.adapters.rows import row_ranges
from spf_kit.adapters.scratch import Scratch
from spf_kit.adapters.update import Update
from spf_kit.errors import UserError


def norm(layer: Update) -> float | None:
    """|U|; None where U depends on the base's weight (DoRA, OFT).

    LoRA: by the triangles of its thin factors (`low_rank.square_of_product`). LoKr: |C kron D| = |C| |D|, of
    which a D without a rank is a matrix as it stands. LoHa: by its factors too, or where the update is
    smaller, by that in float32, block by block.
    """
    if layer.depends_on_weight or layer.dora_scale is not None:
        return None
    if isinstance(layer, LokrLayer):
        small = float(torch.linalg.vector_norm(layer.small(torch.float64)))
        if layer.lokr_w2 is not None:
            large = float(torch.linalg.vector_norm(layer.lokr_w2, dtype=torch.float64))
        else:
            large = math.sqrt(square_of_product(*layer.thin()))
        return abs(layer.scale) * small * large
    if isinstance(layer, LohaLayer) and not _thin(layer):
        return math.sqrt(_square_by_rows(layer))
    return math.sqrt(square_of_product(*layer.factors()))


def _thin(layer: LohaLayer) -> bool:
    """Whether its r^2 pairs of factors are fewer numbers than the update."""
    out, into = layer.shape[0], math.prod(layer.shape[1:])
    return layer.hada_w1_b.shape[0] * layer.hada_w2_b.shape[0] * (out + into) < out * into


def _square_by_rows(layer: LohaLayer) -> float:
    """|U|^2; a block of rows is in memory at a time."""
    total, scratch = 0.0, Scratch()
    for rows in row_ranges(layer.shape, [layer]):
        block = scratch("block", (len(rows), math.prod(layer.shape[1:]))).zero_()
        layer.add_rows(block, block, rows.start, 1.0, scratch)  # a LoHa does not read the weight
        total += square(block)
    return total


def by_block(
    layers: Mapping[LayerKey, IndexedLayer], block_of: Mapping[LayerKey, str]
) -> dict[str, float | None]:
    """The root of the sum of squares over each block's layers, read one at a time; None as for `norm`.

    Raises UserError for values that are NaN or infinite, or whose square is.
    """
    squares: dict[str, float] = {}
    for key, indexed in layers.items():
        found = norm(load_layer(indexed))
        if found is not None and not math.isfinite(found * found):
            raise UserError(
                f"{str(indexed.header.path)!r}: what the layer {key[1]!r} adds is too large to be told"
            )
        square = math.nan if found is None else found**2
        squares[block_of[key]] = squares.get(block_of[key], 0.0) + square
    return {block: None if math.isnan(total) else math.sqrt(total) for block, total in squares.items()}
