"""Optimizers that cannot step without values: their state by exact count (`measure.memory`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from spf_kit.measure.memory import optimizer_bytes
from spf_kit.schema import Train
from spf_kit.training.optimizers import base_rates, find

VALUED = ("prodigy", "adafactor")  # they decide by numbers that they read from the device


def needs_values(train: Train) -> bool:
    """Whether an optimizer's step runs on tensors with values only: bitsandbytes calls its own kernels."""
    spec = find(train.optimizer)
    return spec.package == "bitsandbytes" or spec.name in VALUED


class Counted(Optimizer):
    """Holds as many bytes as the optimizer's state has, from its first step on, and changes nothing.

    bitsandbytes updates in place, in one kernel, so that nothing more is alive meanwhile.
    """

    def __init__(self, name: str, groups: Sequence[dict[str, Any]]) -> None:
        super().__init__(groups, {})
        self.name = name

    @classmethod
    def build(cls, train: Train, parameters: Mapping[str, Sequence[Tensor]]) -> Counted:
        """In the place of `optimizers.build`."""
        rates = base_rates(train, list(parameters))
        groups = [
            {"params": list(tensors), "lr": rates[group], "name": group}
            for group, tensors in parameters.items()
            if tensors
        ]
        return cls(find(train.optimizer).name, groups)

    def step(self, closure: Any = None) -> None:
        if self.state:
            return
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        size = optimizer_bytes(self.name, [tuple(tensor.shape) for tensor in tensors])
        self.state[tensors[0]]["counted"] = torch.empty(size or 0, dtype=torch.uint8)
