"""Which family a LoRA was made for, from the widths of its layers. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from spf_kit.adapters.index import LayerKey


class Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


_NAMES = {
    "embedded": "the embedded base",
    "sd15": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
}
FAMILIES = frozenset(_NAMES)
_TEXT_WIDTHS = {768: "sd15", 1024: "sd2", 2048: "sdxl"}  # of the text embeddings that cross-attention reads
_VERSIONS = {"sd_v1": "sd15", "sd_v2": "sd2", "sdxl_": "sdxl", "embedded": "embedded"}


def family_name(family: str) -> str:
    """For sentences."""
    return _NAMES.get(family, family)


def guess_family(layers: Mapping[LayerKey, Shaped], metadata: Mapping[str, str]) -> str:
    """ "sd15", "sd2", "sdxl", "embedded" or words for what cannot be told.

    The width of the text embeddings tells the published families apart; only for another width, or a LoRA
    without cross-attention layers, what the file says of itself counts.
    """
    if any(component == "text_encoder_2" for component, _ in layers):
        return "sdxl"
    reads_text = ("attn2.to_k", "attn2.to_v", "attn2_to_k", "attn2_to_v")
    makes_text = ("q_proj", "k_proj", "v_proj", "out_proj")
    widths = _widths(layers, "unet", reads_text) or _widths(layers, "text_encoder", makes_text)
    known = sorted(widths & _TEXT_WIDTHS.keys())
    if known:
        return _TEXT_WIDTHS[known[0]]
    version = metadata.get("ss_base_model_version", "")
    for start, family in _VERSIONS.items():
        if version.startswith(start):
            return family
    return f"a model with text embeddings of width {min(widths)}" if widths else "an unknown model"


def _widths(layers: Mapping[LayerKey, Shaped], component: str, ends: tuple[str, ...]) -> set[int]:
    """Input widths of the layers whose names end so."""
    return {
        layer.shape[1]
        for (c, module), layer in layers.items()
        if c == component and module.endswith(ends) and len(layer.shape) > 1
    }
