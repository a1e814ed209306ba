"""Does a LoRA belong on this base? Names and shapes decide; a file's own words only shape the answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from spf_kit.adapters.guess import family_name, guess_family
from spf_kit.adapters.index import LayerKey
from spf_kit.adapters.keys import flatten
from spf_kit.adapters.parts import fits
from spf_kit.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from spf_kit.families.base import Family


class Shaped(Protocol):
    """A layer of a file, loaded or not."""

    @property
    def shape(self) -> tuple[int, ...]: ...


class Lora(Protocol):
    """A LoRA, loaded (`LoraFile`) or not (`LoraIndex`)."""

    @property
    def layers(self) -> Mapping[LayerKey, Shaped]: ...

    @property
    def metadata(self) -> Mapping[str, str]: ...

    @property
    def path(self) -> Path | None: ...


def check_family(lora: Lora, family: Family) -> None:
    """Raises UserError, naming both families, if a layer of the LoRA has no place in the base."""
    fit(lora, family)


def fit(lora: Lora, family: Family) -> dict[LayerKey, LayerKey]:
    """Each layer of the LoRA to the (component, module) of the base at run time.

    Raises UserError if a layer has no place, or not its shape; RuntimeError if a text encoder that it needs
    was freed.
    """
    freed = {component for component, _ in lora.layers} & {*family.freed}
    if freed:
        name = min(freed).replace("_", " ")
        raise RuntimeError(f"the LoRA changes the {name}, which was freed: call reload_encoders() first")
    places = {component: _places(family, component) for component in family.components()}
    return match(lora, places, base=family.base_id, family=family.name)


Places = Mapping[str, Mapping[str, tuple[str, tuple[int, ...]]]]
"""What a base has: component to flattened file name to (the base's own name, shape of the weight)."""


def match(lora: Lora, places: Places, *, base: str, family: str) -> dict[LayerKey, LayerKey]:
    """Each layer of the LoRA to (component, the base's own name).

    Names are compared as kohya writes them, without dots, so that their ambiguity does not matter.

    Raises UserError if a layer has no place, or not its shape; `base` and `family` name the base in it.
    """
    found, missing, misshapen = {}, [], []
    for key, layer in lora.layers.items():
        component, module = key
        place = places.get(component, {}).get(flatten(module))
        if place is None:
            missing.append(key)
        elif not fits(layer.shape, place[1]):
            misshapen.append((key, layer.shape, place[1]))
        else:
            found[key] = (component, place[0])
    if not missing and not misshapen:
        return found
    if misshapen:
        (component, module), update, weight = misshapen[0]
        reason = f"its layer {module!r} of {component} is {_x(update)}, the base's is {_x(weight)}"
    else:
        component, module = missing[0]
        layer_name = f" layer {module!r}" if component in places else ""
        reason = f"the base has no {component}{layer_name}"
    source = repr(str(lora.path)) if lora.path else "the LoRA"
    made_for = family_name(guess_family(lora.layers, lora.metadata))
    count = len(misshapen) or len(missing)
    raise UserError(
        f"{source} was made for {made_for} and does not fit the base {base!r} ({family_name(family)}): "
        f"{reason} ({count} of {len(lora.layers)} layers): give the base that it was trained on"
    )


def _x(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _places(family: Family, component: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    root = family.components()[component]
    return {
        flatten(family.file_module_name(component, name)): (name, tuple(module.weight.shape))  # type: ignore
        for name, module in adaptable(root).items()
    }


def adaptable(root: nn.Module) -> dict[str, nn.Module]:
    """The matrices and 2-D convolutions of a model by name, adapters looked through."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    found: dict[str, nn.Module] = {}
    wrapped: list[str] = []
    for name, module in root.named_modules():
        if any(name.startswith(prefix) for prefix in wrapped):
            continue  # inside an adapter's layer
        if isinstance(module, BaseTunerLayer):
            wrapped.append(f"{name}.")
            found[name] = module.get_base_layer()
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            found[name] = module
    return found
