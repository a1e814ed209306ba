"""Single layers of a live model, made and unmade through peft without side effects.

peft's own functions also choose what is active and what is trainable, for all adapters at once; here each
adapter keeps to itself.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spf_kit.adapters.dora import AdditiveDora
from spf_kit.adapters.fit import adaptable
from spf_kit.adapters.index import LayerKey
from spf_kit.adapters.layers import magnitudes

if TYPE_CHECKING:
    from spf_kit.families.base import Family


@dataclass(frozen=True)
class Spec:
    """How peft shall make one layer."""

    rank: int
    alpha: float
    dora: bool


@dataclass(frozen=True)
class Tuned:
    """One adapted module: peft's layer, and where it stands."""

    parent: nn.Module
    child: str
    tuner: Any  # peft.tuners.lora.LoraLayer

    def parts(self, key: str) -> dict[str, nn.Parameter]:
        found = {"down": self.tuner.lora_A[key].weight, "up": self.tuner.lora_B[key].weight}
        if key in self.tuner.lora_magnitude_vector:
            found["magnitude"] = self.tuner.lora_magnitude_vector[key].weight
        return found

    def detach(self, key: str) -> None:
        tuner = self.tuner
        names = [name for name in tuner.lora_A if name != key]
        if not names:
            setattr(self.parent, self.child, tuner.base_layer)
            return
        trainable = [(p, p.requires_grad) for p in tuner.parameters()]
        active = [name for name in tuner.active_adapters if name != key]
        tuner._active_adapter = active  # first, so that peft chooses no other in its place
        tuner.delete_adapter(key)
        tuner._active_adapter = active
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


def attach_layers(
    family: Family, key: str, specs: Mapping[LayerKey, Spec], dropout: float
) -> dict[LayerKey, Tuned]:
    """Let peft put its layers on the base; everything that was there stays as it was.

    Raises ValueError if the name is taken, RuntimeError if a module does not exist.
    """
    components = family.components()
    for component in {component for component, _ in specs}:
        if key in getattr(components[component], "peft_config", {}):
            raise ValueError(f"an adapter of the name {key.removeprefix('spf_')!r} is attached already")
    found = {}
    for component in dict.fromkeys(component for component, _ in specs):
        root = components[component]
        own = {module: spec for (c, module), spec in specs.items() if c == component}
        unknown = own.keys() - adaptable(root).keys()
        if unknown:
            raise RuntimeError(f"{component} has no matrix or convolution {min(unknown)!r}")
        # peft draws initial weights, which are replaced: the caller's random numbers must not notice
        with _untouched(root), torch.random.fork_rng(devices=[]):
            _inject(root, key, own, dropout)
        for module, spec in own.items():
            found[component, module] = _prepare(root, module, key, spec)
    return {spec_key: found[spec_key] for spec_key in specs}


def _inject(root: nn.Module, key: str, specs: Mapping[str, Spec], dropout: float) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    first = next(iter(specs.values()))
    config = LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        # a regular expression of whole names: a list would also match other modules' endings
        target_modules="|".join(re.escape(module) for module in specs),
        rank_pattern={f"^{re.escape(m)}": s.rank for m, s in specs.items() if s.rank != first.rank},
        alpha_pattern={f"^{re.escape(m)}": s.alpha for m, s in specs.items() if s.alpha != first.alpha},
        use_dora=any(spec.dora for spec in specs.values()),
        init_lora_weights=True,
    )
    with warnings.catch_warnings():
        # a second adapter is what we want
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        inject_adapter_in_model(config, root, adapter_name=key)


def _prepare(root: nn.Module, module: str, key: str, spec: Spec) -> Tuned:
    """Zero effect, float32 parameters, frozen, on."""
    parent, _, child = module.rpartition(".")
    layer = Tuned(root.get_submodule(parent), child, root.get_submodule(module))
    tuner = layer.tuner
    if not spec.dora and key in tuner.lora_magnitude_vector:  # peft makes all layers alike, files may not be
        del tuner.lora_magnitude_vector[key]
        del tuner.lora_variant[key]
    for parameter in layer.parts(key).values():
        parameter.data = parameter.data.to(torch.float32)
        parameter.requires_grad_(False)
    tuner.train(tuner.get_base_layer().training)  # dropout acts when its component is in training mode
    nn.init.zeros_(tuner.lora_B[key].weight)
    if key in tuner.lora_magnitude_vector:
        tuner.lora_variant[key] = AdditiveDora()
        magnitude = tuner.lora_magnitude_vector[key].weight
        weight = tuner.get_base_layer().weight.detach().float()
        magnitude.data = magnitudes(weight).reshape(magnitude.shape)  # peft's are rounded to the base's type
    tuner._active_adapter = [name for name in tuner.lora_A if name in {*tuner.active_adapters, key}]
    return layer


@contextmanager
def _untouched(root: nn.Module) -> Iterator[None]:
    """Keep what is on and what is trainable in a model whose layers peft is about to change."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    trainable = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
    active = [(m, list(m.active_adapters)) for m in root.modules() if isinstance(m, BaseTunerLayer)]
    try:
        yield
    finally:
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        for tuner, names in active:
            tuner._active_adapter = names


def forget(root: nn.Module | None, key: str) -> None:
    """Peft's own note of the adapter, which diffusers reads."""
    configs = getattr(root, "peft_config", None)
    if configs is not None:
        configs.pop(key, None)
        if not configs:
            del root.peft_config  # type: ignore[union-attr]


def initialise(layer: Tuned, key: str, name: str, seed: int) -> None:
    """`down` uniform in +-1/sqrt(fan in), as Kaiming's with a = sqrt(5) in LoRA's own code; `up` zero.

    One generator for each layer, keyed by seed and name.
    """
    digest = hashlib.sha256(f"adapter\0{seed}\0{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    down = layer.tuner.lora_A[key].weight
    bound = 1 / math.sqrt(down[0].numel())
    down.data.copy_(torch.empty(down.shape).uniform_(-bound, bound, generator=generator))
