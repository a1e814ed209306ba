"""Settings for some of an adapter's layers: `ranks = { mid = 16, "up.1" = 4, "*.to_k" = 0 }`. No torch."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from spf_kit.adapters.index import LayerKey
from spf_kit.adapters.keys import target_group
from spf_kit.errors import UserError, nearest

V = TypeVar("V")
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.|(mid)_block\.|text_model\.encoder\.(layers)\.(\d+)\.")


def names(layer: LayerKey) -> list[str]:
    """What a layer, named as in files, can be called by: its component, its blocks, its target group."""
    component, module = layer
    match = _BLOCK.match(module)
    if match is None:
        blocks = []
    elif match[3]:
        blocks = ["mid"]
    else:
        kind, number = (match[1], match[2]) if match[1] else (match[4], match[5])
        blocks = [f"{kind}.{number}"] if kind == "layers" else [kind, f"{kind}.{number}"]
    return [component, *blocks, target_group(component, module)]


def means(pattern: str, layer: LayerKey) -> bool:
    """Whether a pattern means a layer: one of its `names`, or its module's, where * stands for anything."""
    component, module = layer
    return pattern in names(layer) or any(
        fnmatch.fnmatchcase(name, pattern) for name in (module, f"{component}.{module}")
    )


def assign(table: Mapping[str, V], layers: Iterable[LayerKey], key: str) -> dict[LayerKey, tuple[str, V]]:
    """For each layer that a pattern means, the last such pattern and its value.

    Raises UserError for a pattern that means no layer; `key` names the table.
    """
    layers = list(layers)
    found: dict[LayerKey, tuple[str, V]] = {}
    for pattern, value in table.items():
        meant = [layer for layer in layers if means(pattern, layer)]
        if not meant:
            there = list(dict.fromkeys(name for layer in layers for name in names(layer)))
            example = f"*.{layers[0][1].rpartition('.')[2]}" if layers else "*.to_k"
            raise UserError(
                f"{key} names {pattern!r}, which means none of the adapter's layers;{nearest(pattern, there)}"
                f" there are {', '.join(sorted(there))}, and modules' names, as {example!r}"
            )
        found |= dict.fromkeys(meant, (pattern, value))
    return found
