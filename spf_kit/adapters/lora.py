"""LoRA and LoCon: one product of two thin matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from spf_kit.adapters.parts import Shape
from spf_kit.adapters.scratch import Scratch
from spf_kit.adapters.update import Update


@dataclass
class LoraLayer(Update):
    """U = alpha / r * up @ down, and with DoRA's magnitudes as `Update` says.

    Hu et al., arXiv 2106.09685.
    """

    down: Tensor  # (r, i) or (r, i, h, w)
    up: Tensor  # (o, r) or (o, r, 1, 1)
    alpha: float
    dora_scale: Tensor | None = None
    kind = "lora"

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], alpha: float, shape: Shape) -> Self:
        """A Tucker-decomposed convolution (LyCORIS: lora_mid) becomes a plain one."""
        down, up = parts["down"], parts["up"]
        if "mid" in parts:
            # up_or mid_rs[h, w] down_si = up_or (mid down)_ri[h, w]
            mid = parts["mid"].to(torch.float32)
            down = torch.einsum("rshw,si->rihw", mid, down.to(torch.float32).flatten(1)).to(down.dtype)
        if len(shape) == 4 and up.dim() == 2:
            up = up[:, :, None, None]
        return cls(down, up, alpha)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> Shape:
        return (self.up.shape[0], *self.down.shape[1:])

    def update(self, dtype: torch.dtype = torch.float32) -> Tensor:
        product = self.up.flatten(1).to(dtype) @ self.down.flatten(1).to(dtype)
        return (product * self.scale).reshape(self.shape)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.up.flatten(1).double() * self.scale, self.down.flatten(1).double()

    def add_rows(self, total: Tensor, weight: Tensor, first: int, factor: float, scratch: Scratch) -> None:
        """In one pass over the rows, where a product and a sum take two."""
        up = self.up.flatten(1)[first : first + len(total)]
        total.addmm_(up, self.down.flatten(1), alpha=self.scale * factor)
