"""What every kind of update of one weight can do; each kind has a file of its own beside this one.

Shapes: r rank; o and i the weight's outputs and inputs; h x w a convolution's kernel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from spf_kit.adapters.parts import Shape, fits
from spf_kit.adapters.scratch import Scratch

EPSILON = 1e-12  # a weight's row of zeros has no direction: DoRA's quotient must stay finite


class Update(ABC):
    """One layer of an adapter file: W' = W + U, or with DoRA's magnitudes m W' = m * (W + U) / |W + U|.

    Subclasses are dataclasses; their tensors are fields, named as the parts of `parts.PARTS`.
    DoRA: Liu et al., arXiv 2402.09353, eq. 5; it goes with every U that does not depend on W.
    """

    kind: ClassVar[str]
    depends_on_weight: ClassVar[bool] = False  # what it adds, even without DoRA
    alpha: float
    dora_scale: Tensor | None  # m: (o, 1, ...), or (1, i, ...) for magnitudes of the inputs

    # --- what each kind says ---

    @classmethod
    @abstractmethod
    def from_parts(cls, parts: Mapping[str, Tensor], alpha: float, shape: Shape) -> Self:
        """From a file's tensors, without `dora_scale`; shapes have been checked by `parts.describe`.

        Raises ValueError, a sentence's end, if the values contradict the format.
        """

    @property
    @abstractmethod
    def rank(self) -> int:
        """0 where whole matrices have none."""

    @property
    @abstractmethod
    def shape(self) -> Shape:
        """Of the weight that is updated, as far as it is known; see `parts.Described`."""

    @abstractmethod
    def update(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """U, of `shape`. Raises ValueError for kinds that need W for it."""

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """U as a product in float64, (o, R) and (R, i h w). Raises ValueError for kinds that need W."""

    def difference(self, weight: Tensor) -> Tensor:
        """W' - W before DoRA, for a float32 W."""
        return self.update().reshape(weight.shape)

    def live(self, weight: Tensor) -> Update:
        """The update in a form that can act beside this weight at run time: itself, or `lokr.whole` of
        what it comes to, where peft's layer cannot hold it."""
        return self

    # --- what all have in common ---

    @property
    def scale(self) -> float:
        """Of the product of the parts."""
        return self.alpha / self.rank if self.rank else 1.0

    @property
    def dora_axis(self) -> int | None:
        """The weight's axis that the magnitudes belong to."""
        if self.dora_scale is None:
            return None
        return 0 if self.dora_scale.shape[0] == self.shape[0] else 1

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.tensors().values())).dtype

    def tensors(self) -> dict[str, Tensor]:
        """The parts by name, without alpha."""
        found = ((field.name, getattr(self, field.name)) for field in fields(self))  # type: ignore[arg-type]
        return {name: value for name, value in found if isinstance(value, Tensor)}

    def to(self, dtype: torch.dtype) -> Self:
        return replace(self, **{name: tensor.to(dtype) for name, tensor in self.tensors().items()})  # type: ignore[type-var]

    def scaled(self, factor: float) -> Self:
        """The layer whose strength 1 is this one's strength `factor`.

        Raises ValueError, a sentence's end, for kinds whose form holds no multiple of what they add.
        """
        if self.dora_scale is not None:
            raise ValueError("DoRA's magnitudes hold no multiple of its update")
        return replace(self, alpha=self.alpha * factor)  # type: ignore[type-var]

    def delta(self, weight: Tensor) -> Tensor:
        """What strength 1 adds to `weight`, in float32 and of its shape; strength s adds s times that.

        Raises ValueError if the shapes do not fit, see `parts.fits`.
        """
        self.check(tuple(weight.shape))
        original = weight.to(torch.float32)
        difference = self.difference(original)
        if self.dora_scale is None:
            return difference
        magnitude = self.dora_scale.to(torch.float32)
        return dora_weight(original, difference, magnitude, self.dora_axis or 0) - original

    # --- some rows at a time, see `rows.py` ---

    @property
    def rows_together(self) -> int:
        """Blocks of rows begin at multiples of this."""
        return 1

    @abstractmethod
    def add_rows(self, total: Tensor, weight: Tensor, first: int, factor: float, scratch: Scratch) -> None:
        """total += factor * (W' - W), before DoRA, for the rows from `first` on, in place.

        `total` and `weight` are (n, i h w), `weight` these rows of W, which only kinds that depend on W read.
        All in float32, the parts too.
        """

    def check(self, weight: Shape) -> None:
        """Raises ValueError if the update does not fit a weight of this shape."""
        if not fits(self.shape, weight):
            raise ValueError(f"an update of shape {self.shape} does not fit a weight of {weight}")


def tucker(core: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """sum_rs core_rs[h, w] outputs_ro inputs_si: (r, r, h, w), (r, o), (r, i) to (o, i, h, w)."""
    return torch.einsum("rshw,ro,si->oihw", core, outputs, inputs)


def thin(outputs: Tensor, inputs: Tensor, core: Tensor | None) -> tuple[Tensor, Tensor]:
    """A product as (o, r) and (r, i h w) in float64; a Tucker core joins the inputs' side."""
    if core is None:
        return outputs.double(), inputs.double().flatten(1)
    return outputs.double().T.contiguous(), torch.einsum(
        "rshw,si->rihw", core.double(), inputs.double()
    ).flatten(1)


def whole_factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (o, k) as the product of itself and 1, of the smaller side."""
    o, k = matrix.shape
    if o <= k:
        return torch.eye(o, dtype=matrix.dtype), matrix
    return matrix, torch.eye(k, dtype=matrix.dtype)


def dora_weight(weight: Tensor, update: Tensor, magnitude: Tensor, axis: int = 0) -> Tensor:
    """m * (W + U) / |W + U|, with the norm over everything but `axis`; magnitude has one value along it."""
    return dora_factor(weight, update, magnitude, axis) * (weight + update)


def dora_factor(weight: Tensor, update: Tensor, magnitude: Tensor, axis: int = 0) -> Tensor:
    """m / |W + U|, (o, 1, ...) or (1, i, ...)."""
    shape = [1] * weight.dim()
    shape[axis] = -1
    return magnitude.reshape(shape) / magnitudes(weight + update, axis).reshape(shape)


def magnitudes(weight: Tensor, axis: int = 0) -> Tensor:
    """The norms of the weight's slices along `axis`, flat: where DoRA's magnitudes begin."""
    return torch.linalg.vector_norm(weight.transpose(0, axis).flatten(1), dim=1).clamp_min(EPSILON)
