"""A LoRA from one format into another: the same update, with its alphas, type and metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from spf_kit.adapters import files, formats, keys, sai_names
from spf_kit.adapters.files import LoraFile
from spf_kit.adapters.guess import FAMILIES, family_name, guess_family
from spf_kit.adapters.index import LayerKey, index
from spf_kit.adapters.keys import Format, flatten, restore_dots
from spf_kit.adapters.layers import LoraLayer, Update
from spf_kit.adapters.metadata import parse_json
from spf_kit.adapters.tensors import parse_dtype
from spf_kit.errors import UserError, nearest
from spf_kit.families import ldm_keys
from spf_kit.families.detect import shipped_config

_UNDOTTED = ("conv_in", "conv_out", "text_projection")  # modules that lie in no other
FORMATS: tuple[Format, ...] = ("kohya", "diffusers", "peft")


def convert(
    lora: str | Path,
    output: str | Path,
    format: str,
    *,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the LoRA `lora`, of any format that is read, as `format`: "kohya", "diffusers" or "peft".

    Args:
        output: a .safetensors file, for peft a folder.
        dtype: of the tensors; None keeps the file's.

    Returns:
        JSON-able: `ignored` is how many layers of the result every loader would leave out, always 0;
        `outside_blocks` how many kohya's own scripts would, of a file of their format; `rounding` the largest
        relative change (Frobenius) of a tensor, 0 where every bit was kept, beside the file or, where
        that notes the alphas that it was written from, beside those tensors.

    Raises:
        UserError: the file is missing or damaged, the format cannot hold it, a layer's name is none of a
            Stable Diffusion model's, a value does not fit the type, or `output` exists without `overwrite`.
    """
    output, wanted = Path(output), _format(format)
    files.check_output(output, wanted, overwrite)
    source = with_own_alphas(files.read(lora))
    _refuse_strangers(source)
    kept = parse_dtype(dtype or source.dtype)
    files.write(source, output, wanted, kept)
    written = files.read(output)
    found = index(output)
    count = sum(len(layer.names) for layer in found.layers.values())
    changed = rounding(source.layers, written.layers, folded=wanted == "diffusers")
    outside = sum(keys.is_outside(*key) for key in written.layers) if wanted == "kohya" else 0
    return {
        "lora": str(lora),
        "output": str(output),
        "from": source.format,
        "format": wanted,
        "kind": source.kind,
        "layers": len(written.layers),
        "keys": count,
        "ignored": len(strangers(written)),
        "outside_blocks": outside,
        "dtype": str(kept).removeprefix("torch."),
        "rounding": changed,
        "sentence": f"{output}: {len(written.layers)} layers, {count} keys, in the format {wanted}"
        + (f", rounded by at most {changed:.1e}" if changed else ", every value kept")
        + (f"; kohya's own scripts leave out {outside} outside the UNet's blocks" if outside else ""),
    }


def _format(name: str) -> Format:
    found = next((known for known in FORMATS if known == name), None)
    if found is None:
        raise UserError(
            f"the format {name!r} is unknown: choose {', '.join(FORMATS)}{nearest(name, FORMATS)}"
        )
    return found


def with_own_alphas(lora: LoraFile) -> LoraFile:
    """A file of diffusers' format with the alphas that it was written from, where no bit is lost by it."""
    noted = parse_json(lora.metadata, formats.ALPHAS)
    layers: dict[LayerKey, Update] = {}
    for (component, module), layer in lora.layers.items():
        alpha = noted.get(f"{component}.{module}") if isinstance(noted, dict) else noted
        if isinstance(layer, LoraLayer) and isinstance(alpha, int | float) and abs(alpha) < 1e30:
            layer = formats.unfold_scale(layer, float(alpha))
        layers[component, module] = layer
    return replace(lora, layers=layers)


# --- what a loader would leave out ------------------------------------------------------------------------


def strangers(lora: LoraFile) -> list[LayerKey]:
    """The layers which no model of the LoRA's family has, by name: loaders leave them out, or fail."""
    family = guess_family(lora.layers, lora.metadata)
    maps = {component: _names(family, component) for component in lora.components}
    found = []
    for component, module in lora.layers:
        flat = flatten(module)
        # kohya's own name, whose dots could not be told, or a word of another model
        unread = restore_dots(flat) != module or ("_" in flat and "." not in module and flat not in _UNDOTTED)
        # a table of embeddings is no layer: loaders know pairs for matrices and convolutions alone
        unread = unread or ".embeddings." in f".{module}"
        if unread or maps[component].to_ldm(f"{module}.weight") is None:
            found.append((component, module))
    return found


def _names(family: str, component: str) -> ldm_keys.KeyMap:
    """The modules of a component; where the family is not known, of a UNet with attention on every level."""
    if family not in FAMILIES:
        return sai_names.names() if component == "unet" else ldm_keys.key_map("text_encoder", {})
    config = shipped_config(family, component)
    return ldm_keys.key_map(component, config, ldm_keys.prefix_of(component, family))


def _refuse_strangers(lora: LoraFile) -> None:
    found = strangers(lora)
    if found:
        component, module = found[0]
        family = family_name(guess_family(lora.layers, lora.metadata))
        raise UserError(
            f"{lora.name} holds {len(found)} layers that no loader finds in {family}, the first {module!r} "
            f"of {component}: convert the LoRA with the program that made it"
        )


# --- what was lost ----------------------------------------------------------------------------------------


def rounding(
    before: Mapping[LayerKey, Update], after: Mapping[LayerKey, Update], *, folded: bool = False
) -> float:
    """The largest |t' - t| / |t| over all tensors t, which become t'. `folded`: with the scale within."""
    exact = files.folded(before, torch.float64) if folded else before
    worst = 0.0
    for key, layer in exact.items():
        kept = after[key].tensors()
        for part, tensor in layer.tensors().items():
            wanted = tensor.double()
            difference = (kept[part].double().reshape(wanted.shape) - wanted).norm()
            if difference:
                worst = max(worst, float(difference / wanted.norm()))
    return worst
