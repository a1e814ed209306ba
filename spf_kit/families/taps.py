"""Probes of a UNet's cross-attention: queries and keys of chosen layers, seen while a pass runs.

The hooks stand on the projections `to_q` and `to_k`, adapter included, so every attention backend is served
and the prediction keeps its bits. They are there for one pass and gone before its backward: what gradient
checkpointing computes again fires none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from spf_kit.probes import LayerProbe

LAYER = "attn2"  # diffusers' name of a transformer block's cross-attention


def attention_layers(unet: Any) -> dict[str, int]:
    """The cross-attention layers, in the model's order: name to latent pixels of one of its pixels' side."""
    deepest = len(unet.config.block_out_channels) - 1
    found = {}
    for name, module in unet.named_modules():
        if name.rpartition(".")[2] == LAYER and hasattr(module, "to_q"):
            kind, *rest = name.split(".")
            depth = {"down_blocks": lambda i: i, "up_blocks": lambda i: deepest - i}.get(kind)
            found[name] = 2 ** (depth(int(rest[0])) if depth else deepest)
    return found


@contextmanager
def recording(unet: Any, names: Sequence[str]) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Within the block, the next pass fills {layer: {"to_q": (B, Q, d), "to_k": (B, L, d)}}."""
    seen: dict[str, dict[str, Tensor]] = {name: {} for name in names}

    def keep(layer: str, part: str, module: Any, inputs: Any, output: Tensor) -> None:
        seen[layer][part] = output

    handles = [
        getattr(unet.get_submodule(name), part).register_forward_hook(partial(keep, name, part))
        for name in names
        for part in ("to_q", "to_k")
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def probes(
    unet: Any, seen: dict[str, dict[str, Tensor]], factors: dict[str, int], latent_size: Sequence[int]
) -> dict[str, LayerProbe]:
    """What a pass over latents of `latent_size`, (h, w), has left behind, layer by layer."""
    found = {}
    for name, parts in seen.items():
        attention, size = unet.get_submodule(name), _shrunk(latent_size, factors[name])
        queries, keys = parts["to_q"], parts["to_k"]
        if queries.shape[1] != size[0] * size[1]:
            raise RuntimeError(
                f"{name} has {queries.shape[1]} pixels where {size[0]} x {size[1]} were expected"
            )
        found[name] = LayerProbe(
            name, factors[name], size, queries, keys, attention.heads, float(attention.scale)
        )
    return found


def _shrunk(size: Sequence[int], factor: int) -> tuple[int, int]:
    """A convolution with stride 2 and padding 1 rounds up each time it halves."""
    h, w = size
    while factor > 1:
        h, w, factor = -(-h // 2), -(-w // 2), factor // 2
    return h, w
