"""What one adapter on one module can do, whatever its kind.

Every kind adds s * (W' - W) x to the layer's output, so that strengths are linear, 0 is exactly nothing, the
order of adapters does not matter, and a merge into the weights is the same arithmetic.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from spf_kit.adapters.layers import LAYERS
from spf_kit.adapters.parts import PARTS
from spf_kit.adapters.spec import Spec
from spf_kit.adapters.update import Update


class Live(ABC):
    """One adapted module: peft's layer, and where it stands."""

    kind: ClassVar[str]

    def __init__(self, root: nn.Module, module: str, key: str, spec: Spec) -> None:
        parent, _, self.child = module.rpartition(".")
        self.parent, self.key, self.spec = root.get_submodule(parent), key, spec
        self.tuner: Any = root.get_submodule(module)

    @classmethod
    @abstractmethod
    def attach(cls, root: nn.Module, key: str, specs: Mapping[str, Spec], dropout: float) -> dict[str, Self]:
        """Put peft's layers on the modules, without effect: float32, frozen, on."""

    @abstractmethod
    def parts(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, always in the same order."""

    @abstractmethod
    def initialise(self, generator: torch.Generator) -> None:
        """Draw the first weights; the effect stays nothing."""

    @abstractmethod
    def load(self, layer: Update) -> None:
        """Take over a file's layer. Where the scale here is another one, the update stays the same."""

    @abstractmethod
    def update(self) -> Update:
        """A copy as a file's layer, on the CPU; strength is no part of it."""

    @abstractmethod
    def act(self, strength: float, on: bool) -> None:
        """Add the difference times `strength`, or nothing."""

    @abstractmethod
    def square_norm(self) -> Tensor:
        """The squared Frobenius norm of what strength 1 adds to the weight; gradients flow. DoRA's magnitudes
        are left out."""

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.tuner.get_base_layer().weight
        return weight

    def detach(self) -> None:
        """Put back what was there before."""
        holder, name = self._place()
        setattr(holder, name, self.tuner.base_layer)

    def _place(self) -> tuple[nn.Module, str]:
        """Who holds the layer now: its parent module, or the layer of a later adapter around it."""
        holder, name = self.parent, self.child
        while (found := getattr(holder, name)) is not self.tuner:
            holder, name = found, "base_layer"
        return holder, name


class Wrapped(Live):
    """The kinds whose layers each adapter has for itself, around those of earlier adapters."""

    @classmethod
    @abstractmethod
    def make(cls, module: nn.Module, key: str, spec: Spec) -> Any:
        """peft's layer around a module or another adapter's layer; its weights may be anything."""

    @classmethod
    def attach(cls, root: nn.Module, key: str, specs: Mapping[str, Spec], dropout: float) -> dict[str, Self]:
        found = {}
        for module, spec in specs.items():
            inner = root.get_submodule(module)
            tuner = cls.make(inner, key, spec)
            tuner.input_dropout = nn.Dropout(dropout) if dropout else nn.Identity()
            parent, _, child = module.rpartition(".")
            setattr(root.get_submodule(parent), child, tuner)
            found[module] = live = cls(root, module, key, spec)
            tuner.train(
                tuner.get_base_layer().training
            )  # dropout acts when its component is in training mode
            for parameter in live.parts().values():
                parameter.data = parameter.data.to(torch.float32)
                parameter.requires_grad_(False)
            live._empty()
            live.act(1.0, True)
        return found

    @abstractmethod
    def _empty(self) -> None:
        """Set to zero what makes the effect nothing."""

    def act(self, strength: float, on: bool) -> None:
        self.tuner._active_adapter = [self.key] if on else []


class Product(Wrapped):
    """LoHa and LoKr: parameters named as in files; the difference is their product times a scale."""

    zero: ClassVar[tuple[str, ...]]  # the parts that begin with zeros; the first of them that there is

    def parts(self) -> dict[str, nn.Parameter]:
        held = ((part, getattr(self.tuner, part)) for part in PARTS[self.kind])
        return {part: values[self.key] for part, values in held if self.key in values}

    def seen(self) -> Update:
        """The parameters themselves as a file's layer."""
        return LAYERS[self.kind].from_parts(self.parts(), self.spec.alpha, ())

    def update(self) -> Update:
        copies = {part: p.detach().to("cpu", copy=True) for part, p in self.parts().items()}
        return LAYERS[self.kind].from_parts(copies, self.spec.alpha, ())

    def act(self, strength: float, on: bool) -> None:
        super().act(strength, on)
        self.tuner.scaling[self.key] = strength * self.seen().scale

    def load(self, layer: Update) -> None:
        device = self.weight.device
        for part in self.parts():
            del getattr(self.tuner, part)[self.key]
        for part, tensor in layer.tensors().items():
            # LyCORIS also writes a low-rank factor with its kernel apart, peft multiplies matrices
            flat = tensor.flatten(1) if part.endswith("_b") else tensor
            values = flat.detach().to(device, torch.float32, copy=True)
            getattr(self.tuner, part)[self.key] = nn.Parameter(values, requires_grad=False)
        if layer.scale != (scale := self.seen().scale) and scale:
            self._zero().data.mul_(layer.scale / scale)
        self.act(1.0, True)

    def _zero(self) -> nn.Parameter:
        parts = self.parts()
        return next(parts[part] for part in self.zero if part in parts)

    def _empty(self) -> None:
        nn.init.zeros_(self._zero())

    def square_norm(self) -> Tensor:
        return self.seen().update().square().sum()


def plain(module: nn.Module) -> Any:
    """The base's own module under all adapters."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module  # type: ignore[operator]


class Convolution:
    """What peft's LoRA asks of a convolution that it is put around."""

    @property
    def groups(self) -> int:
        found: int = plain(self).groups  # type: ignore[arg-type]
        return found


class Dropped:
    """Dropout of an update's input, as for LoRA; peft has other kinds of dropout for LoHa and LoKr."""

    def _get_delta_activations(self, adapter_name: str, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dropped = self.input_dropout(input)  # type: ignore[attr-defined]
        output: Tensor = super()._get_delta_activations(adapter_name, dropped, *args, **kwargs)  # type: ignore[misc]
        return output
