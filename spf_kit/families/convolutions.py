"""Convolutions of few pixels with many weights, on the CPU: a product of matrices.

oneDNN copies a convolution's weights into a layout of its own at every call. At the deep levels of a large
UNet that copy is most of the work and of the memory: 2560 to 1280 channels are 118 MB in float32, for 16
pixels. There the pixels are gathered instead, nine values each, and multiplied with the weights as they lie.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MANY = 3_600_000  # weights, as 640 to 640 channels have
FEW = 256  # pixels of all pictures together


class FewPixels(nn.Conv2d):
    """A convolution that multiplies matrices where that is cheaper.

    peft makes an adapter's own layers of the class of the layer that they are put on, with other kernels and
    fewer weights: what suits is asked at each call.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        batch, _, height, width = input.shape
        if batch * height * width > FEW or not (suits(self) and _lies(weight)):
            return super()._conv_forward(input, weight, bias)
        padded = F.pad(input.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        shifted = [padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3)]
        gathered = torch.cat(shifted, dim=-1)  # (B, h, w, 9 C)
        matrix = weight.permute(0, 2, 3, 1).flatten(1)  # (out, 9 C), no copy: so they lie
        return F.linear(gathered, matrix, bias).permute(0, 3, 1, 2)


def few_pixels(module: nn.Module) -> None:
    """Convolutions of `module` that this is for become such; their weights and names stay."""
    for layer in module.modules():
        if type(layer) is nn.Conv2d and suits(layer):
            layer.__class__ = FewPixels


def suits(layer: nn.Conv2d) -> bool:
    """Whether it has a 3x3 kernel, one output for each input pixel, zeros around, and many weights."""
    shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
    same = shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and layer.padding_mode == "zeros"
    return same and layer.weight.numel() >= MANY


def _lies(weight: Tensor) -> bool:
    """With the channels last, where the CPU can multiply it."""
    return weight.device.type == "cpu" and weight.is_contiguous(memory_format=torch.channels_last)
