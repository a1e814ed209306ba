"""A GPU's ways with memory, on tensors that have no values: attention kernels, and what autocast widens.

torch decides both in C++ by the device, and a build for the CPU has no other device. So tensors that stand
for a GPU's are on the CPU as far as torch knows; what differs there is put right here.

Shapes: B samples, H heads, Q queries, K keys, d features of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

GRANULE = 512  # bytes: torch's allocator on CUDA hands out multiples
HALF = (torch.float16, torch.bfloat16)

# What autocast computes in float32 on CUDA and leaves alone on the CPU, as far as models use it:
# https://docs.pytorch.org/docs/stable/amp.html#cuda-ops-that-autocast-to-float32
WIDENED = {
    F.group_norm, F.layer_norm, F.softmax, F.log_softmax, F.mse_loss, F.cosine_similarity, F.softplus,
    torch.group_norm, torch.layer_norm, torch.softmax, torch.log_softmax, torch.exp, torch.log, torch.pow,
    torch.rsqrt, torch.reciprocal, torch.sum, torch.prod, torch.cumsum, torch.norm, torch.square,
    torch.linalg.vector_norm, torch.linalg.norm,
    Tensor.softmax, Tensor.log_softmax, Tensor.exp, Tensor.log, Tensor.pow, Tensor.__pow__, Tensor.rsqrt,
    Tensor.reciprocal, Tensor.sum, Tensor.prod, Tensor.cumsum, Tensor.norm, Tensor.square,
}  # fmt: skip


class FusedAttention(torch.autograd.Function):
    """Flash and memory-efficient attention as they allocate: no (Q, K) matrix, but the output and a logarithm
    for each query; backward the gradients, a sum for each query and, below float32, wide sums for dq."""

    @staticmethod
    def forward(context: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = q.new_empty(*q.shape[:-1], v.shape[-1])
        normaliser = q.new_empty(q.shape[:-1], dtype=torch.float32)
        context.save_for_backward(q, k, v, output, normaliser)
        return output

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        q, k, v, _, normaliser = context.saved_tensors
        sums = torch.empty_like(normaliser)
        wide = q.new_empty(q.shape, dtype=torch.float32) if q.dtype in HALF else None
        found = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        del sums, wide
        return found


def attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    """(B, H, Q, d), (B, H, K, d) twice to (B, H, Q, d), in the type that autocast computes in."""
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (x.to(torch.get_autocast_dtype("cpu")) for x in (q, k, v))
    output: Tensor = FusedAttention.apply(q, k, v)
    return output


class GpuMode(TorchFunctionMode):
    """Within it, functions allocate as on a GPU. It acts on the level of Python, so that autograd, and what
    gradient checkpointing computes again, go the same way."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return attention(*args, **kwargs)
        if func in WIDENED and torch.is_autocast_enabled("cpu"):
            args, kwargs = _widened(args), {key: _widened(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(map(_widened, value))
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


@contextmanager
def xformers() -> Iterator[None]:
    """Diffusers' own xformers processor, without xformers: only the kernel is a stand-in.

    Its tensors are (B H, Q, d) copies of queries, keys and values, which the processor makes.
    """
    from diffusers.models import attention_processor

    def kernel(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        return attention(q, k, v)

    stand_in = SimpleNamespace(ops=SimpleNamespace(memory_efficient_attention=kernel))
    with mock.patch.object(attention_processor, "xformers", stand_in):
        yield


def use_xformers(module: Any) -> None:
    """Switch a UNet or a VAE to that processor."""
    from diffusers.models.attention_processor import XFormersAttnProcessor

    module.set_attn_processor(XFormersAttnProcessor())
