"""What a LoRA file holds, from its headers alone: layers, ranks, alphas, shapes. Imports no torch.

Everything that can be wrong with a file, except the values of its tensors, is found here: a wrong file is
refused before anything is loaded, and `inspect` answers at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from spf_kit.adapters import keys, peft_config, sai_names
from spf_kit.adapters.keys import Format, Part, UNetNames, flatten
from spf_kit.adapters.parts import COMMON, NAMES, Described, Shape, describe, kind_of
from spf_kit.adapters.peft_config import PEFT_CONFIG, PEFT_WEIGHTS, PeftConfig
from spf_kit.errors import UserError
from spf_kit.headers import Header, TensorInfo, read_header

DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}

_OF_TENSORS = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")

LayerKey = tuple[str, str]  # component, module


@dataclass(frozen=True)
class IndexedLayer:
    """One layer, still on the disk. `rank` and `shape` are as `parts.Described` has them."""

    header: Header
    names: Mapping[Part, str]
    kind: str
    rank: int
    alpha: float
    shape: Shape
    dora_axis: int | None  # the weight's axis that DoRA's magnitudes belong to; None without DoRA
    factor: float = 1.0  # of the whole update, where the kind has no alpha for it (peft's LoKr)

    @property
    def dtype(self) -> str:
        return self.header.tensors[
            next(name for part, name in self.names.items() if part not in COMMON)
        ].dtype

    @property
    def parameters(self) -> int:
        return sum(self.header.tensors[name].count for part, name in self.names.items() if part != "alpha")


@dataclass(frozen=True)
class LoraIndex:
    """A LoRA file or folder, described."""

    path: Path
    format: Format
    layers: Mapping[LayerKey, IndexedLayer]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def unet_names(self) -> UNetNames | None:
        """How kohya's file spells the UNet's layers; None for other formats, or without a UNet."""
        flat = [name for (c, _), layer in self.layers.items() if c == "unet" for name in layer.names.values()]
        if self.format != "kohya" or not flat:
            return None
        heads = tuple(f"lora_unet_{flatten(head)}" for head in sai_names.HEADS)
        return "sai" if any(name.startswith(heads) for name in flat) else "diffusers"

    @property
    def kind(self) -> str:
        return kind_of([(layer.kind, layer.shape, layer.dora_axis) for layer in self.layers.values()])


# --- finding the files ------------------------------------------------------------------------------------


def index(path: str | Path) -> LoraIndex:
    """Describe a LoRA: a .safetensors file in kohya's or diffusers' naming, or a peft folder.

    Raises UserError, one sentence, for everything that is wrong with it.
    """
    path = Path(path)
    if not path.is_dir():
        config = path.with_name(PEFT_CONFIG) if path.name == PEFT_WEIGHTS else None
        return _index_file(path, read_header(path), config)
    if (path / PEFT_CONFIG).is_file():
        return _index_file(path, read_header(path / PEFT_WEIGHTS), path / PEFT_CONFIG)
    parts = [name for name in keys.COMPONENTS if (path / name / PEFT_CONFIG).is_file()]
    if parts:
        return _index_components(path, parts)
    if (path / DIFFUSERS_WEIGHTS).is_file():
        return index(path / DIFFUSERS_WEIGHTS)
    raise UserError(
        f"the folder {str(path)!r} holds no LoRA: a peft folder has an {PEFT_CONFIG}, "
        f"one of diffusers a {DIFFUSERS_WEIGHTS}"
    )


def _index_components(path: Path, parts: list[str]) -> LoraIndex:
    layers: dict[LayerKey, IndexedLayer] = {}
    metadata: dict[str, str] = {}
    for part in parts:
        found = _index_file(path / part, read_header(path / part / PEFT_WEIGHTS), path / part / PEFT_CONFIG)
        layers |= {(part, module): layer for (_, module), layer in found.layers.items()}
        metadata |= found.metadata
    if len(parts) > 1:  # hashes are of one part's tensors, not of the LoRA
        metadata = {key: value for key, value in metadata.items() if key not in _OF_TENSORS}
    return LoraIndex(path, "peft", layers, metadata)


def _index_file(path: Path, header: Header, config_path: Path | None) -> LoraIndex:
    groups, layout = _group(path, header)
    if config_path is not None:
        config = peft_config.of_folder(config_path, header.path)
        configs = dict.fromkeys(keys.COMPONENTS, config)
    else:
        configs = peft_config.of_metadata(header)
    layers = {key: _layer(path, header, key, names, configs.get(key[0])) for key, names in groups.items()}
    return LoraIndex(path, layout, layers, header.metadata)


def _group(path: Path, header: Header) -> tuple[dict[LayerKey, dict[Part, str]], Format]:
    """The tensors' names by layer and part, all of them understood."""
    groups: dict[LayerKey, dict[Part, str]] = {}
    unknown, layouts = [], set()
    for name in header.tensors:
        key = keys.parse(name)
        if key is None:
            unknown.append(name)
            continue
        layouts.add(key.format)
        names = groups.setdefault((key.component, key.module), {})
        if key.part in names:
            raise UserError(
                f"{str(path)!r} holds the same part of one layer twice: {names[key.part]!r} and {name!r}"
            )
        names[key.part] = name
    if any(name.startswith("model.diffusion_model.") for name in unknown):
        raise UserError(f"{str(path)!r} is a checkpoint, not a LoRA: give checkpoints with --base or --into")
    if unknown:
        kind = keys.other_kind(unknown)
        if kind:
            raise UserError(
                f"{str(path)!r} is {kind}, which spf-kit does not read; it reads LoRA, LoCon, DoRA, "
                "LoHa, LoKr and OFT as kohya and LyCORIS write them"
            )
        if groups:
            raise UserError(
                f"{str(path)!r} holds {len(unknown)} tensors that are no part of a LoRA: {unknown[0]!r}"
            )
    if not groups:
        example = f"; it holds {unknown[0]!r}" if unknown else ""
        raise UserError(f"{str(path)!r} is not a LoRA{example}")
    if "kohya" in layouts and len(layouts) > 1:
        raise UserError(f"{str(path)!r} mixes kohya's and diffusers' tensor names: no loader reads it whole")
    layout: Format = "kohya" if "kohya" in layouts else "peft" if "peft" in layouts else "diffusers"
    return groups, layout


