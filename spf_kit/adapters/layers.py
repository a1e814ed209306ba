"""The kinds of updates by name, and layers of files as objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from spf_kit.adapters.index import IndexedLayer
from spf_kit.adapters.loha import LohaLayer
from spf_kit.adapters.lokr import LokrLayer
from spf_kit.adapters.lora import LoraLayer
from spf_kit.adapters.oft import OftLayer
from spf_kit.adapters.tensors import all_finite, read_tensor
from spf_kit.adapters.update import Update
from spf_kit.errors import UserError

__all__ = ["LAYERS", "LohaLayer", "LokrLayer", "LoraLayer", "OftLayer", "Update", "load_layer"]

LAYERS: Mapping[str, type[Update]] = {cls.kind: cls for cls in (LoraLayer, LohaLayer, LokrLayer, OftLayer)}


def load_layer(layer: IndexedLayer) -> Update:
    """Read one layer's tensors.

    Raises UserError for values that are NaN or infinite, or that contradict the format.
    """
    header = layer.header
    with open(header.path, "rb") as file:
        found = {
            part: read_tensor(header, name, file) for part, name in layer.names.items() if part != "alpha"
        }
    for part, tensor in found.items():
        if not all_finite(tensor):
            raise UserError(
                f"{str(header.path)!r} is damaged: the tensor {layer.names[part]!r} holds NaN or infinite "
                "values, as after a failed training: use an earlier save of it"
            )
    if layer.factor != 1.0:
        found["lokr_w1"] = (found["lokr_w1"].to(torch.float32) * layer.factor).to(found["lokr_w1"].dtype)
    dora = found.pop("dora_scale", None)
    try:
        loaded = LAYERS[layer.kind].from_parts(found, layer.alpha, layer.shape)
    except ValueError as error:
        raise UserError(
            f"{str(header.path)!r}: the layer of {next(iter(layer.names.values()))!r} {error}"
        ) from None
    if dora is None:
        return loaded
    size = [1] * len(layer.shape)
    size[layer.dora_axis or 0] = -1
    return replace(loaded, dora_scale=dora.reshape(size))  # type: ignore[type-var]
