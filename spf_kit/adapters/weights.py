"""How much of a LoRA: `style.safetensors`, `style.safetensors:0.8`, `style.safetensors:unet=0.8,te=0.4`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from spf_kit.errors import UserError

_COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "unet": ("unet",),
    "te": ("text_encoder", "text_encoder_2"),
    "te1": ("text_encoder",),
    "te2": ("text_encoder_2",),
}


@dataclass(frozen=True)
class Weights:
    """A factor for each component; those without their own have `default`."""

    default: float = 1.0
    components: Mapping[str, float] = field(default_factory=dict)

    def of(self, component: str) -> float:
        return self.components.get(component, self.default)

    @property
    def uniform(self) -> float | None:
        """The one factor of all components; None if they differ."""
        values = {self.of(component) for components in _COMPONENTS.values() for component in components}
        return values.pop() if len(values) == 1 else None

    def __str__(self) -> str:
        """As `parse` reads it; `te` stands for both text encoders where they have the same."""
        if not self.components:
            return f"{self.default:g}"
        own = dict(self.components)
        if "text_encoder" in own and own["text_encoder"] == own.get("text_encoder_2"):
            del own["text_encoder_2"]
            own["te"] = own.pop("text_encoder")
        short = {"text_encoder": "te1", "text_encoder_2": "te2"}
        return ",".join(f"{short.get(name, name)}={value:g}" for name, value in own.items())


def parse(text: str) -> tuple[Path, Weights]:
    """Split `PATH[:WEIGHT]`. WEIGHT is one number, or some by component (unet, te, te1, te2; others keep 1).

    A path that exists as it stands is not split, nor is a Windows drive (`C:\\loras\\a.safetensors`).

    Raises UserError if what follows the last colon is no weight.
    """
    head, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), Weights()
    if "/" in tail or "\\" in tail or (len(head) == 1 and not Path(head).exists()):
        return Path(text), Weights()  # the colon belongs to the path
    if not head:
        raise UserError(f"{text!r} names no file before the colon")
    return Path(head), _weights(text, tail)


def parse_weighted(text: str) -> tuple[Path, float]:
    """Like `parse`, where one number is wanted.

    Raises UserError if the components have different weights.
    """
    path, weights = parse(text)
    if weights.uniform is None:
        raise UserError(f"{text!r} weighs components apart, which only merge does: give one number")
    return path, weights.uniform


def _weights(text: str, spec: str) -> Weights:
    if "=" not in spec:
        return Weights(_number(text, spec))
    components: dict[str, float] = {}
    for part in spec.split(","):
        name, _, value = part.partition("=")
        names = _COMPONENTS.get(name.strip())
        if names is None:
            raise UserError(
                f"{text!r}: unknown component {name.strip()!r}; there are {', '.join(_COMPONENTS)}"
            )
        for component in names:
            if component in components:
                raise UserError(f"{text!r}: {part.strip()!r} weighs the {component.replace('_', ' ')} again")
            components[component] = _number(text, value)
    return Weights(1.0, components)


def _number(text: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{text!r}: {value.strip()!r} is no weight: write FILE:0.8 or FILE:unet=0.8,te=0.4")
    return number
