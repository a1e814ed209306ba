"""The best approximation of a product of thin matrices, or of a whole matrix, by a product of rank r.

U D with U (o, R) and D (R, k): with U = Q_u R_u and D^T = Q_d R_d, the singular values of U D are those of
R_u R_d^T, which is only R x R. Keeping the largest r of them is the best approximation of rank r (Eckart and
Young), and what is left out is known exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from spf_kit.adapters.layers import LoraLayer

OVERSAMPLING = 16  # Halko, Martinsson and Tropp, arXiv 0909.4061, section 4.2: 5 to 10 suffice
ITERATIONS = 8  # at most, of the subspace
SETTLED = 1e-3  # of the kept square norm: what another iteration must gain to be followed by one more
SMALL = 192  # side of a matrix that is decomposed as a whole


class Share(NamedTuple):
    """Squared Frobenius norms of an update: what is kept of it, and what is not."""

    kept: float
    lost: float

    @property
    def residual(self) -> float:
        """Share of the update that is missing, as a quotient of Frobenius norms."""
        total = self.kept + self.lost
        return math.sqrt(self.lost / total) if total else 0.0


@dataclass(frozen=True)
class Cut:
    """A layer of the wanted rank, alpha = rank, and what it keeps."""

    layer: LoraLayer
    kept: float
    lost: float

    @property
    def residual(self) -> float:
        return Share(self.kept, self.lost).residual


def whole_residual(shares: Iterable[Share | Cut]) -> float:
    """Of all layers together."""
    shares = list(shares)
    return Share(sum(s.kept for s in shares), sum(s.lost for s in shares)).residual


def cut_product(
    up: Tensor, down: Tensor, shape: tuple[int, ...], rank: int | None, keep: float | None = None
) -> Cut:
    """up @ down, (o, R) and (R, k) in float64, as a layer of a weight of `shape`.

    Args:
        rank: at most; None is no limit.
        keep: share of the squared norm that the rank must reach, within `rank`; None takes all of `rank`.
    """
    most = min(up.shape[1], *up.shape[:1], *down.shape[1:])
    if keep is None and up.shape[1] == most and (rank is None or rank >= most):
        kept = float((up.T @ up * (down @ down.T)).sum())  # squared Frobenius norm of up @ down
        return Cut(as_layer(up, down, shape), kept, 0.0)
    up_basis, up_small = torch.linalg.qr(up)
    down_basis, down_small = torch.linalg.qr(down.T)
    left, values, right = torch.linalg.svd(up_small @ down_small.T, full_matrices=False)
    squares = values.square()
    chosen = min(rank or most, most)
    if keep is not None:
        chosen = min(chosen, rank_for(squares, keep))
    root = values[:chosen].sqrt()
    layer = as_layer(
        up_basis @ left[:, :chosen] * root, root[:, None] * (right[:chosen] @ down_basis.T), shape
    )
    return Cut(layer, float(squares[:chosen].sum()), float(squares[chosen:].sum()))


def rank_for(squares: Tensor, keep: float) -> int:
    """The smallest rank whose squared singular values (in descending order) have the share `keep`."""
    reached = squares.cumsum(0)
    return min(int((reached < keep * reached[-1]).sum()) + 1, len(squares))


def cut_matrix(matrix: Tensor, rank: int, seed: int = 0) -> Cut:
    """A difference of weights (o, i) or (o, i, h, w), in float32 or wider, as a layer of at most `rank`.

    A small matrix is decomposed as a whole, in float64. A large one by subspace iteration (Halko et al.,
    algorithm 4.4) from seeded random numbers, until what is kept of the squared norm grows by less than a
    thousandth. `lost` is measured on the result, whatever the way there.
    """
    flat = matrix.flatten(1)
    side = min(flat.shape)
    rank = min(rank, side)
    if side <= max(SMALL, 2 * (rank + OVERSAMPLING)):
        left, values, right = torch.linalg.svd(flat.double(), full_matrices=False)
    else:
        left, values, right = _largest(flat, rank, seed)
    root = values[:rank].sqrt()
    layer = as_layer(left[:, :rank] * root, root[:, None] * right[:rank], tuple(matrix.shape))
    # measured, for as a difference of squares it would drown in the rounding of what is kept
    rest = torch.addmm(flat, layer.up.flatten(1).to(flat), layer.down.flatten(1).to(flat), alpha=-1)
    return Cut(layer, float(values[:rank].square().sum()), square(rest))


def _largest(flat: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values and their vectors, with the precision of the matrix."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(flat.shape[1], rank + OVERSAMPLING, generator=generator, dtype=flat.dtype)
    before = 0.0
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(flat @ start)[0]
        small = basis.T @ flat  # (columns, k), with the singular values of the projection
        squares = torch.linalg.eigvalsh((small @ small.T).double()).flip(0)
        kept = float(squares[:rank].sum())
        if kept - before <= SETTLED * kept:
            break
        before, start = kept, torch.linalg.qr(small.T)[0]
    left, values, right = torch.linalg.svd(small.double(), full_matrices=False)
    return basis.double() @ left, values, right


def square(matrix: Tensor) -> float:
    """The squared Frobenius norm, summed in float64."""
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2


def square_of_product(up: Tensor, down: Tensor) -> float:
    """|up @ down|^2 of (o, R) and (R, k), in float64, by their triangles: it may be a small difference of
    large products."""
    triangles = (torch.linalg.qr(matrix.double(), "r")[1] for matrix in (up, down.T))
    left, right = triangles
    return square(left @ right.T)


def as_layer(up: Tensor, down: Tensor, shape: tuple[int, ...]) -> LoraLayer:
    """(o, r) and (r, k) as a layer of a weight of `shape`, in float32, with alpha = rank."""
    rank, tail = up.shape[1], [1] * (len(shape) - 2)
    up, down = up.float(), down.float()
    return LoraLayer(down.reshape(rank, *shape[1:]), up.reshape(shape[0], rank, *tail), float(rank))
