"""Layers of every kind on a live model, made and unmade through peft without side effects."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from spf_kit.adapters.fit import adaptable
from spf_kit.adapters.index import LayerKey
from spf_kit.adapters.live.base import Live
from spf_kit.adapters.live.loha import LohaLive
from spf_kit.adapters.live.lokr import LokrLive
from spf_kit.adapters.live.lora import LoraLive
from spf_kit.adapters.live.oft import OftLive
from spf_kit.adapters.spec import Spec

if TYPE_CHECKING:
    from spf_kit.families.base import Family

LIVE: Mapping[str, type[Live]] = {cls.kind: cls for cls in (LoraLive, LohaLive, LokrLive, OftLive)}


def attach_layers(
    family: Family, key: str, specs: Mapping[LayerKey, Spec], dropout: float
) -> dict[LayerKey, Live]:
    """Put layers without effect on the base; everything that was there stays as it was.

    Raises ValueError if the name is taken, RuntimeError if a module does not exist.
    """
    components = family.components()
    for component in {component for component, _ in specs}:
        if _is_taken(components[component], key):
            raise ValueError(f"an adapter of the name {key.removeprefix('spf_')!r} is attached already")
    found: dict[LayerKey, Live] = {}
    for component in dict.fromkeys(component for component, _ in specs):
        root = components[component]
        own = {module: spec for (c, module), spec in specs.items() if c == component}
        unknown = own.keys() - adaptable(root).keys()
        if unknown:
            raise RuntimeError(f"{component} has no matrix or convolution {min(unknown)!r}")
        # peft draws initial weights, which are replaced: the caller's random numbers must not notice
        with torch.random.fork_rng(devices=[]):
            for kind, live in LIVE.items():
                if alike := {module: spec for module, spec in own.items() if spec.kind == kind}:
                    made = live.attach(root, key, alike, dropout)
                    found |= {(component, module): layer for module, layer in made.items()}
    return {spec_key: found[spec_key] for spec_key in specs}


def _is_taken(root: nn.Module, key: str) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(
        key in getattr(module, name)
        for module in root.modules()
        if isinstance(module, BaseTunerLayer)
        for name in module.adapter_layer_names
    )


def initialise(layer: Live, name: str, seed: int) -> None:
    """One generator for each layer, keyed by seed and name."""
    digest = hashlib.sha256(f"adapter\0{seed}\0{name}".encode()).digest()
    layer.initialise(torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1))


def forget(root: nn.Module | None, key: str) -> None:
    """Peft's own note of the adapter, which diffusers reads."""
    configs = getattr(root, "peft_config", None)
    if configs is not None:
        configs.pop(key, None)
        if not configs:
            del root.peft_config  # type: ignore[union-attr]
