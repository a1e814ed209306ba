"""LoRA, LoCon and DoRA on a live model: several adapters share one layer of peft's.

peft's own functions also choose what is active and what is trainable, for all adapters at once; here each
adapter keeps to itself.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn

from spf_kit.adapters.dora import AdditiveDora
from spf_kit.adapters.live.base import Live
from spf_kit.adapters.lora import LoraLayer
from spf_kit.adapters.spec import Spec
from spf_kit.adapters.update import Update, magnitudes


class LoraLive(Live):
    kind = "lora"

    @classmethod
    def attach(cls, root: nn.Module, key: str, specs: Mapping[str, Spec], dropout: float) -> dict[str, Self]:
        with _untouched(root):
            _inject(root, key, specs, dropout)
        found = {module: cls(root, module, key, spec) for module, spec in specs.items()}
        for live in found.values():
            live._prepare()
        return found

    def _prepare(self) -> None:
        tuner, key = self.tuner, self.key
        if not self.spec.dora and key in tuner.lora_magnitude_vector:
            # peft makes all layers alike, files may not be
            del tuner.lora_magnitude_vector[key]
            del tuner.lora_variant[key]
        for parameter in self.parts().values():
            parameter.data = parameter.data.to(torch.float32)
            parameter.requires_grad_(False)
        tuner.train(tuner.get_base_layer().training)  # dropout acts when its component is in training mode
        nn.init.zeros_(tuner.lora_B[key].weight)
        if key in tuner.lora_magnitude_vector:
            tuner.lora_variant[key] = AdditiveDora()
            magnitude = tuner.lora_magnitude_vector[key].weight
            # peft's are rounded to the base's type
            magnitude.data = magnitudes(self.weight.detach().float()).reshape(magnitude.shape)
        tuner._active_adapter = [name for name in tuner.lora_A if name in {*tuner.active_adapters, key}]

    def parts(self) -> dict[str, nn.Parameter]:
        tuner, key = self.tuner, self.key
        found = {"down": tuner.lora_A[key].weight, "up": tuner.lora_B[key].weight}
        if key in tuner.lora_magnitude_vector:
            found["magnitude"] = tuner.lora_magnitude_vector[key].weight
        return found

    def initialise(self, generator: torch.Generator) -> None:
        """`down` uniform in +-1/sqrt(fan in), as Kaiming's with a = sqrt(5) in LoRA's own code; `up` zero."""
        down = self.parts()["down"]
        bound = 1 / math.sqrt(down[0].numel())
        down.data.copy_(torch.empty(down.shape).uniform_(-bound, bound, generator=generator))

    def load(self, layer: Update) -> None:
        assert isinstance(layer, LoraLayer)
        tuner, key = self.tuner, self.key
        down, up = tuner.lora_A[key].weight, tuner.lora_B[key].weight
        down.data.copy_(layer.down.reshape(down.shape))
        ratio = layer.alpha / self.spec.alpha if self.spec.alpha else 1
        up.data.copy_(layer.up.reshape(up.shape).to(torch.float32) * ratio)
        if layer.dora_scale is not None:
            axis, magnitude = layer.dora_axis or 0, tuner.lora_magnitude_vector[key]
            tuner.lora_variant[key].axis = axis
            values = layer.dora_scale.to(magnitude.weight.device, torch.float32)
            shape = magnitude.weight.shape if axis == 0 else (-1,)
            magnitude.weight = nn.Parameter(values.reshape(shape).clone(), requires_grad=False)

    def update(self) -> Update:
        parts = {part: p.detach().to("cpu", copy=True) for part, p in self.parts().items()}
        magnitude = parts.get("magnitude")
        if magnitude is not None:
            shape = [1] * parts["down"].dim()
            shape[self.tuner.lora_variant[self.key].axis] = -1
            magnitude = magnitude.reshape(shape)
        return LoraLayer(parts["down"], parts["up"], self.spec.alpha, magnitude)

    def act(self, strength: float, on: bool) -> None:
        tuner, key = self.tuner, self.key
        variant, scale = tuner.lora_variant.get(key), self.spec.alpha / self.spec.rank
        if variant is None:
            scale *= strength
        else:
            variant.strength = strength
        tuner.scaling[key] = scale
        active = {*tuner.active_adapters, key} if on else {*tuner.active_adapters} - {key}
        # not peft's set_adapter, which would also change what is trainable
        tuner._active_adapter = [name for name in tuner.lora_A if name in active]

    def square_norm(self) -> Tensor:
        """|s U D|^2 = s^2 sum((U^T U) * (D D^T)), r x r, without making the product."""
        down, up = self.parts()["down"].flatten(1), self.parts()["up"].flatten(1)
        return (self.spec.alpha / self.spec.rank) ** 2 * ((up.T @ up) * (down @ down.T)).sum()

    def detach(self) -> None:
        tuner, key = self.tuner, self.key
        if all(name == key for name in tuner.lora_A):
            super().detach()
            return
        trainable = [(p, p.requires_grad) for p in tuner.parameters()]
        active = [name for name in tuner.active_adapters if name != key]
        tuner._active_adapter = active  # first, so that peft chooses no other in its place
        tuner.delete_adapter(key)
        tuner._active_adapter = active
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


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
