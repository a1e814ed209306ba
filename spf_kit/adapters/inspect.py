"""What a file or folder is: a LoRA or a checkpoint, told from headers and configs alone. Imports no torch."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spf_kit.adapters import keys
from spf_kit.adapters.guess import guess_family
from spf_kit.adapters.index import DIFFUSERS_WEIGHTS, IndexedLayer, LoraIndex, index
from spf_kit.adapters.metadata import legacy_hash, parse_json
from spf_kit.adapters.peft_config import PEFT_CONFIG
from spf_kit.errors import UserError
from spf_kit.files import sha256
from spf_kit.headers import Header, read_header

_TRAINING = (
    "base_model_version", "sd_model_name", "output_name", "network_module", "network_dim", "network_alpha",
    "network_args", "learning_rate", "unet_lr", "text_encoder_lr", "optimizer", "lr_scheduler", "steps",
    "num_epochs", "num_train_images", "batch_size_per_device", "gradient_accumulation_steps", "resolution",
    "clip_skip", "mixed_precision", "seed", "noise_offset", "min_snr_gamma", "training_comment",
)  # fmt: skip
MODEL_PARTS = (*keys.COMPONENTS, "vae")
_TAGS = 10  # the most frequent ones are shown


def inspect(path: str | Path, *, hash: bool = False) -> dict[str, Any]:
    """Describe a LoRA (file or peft folder), a checkpoint or a diffusers folder, as JSON-able data.

    `hash` also hashes whole files, which takes a second for each gigabyte.

    Raises UserError if it is missing, damaged, or nothing that this package knows.
    """
    path = Path(path)
    if path.is_dir():
        if _is_lora_folder(path):
            return _lora(index(path), hash)
        return _model_folder(path, hash)
    header = read_header(path)
    if keys.is_adapter(header.tensors):
        return _lora(index(path), hash)
    return _checkpoint(header, hash)


def _is_lora_folder(path: Path) -> bool:
    parts = (path, *(path / component for component in keys.COMPONENTS))
    return any((part / PEFT_CONFIG).is_file() for part in parts) or (path / DIFFUSERS_WEIGHTS).is_file()


# --- LoRAs ------------------------------------------------------------------------------------------------


def _lora(lora: LoraIndex, whole: bool) -> dict[str, Any]:
    layers, metadata = lora.layers, lora.metadata
    headers = list({layer.header.path: layer.header for layer in layers.values()}.values())
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
        "trigger": metadata.get("modelspec.trigger_phrase") or None,
        "title": metadata.get("modelspec.title") or metadata.get("ss_output_name"),
        "training": _training(metadata),
        "tags": _tags(metadata),
        "measured": parse_json(metadata, "spf_kit.measured"),
        "selection": parse_json(metadata, "spf_kit.selection"),
        "merged": parse_json(metadata, "spf_kit.merged"),
        "trained_on": parse_json(metadata, "spf_kit.on"),
        "trained_by_spf_kit": metadata.get("spf_kit.version"),
        "hashes": _stored_hashes(metadata),
    }
    if whole:
        told["hashes"] |= _whole_hashes(headers)
    return told


def _component(layers: Mapping[tuple[str, str], IndexedLayer], component: str) -> dict[str, Any]:
    own = {module: layer for (c, module), layer in layers.items() if c == component}
    groups = Counter(keys.target_group(component, module) for module in own)
    ranks: dict[str, set[int | str]] = {}
    for module, layer in own.items():
        ranks.setdefault(_block(component, module), set()).add(layer.rank or "whole")
    return {
        "layers": len(own),
        "kinds": _one_or_all(layer.kind for layer in own.values()),
        "targets": dict(groups.most_common()),
        "ranks": {block: _one_or_all(found) for block, found in ranks.items()},
        "parameters": sum(layer.parameters for layer in own.values()),
    }


def _block(component: str, module: str) -> str:
    """`down_blocks.0`, `mid_block`, `layers.3`: what per-block ranks are given for."""
    parts = module.split(".")
    if component == "unet":
        return ".".join(parts[:2]) if parts[0].endswith("_blocks") else parts[0]
    return ".".join(parts[2:4]) if "layers" in parts else parts[0]


def _training(metadata: Mapping[str, str]) -> dict[str, str]:
    """kohya's most telling entries, without the ones that say nothing."""
    found = {name: metadata.get(f"ss_{name}") for name in _TRAINING}
    return {name: value for name, value in found.items() if value not in (None, "", "None", "{}")}  # type: ignore[misc]


