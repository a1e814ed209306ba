"""Linear layers that keep their frozen weights in 8 or 4 bits.

The weight is widened to the type of the computation for each product, in the forward pass and again in the
backward pass, and let go of at once. Rounding and its inverse are bitsandbytes' (8bit, nf4) and torch's
(fp8); the layers are not. bitsandbytes computes a pass without gradient by another kernel than one with it,
so that an adapter without effect would show one, rounds the inputs too (8bit), and packs weights anew in
place (nf4). With diffusers' layerwise casting autograd keeps every widened weight until the backward pass.

Shapes: o, i outputs and inputs of a layer; n = o i values.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from spf_kit.errors import UserError

BLOCK, OUTER_BLOCK = 64, 256  # values that share a scale, and scales that share one (nf4)
FP8_MAX = 448.0  # float8_e4m3fn


class QuantizedLinear(nn.Linear):
    """A frozen linear layer that holds no weight, but what gives one (buffers outside of the state dict).

    `weight` makes it anew at every look, (o, i) in `dtype`; products do so in autocast's type.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        """In the place of `linear`, on the meta device, to be filled by `take`."""
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = dtype
        self.register_parameter("bias", linear.bias)
        for name, (shape, kept) in self.layout().items():
            self.register_buffer(name, torch.empty(shape, dtype=kept, device="meta"), persistent=False)

    @abstractmethod
    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of each buffer."""

    @abstractmethod
    def rounded(self, weight: Tensor) -> tuple[Tensor, ...]:
        """A weight (o, i) float32 to the buffers, in the order of `layout`."""

    @abstractmethod
    def widened(self, dtype: torch.dtype) -> Tensor:
        """The weight (o, i) in this type."""

    def take(self, weight: Tensor, device: torch.device | str) -> None:
        """Hold this weight, rounded on the device."""
        kept = self.rounded(weight.detach().to(device, torch.float32).contiguous())
        for name, tensor in zip(self.layout(), kept, strict=True):
            self._buffers[name] = tensor

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.widened(self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        dtype = self.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            input = input.to(dtype)
        output: Tensor = _Product.apply(input, self, dtype)
        return output

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Buffers move and keep their types; a conversion is one of what they are widened to."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            moved = self.get_buffer(name)
            if moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


class _Product(torch.autograd.Function):
    """x W^T + b for a constant W, of which nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
        ctx.layer, ctx.dtype = layer, dtype
        return F.linear(x, layer.widened(dtype), layer.bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.layer.widened(ctx.dtype), None, None


class Float8Linear(QuantizedLinear):
    """float8_e4m3fn times a power of two for each output.

    It brings a row's largest value near the type's end: half of the values of a usual weight would else be
    among the smallest, which have fewer digits. A power is exact in every type that a weight is widened to.
    """

    values: Tensor
    scales: Tensor

    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        size = self.out_features, self.in_features
        return {"values": (size, torch.float8_e4m3fn), "scales": ((size[0], 1), torch.float32)}

    def rounded(self, weight: Tensor) -> tuple[Tensor, ...]:
        largest = weight.abs().amax(1, keepdim=True)
        exponents = torch.where(largest > 0, (largest / FP8_MAX).log2().ceil(), 0.0)
        scales = torch.exp2(exponents)
        return (weight / scales).to(torch.float8_e4m3fn), scales

    def widened(self, dtype: torch.dtype) -> Tensor:
        return self.values.to(dtype).mul_(self.scales)


class Int8Linear(QuantizedLinear):
    """What bitsandbytes' Linear8bitLt holds: int8, and the largest value of each output."""

    values: Tensor
    largest: Tensor

    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        size = self.out_features, self.in_features
        return {"values": (size, torch.int8), "largest": ((size[0], 1), torch.float32)}

    def rounded(self, weight: Tensor) -> tuple[Tensor, ...]:
        values, largest, _ = _library().int8_vectorwise_quant(weight.to(torch.float16))  # it takes no other
        return values, largest.unsqueeze(1)

    def widened(self, dtype: torch.dtype) -> Tensor:
        # the library's formula, without its two matrices in float32
        return torch.mul(self.values, self.largest / 127, out=torch.empty_like(self.values, dtype=dtype))


class Nf4Linear(QuantizedLinear):
    """What bitsandbytes' Linear4bit holds: two values a byte, their scales in 8 bits, and scales of these."""

    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        count = self.out_features * self.in_features
        blocks = -(-count // BLOCK)
        return {
            "values": ((-(-count // 2), 1), torch.uint8),
            "largest": ((blocks,), torch.uint8),
            "offset": ((), torch.float32),
            "outer": ((-(-blocks // OUTER_BLOCK),), torch.float32),
            "code": ((256,), torch.float32),
        }

    def rounded(self, weight: Tensor) -> tuple[Tensor, ...]:
        values, state = _library().quantize_4bit(
            weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        return values, state.absmax, state.offset, state.state2.absmax, state.state2.code.clone()

    def widened(self, dtype: torch.dtype) -> Tensor:
        library = _library()
        values, largest, offset, outer, code = self._buffers.values()
        inner = library.QuantState(outer, code=code, blocksize=OUTER_BLOCK, dtype=torch.float32)
        shape = torch.Size((self.out_features, self.in_features))
        state = library.QuantState(
            largest, shape=shape, blocksize=BLOCK, quant_type="nf4", dtype=dtype, offset=offset, state2=inner
        )
        weight: Tensor = library.dequantize_4bit(values, state)
        return weight


KINDS: Mapping[str, type[QuantizedLinear]] = {"fp8": Float8Linear, "8bit": Int8Linear, "nf4": Nf4Linear}


def prepare(
    unet: nn.Module, kind: str, *, dtype: torch.dtype, device: torch.device | str
) -> dict[str, QuantizedLinear]:
    """Put empty layers of a kind in the place of a UNet's linear layers, those of its transformers: the
    timestep's embeddings are small and steer everything. Returns them by name.

    Raises UserError if the kind cannot be used here.
    """
    _check(kind, torch.device(device))
    names = [
        name for name, module in unet.named_modules()
        if isinstance(module, nn.Linear) and ".attentions." in name
    ]  # fmt: skip
    found = {}
    for name in names:
        parent, _, child = name.rpartition(".")
        found[name] = KINDS[kind](unet.get_submodule(name), dtype)  # type: ignore[arg-type]
        setattr(unet.get_submodule(parent), child, found[name])
    return found


def _check(kind: str, device: torch.device) -> None:
    if kind == "fp8":
        if device.type == "mps":
            raise UserError(
                "base.quantize = 'fp8': Apple's GPUs have no 8-bit floats: "
                "set base.quantize = '8bit' or leave it out"
            )
        return
    try:
        _library()
    except Exception as error:  # its native library may not fit, with errors of many kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"base.quantize = {kind!r} needs bitsandbytes, which cannot be used ({reason}): "
            "pip install -U bitsandbytes, or set base.quantize = 'fp8'"
        ) from error


def _library() -> Any:
    # it warns at import of kernels for its own 4-bit layers
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes.functional

    return bitsandbytes.functional
