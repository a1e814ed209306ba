"""A LoRA's layers as the tensors of a file, in kohya's, diffusers' and peft's naming.

What an alpha becomes. kohya: a tensor for each layer. peft: `lora_alpha` and `alpha_pattern` in its config.
diffusers before 0.35 and ComfyUI take a diffusers file without alphas for alpha = rank, so there the scale is
multiplied into the two matrices: every loader then applies the same update. What alpha was stays in the
metadata as `spf_kit.alphas`, so that it can come back.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spf_kit.adapters import sai_names
from spf_kit.adapters.index import LayerKey
from spf_kit.adapters.keys import UNetNames, flatten, kohya_prefix
from spf_kit.adapters.lora import LoraLayer
from spf_kit.adapters.parts import FILE_PARTS, NAMES
from spf_kit.adapters.tensors import all_finite
from spf_kit.adapters.update import Update
from spf_kit.errors import UserError

Layers = Mapping[LayerKey, Update]
ALPHAS = "spf_kit.alphas"  # one number, or one for each `component.module`
_KOHYA_NAMES = {part: name for name, part in FILE_PARTS.items()}


@dataclass(frozen=True)
class PeftPart:
    """One component's peft folder."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]


def to_kohya(layers: Layers, dtype: torch.dtype, unet_names: UNetNames = "diffusers") -> dict[str, Tensor]:
    """`lora_unet_….lora_down.weight`, `.lora_up.weight`, `.alpha`; LyCORIS' `.dora_scale`, `.hada_w1_a`.

    `unet_names` is "sai" for SDXL, see `sai_names`; its first text encoder is `lora_te1`, even alone.
    """
    two = unet_names == "sai" or any(component == "text_encoder_2" for component, _ in layers)
    tensors = {}
    for (component, module), layer in layers.items():
        if component == "unet" and unet_names == "sai":
            module = sai_names.to_sai(module) or module
        name = f"{kohya_prefix(component, two_text_encoders=two)}_{flatten(module)}"
        for part, tensor in layer.tensors().items():
            tensors[f"{name}.{_KOHYA_NAMES[part]}"] = cast(tensor, dtype, name)
        tensors[f"{name}.alpha"] = alpha_tensor(layer.alpha, dtype)
    return tensors


def to_diffusers(layers: Layers, dtype: torch.dtype) -> dict[str, Tensor]:
    """`unet.….lora_A.weight`, `.lora_B.weight` and `.lora_magnitude_vector.weight`; alpha is the rank."""
    tensors = {}
    refuse_half_dora(layers, "diffusers")
    for (component, module), layer in layers.items():
        refuse_flat_name(component, module, "diffusers")
        folded = fold_scale(lora_only(layer, "diffusers"), dtype)
        tensors.update(_peft_tensors(f"{component}.{module}", folded, dtype))
    return tensors


def to_peft(layers: Layers, dtype: torch.dtype) -> dict[str, PeftPart]:
    """For each component what `PeftModel.from_pretrained` reads; text encoders named as by transformers 5."""
    from spf_kit.adapters import peft_format

    parts = {}
    refuse_half_dora(layers, "peft")
    for component in dict.fromkeys(component for component, _ in layers):
        of_component = [(module, layer) for (c, module), layer in layers.items() if c == component]
        if any(layer.kind in peft_format.KINDS for _, layer in of_component):
            named = {peft_name(component, module): layer for module, layer in of_component}
            parts[component] = peft_format.part(component, named, dtype)
            continue
        own = {peft_name(component, module): lora_only(layer, "peft") for module, layer in of_component}
        tensors: dict[str, Tensor] = {}
        for module, layer in own.items():
            refuse_flat_name(component, module, "peft")
            tensors.update(_peft_tensors(f"base_model.model.{module}", layer, dtype))
        parts[component] = PeftPart(tensors, _peft_config(own))
    return parts


def peft_name(component: str, module: str) -> str:
    """peft matches the names at run time, where transformers 5 has no level `text_model.` but in encoders
    with a projection."""
    return module if component == "text_encoder_2" else module.removeprefix("text_model.")


def lora_only(layer: Update, format: str) -> LoraLayer:
    """Raises UserError for other kinds, of which diffusers loads none into a Stable Diffusion model."""
    if not isinstance(layer, LoraLayer):
        raise UserError(
            f"the format {format} is written for LoRA and DoRA alone, this is a {NAMES[layer.kind]}: write "
            "it with format kohya, which ComfyUI and A1111 load"
        )
    return layer


def fold_scale(layer: LoraLayer, dtype: torch.dtype) -> LoraLayer:
    """The same update with alpha = rank, multiplied in float64 and rounded once.

    A scale below 1 goes into `down`, whose values are about those that it was drawn with: `up` begins at 0,
    and holds values after a short training that float16 has few digits for. Of a scale under 1/32 a power of
    two goes into `up` all the same: alpha 1 at rank 128 in `down` alone would leave few digits there.
    """
    if layer.scale == 1.0:
        return layer
    for_up, for_down = _shares(layer.scale)
    down = (layer.down.double() * for_down).to(dtype) if for_down != 1.0 else layer.down
    up = (layer.up.double() * for_up).to(dtype)
    return replace(layer, down=down, up=up, alpha=float(layer.rank))


