"""OFT: the outputs of a layer, rotated in blocks. What it adds depends on the weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from spf_kit.adapters.lokr import whole
from spf_kit.adapters.parts import Shape
from spf_kit.adapters.scratch import Scratch
from spf_kit.adapters.update import Update

TOLERANCE = 0.05  # of an orthogonal matrix in float16 or bfloat16, by its largest value


@dataclass
class OftLayer(Update):
    """W' = rescale * R^T W with R = diag(R_1, ..., R_k) over the outputs.

    R_j = (1 + Q_j) (1 - Q_j)^-1 (Cayley) with Q_j = B_j - B_j^T, so that R_j is orthogonal. alpha limits
    |Q|_F over all blocks to alpha * o; 0 limits nothing. At strength s the layer is W + s (W' - W), linear as
    for every other kind: between 0 and 1 it is no rotation, and merging is the same arithmetic.

    kohya's and LyCORIS' format, which ComfyUI and A1111 read too. peft's OFT rotates the inputs, which no
    such file can say. ComfyUI takes alpha itself for the limit; what is trained here has alpha 0, the same to
    all.
    Qiu et al., arXiv 2306.07280, section 3.
    """

    oft_blocks: Tensor  # B (k, n, n)
    alpha: float
    rescale: Tensor | None = None  # (o, 1, ...)
    dora_scale: Tensor | None = None
    kind = "oft"
    depends_on_weight = True

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], alpha: float, shape: Shape) -> Self:
        """LyCORIS 2 wrote the rotations themselves (`oft_diag`, alpha unused), others under that name B.

        B has the freedom of all matrices; a trained one that is orthogonal by chance does not occur.
        """
        if alpha < 0:
            raise ValueError(f"has the alpha {alpha}, which can limit no rotation")
        blocks = parts.get("oft_blocks")
        if blocks is None:
            rotations = parts["oft_diag"].float()
            one = torch.eye(rotations.shape[-1])
            if (rotations @ rotations.mT - one).abs().max() > TOLERANCE:
                raise ValueError("has an oft_diag that is no rotation: which format that is cannot be told")
            # (R - 1) (R + 1)^-1 = Q, and a skew Q is B - B^T for its upper half B
            skew, failed = torch.linalg.solve_ex(rotations + one, rotations - one, left=False)
            if failed.any() or not skew.abs().max() < 1e4:
                raise ValueError("has a rotation by half a turn, which Cayley's formula cannot express")
            blocks, alpha = ((skew - skew.mT) / 2).triu(1).to(parts["oft_diag"].dtype), 0.0
        return cls(blocks, alpha, parts.get("rescale"))

    @property
    def rank(self) -> int:
        return self.oft_blocks.shape[1]

    @property
    def shape(self) -> Shape:
        return (self.oft_blocks.shape[0] * self.oft_blocks.shape[1],)

    @property
    def scale(self) -> float:
        return 1.0  # alpha is no factor here

    @property
    def limited(self) -> Tensor:
        """B with the limit of alpha applied, float64."""
        blocks = self.oft_blocks.double()
        if not self.alpha:
            return blocks
        norm = (blocks - blocks.mT).norm()
        return blocks * (self.alpha * self.shape[0] / norm).clamp(max=1.0) if norm > 0 else blocks

    def rotations(self) -> Tensor:
        """R (k, n, n), float64."""
        blocks = self.limited
        skew, one = blocks - blocks.mT, torch.eye(self.rank, dtype=torch.float64)
        return torch.linalg.solve(one - skew, one + skew, left=False)

    def scaled(self, factor: float) -> Self:
        raise ValueError("a rotation's file holds no multiple of what it adds")

    def difference(self, weight: Tensor) -> Tensor:
        flat = weight.reshape(len(weight), -1)
        total = torch.zeros_like(flat)
        self.add_rows(total, flat, 0, 1.0, Scratch())
        return total.reshape(weight.shape)

    @property
    def rows_together(self) -> int:
        return self.rank

    def add_rows(self, total: Tensor, weight: Tensor, first: int, factor: float, scratch: Scratch) -> None:
        """W' - W = (rescale R^T - 1) W, whose small matrices take the difference before the large one."""
        size = self.rank
        turns = self._turns[first // size : (first + len(total)) // size]
        blocks = (len(turns), size, total.shape[1])
        total.view(blocks).baddbmm_(turns, weight.reshape(blocks), alpha=factor)

    @cached_property
    def _turns(self) -> Tensor:
        """rescale R^T - 1, (k, n, n) float32."""
        turns = self.rotations().mT
        if self.rescale is not None:
            turns = turns * self.rescale.double().reshape(-1, self.rank, 1)
        return (turns - torch.eye(self.rank, dtype=torch.float64)).float()

    def update(self, dtype: torch.dtype = torch.float32) -> Tensor:
        raise ValueError("what an OFT adds depends on the weight")

    def factors(self) -> tuple[Tensor, Tensor]:
        raise ValueError("what an OFT adds depends on the weight")

    def live(self, weight: Tensor) -> Update:
        if self.rescale is not None or self.dora_scale is not None or weight.dim() != 2:
            return whole(self.delta(weight))
        return (
            replace(self, oft_blocks=self.limited.to(self.oft_blocks.dtype), alpha=0.0)
            if self.alpha
            else self
        )
