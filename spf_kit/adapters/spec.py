"""How one layer of a new adapter shall be made. Imports no peft."""

from __future__ import annotations

from dataclasses import dataclass

from spf_kit.adapters.parts import Shape, new_parts


@dataclass(frozen=True)
class Spec:
    rank: int
    alpha: float
    dora: bool = False
    kind: str = "lora"
    factor: int = -1  # LoKr
    decompose_both: bool = False  # LoKr
    constraint: float = 0.0  # OFT

    def parts(self, weight: Shape) -> dict[str, Shape]:
        """The shapes of the trained parameters on a weight of this shape."""
        return new_parts(
            self.kind, weight, self.rank,
            factor=self.factor, decompose_both=self.decompose_both, dora=self.dora,
        )  # fmt: skip
