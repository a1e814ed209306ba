"""LoHa: the Hadamard product of two products, of rank up to r squared with the parameters of rank 2 r."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from spf_kit.adapters.lokr import whole
from spf_kit.adapters.parts import Shape
from spf_kit.adapters.scratch import Scratch
from spf_kit.adapters.update import Update, thin, tucker, whole_factors


@dataclass
class LohaLayer(Update):
    """U = alpha / r * (A_1 B_1) * (A_2 B_2), the middle product value by value.

    With Tucker cores T_n each factor is sum_rs T_rs[h, w] a_ro b_si. FedPara: Hyeon-Woo et al.,
    arXiv 2108.06098, propositions 1 and 3; LyCORIS: Yeh et al., arXiv 2309.14859, section 3.
    """

    hada_w1_a: Tensor  # A_1 (o, r); (r, o) with a Tucker core
    hada_w1_b: Tensor  # B_1 (r, i h w); (r, i) with one
    hada_w2_a: Tensor
    hada_w2_b: Tensor
    alpha: float
    hada_t1: Tensor | None = None  # (r, r, h, w)
    hada_t2: Tensor | None = None
    dora_scale: Tensor | None = None
    kind = "loha"

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], alpha: float, shape: Shape) -> Self:
        return cls(alpha=alpha, **parts)

    @property
    def rank(self) -> int:
        return self.hada_w1_b.shape[0]

    @property
    def shape(self) -> Shape:
        if self.hada_t1 is None:
            return (self.hada_w1_a.shape[0], *self.hada_w1_b.shape[1:])
        return (self.hada_w1_a.shape[1], self.hada_w1_b.shape[1], *self.hada_t1.shape[2:])

    def update(self, dtype: torch.dtype = torch.float32) -> Tensor:
        first = _product(self.hada_w1_a, self.hada_w1_b, self.hada_t1, dtype)
        second = _product(self.hada_w2_a, self.hada_w2_b, self.hada_t2, dtype)
        return first.mul_(second).mul_(self.scale).reshape(self.shape)

    def add_rows(self, total: Tensor, weight: Tensor, first: int, factor: float, scratch: Scratch) -> None:
        here = slice(first, first + len(total))
        products = []
        for name, a, b, core in (
            ("first", self.hada_w1_a, self.hada_w1_b, self.hada_t1),
            ("second", self.hada_w2_a, self.hada_w2_b, self.hada_t2),
        ):
            if core is None:
                products.append(torch.mm(a[here], b.flatten(1), out=scratch(name, total.shape)))
            else:
                products.append(tucker(core, a[:, here], b).flatten(1))
        total.addcmul_(*products, value=self.scale * factor)

    def live(self, weight: Tensor) -> Update:
        return self if self.dora_scale is None else whole(self.delta(weight))

    def factors(self) -> tuple[Tensor, Tensor]:
        """The rows of two products multiply as Kronecker products of their rows: r^2 columns.

            (A_1 B_1) * (A_2 B_2) = sum_st (A_1s * A_2t) (B_1s * B_2t)

        Where that is more than the update has rows or columns, the update itself and 1.
        """
        if self.hada_w1_b.shape[0] * self.hada_w2_b.shape[0] > min(self.shape[0], math.prod(self.shape[1:])):
            return whole_factors(self.update(torch.float64).flatten(1))
        (a_1, b_1), (a_2, b_2) = (
            thin(a, b, t)
            for a, b, t in (
                (self.hada_w1_a, self.hada_w1_b, self.hada_t1),
                (self.hada_w2_a, self.hada_w2_b, self.hada_t2),
            )
        )
        up = torch.einsum("os,ot->ost", a_1, a_2).flatten(1)
        down = torch.einsum("si,ti->sti", b_1, b_2).flatten(0, 1)
        return up * self.scale, down


def _product(a: Tensor, b: Tensor, core: Tensor | None, dtype: torch.dtype) -> Tensor:
    if core is None:
        return a.to(dtype) @ b.flatten(1).to(dtype)
    return tucker(core.to(dtype), a.to(dtype), b.to(dtype))
