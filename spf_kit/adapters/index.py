"""What a LoRA file holds, from its headers alone: layers, ranks, alphas, shapes. Imports no torch.

Everything that can be wrong with a file, except the values of its tensors, is found here: a wrong file is
refused before anything is loaded, and `inspect` answers at once.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spf_kit.adapters import keys, sai_names
from spf_kit.adapters.keys import Format, Part, UNetNames, flatten
from spf_kit.adapters.parts import COMMON, Shape, describe, kind_of
from spf_kit.errors import UserError
from spf_kit.headers import Header, TensorInfo, read_header

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
DIFFUSERS_CONFIG_KEY = "lora_adapter_metadata"  # where diffusers keeps peft's config in a file's metadata
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}

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
    return LoraIndex(path, "peft", layers, metadata)


def _index_file(path: Path, header: Header, config_path: Path | None) -> LoraIndex:
    groups, layout = _group(path, header)
    alphas = Alphas.of(path, header, config_path)
    layers = {key: _layer(path, header, key, names, alphas) for key, names in groups.items()}
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


def _layer(path: Path, header: Header, key: LayerKey, names: dict[Part, str], alphas: Alphas) -> IndexedLayer:
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
    shape = found.shape
    if "alpha" in names:
        alpha = header.scalar(names["alpha"])
    else:
        alpha = (
            0.0 if found.kind == "oft" else alphas.of_module(key, found.rank)
        )  # there it limits, 0 nothing
    if not math.isfinite(alpha):
        raise wrong(f"has the alpha {alpha}")
    axis = None
    if "dora_scale" in info:
        axis = _dora_axis(info["dora_scale"], shape, is_kohya=names["dora_scale"].endswith("dora_scale"))
        if axis is None:
            raise wrong(
                f"has DoRA magnitudes of shape {list(info['dora_scale'].shape)} for a weight {list(shape)}"
            )
    return IndexedLayer(header, dict(names), found.kind, found.rank, alpha, shape, axis)


def _dora_axis(info: TensorInfo, shape: Shape, *, is_kohya: bool) -> int | None:
    """peft has one magnitude for each output, of any shape; LyCORIS may have one for each input, (1, in)."""
    if info.count == shape[0] and (not is_kohya or info.shape[:1] == (shape[0],)):
        return 0
    return (
        1 if is_kohya and shape[1:] and info.count == shape[1] and info.shape[:2] == (1, shape[1]) else None
    )


# --- alphas that are not tensors --------------------------------------------------------------------------


@dataclass(frozen=True)
class Alphas:
    """What peft's config says of alpha; without one, alpha is the rank, as every loader takes it."""

    path: Path
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by component, "" for all

    @classmethod
    def of(cls, path: Path, header: Header, config_path: Path | None) -> Alphas:
        if config_path is not None:
            if not config_path.is_file():
                raise UserError(
                    f"{str(header.path)!r} needs the {PEFT_CONFIG} beside it, which holds its alpha"
                )
            try:
                text = config_path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"cannot read {str(config_path)!r}: {error}") from error
            config = _load_config(config_path, text)
            _check_config(config_path, config)
            return cls(config_path, {"": config})
        if DIFFUSERS_CONFIG_KEY in header.metadata:
            flat = _load_config(path, header.metadata[DIFFUSERS_CONFIG_KEY])
            configs: dict[str, dict[str, Any]] = {}
            for name, value in flat.items():  # "unet.lora_alpha": 8
                component, dot, key = name.partition(".")
                if dot:
                    configs.setdefault(component, {})[key] = value
            return cls(path, configs)
        return cls(path)

    def of_module(self, key: LayerKey, rank: int) -> float:
        """alpha as kohya means it: the update is scaled by alpha / rank."""
        component, module = key
        config = self.configs.get(component) or self.configs.get("") or {}
        alpha = config.get("lora_alpha", rank)
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if _matches(self.path, pattern, module):
                alpha = value
        if type(alpha) not in (int, float):
            raise UserError(f"{str(self.path)!r} has lora_alpha = {alpha!r}, which is no number")
        return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)


def _load_config(path: Path, text: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{str(path)!r} holds a peft configuration that is not a JSON object")
    return config


def _check_config(path: Path, config: dict[str, Any]) -> None:
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise UserError(
            f"{str(path)!r} is of the kind {kind!r}, which spf-kit does not read; of peft's "
            "it reads LoRA and DoRA"
        )
    if config.get("bias", "none") != "none" or config.get("modules_to_save"):
        raise UserError(
            f"{str(path)!r} trained whole parameters beside the LoRA, which spf-kit does not read"
        )


def _matches(path: Path, pattern: str, module: str) -> bool:
    """peft compares regular expressions with the ends of names. Files hold plain names, at most with `^`, and
    running a stranger's expression could take forever: others are refused."""
    plain = pattern.removeprefix("^").replace("\\.", ".")
    if not re.fullmatch(r"[\w.]+", plain):
        raise UserError(f"{str(path)!r} has the alpha_pattern {pattern!r}, which is more than a name")
    return f".{module}".endswith(f".{plain}")
