"""A GPU's ways with memory, on tensors that have no values: attention kernels, and what autocast widens.

torch decides both in C++ by the device, and a build for the CPU has no other device. So tensors that stand
for a GPU's are on the CPU as far as torch knows; what differs there is put right here.

Shapes: B samples, H heads, Q queries, K keys, d features of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

GRANULE = 512  # bytes: torch's allocator on CUDA hands out multiples
HALF = (torch.float16, torch.bfloat16)

# What autocast computes in float32 on CUDA and leaves alone on the CPU, as far as models use it:
# https://docs.pytorch.org/docs/stable/amp.html#cuda-ops-that-autocast-to-float32
WIDENED: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (F, ("group_norm", "layer_norm", "softmax", "log_softmax", "mse_loss", "cosine_similarity")),
    (torch, ("softmax", "log_softmax", "exp", "pow", "rsqrt", "sum", "prod", "cumsum", "norm")),
    (torch.linalg, ("norm", "vector_norm")),
    (Tensor, ("softmax", "log_softmax", "exp", "pow", "rsqrt", "sum", "prod", "cumsum", "norm", "square")),
)


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


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within it, these functions allocate as on a GPU.

    They are replaced rather than watched by a mode of torch's: modes rest during a backward pass, in which
    gradient checkpointing computes again.
    """
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attention))
        for owner, names in WIDENED:
            for name in names:
                stack.enter_context(mock.patch.object(owner, name, _wide(getattr(owner, name))))
        stack.enter_context(_xformers())
        yield


def _wide(function: Callable[..., Any]) -> Callable[..., Any]:
    """Under autocast, a function of float32 arguments."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = _widened(args), {key: _widened(value) for key, value in kwargs.items()}
        return function(*args, **kwargs)

    return call


def _widened(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(map(_widened, value))
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


@contextmanager
def _xformers() -> Iterator[None]:
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
