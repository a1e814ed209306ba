"""Attention backends of diffusers' modules."""

from __future__ import annotations

from typing import Any

import torch

from spf_kit.errors import UserError

BACKENDS = ("sdpa", "sliced", "xformers")


def use_attention(backend: str, module: Any, device: torch.device) -> None:
    """Switch a UNet or a VAE to a backend: torch's fused attention (sdpa), head by head (sliced), xformers.

    Raises UserError if the backend is unknown or cannot be used here.
    """
    if backend == "sdpa":
        return  # what diffusers takes by itself
    if backend == "sliced":
        if hasattr(module, "set_attention_slice"):
            module.set_attention_slice("max")
        return
    if backend != "xformers":
        raise UserError(f"unknown attention backend {backend!r}; there are: {', '.join(BACKENDS)}")
    try:
        import xformers.ops  # noqa: F401
    except Exception as error:  # a build for another torch fails with an OSError or a RuntimeError
        raise UserError(
            f"attention = 'xformers' cannot be used: its import fails ({type(error).__name__}: {error}); "
            "pip install 'spf-kit[xformers]', or set attention = 'sdpa' in [base]"
        ) from error
    if device.type != "cuda":
        raise UserError(
            f"attention = 'xformers' needs a CUDA device, this run is on {device.type!r}; "
            "set attention = 'sdpa' in [base]"
        )
    try:
        module.enable_xformers_memory_efficient_attention()
    except Exception as error:
        raise UserError(
            f"attention = 'xformers' cannot be used on this device ({error}); "
            "set attention = 'sdpa' in [base]"
        ) from error
