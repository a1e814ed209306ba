"""What a file or folder is, told from headers and configs alone: LoRAs here, base models in `inspect_models`.
Imports no torch, unless norms are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spf_kit.adapters import hashes, inspect_models, keys
from spf_kit.adapters.guess import guess_family
from spf_kit.adapters.index import DIFFUSERS_WEIGHTS, IndexedLayer, LoraIndex, index
from spf_kit.adapters.metadata import STRENGTH_KEY, parse_json
from spf_kit.adapters.peft_config import PEFT_CONFIG
from spf_kit.files import sha256
from spf_kit.headers import Header, read_header

# kohya's entries that tell most, shown first; then all others, but the ones that have a place of their own
_TELLING = (
    "output_name", "network_module", "network_dim", "network_alpha", "network_args", "learning_rate",
    "unet_lr", "text_encoder_lr", "optimizer", "lr_scheduler", "steps", "num_epochs", "num_train_images",
    "batch_size_per_device", "gradient_accumulation_steps", "resolution", "clip_skip", "mixed_precision",
    "seed", "noise_offset", "min_snr_gamma", "training_comment",
)  # fmt: skip
_ELSEWHERE = {"tag_frequency", "bucket_info", "datasets", "dataset_dirs", "reg_dataset_dirs"}
_BASE = {
    "sd_model_name": "name", "base_model_version": "version", "sd_model_hash": "autov1",
    "new_sd_model_hash": "sha256", "vae_name": "vae", "vae_hash": "vae_autov1", "new_vae_hash": "vae_sha256",
}  # fmt: skip
_SILENT = (None, "", "None", "{}", "[]")
_CHANGED = (
    "the tensors are not those that the metadata's sshs_model_hash was made of: they were changed later"
)


def inspect(path: str | Path, *, hash: bool = False, norms: bool = False) -> dict[str, Any]:
    """Describe a LoRA (file or peft folder), a checkpoint or a diffusers folder, as JSON-able data.

    `hash` also hashes whole files of more than a gigabyte, which takes a second for each; `norms` reads a
    LoRA's tensors and tells each block's Frobenius norm of what strength 1 adds to the weights.

    Raises UserError if it is missing, damaged, or nothing that this package knows.
    """
    path = Path(path)
    if path.is_dir():
        if _is_lora_folder(path):
            return _lora(index(path), hash, norms)
        return inspect_models.folder(path, whole=hash)
    header = read_header(path)
    if keys.is_adapter(header.tensors):
        return _lora(index(path), hash, norms)
    return inspect_models.checkpoint(header, whole=hash)


def _is_lora_folder(path: Path) -> bool:
    parts = (path, *(path / component for component in keys.COMPONENTS))
    return any((part / PEFT_CONFIG).is_file() for part in parts) or (path / DIFFUSERS_WEIGHTS).is_file()


# --- LoRAs ------------------------------------------------------------------------------------------------


def _lora(lora: LoraIndex, whole: bool, norms: bool) -> dict[str, Any]:
    layers, metadata = lora.layers, lora.metadata
    headers = list({layer.header.path: layer.header for layer in layers.values()}.values())
    found = _hashes(headers, whole)
    told: dict[str, Any] = {
        "path": str(lora.path),
        "kind": lora.kind,
        "family": guess_family(layers, metadata),
        "format": lora.format,
        "rank": _one_or_all(layer.rank or "whole" for layer in layers.values()),
        "alpha": _one_or_all(round(layer.alpha, 6) for layer in layers.values()),
        "dtype": _one_or_all(layer.dtype for layer in layers.values()),
        "layers": len(layers),
        "keys": sum(len(header.tensors) for header in headers),
        "size_bytes": sum(header.path.stat().st_size for header in headers),
        "components": {
            component: _component(layers, component)
            for component in dict.fromkeys(component for component, _ in layers)
        },
        "base": _said(metadata, _BASE),
        "trigger": metadata.get("modelspec.trigger_phrase") or None,
        "title": metadata.get("modelspec.title") or metadata.get("ss_output_name"),
        "training": _training(metadata),
        "tags": _tags(metadata),
        "measured": parse_json(metadata, "spf_kit.measured"),
        "selection": parse_json(metadata, "spf_kit.selection"),
        "strength": parse_json(metadata, STRENGTH_KEY),
        "merged": parse_json(metadata, "spf_kit.merged"),
        "trained_on": parse_json(metadata, "spf_kit.on"),
        "trained_by_spf_kit": metadata.get("spf_kit.version"),
        **inspect_models.modelspec(metadata),
        "hashes": found,
        "note": _CHANGED if hashes.contradicts(found, metadata) else None,
    }
    if norms:
        told["norms"] = _norms(layers)
    return told


def _norms(layers: Mapping[tuple[str, str], IndexedLayer]) -> dict[str, dict[str, float | None]]:
    """By component, each block's; None where it depends on the base (DoRA, OFT)."""
    from spf_kit.adapters.norms import by_block

    blocks = {key: _block(*key) for key in layers}
    told = {}
    for component in dict.fromkeys(component for component, _ in layers):
        own = {key: layer for key, layer in layers.items() if key[0] == component}
        told[component] = by_block(own, blocks)
    return told


