"""DoRA at run time, through peft's modules, with a strength and beside other adapters.

peft's own DoRA rescales whatever the layer gives, other adapters' updates included, and its scaling moves
only the inner update, so that at 0 the magnitudes stay. Here every adapter adds its own difference from the
plain weight, s * (m * (W + U) / |W + U| - W): strengths are linear, 0 is exactly nothing, the order of
adapters does not matter, and a merge into the weights is the same arithmetic. ComfyUI's strengths are, too.

Shapes: o, i outputs and inputs of the layer.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from spf_kit.adapters.update import dora_factor


class AdditiveDora(LoraVariant):
    """Takes the place of peft's variant in one layer, for one adapter."""

    def __init__(self, axis: int = 0) -> None:
        self.axis = axis  # of the weight, to which the magnitudes belong: 0 outputs, 1 inputs
        self.strength = 1.0

    def supports_lora_conversion(self) -> bool:
        return False

    def forward(  # type: ignore[override]
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """`result`, the layer's output so far, plus this adapter's difference.

        With f = m / |W + U|, over outputs: (f - 1) * W x + f * U x; over inputs: W (f - 1) x + U f x.
        """
        base, dropout = module.get_base_layer(), module.lora_dropout[active_adapter]
        x = dropout(x)
        factor = self._factor(module, active_adapter)
        if self.axis == 0:
            factor = _along_channels(factor, result)
            # W x is the result itself, unless dropout or another adapter has changed it
            first = next(name for name in module.active_adapters if name in module.lora_A) == active_adapter
            first = first and module.base_layer is base  # no adapter of another kind below
            plain = result if first and isinstance(dropout, nn.Identity) else base(x.to(base.weight.dtype))
            difference = (factor - 1) * _without_bias(plain, base)
            difference = difference + factor * self._update(module, active_adapter, x)
        else:
            factor = _along_channels(factor, x)
            difference = _without_bias(base(((factor - 1) * x).to(base.weight.dtype)), base)
            difference = difference + self._update(module, active_adapter, factor * x)
        return result + self.strength * difference

    def _update(self, module: Any, name: str, x: Tensor) -> Tensor:
        output: Tensor = module.lora_B[name](module.lora_A[name](x)) * module.scaling[name]
        return output

    def _factor(self, module: Any, name: str) -> Tensor:
        """m / |W + U|, flat, in float32 even under autocast: a fresh adapter must give exactly 1.

        |W + U| is taken as a constant in the gradient, as the paper does (section 4.3).
        """
        weight, magnitude = module.get_base_layer().weight, module.lora_magnitude_vector[name].weight
        with torch.autocast(device_type=weight.device.type, enabled=False):
            down, up = (
                part[name].weight.detach().float().flatten(1) for part in (module.lora_A, module.lora_B)
            )
            update = (up @ down).reshape(weight.shape) * module.scaling[name]
            return dora_factor(weight.detach().float(), update, magnitude.float(), self.axis).flatten()


def _along_channels(values: Tensor, like: Tensor) -> Tensor:
    """Values of the channels, shaped to multiply: last dimension of (B, L, C), second of (B, C, h, w)."""
    return values.reshape(1, -1, 1, 1) if like.dim() == 4 else values


def _without_bias(output: Tensor, base: nn.Module) -> Tensor:
    return output if base.bias is None else output - _along_channels(base.bias, output)  # type: ignore[arg-type]
