"""LoHa on a live model; the formula is in `spf_kit.adapters.loha`."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoHaConfig
from peft.tuners.loha import layer as peft_loha
from torch import Tensor, nn

from spf_kit.adapters.live.base import Convolution, Dropped, Product, plain
from spf_kit.adapters.spec import Spec
from spf_kit.adapters.update import tucker


class _Corrected(Dropped):
    """peft's gradients through Tucker cores (0.21) mix up the two factors; autograd's are right."""

    def get_delta_weight(self, adapter_name: str, *, apply_rank_dropout: bool = False) -> Tensor:
        held: Any = self
        if adapter_name not in held.hada_t1:
            delta: Tensor = super().get_delta_weight(adapter_name)  # type: ignore[misc]
            return delta
        first, second = (
            tucker(core[adapter_name], a[adapter_name], b[adapter_name])
            for core, a, b in (
                (held.hada_t1, held.hada_w1_a, held.hada_w1_b),
                (held.hada_t2, held.hada_w2_a, held.hada_w2_b),
            )
        )
        return (first * second * held.scaling[adapter_name]).reshape(held.get_base_layer().weight.shape)


class _Linear(_Corrected, peft_loha.Linear):  # type: ignore[misc]
    pass


class _Conv2d(_Corrected, Convolution, peft_loha.Conv2d):  # type: ignore[misc]
    pass


class LohaLive(Product):
    """New ones have no Tucker cores, as LyCORIS' by default: a convolution is a matrix (o, i h w)."""

    kind = "loha"
    zero = ("hada_w2_a",)

    @classmethod
    def make(cls, module: nn.Module, key: str, spec: Spec) -> Any:
        layer = _Conv2d if plain(module).weight.dim() == 4 else _Linear
        return layer(module, key, config=LoHaConfig(), r=spec.rank, alpha=spec.alpha)

    def initialise(self, generator: torch.Generator) -> None:
        """LyCORIS' own: B normal, A_1 a tenth of that, A_2 zero. peft's are so small that little is learnt at
        first, where the gradient of A_2 is the other product."""
        for part, deviation in (("hada_w1_b", 1.0), ("hada_w1_a", 0.1), ("hada_w2_b", 1.0)):
            values = self.parts()[part].data
            values.copy_(torch.empty(values.shape).normal_(std=deviation, generator=generator))
        self._empty()
