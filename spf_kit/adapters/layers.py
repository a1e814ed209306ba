"""One layer's low-rank update, and what it does to a weight.

Shapes: r rank; o and i the weight's outputs and inputs; h x w a convolution's kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spf_kit.adapters.index import IndexedLayer
from spf_kit.adapters.tensors import all_finite, read_tensor
from spf_kit.errors import UserError

EPSILON = 1e-12  # a weight's row of zeros has no direction: DoRA's quotient must stay finite


@dataclass
class LoraLayer:
    """W' = W + alpha / r * up @ down, and with DoRA W' = m * (W + ...) / |W + ...|.

    LoRA: Hu et al., arXiv 2106.09685; DoRA: Liu et al., arXiv 2402.09353, eq. 5.
    """

    down: Tensor  # (r, i) or (r, i, h, w)
    up: Tensor  # (o, r) or (o, r, 1, 1)
    alpha: float
    dora_scale: Tensor | None = None  # m: (o, 1, ...), or (1, i, ...) for magnitudes of the inputs

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that is updated."""
        return (self.up.shape[0], *self.down.shape[1:])

    @property
    def dora_axis(self) -> int | None:
        if self.dora_scale is None:
            return None
        return 0 if self.dora_scale.shape[0] == self.shape[0] else 1

    @property
    def dtype(self) -> torch.dtype:
        return self.down.dtype

    def tensors(self) -> dict[str, Tensor]:
        found = {"down": self.down, "up": self.up}
        return found if self.dora_scale is None else {**found, "dora_scale": self.dora_scale}

    def update(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """alpha / r * up @ down, of the weight's shape."""
        product = self.up.flatten(1).to(dtype) @ self.down.flatten(1).to(dtype)
        return (product * self.scale).reshape(self.shape)

    def delta(self, weight: Tensor) -> Tensor:
        """What strength 1 adds to `weight`, in float32 and of its shape; strength s adds s times that.

        Raises ValueError if the shapes do not fit, see `fits`.
        """
        if not fits(self.shape, tuple(weight.shape)):
            raise ValueError(
                f"an update of shape {self.shape} does not fit a weight of {tuple(weight.shape)}"
            )
        update = self.update().reshape(weight.shape)
        if self.dora_scale is None:
            return update
        original = weight.to(torch.float32)
        return (
            dora_weight(original, update, self.dora_scale.to(torch.float32), self.dora_axis or 0) - original
        )

    def add_to(self, total: Tensor, factor: float) -> None:
        """total += factor * alpha / r * up @ down in place, for a float32 `total` and a layer without DoRA.

        One pass over the weight, where `update` and a sum take four.
        """
        if self.dora_scale is not None or not fits(self.shape, tuple(total.shape)):
            raise ValueError(f"an update of shape {self.shape} cannot be added to {tuple(total.shape)}")
        up = self.up.flatten(1).to(total.dtype) * (self.scale * factor)
        total.view(total.shape[0], -1).addmm_(up, self.down.flatten(1).to(total.dtype))

    def to(self, dtype: torch.dtype) -> LoraLayer:
        return replace(self, **{name: tensor.to(dtype) for name, tensor in self.tensors().items()})


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


def fits(update: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether an update applies to a weight: the same shape, where a 1x1 convolution is a matrix."""
    return _matrix(update) == _matrix(weight)


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if math.prod(shape[2:]) == 1 else shape


def load_layer(layer: IndexedLayer) -> LoraLayer:
    """Read one layer's tensors. A Tucker-decomposed convolution (LyCORIS: lora_mid) becomes a plain one.

    Raises UserError for values that are NaN or infinite.
    """
    header = layer.header
    with open(header.path, "rb") as file:
        found = {
            part: read_tensor(header, name, file) for part, name in layer.names.items() if part != "alpha"
        }
    for part, tensor in found.items():
        if not all_finite(tensor):
            raise UserError(
                f"{str(header.path)!r} is damaged: the tensor {layer.names[part]!r} holds NaN or infinite "
                "values, as after a failed training: use an earlier save of it"
            )
    down, up = found["down"], found["up"]
    if "mid" in found:
        # up_or mid_rs[h, w] down_si = up_or (mid down)_ri[h, w]
        mid = found["mid"].to(torch.float32)
        down = torch.einsum("rshw,si->rihw", mid, down.to(torch.float32).flatten(1)).to(down.dtype)
    if len(layer.shape) == 4 and up.dim() == 2:
        up = up[:, :, None, None]
    dora = found.get("dora_scale")
    if dora is not None:
        size = [1] * len(layer.shape)
        size[layer.dora_axis or 0] = -1
        dora = dora.reshape(size)
    return LoraLayer(down, up, layer.alpha, dora)
