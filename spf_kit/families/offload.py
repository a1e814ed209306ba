"""Modules that take turns on a GPU: what the moment does not need waits in the host's memory.

- The text encoders come when they are called, and go once they have answered, unless they are trained.
- The VAE comes when it is called, and goes when the UNet is called next: what was decoded under autograd
  needs its weights until the backward pass is over, and the UNet is not called before that.
- The UNet goes while the VAE works without gradient (pictures are drawn or read), and comes back when it is
  called next. A quantised one stays: it is small, and its packed weights do not travel.

Turns are hooks of accelerate's on the modules, which diffusers' pipelines know: they draw on the hooks'
`execution_device`, wherever the weights are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from torch import nn

if TYPE_CHECKING:
    from spf_kit.families.base import Family

HOST = torch.device("cpu")


def take_turns(family: Family, component: str) -> None:
    """Put the hook of its kind on a component that has just been loaded."""
    kind = {"unet": UNetTurn, "vae": VaeTurn}.get(component, TextTurn)
    add_hook_to_module(getattr(family, component), kind(family))


class Turn(ModelHook):
    """Brings its module to the family's device before it works."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family = family

    @property
    def execution_device(self) -> torch.device:
        """Where diffusers' pipelines put what they compute with."""
        return self.family.device

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.make_room()
        move(module, self.family.device)
        return send_to_device((args, kwargs), self.family.device)

    def make_room(self) -> None:
        """Send away who is idle now."""


class TextTurn(Turn):
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if not any(parameter.requires_grad for parameter in module.parameters()):
            move(module, HOST)
        return output


class VaeTurn(Turn):
    def make_room(self) -> None:
        if not torch.is_grad_enabled() and not self.family.quantize:
            move(self.family.unet, HOST)


class UNetTurn(Turn):
    def make_room(self) -> None:
        if self.family.vae is not None:
            move(self.family.vae, HOST)


def move(module: nn.Module, device: torch.device) -> None:
    """To the device, if it is not there. Parameters stay the objects that they are."""
    first = next(module.parameters())
    if first.device.type != device.type and not first.is_meta:
        module.to(device)
