"""What is to be merged, and where it goes: from headers alone, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from spf_kit.adapters.fit import match
from spf_kit.adapters.index import LoraIndex, index
from spf_kit.adapters.keys import flatten
from spf_kit.adapters.streaming import Change
from spf_kit.adapters.weights import Weights
from spf_kit.errors import UserError
from spf_kit.headers import Header, read_header

Weighted = tuple[str | Path, float | Weights]

COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "vae")


class Place(NamedTuple):
    """Where a module's weight lies: a tensor, or a third of its rows, which then are what has this shape."""

    file: Path
    key: str
    shape: tuple[int, ...]
    third: int | None = None


@dataclass(frozen=True)
class Source:
    """A LoRA and how much of it."""

    lora: LoraIndex
    weights: Weights


@dataclass(frozen=True)
class Target:
    """A checkpoint's files, and where its weights lie: by component and flattened module name."""

    path: Path
    family: str
    headers: Mapping[Path, Header]
    places: Mapping[str, Mapping[str, Place]]


def open_sources(loras: Sequence[Weighted]) -> list[Source]:
    """Raises UserError if there is none, or one cannot be read."""
    if not loras:
        raise UserError("there is nothing to merge: name at least one LoRA")
    return [
        Source(index(path), weight if isinstance(weight, Weights) else Weights(float(weight)))
        for path, weight in loras
    ]


def open_target(into: str | Path) -> Target:
    """Find a checkpoint's weights, from headers alone.

    Raises UserError if it is missing, not a base model, or of an unsupported kind.
    """
    from spf_kit import families

    if str(into) == families.EMBEDDED:
        from spf_kit.embedded import base_path

        path = base_path()
    else:
        path = Path(into).expanduser()
        if not path.exists():
            raise UserError(
                f"the checkpoint {str(into)!r} does not exist: give a .safetensors file or a folder"
            )
    family = families.detect(str(into))
    return _open_folder(path, family) if path.is_dir() else _open_file(path, family)


def _open_file(path: Path, family: str) -> Target:
    from spf_kit.families.ldm_keys import third_of
    from spf_kit.families.single_file import merge_targets

    header = read_header(path)
    places: dict[str, dict[str, Place]] = {}
    for (component, module), key in merge_targets(header).items():
        shape, third = header.tensors[key].shape, third_of(key, module)
        if third is not None:
            shape = (shape[0] // 3, *shape[1:])
        places.setdefault(component, {})[flatten(module)] = Place(path, key, shape, third)
    return Target(path, family, {path: header}, places)


def _open_folder(path: Path, family: str) -> Target:
    headers: dict[Path, Header] = {}
    places: dict[str, dict[str, Place]] = {}
    for component in COMPONENTS:
        for file in sorted((path / component).glob("*.safetensors")):
            headers[file] = header = read_header(file)
            own = places.setdefault(component, {})
            for name, info in header.tensors.items():
                if name.endswith(".weight"):
                    module = name.removesuffix(".weight")
                    if component.startswith("text_encoder") and not module.startswith("text_"):
                        module = f"text_model.{module}"  # as transformers 5 saves it
                    # fp16 and full variants lie side by side: both are changed, by the file's own plan
                    own.setdefault(flatten(module), Place(file, name, info.shape))
    if "unet" not in places:
        raise UserError(f"{str(path)!r} has no unet/*.safetensors to merge into")
    return Target(path, family, headers, places)


def plan(sources: Sequence[Source], target: Target) -> dict[Path, dict[str, list[Change]]]:
    """What is added to which tensor of which file.

    Raises UserError if a LoRA does not fit, naming both families.
    """
    shapes = {
        component: {flat: (flat, place.shape) for flat, place in own.items()}
        for component, own in target.places.items()
        if component != "vae"
    }
    changes: dict[Path, dict[str, list[Change]]] = {path: {} for path in target.headers}
    for source in sources:
        found = match(source.lora, shapes, base=str(target.path), family=target.family)
        for key, (component, flat) in found.items():
            factor = source.weights.of(component)
            if factor == 0:
                continue
            place = target.places[component][flat]
            change = Change(source.lora.layers[key], factor, place.third)
            for path, header in target.headers.items():
                if path.parent == place.file.parent and place.key in header.tensors:
                    changes[path].setdefault(place.key, []).append(change)
    return changes
