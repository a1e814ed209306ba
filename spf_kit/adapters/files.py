"""LoRA files: read in every common format, written in three, and read back before they take their place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from spf_kit.adapters import formats, peft_format
from spf_kit.adapters.fit import check_family, fit
from spf_kit.adapters.guess import guess_family
from spf_kit.adapters.index import LayerKey, index
from spf_kit.adapters.keys import COMPONENTS, Format, UNetNames
from spf_kit.adapters.layers import LoraLayer, Update, load_layer
from spf_kit.adapters.metadata import scaled_alphas
from spf_kit.adapters.parts import kind_of
from spf_kit.adapters.peft_config import DIFFUSERS_CONFIG_KEY, PEFT_CONFIG, PEFT_WEIGHTS
from spf_kit.adapters.tensors import kohya_hashes, parse_dtype, write_tensors
from spf_kit.errors import UserError
from spf_kit.files import FolderSort, atomic, refuse_existing, refuse_other_folder

OF_A_FORMAT = (DIFFUSERS_CONFIG_KEY, formats.ALPHAS)  # metadata that is about the tensors of one format
PEFT_FOLDER = FolderSort(
    "folder of peft", (f"**/{PEFT_CONFIG}",), (PEFT_CONFIG, PEFT_WEIGHTS, "README.md", *COMPONENTS)
)

__all__ = ["LoraFile", "LoraLayer", "check_family", "fit", "read", "write"]


@dataclass
class LoraFile:
    """A LoRA, independent of the file's format.

    Layers are keyed by component ("unet", "text_encoder", "text_encoder_2") and module, named as in published
    checkpoints: text encoders' begin with `text_model.`.
    """

    layers: dict[LayerKey, Update]
    metadata: dict[str, str] = field(default_factory=dict)
    format: Format = "kohya"
    path: Path | None = None
    unet_names: UNetNames | None = None  # how kohya's format spells the UNet's layers; None: by the family

    @property
    def kind(self) -> str:
        return kind_of([(layer.kind, layer.shape, layer.dora_axis) for layer in self.layers.values()])

    @property
    def dtype(self) -> torch.dtype:
        """The widest type among the layers."""
        return max((layer.dtype for layer in self.layers.values()), key=lambda dtype: dtype.itemsize)

    @property
    def ranks(self) -> set[int]:
        return {layer.rank for layer in self.layers.values()}

    @property
    def components(self) -> list[str]:
        return list(dict.fromkeys(component for component, _ in self.layers))

    def scaled(self, factor: float) -> LoraFile:
        """The LoRA whose strength 1 is this one's strength `factor`; kohya's metadata follow.

        Raises UserError for kinds whose files hold no multiple of what they add: DoRA and OFT.
        """
        try:
            layers = {key: layer.scaled(factor) for key, layer in self.layers.items()}
        except ValueError as error:
            raise UserError(f"{self.name} cannot be scaled: {error}") from None
        return replace(self, layers=layers, metadata=scaled_alphas(self.metadata, factor))

    @property
    def name(self) -> str:
        """For sentences."""
        return repr(str(self.path)) if self.path else "this LoRA"


def read(path: str | Path) -> LoraFile:
    """Read a .safetensors file of kohya, LyCORIS or diffusers, or a peft folder. Tensors keep their types.

    Raises UserError, one sentence, if anything is wrong: missing, not safetensors, truncated, damaged,
    tensors that are no part of a LoRA, half a pair, shapes that do not fit, NaN or infinite values.
    """
    found = index(path)
    layers = {key: load_layer(layer) for key, layer in found.layers.items()}
    return LoraFile(layers, dict(found.metadata), found.format, Path(path), found.unet_names)


def write(
    lora: LoraFile,
    path: str | Path,
    format: Format = "kohya",
    dtype: str | torch.dtype | None = None,
) -> Path:
    """Write a LoRA: a file (kohya, diffusers) or a folder (peft); `dtype` None keeps the layers'.

    The hashes join the metadata. What was written is read back and compared before it takes its place, so
    that a file that exists is one that loads. An existing file is replaced.

    Raises UserError if a value does not fit the type, the name has the wrong suffix, or the disk refuses.
    """
    path, kept = Path(path), parse_dtype(dtype or lora.dtype)
    check_name(path, format)
    if not lora.layers:
        raise UserError(f"there is nothing to write to {str(path)!r}: the LoRA has no layers")
    metadata = {key: value for key, value in lora.metadata.items() if key not in OF_A_FORMAT}
    expected, parts = _tensors(lora, format, kept)  # what the format cannot hold is refused before the disk
    if format == "diffusers":
        metadata |= formats.alphas_note(lora.layers)
    with atomic(path, folder=format == "peft") as temporary:
        for component, part in parts.items():
            file = temporary
            if format == "peft":
                # one component lies in the folder itself, several each in one of its name
                own = temporary if len(parts) == 1 else temporary / component
                own.mkdir(exist_ok=True)
                text = json.dumps(part.config, indent=2, sort_keys=True, allow_nan=False)
                (own / PEFT_CONFIG).write_text(text + "\n", encoding="utf-8")
                file = own / PEFT_WEIGHTS
            hashes = kohya_hashes(part.tensors, metadata)
            write_tensors(file, part.tensors, {"format": "pt", **metadata, **hashes})
        _verify(temporary, expected, kept)
    return path


def check_output(path: Path, format: Format, overwrite: bool) -> None:
    """Raises UserError for a name that loaders would not take for this format, for what exists without
    `overwrite`, and for a folder of other things."""
    check_name(path, format)
    refuse_existing(path, overwrite)
    if format == "peft":
        refuse_other_folder(path, PEFT_FOLDER)


def check_name(path: Path, format: Format) -> None:
    """Raises UserError for a name that loaders would not take for this format."""
    if format != "peft" and path.suffix != ".safetensors":
        raise UserError(f"the LoRA file {str(path)!r} must end in .safetensors: loaders choose by that")
    if format == "peft" and path.suffix == ".safetensors":
        raise UserError(f"{str(path)!r} is to be a folder, as peft has it: give a name without .safetensors")


def _tensors(
    lora: LoraFile, format: Format, dtype: torch.dtype
) -> tuple[Mapping[LayerKey, Update], Mapping[str, formats.PeftPart]]:
    """The layers as they will be read back, and the tensors by component (peft) or all together."""
    if format == "peft":
        held = {key: peft_format.as_held(layer) for key, layer in lora.layers.items()}
        return held, formats.to_peft(lora.layers, dtype)
    if format == "kohya":
        tensors = formats.to_kohya(lora.layers, dtype, _unet_names(lora))
        return lora.layers, {"": formats.PeftPart(tensors, {})}
    tensors = formats.to_diffusers(lora.layers, dtype)
    return folded(lora.layers, dtype), {"": formats.PeftPart(tensors, {})}


def _unet_names(lora: LoraFile) -> UNetNames:
    """kohya's trainer has SDXL's UNet in SAI's names, all others in diffusers'. A file keeps its own, but
    where diffusers' loader knows a layer by SAI's alone."""
    if any(component == "unet" and module.startswith("add_embedding.") for component, module in lora.layers):
        return "sai"
    if lora.unet_names is not None:
        return lora.unet_names
    return "sai" if guess_family(lora.layers, lora.metadata) == "sdxl" else "diffusers"


def folded(layers: Mapping[LayerKey, Update], dtype: torch.dtype) -> dict[LayerKey, Update]:
    """As diffusers' format holds them."""
    return {
        key: formats.fold_scale(formats.lora_only(layer, "diffusers"), dtype) for key, layer in layers.items()
    }


def _verify(path: Path, expected: Mapping[LayerKey, Update], dtype: torch.dtype) -> None:
    """Raises RuntimeError unless reading the file gives what was to be written, bit for bit."""
    found = read(path).layers
    if found.keys() != expected.keys():
        wrong = sorted(found.keys() ^ expected.keys())
        raise RuntimeError(f"the written LoRA lacks or invents {len(wrong)} layers, the first {wrong[0]}")
    for key, layer in expected.items():
        wanted, got = layer.to(dtype).tensors(), found[key].tensors()
        same = wanted.keys() == got.keys() and all(torch.equal(got[p].cpu(), wanted[p].cpu()) for p in wanted)
        # peft's config keeps alpha as a decimal number, kohya's tensor rounds it to float32
        if not same or abs(found[key].alpha - layer.alpha) > 1e-6 * abs(layer.alpha):
            raise RuntimeError(f"the layer {key} was not written as it is")