def unfold_scale(layer: LoraLayer, alpha: float) -> LoraLayer:
    """The inverse of `fold_scale`; the layer as it is where that would not give its very bits again."""
    if layer.scale != 1.0 or not alpha or not math.isfinite(alpha):
        return layer
    for_up, for_down = _shares(alpha / layer.rank)
    down, up = ((t.double() / s).to(t.dtype) for t, s in ((layer.down, for_down), (layer.up, for_up)))
    unfolded = replace(layer, down=down, up=up, alpha=alpha)
    again = fold_scale(unfolded, layer.dtype)
    same = torch.equal(again.down, layer.down) and torch.equal(again.up, layer.up)
    return unfolded if same else layer


def _shares(scale: float) -> tuple[float, float]:
    """Of `up` and `down`: 1/128 is 1/8 * 1/16, 0.6 is 1 * 0.6, and 3 is 3 * 1."""
    if not 0 < abs(scale) < 1:
        return scale, 1.0
    exponent = max(math.floor(-math.log2(abs(scale))) - 4, 0)
    return 2.0**-exponent, scale * 2.0**exponent


def alphas_note(layers: Layers) -> dict[str, str]:
    """Metadata for `fold_scale`d layers; nothing where every alpha is the rank."""
    alphas = {f"{component}.{module}": layer.alpha for (component, module), layer in layers.items()}
    if all(layer.alpha == layer.rank for layer in layers.values()):
        return {}
    uniform = len(set(alphas.values())) == 1
    return {ALPHAS: json.dumps(next(iter(alphas.values())) if uniform else alphas)}


def _peft_tensors(name: str, layer: LoraLayer, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {
        f"{name}.lora_A.weight": cast(layer.down, dtype, name),
        f"{name}.lora_B.weight": cast(layer.up, dtype, name),
    }
    if layer.dora_scale is not None:
        if layer.dora_axis != 0:
            raise UserError(
                f"the layer {name!r} has DoRA magnitudes for its inputs, which only kohya's format can hold: "
                "write it with format kohya"
            )
        # peft: (o,) for matrices, (1, o, 1, 1) for convolutions
        shape = (-1,) if len(layer.shape) == 2 else (1, -1, *[1] * (len(layer.shape) - 2))
        magnitude = cast(layer.dora_scale, dtype, name).reshape(shape)
        tensors[f"{name}.lora_magnitude_vector.weight"] = magnitude
    return tensors


def _peft_config(layers: Mapping[str, LoraLayer]) -> dict[str, Any]:
    from peft import LoraConfig

    ranks = {module: layer.rank for module, layer in layers.items()}
    alphas = {module: _number(layer.alpha) for module, layer in layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = LoraConfig(
        r=int(rank),
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=sorted(layers),
        use_dora=any(layer.dora_scale is not None for layer in layers.values()),
        rank_pattern={module: r for module, r in sorted(ranks.items()) if r != rank},
        alpha_pattern={module: a for module, a in sorted(alphas.items()) if a != alpha},
        inference_mode=True,
    ).to_dict()
    config["target_modules"] = sorted(layers)  # peft keeps a set, whose order differs between runs
    return {key: value for key, value in config.items() if key != "task_type"}


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def refuse_flat_name(component: str, module: str, format: str) -> None:
    """kohya's names whose dots could not be told stay flat, and no other format has such names."""
    if "." not in module and "_blocks" in module:
        raise UserError(
            f"the layer {module!r} of {component} cannot be written in the format {format}: "
            "its name is none of a Stable Diffusion model"
        )


def refuse_half_dora(layers: Layers, format: str) -> None:
    """peft and diffusers give every layer of a component magnitudes if one has them."""
    for component in dict.fromkeys(component for component, _ in layers):
        own = {module: layer for (c, module), layer in layers.items() if c == component}
        without = [module for module, layer in own.items() if layer.dora_scale is None]
        if 0 < len(without) < len(own):
            raise UserError(
                f"{component} has DoRA magnitudes in some layers and none in {without[0]!r}, which the "
                f"format {format} cannot hold: write it with format kohya"
            )


def alpha_tensor(alpha: float, dtype: torch.dtype) -> Tensor:
    """alpha in the file's type if that holds it exactly, else in float32 (8 * sqrt(8), rank-stabilised)."""
    tensor = torch.tensor(alpha, dtype=dtype)
    return tensor if tensor.item() == alpha else torch.tensor(alpha, dtype=torch.float32)


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """On the CPU, contiguous, in the file's type.

    Raises UserError for NaN or infinite values, and for finite ones that the type cannot hold.
    """
    result = tensor.detach().to("cpu", dtype).contiguous()
    if not all_finite(result):
        if not all_finite(tensor):
            raise UserError(f"the layer {name!r} holds NaN or infinite values: nothing was written")
        largest, kept = tensor.abs().max().item(), str(dtype).removeprefix("torch.")
        raise UserError(
            f"the layer {name!r} holds the value {largest:.4g}, too large for {kept}: save it in "
            "bfloat16 or float32"
        )
    return result
