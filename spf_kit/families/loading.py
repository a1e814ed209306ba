"""Weights into modules without doubling the memory.

Modules are made on the meta device and take the tensors over as they come from the file: with the file's own
dtype they stay mapped (no copy at all), else each is converted alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spf_kit.errors import UserError
from spf_kit.families import quantized
from spf_kit.families.sources import Source, read

TEXT_LEVEL = "text_model."


def load_module(
    source: Source,
    component: str,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    quantize: str | None = None,
) -> nn.Module:
    """One component of a model, frozen and in evaluation mode.

    Args:
        quantize: a UNet's linear layers, one by one as they are read (see `quantized`).

    Raises:
        UserError: tensors are missing, unknown or of another shape than the config says; or weights cannot
            be quantised here.
    """
    module = _checked_module(source, component)
    wanted = module.state_dict()
    layers = quantized.prepare(module, quantize, dtype=dtype, device=device) if quantize else {}
    state: dict[str, Tensor] = {}
    taken = set()
    unknown = []
    for name, tensor in read(source.weights(component)):
        runtime = runtime_name(module, name)
        if runtime not in wanted:
            # early files hold the positions 0..76 as a tensor; they are computed now
            if not name.endswith("position_ids"):
                unknown.append(name)
            continue
        tensor = _fit(tensor, wanted[runtime], name, component, source)
        layer = layers.get(runtime.removesuffix(".weight")) if runtime.endswith(".weight") else None
        if layer is not None:
            layer.take(tensor, device)
            taken.add(runtime)
        else:
            state[runtime] = tensor.to(device, dtype)
    missing = sorted(wanted.keys() - state.keys() - taken)
    if missing or (unknown and component == "unet"):
        raise UserError(_misfit(source, component, missing, unknown))
    module.load_state_dict(state, strict=True, assign=True)
    module.to(device)  # the text encoder's positions are a buffer, which files do not hold
    return module.requires_grad_(False).eval()


def bare_module(
    source: Source, component: str, *, dtype: torch.dtype, quantize: str | None = None
) -> nn.Module:
    """One component on the meta device, frozen and in evaluation mode; no weight is read.

    Raises UserError if its config cannot be used, or weights cannot be quantised here.
    """
    module = _checked_module(source, component)
    nn.Module.to(module, "meta", dtype)  # diffusers' own `to` warns of digits that get lost
    if quantize:
        quantized.prepare(module, quantize, dtype=dtype, device="meta")
    return module.requires_grad_(False).eval()


def _checked_module(source: Source, component: str) -> nn.Module:
    from huggingface_hub.errors import StrictDataclassError

    # libraries check a config in many places, each with an error of its own
    checks = (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RuntimeError)
    try:
        return empty_module(component, source.configs[component])
    except (*checks, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"the config of the {component} of {source.location!r} cannot be used: {reason}"
        ) from error


def empty_module(component: str, config: Mapping[str, Any]) -> nn.Module:
    """The component's module on the meta device: shapes and names, no memory."""
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with init_empty_weights(include_buffers=False):
        if component == "unet":
            return UNet2DConditionModel.from_config(dict(config))
        if component == "vae":
            return AutoencoderKL.from_config(dict(config))
        text = CLIPTextModelWithProjection if component == "text_encoder_2" else CLIPTextModel
        return text(CLIPTextConfig.from_dict(dict(config)))


def runtime_name(module: nn.Module, name: str) -> str:
    """A name as files have it to the name in this module: transformers 5.6 dropped `text_model.` from the
    encoder without a projection."""
    return name if hasattr(module, "text_model") else name.removeprefix(TEXT_LEVEL)


def _fit(tensor: Tensor, wanted: Tensor, name: str, component: str, source: Source) -> Tensor:
    """The tensor in the module's shape: single files hold a VAE's attention as 1x1 convolutions."""
    if tensor.shape == (*wanted.shape, 1, 1):
        return tensor.reshape(wanted.shape)
    if tensor.shape != wanted.shape:
        raise UserError(
            f"{source.location!r} does not fit its architecture: {component} {name} has shape "
            f"{tuple(tensor.shape)}, expected {tuple(wanted.shape)}"
        )
    return tensor


def _misfit(source: Source, component: str, missing: list[str], unknown: list[str]) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} tensors are missing (first: {missing[0]})")
    if unknown:
        parts.append(f"{len(unknown)} are unknown (first: {unknown[0]})")
    return (
        f"{source.location!r} does not hold a complete {component} of the family {source.name!r}: "
        f"{' and '.join(parts)}; it may be damaged or of a variant that is not supported"
    )
