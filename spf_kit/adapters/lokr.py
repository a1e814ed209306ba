"""LoKr: the Kronecker product of a small matrix and a larger one, which may be low-rank themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from spf_kit.adapters.parts import Shape
from spf_kit.adapters.scratch import Scratch
from spf_kit.adapters.update import Update, thin, tucker, whole_factors


@dataclass
class LokrLayer(Update):
    """U = s * C kron D: U[a c + c', b d + d'] = s * C[a, b] D[c', d'].

    C is `lokr_w1` (a, b) or w1_a @ w1_b; D is `lokr_w2` (c, d, h, w), w2_a @ w2_b, or with a Tucker core
    sum_rs t2_rs[h, w] w2_a_rc w2_b_sd. s = alpha / r, and 1 where both are whole: nothing has a rank then,
    and LyCORIS, ComfyUI and A1111 leave such alphas alone. Yeh et al., arXiv 2309.14859, section 3.
    """

    alpha: float
    lokr_w1: Tensor | None = None
    lokr_w1_a: Tensor | None = None
    lokr_w1_b: Tensor | None = None
    lokr_w2: Tensor | None = None
    lokr_w2_a: Tensor | None = None
    lokr_w2_b: Tensor | None = None
    lokr_t2: Tensor | None = None
    dora_scale: Tensor | None = None
    kind = "lokr"

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], alpha: float, shape: Shape) -> Self:
        return cls(alpha, **parts)

    @property
    def rank(self) -> int:
        for decomposed in (self.lokr_w1_b, self.lokr_w2_b):
            if decomposed is not None:
                return decomposed.shape[0]
        return 0

    def scaled(self, factor: float) -> Self:
        if self.rank or self.dora_scale is not None:
            return super().scaled(factor)
        assert self.lokr_w2 is not None
        return replace(self, lokr_w2=self.lokr_w2 * factor)  # alpha says nothing here

    @property
    def shape(self) -> Shape:
        (a, b), (c, d, *kernel) = self._small_shape, self._large_shape
        return (a * c, b * d, *kernel)

    @property
    def _small_shape(self) -> Shape:
        if self.lokr_w1 is not None:
            return tuple(self.lokr_w1.shape)
        assert self.lokr_w1_a is not None
        assert self.lokr_w1_b is not None
        return (self.lokr_w1_a.shape[0], self.lokr_w1_b.shape[1])

    @property
    def _large_shape(self) -> Shape:
        if self.lokr_w2 is not None:
            return tuple(self.lokr_w2.shape)
        assert self.lokr_w2_a is not None
        assert self.lokr_w2_b is not None
        if self.lokr_t2 is not None:
            return (self.lokr_w2_a.shape[1], self.lokr_w2_b.shape[1], *self.lokr_t2.shape[2:])
        return (self.lokr_w2_a.shape[0], *self.lokr_w2_b.shape[1:])

    def small(self, dtype: torch.dtype) -> Tensor:
        """C, (a, b)."""
        if self.lokr_w1 is not None:
            return self.lokr_w1.to(dtype)
        assert self.lokr_w1_a is not None
        assert self.lokr_w1_b is not None
        return self.lokr_w1_a.to(dtype) @ self.lokr_w1_b.to(dtype)

    def large(self, dtype: torch.dtype) -> Tensor:
        """D, (c, d) or (c, d, h, w)."""
        if self.lokr_w2 is not None:
            return self.lokr_w2.to(dtype)
        assert self.lokr_w2_a is not None
        assert self.lokr_w2_b is not None
        a, b = self.lokr_w2_a.to(dtype), self.lokr_w2_b.to(dtype)
        if self.lokr_t2 is not None:
            return tucker(self.lokr_t2.to(dtype), a, b)
        return (a @ b.flatten(1)).reshape(self._large_shape)

    def update(self, dtype: torch.dtype = torch.float32) -> Tensor:
        small, large = self.small(dtype), self.large(dtype)
        small = small.reshape(*small.shape, *[1] * (large.dim() - 2))
        return torch.kron(small, large.contiguous()) * self.scale

    def add_rows(self, total: Tensor, weight: Tensor, first: int, factor: float, scratch: Scratch) -> None:
        """Row a c + c' is row a of C times row c' of D: each run of rows of one a is an outer product."""
        small, height, position, size = self._columns, self._large_shape[0], 0, total.shape[0]
        while position < size:
            a, row = divmod(first + position, height)
            count = min(height - row, size - position)
            large = self._large_rows(slice(row, row + count))
            part = total[position : position + count].view(count, small.shape[1], -1)
            part.addcmul_(small[a], large, value=self.scale * factor)
            position += count

    @cached_property
    def _columns(self) -> Tensor:
        """C in float32, each of its rows a column (a, b, 1)."""
        return self.small(torch.float32)[:, :, None]

    def _large_rows(self, here: slice) -> Tensor:
        """Some rows of D, (n, 1, d h w)."""
        if self.lokr_w2 is not None:
            return self.lokr_w2.flatten(1)[here, None]
        assert self.lokr_w2_a is not None
        assert self.lokr_w2_b is not None
        if self.lokr_t2 is not None:
            return tucker(self.lokr_t2, self.lokr_w2_a[:, here], self.lokr_w2_b).flatten(1)[:, None]
        return (self.lokr_w2_a[here] @ self.lokr_w2_b.flatten(1))[:, None]

    def live(self, weight: Tensor) -> Update:
        return self if self.dora_scale is None else whole(self.delta(weight))

    def factors(self) -> tuple[Tensor, Tensor]:
        """C kron (P Q) = (C kron P) (1 kron Q) = (1 kron P) (C kron Q), whichever is thinner.

        The columns of a kernel stand within D, so that Q (r, d h w) stays whole.
        """
        small, (large_up, large_down) = self.small(torch.float64), self.thin()
        if small.shape[1] <= small.shape[0]:
            up = torch.kron(small, large_up)
            down = torch.kron(torch.eye(small.shape[1], dtype=torch.float64), large_down)
        else:
            up = torch.kron(torch.eye(small.shape[0], dtype=torch.float64), large_up)
            down = torch.kron(small, large_down)
        return up * self.scale, down

    def thin(self) -> tuple[Tensor, Tensor]:
        """D as (c, r) and (r, d h w) in float64; r is c or d h w for a whole D."""
        if self.lokr_w2_a is not None and self.lokr_w2_b is not None:
            return thin(self.lokr_w2_a, self.lokr_w2_b, self.lokr_t2)
        return whole_factors(self.large(torch.float64).flatten(1))


def whole(difference: Tensor) -> LokrLayer:
    """A difference of weights as it is: 1 kron D. How an update of any other make can act at run time."""
    return LokrLayer(1.0, lokr_w1=torch.ones(1, 1), lokr_w2=difference)
