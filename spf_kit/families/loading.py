"""Weights into modules without doubling the memory.

Modules are made on the meta device and take the tensors over as they come from the file: with the file's own
dtype they stay mapped (no copy at all), else each is converted alone. With `channels_last` all are copied, or
what a mapping holds beside the tensors that still need it would stay in memory too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spf_kit import heap
from spf_kit.errors import UserError
from spf_kit.families import convolutions, quantized
from spf_kit.families.sources import Source, read

TEXT_LEVEL = "text_model."
LARGE = 30_000_000  # parameters


def load_module(
    source: Source,
    component: str,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    quantize: str | None = None,
    channels_last: bool | None = False,
) -> nn.Module:
    """One component of a model, frozen and in evaluation mode.

    Args:
        channels_last: the memory format of convolutions' weights; None chooses, see `suits_channels_last`.
        quantize: a UNet's linear layers, one by one as they are read (see `quantized`).

    Raises:
        UserError: tensors are missing, unknown or of another shape than the config says; or weights cannot
            be quantised here.
    """
    with heap.weights():
        return _load(
            source, component, dtype=dtype, device=device, quantize=quantize, channels_last=channels_last
        )


def _load(
    source: Source,
    component: str,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    quantize: str | None,
    channels_last: bool | None,
) -> nn.Module:
    module = _checked_module(source, component)
    wanted = module.state_dict()
    if channels_last is None:
        channels_last = suits_channels_last(module, dtype, device)
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
            state[runtime] = _placed(tensor, device, dtype, channels_last)
        del tensor
    missing = sorted(wanted.keys() - state.keys() - taken)
    if missing or (unknown and component == "unet"):
        raise UserError(_misfit(source, component, missing, unknown))
    module.load_state_dict(state, strict=True, assign=True)
    module.to(device)  # the text encoder's positions are a buffer, which files do not hold
    if channels_last:
        convolutions.few_pixels(module)
    return module.requires_grad_(False).eval()


def suits_channels_last(module: nn.Module, dtype: torch.dtype, device: torch.device | str) -> bool:
    """Where it has been measured to be faster (bench/step.py): large models in float32 on the CPU, by 15% and
    more, and by what products of matrices save there (see `convolutions`).

    The embedded base loses 2% by it, bfloat16 8%.
    """
    large = sum(parameter.numel() for parameter in module.parameters()) >= LARGE
    return large and dtype == torch.float32 and torch.device(device).type == "cpu"


def _placed(tensor: Tensor, device: torch.device | str, dtype: torch.dtype, channels_last: bool) -> Tensor:
    if not channels_last:
        return tensor.to(device, dtype)
    kind = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
    return tensor.to(device, dtype, copy=True, memory_format=kind)


def bare_module(
    source: Source,
    component: str,
    *,
    dtype: torch.dtype,
    quantize: str | None = None,
    channels_last: bool | None = False,
) -> nn.Module:
    """One component on the meta device, frozen and in evaluation mode; no weight is read.

    Raises UserError if its config cannot be used, or weights cannot be quantised here.
    """
    with heap.weights():  # modules make room for a weight before it goes to the meta device
        module = _checked_module(source, component)
    nn.Module.to(module, "meta", dtype)  # diffusers' own `to` warns of digits that get lost
    if channels_last:
        nn.Module.to(module, memory_format=torch.channels_last)
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