def _tags(metadata: Mapping[str, str]) -> dict[str, int]:
    """The most frequent tags of the training captions, over all folders."""
    counts: Counter[str] = Counter()
    folders = parse_json(metadata, "ss_tag_frequency")
    for tags in folders.values() if isinstance(folders, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if isinstance(count, int):
                counts[tag.strip()] += count
    return dict(counts.most_common(_TAGS))


def _stored_hashes(metadata: Mapping[str, str]) -> dict[str, str]:
    """What the file says of itself; AutoV3 is the start of kohya's hash of the tensors."""
    found = {key: metadata[key] for key in ("sshs_model_hash", "sshs_legacy_hash") if key in metadata}
    if "modelspec.hash_sha256" in metadata:
        found["modelspec"] = metadata["modelspec.hash_sha256"]
    if "sshs_model_hash" in found:
        found["autov3"] = found["sshs_model_hash"][:12]
    return found


# --- checkpoints ------------------------------------------------------------------------------------------


def _checkpoint(header: Header, whole: bool) -> dict[str, Any]:
    """A single file; `family` is None where it is none that can be trained, and `note` says why."""
    from spf_kit.families.detect import family_of_file

    family, note = None, None
    try:
        family = family_of_file(header)
    except UserError as error:
        note = str(error)
    is_whole = any(name.startswith("model.diffusion_model.") for name in header.tensors)
    told: dict[str, Any] = {
        "path": str(header.path),
        "kind": "checkpoint" if is_whole else "tensors",
        "family": family,
        "note": note,
        "format": "single file (LDM)" if is_whole else "safetensors",
        **_tensors([header]),
        "components": _prefixes(header),
        **_about_model(header.metadata),
        "hashes": _stored_hashes(header.metadata),
    }
    if whole:
        told["hashes"] |= _whole_hashes([header])
    return told


def _model_folder(path: Path, whole: bool) -> dict[str, Any]:
    from spf_kit import families

    family = families.detect(str(path))
    files = [file for component in MODEL_PARTS for file in sorted((path / component).glob("*.safetensors"))]
    headers = [read_header(file) for file in files]
    if not headers:
        raise UserError(f"the folder {str(path)!r} holds no .safetensors weights")
    components: dict[str, dict[str, int]] = {}
    for header in headers:
        own = components.setdefault(header.path.parent.name, {"tensors": 0, "parameters": 0})
        own["tensors"] += len(header.tensors)
        own["parameters"] += sum(info.count for info in header.tensors.values())
    told = {
        "path": str(path),
        "kind": "diffusers folder",
        "family": family,
        "format": "diffusers",
        **_tensors(headers),
        "components": components,
        **_about_model(next((h.metadata for h in headers if h.path.parent.name == "unet"), {})),
        "hashes": {},
    }
    if whole:
        told["hashes"] = {header.path.relative_to(path).as_posix(): sha256(header.path) for header in headers}
    return told


def _tensors(headers: list[Header]) -> dict[str, Any]:
    types: Counter[str] = Counter()
    for header in headers:
        types.update(info.dtype for info in header.tensors.values())
    return {
        "dtype": types.most_common(1)[0][0] if len(types) == 1 else dict(types.most_common()),
        "keys": sum(types.values()),
        "size_bytes": sum(header.path.stat().st_size for header in headers),
    }


def _prefixes(header: Header) -> dict[str, dict[str, int]]:
    from spf_kit.families.ldm_keys import PREFIXES

    found: dict[str, dict[str, int]] = {}
    for name, info in header.tensors.items():
        component = next((c for c, prefix in PREFIXES.items() if name.startswith(prefix)), "other")
        own = found.setdefault(component, {"tensors": 0, "parameters": 0})
        own["tensors"] += 1
        own["parameters"] += info.count
    return found


def _about_model(metadata: Mapping[str, str]) -> dict[str, Any]:
    return {
        "title": metadata.get("modelspec.title"),
        "merged_from": metadata.get("modelspec.merged_from"),
        "merged": parse_json(metadata, "spf_kit.merged"),
    }


# --- both -------------------------------------------------------------------------------------------------


def _one_or_all(values: Iterable[Any]) -> Any:
    """The value, where all are the same, else how often each occurs."""
    counts = Counter(values)
    return next(iter(counts)) if len(counts) == 1 else {str(v): n for v, n in sorted(counts.items())}


def _whole_hashes(headers: list[Header]) -> dict[str, str]:
    """Of a single file, as sharing sites show them: AutoV1, AutoV2 (A1111's short hash) and AutoV3."""
    if len(headers) != 1:
        return {header.path.parent.name: sha256(header.path) for header in headers}
    header = headers[0]
    whole, data = hashlib.sha256(), hashlib.sha256()
    with open(header.path, "rb") as file:
        whole.update(file.read(header.data_start))
        while block := file.read(1 << 20):
            whole.update(block)
            data.update(block)
    return {
        "sha256": whole.hexdigest(),
        "autov1": legacy_hash(header.path),
        "autov2": whole.hexdigest()[:10],
        "autov3": data.hexdigest()[:12],
    }
