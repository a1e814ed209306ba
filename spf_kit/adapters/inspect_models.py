"""What a base model is, told from headers and configs alone. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spf_kit.adapters import hashes, keys, thumbnail
from spf_kit.adapters.metadata import parse_json
from spf_kit.errors import UserError
from spf_kit.files import sha256
from spf_kit.headers import Header, TensorInfo, read_header

PARTS = (*keys.COMPONENTS, "vae")
EMA = "model_ema."  # averaged weights, which only a longer training of the model needs


def checkpoint(header: Header, *, whole: bool) -> dict[str, Any]:
    """A single file; `family` is None where it is none that can be trained, and `note` says why."""
    from spf_kit.families.detect import family_of_file

    family, note = None, None
    try:
        family = family_of_file(header)
    except UserError as error:
        note = str(error)
    is_whole = any(name.startswith("model.diffusion_model.") for name in header.tensors)
    components = _components((_prefix(name), info) for name, info in header.tensors.items())
    found = hashes.of_file(header, whole=whole)
    return {
        "path": str(header.path),
        "kind": "checkpoint" if is_whole else "tensors",
        "family": family,
        "note": note,
        "format": "single file (LDM)" if is_whole else "safetensors",
        **_tensors([header]),
        "components": components,
        **(_prediction(header, family) if family else {}),
        "vae": "vae" in components,
        "ema": "ema" in components,
        **about(header.metadata),
        "hashes": {k: v for k, v in found.items() if not k.startswith("sshs_") or k in header.metadata},
    }


def folder(path: Path, *, whole: bool) -> dict[str, Any]:
    """A diffusers folder. Raises UserError if it is none, or holds no weights."""
    from spf_kit import families

    family = families.detect(str(path))
    files = [file for component in PARTS for file in sorted((path / component).glob("*.safetensors"))]
    headers = [read_header(file) for file in files]
    if not headers:
        raise UserError(f"the folder {str(path)!r} holds no .safetensors weights")
    told = _tensors(headers)
    small = told["size_bytes"] <= hashes.FREE
    return {
        "path": str(path),
        "kind": "diffusers folder",
        "family": family,
        "format": "diffusers",
        **told,
        "components": _components((h.path.parent.name, info) for h in headers for info in h.tensors.values()),
        **_scheduled(path),
        "vae": any(header.path.parent.name == "vae" for header in headers),
        "ema": (path / "unet_ema").is_dir(),
        **about(next((h.metadata for h in headers if h.path.parent.name == "unet"), {})),
        "hashes": {h.path.relative_to(path).as_posix(): sha256(h.path) for h in headers}
        if whole or small
        else {},
    }


def about(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What any model says of itself."""
    return {
        "title": metadata.get("modelspec.title"),
        "merged_from": metadata.get("modelspec.merged_from"),
        "merged": parse_json(metadata, "spf_kit.merged"),
        **modelspec(metadata),
    }


def modelspec(metadata: Mapping[str, str]) -> dict[str, Any]:
    """All fields of ModelSpec; of a thumbnail its type and size."""
    fields = {
        key.removeprefix("modelspec."): value
        for key, value in sorted(metadata.items())
        if key.startswith("modelspec.") and key != thumbnail.KEY
    }
    url = metadata.get(thumbnail.KEY)
    return {"modelspec": fields, "thumbnail": thumbnail.describe(url) if url else None}


def _tensors(headers: list[Header]) -> dict[str, Any]:
    types = Counter(info.dtype for header in headers for info in header.tensors.values())
    return {
        "dtype": _types(types),
        "keys": sum(types.values()),
        "size_bytes": sum(header.path.stat().st_size for header in headers),
    }


def _types(types: Counter[str]) -> str | dict[str, int]:
    return next(iter(types)) if len(types) == 1 else dict(types.most_common())


def _components(tensors: Iterable[tuple[str, TensorInfo]]) -> dict[str, dict[str, Any]]:
    found: dict[str, list[TensorInfo]] = {}
    for component, info in tensors:
        found.setdefault(component, []).append(info)
    return {
        component: {
            "tensors": len(own),
            "parameters": sum(info.count for info in own),
            "dtype": _types(Counter(info.dtype for info in own)),
        }
        for component, own in found.items()
    }


def _prefix(name: str) -> str:
    from spf_kit.families.ldm_keys import PREFIXES

    if name.startswith(EMA):
        return "ema"
    return next((component for component, prefix in PREFIXES.items() if name.startswith(prefix)), "other")


def _prediction(header: Header, family: str) -> dict[str, Any]:
    from spf_kit.families.prediction import scheduler_of

    stored = parse_json(header.metadata, "spf_kit.scheduler")
    return _of_scheduler(stored if isinstance(stored, dict) else scheduler_of(header, family))


def _scheduled(path: Path) -> dict[str, Any]:
    from spf_kit.families.folder import read_json

    file = path / "scheduler" / "scheduler_config.json"
    return _of_scheduler(read_json(file)) if file.is_file() else {}


def _of_scheduler(config: Mapping[str, Any]) -> dict[str, Any]:
    said = config.get("prediction_type", "epsilon")
    return {
        "prediction_type": said if isinstance(said, str) else None,
        "zero_terminal_snr": bool(config.get("rescale_betas_zero_snr", False)),
    }