# --- one layer --------------------------------------------------------------------------------------------


def _layer(
    path: Path, header: Header, key: LayerKey, names: dict[Part, str], config: PeftConfig | None
) -> IndexedLayer:
    def wrong(what: str) -> UserError:
        return UserError(f"{str(path)!r} is damaged: the layer {key[1]!r} of {key[0]} {what}")

    info = {part: header.tensors[name] for part, name in names.items()}
    for part, one in info.items():
        if one.dtype not in FLOATS:
            raise wrong(f"has a {part} tensor of type {one.dtype}, not a floating one")
    try:
        found = describe({part: one.shape for part, one in info.items()})
    except ValueError as error:
        raise wrong(str(error)) from None
    if config is not None and found.kind != config.kind:
        raise wrong(
            f"is a {NAMES[found.kind]}, but {str(config.path)!r} says peft_type = "
            f"{config.values.get('peft_type')!r}"
        )
    alpha, factor = _scale(header, names, config, found, key[1])
    if not math.isfinite(alpha * factor):
        raise wrong(f"has the alpha {alpha}")
    axis = None
    if "dora_scale" in info:
        axis = _dora_axis(
            info["dora_scale"], found.shape, is_kohya=names["dora_scale"].endswith("dora_scale")
        )
        if axis is None:
            raise wrong(
                f"has DoRA magnitudes of shape {list(info['dora_scale'].shape)} for a weight "
                f"{list(found.shape)}"
            )
    return IndexedLayer(header, dict(names), found.kind, found.rank, alpha, found.shape, axis, factor)


def _scale(
    header: Header, names: dict[Part, str], config: PeftConfig | None, found: Described, module: str
) -> tuple[float, float]:
    """alpha, which a tensor tells before a configuration, and is else the rank, as every loader takes it; and
    the factor beside it."""
    if "alpha" in names:
        return header.scalar(names["alpha"]), 1.0
    if config is None:
        return (0.0 if found.kind == "oft" else float(found.rank)), 1.0  # OFT's limits, 0 nothing
    if not found.rank:
        return 0.0, config.whole_factor(module)
    return config.alpha(module, found.rank), 1.0


def _dora_axis(info: TensorInfo, shape: Shape, *, is_kohya: bool) -> int | None:
    """peft has one magnitude for each output, of any shape; LyCORIS may have one for each input, (1, in)."""
    if info.count == shape[0] and (not is_kohya or info.shape[:1] == (shape[0],)):
        return 0
    return (
        1 if is_kohya and shape[1:] and info.count == shape[1] and info.shape[:2] == (1, shape[1]) else None
    )
