"""The names of an SDXL UNet's layers in kohya's files: its trainer numbers blocks as SAI's checkpoints do.

    down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k   diffusers
    input_blocks.4.1.transformer_blocks.0.attn2.to_k             SAI

Both say the same as long as a block has two layers, as in all published models; loaders rely on that too.
"""

from __future__ import annotations

from functools import cache

from spf_kit.families.ldm_blocks import unet_pairs
from spf_kit.families.ldm_keys import KeyMap

HEADS = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
LAYERS = 2


def to_sai(module: str) -> str | None:
    """diffusers' name of a module to SAI's; None if it has none."""
    return names().to_ldm(module)


def to_diffusers(module: str) -> str | None:
    """SAI's name of a module to diffusers'; None if it is none."""
    return names().to_diffusers(module) if module.startswith(HEADS) else None


@cache
def names() -> KeyMap:
    """Of a model with attention on every level, which is the numbering of those with less."""
    config = {
        "layers_per_block": LAYERS,
        "block_out_channels": [0] * 4,
        "down_block_types": ["CrossAttnDownBlock2D"] * 4,
        "up_block_types": ["CrossAttnUpBlock2D"] * 4,
        "addition_embed_type": "text_time",
    }
    return KeyMap(unet_pairs(config))
