"""LoKr on a live model; the formula is in `spf_kit.adapters.lokr`."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import LoKrConfig
from peft.tuners.lokr import layer as peft_lokr
from torch import Tensor, nn

from spf_kit.adapters.live.base import Convolution, Dropped, Product, plain
from spf_kit.adapters.lokr import LokrLayer
from spf_kit.adapters.spec import Spec


class _Linear(Dropped, peft_lokr.Linear):  # type: ignore[misc]
    pass


class _Conv2d(Dropped, Convolution, peft_lokr.Conv2d):  # type: ignore[misc]
    pass


class LokrLive(Product):
    kind = "lokr"
    zero = ("lokr_w2", "lokr_w2_b")

    @classmethod
    def make(cls, module: nn.Module, key: str, spec: Spec) -> Any:
        """With LyCORIS' shapes: peft divides sizes otherwise where `factor` exceeds their square root."""
        weight = plain(module).weight
        layer = _Conv2d if weight.dim() == 4 else _Linear
        tuner = layer(module, key, config=LoKrConfig(), r=spec.rank, alpha=spec.alpha)
        for part in tuner.adapter_layer_names:
            if key in (held := getattr(tuner, part)):
                del held[key]
        for part, shape in spec.parts(tuple(weight.shape)).items():
            getattr(tuner, part)[key] = nn.Parameter(torch.zeros(shape, device=weight.device))
        return tuner

    def initialise(self, generator: torch.Generator) -> None:
        """LyCORIS' own: uniform in +-1/sqrt(fan in), the last factor zero."""
        for parameter in self.parts().values():
            bound = 1 / math.sqrt(parameter[0].numel())
            values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.data.copy_(values)
        self._empty()

    def square_norm(self) -> Tensor:
        """|s C kron D|^2 = s^2 |C|^2 |D|^2."""
        seen = self.seen()
        assert isinstance(seen, LokrLayer)
        small, large = seen.small(torch.float32), seen.large(torch.float32)
        return seen.scale**2 * small.square().sum() * large.square().sum()