def _component(layers: Mapping[tuple[str, str], IndexedLayer], component: str) -> dict[str, Any]:
    own = {module: layer for (c, module), layer in layers.items() if c == component}
    groups = Counter(keys.target_group(component, module) for module in own)
    blocks: dict[str, list[IndexedLayer]] = {}
    for module, layer in own.items():
        blocks.setdefault(_block(component, module), []).append(layer)
    return {
        "layers": len(own),
        "kinds": _one_or_all(layer.kind for layer in own.values()),
        "targets": dict(groups.most_common()),
        "ranks": {
            block: _one_or_all(layer.rank or "whole" for layer in found) for block, found in blocks.items()
        },
        "alphas": {
            block: _one_or_all(round(layer.alpha, 6) for layer in found) for block, found in blocks.items()
        },
        "parameters": sum(layer.parameters for layer in own.values()),
    }


def _block(component: str, module: str) -> str:
    """`down_blocks.0`, `mid_block`, `layers.3`: what per-block ranks are given for."""
    parts = module.split(".")
    if component == "unet":
        return ".".join(parts[:2]) if parts[0].endswith("_blocks") else parts[0]
    return ".".join(parts[2:4]) if "layers" in parts else parts[0]


def _training(metadata: Mapping[str, str]) -> dict[str, str]:
    """kohya's entries, the most telling ones first, without those that say nothing."""
    names = sorted(key.removeprefix("ss_") for key in metadata if key.startswith("ss_"))
    rest = [name for name in names if name not in {*_TELLING, *_ELSEWHERE, *_BASE}]
    return _said(metadata, {name: name for name in (*_TELLING, *rest)})


def _said(metadata: Mapping[str, str], names: Mapping[str, str]) -> dict[str, str]:
    found = {shown: metadata.get(f"ss_{name}") for name, shown in names.items()}
    return {shown: value for shown, value in found.items() if value is not None and value not in _SILENT}


def _tags(metadata: Mapping[str, str]) -> dict[str, int]:
    """The tags of the training captions, over all folders, the most frequent first."""
    counts: Counter[str] = Counter()
    folders = parse_json(metadata, "ss_tag_frequency")
    for tags in folders.values() if isinstance(folders, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if isinstance(count, int) and abs(count) < 2**63:  # Python refuses to print much larger ones
                counts[tag.strip()] += count
    return dict(counts.most_common())


def _hashes(headers: list[Header], whole: bool) -> dict[str, str]:
    """Of several files (a peft folder's) one for each."""
    if len(headers) == 1:
        return hashes.of_file(headers[0], whole=whole)
    return {header.path.parent.name: sha256(header.path) for header in headers}


# --- both -------------------------------------------------------------------------------------------------


def _one_or_all(values: Iterable[Any]) -> Any:
    """The value, where all are the same, else how often each occurs."""
    counts = Counter(values)
    return next(iter(counts)) if len(counts) == 1 else {str(v): n for v, n in sorted(counts.items())}
