"""Single .safetensors files in the LDM layout: reading them, and writing a diffusers folder as one.

Keys and shapes do not tell a model's numbers of heads, its tokenizer or its noise schedule. For Stable
Diffusion 1.5 they are known; for other sizes `write_single_file` puts them into the header's metadata:
`spf_kit.base` (the family's name), `spf_kit.<component>` and `spf_kit.scheduler` (configs as JSON) and
`spf_kit.tokenizer`. Tools that drop the metadata leave an embedded base that is still known by its sizes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spf_kit.errors import UserError
from spf_kit.families import ldm_keys
from spf_kit.families.detect import embedded_folder, family_of_file, shipped_config
from spf_kit.families.folder import FolderSource
from spf_kit.families.sources import COMPONENTS, Place, Source, Weights, read
from spf_kit.files import atomic
from spf_kit.headers import DTYPE_BITS, Header, encode_header, read_header

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_FLOATS = ("F64", "F32", "F16", "BF16")


class SingleFileSource(Source):
    """A checkpoint in the LDM layout. Only its header has been read."""

    def __init__(self, path: Path) -> None:
        self.header, self.location = read_header(path), str(path)
        self.name = family_of_file(self.header)
        self.configs = configs_of(self.header)
        self.scheduler_config = _scheduler_config(self.header, self.name)

    def weights(self, component: str) -> Weights:
        names = ldm_keys.key_map(component, self.configs[component])
        found = {}
        for key in self.header.tensors:
            place = ldm_keys.locate(key)
            if place is not None and place[0] == component:
                # unknown keys keep their own name, so that the loader can name them
                found[names.to_diffusers(place[1]) or key] = Place(self.header.path, key)
        if not found:
            remedy = (
                "; name one with `vae` in [base]" if component == "vae" else "; get the complete checkpoint"
            )
            raise UserError(f"{self.location!r} holds no {component}{remedy}")
        return found

    def tokenizer(self) -> Any:
        from spf_kit.families.tokenizer import clip_tokenizer, load_tokenizer, unpack

        packed = self.header.metadata.get("spf_kit.tokenizer")
        if packed is not None:
            try:
                return unpack(packed)
            except (OSError, ValueError, AttributeError) as error:
                raise UserError(
                    f"{self.location!r}: the tokenizer in its metadata is damaged ({error})"
                ) from error
        return clip_tokenizer() if self.name == "sd15" else load_tokenizer(embedded_folder() / "tokenizer")


def configs_of(header: Header) -> dict[str, dict[str, Any]]:
    """The components' configs of a single file: from its metadata, else of the family that its sizes show."""
    name = family_of_file(header)
    return {
        component: _stored(header, component) or shipped_config(name, component) for component in COMPONENTS
    }


def merge_targets(header: Header) -> dict[tuple[str, str], str]:
    """(component, module) to the file's weight key, for every layer that a LoRA can change."""
    return ldm_keys.merge_targets(header.tensors, configs_of(header))


def _stored(header: Header, name: str) -> dict[str, Any] | None:
    text = header.metadata.get(f"spf_kit.{name}")
    if text is None:
        return None
    try:
        config = dict(json.loads(text))
        if name in COMPONENTS:
            ldm_keys.key_map(name, config)  # the names must follow from it
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{str(header.path)!r}: its metadata {f'spf_kit.{name}'!r} is damaged ({error})"
        ) from error
    return config


def _scheduler_config(header: Header, name: str) -> dict[str, Any]:
    """The noise schedule: stored, else the family's, with v-prediction where the file declares it.

    Finetunes declare it with an empty tensor `v_pred` (and `ztsnr`) or with modelspec.prediction_type.
    """
    config = _stored(header, "scheduler")
    if config is not None:
        return config
    config = shipped_config(name, "scheduler")
    declared = header.metadata.get(
        "modelspec.prediction_type", header.metadata.get("modelspec.predict_key", "")
    )
    if "v_pred" in header.tensors or declared in ("v", "v_prediction"):
        config["prediction_type"] = "v_prediction"
        config["rescale_betas_zero_snr"] = "ztsnr" in header.tensors
    return config


# --- writing ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file to come, and where it is now."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    place: Place


def write_single_file(folder: Path | str, path: Path | str, dtype: str | None = None) -> Path:
    """Write a diffusers folder as one file in the LDM layout, tensor by tensor, and return its path.

    `dtype` is float32, float16 or bfloat16; None keeps each tensor's own. Raises UserError if the folder is
    not of a supported family, or the file cannot be written (it then does not exist).
    """
    source, path = FolderSource(Path(folder)), Path(path)
    # wide types first, as safetensors has them: each tensor then begins at a multiple of its own width
    entries = sorted(_entries(source, dtype), key=lambda entry: (-DTYPE_BITS[entry.dtype], entry.key))
    header = encode_header({entry.key: (entry.dtype, entry.shape) for entry in entries}, _metadata(source))
    with atomic(path) as temporary, temporary.open("wb") as file:
        file.write(header)
        tensors = read({entry.key: entry.place for entry in entries})
        for entry, (_, tensor) in zip(entries, tensors, strict=True):
            file.write(_bytes(tensor, entry.dtype))
    return path


def _entries(source: Source, dtype: str | None) -> Iterator[_Entry]:
    headers: dict[Path, Header] = {}
    for component in COMPONENTS:
        names = ldm_keys.key_map(component, source.configs[component])
        for name, place in source.weights(component).items():
            key = names.to_ldm(name)
            if name.endswith("position_ids"):
                continue  # computed, and no weight
            if key is None:
                raise UserError(
                    f"{source.location!r}: {component} {name} has no place in the single-file layout"
                )
            if place.file not in headers:
                headers[place.file] = read_header(place.file)
            info = headers[place.file].tensors[place.key]
            is_matrix = ldm_keys.is_vae_attention_weight(key) and len(info.shape) == 2
            shape = (*info.shape, 1, 1) if is_matrix else info.shape
            kept = info.dtype if info.dtype in _FLOATS else "F32"
            yield _Entry(key, _DTYPES[dtype] if dtype else kept, shape, place)


def _bytes(tensor: Tensor, dtype: str) -> memoryview:
    import torch

    to = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    return memoryview(tensor.to(to).contiguous().reshape(-1).view(torch.uint8).numpy())


def _metadata(source: FolderSource) -> dict[str, str]:
    from spf_kit.families.tokenizer import pack

    stored = {"format": "pt", "spf_kit.base": source.name, "spf_kit.tokenizer": pack(source.tokenizer())}
    for component in COMPONENTS:
        stored[f"spf_kit.{component}"] = json.dumps(source.configs[component])
    stored["spf_kit.scheduler"] = json.dumps(source.scheduler_config)
    return stored
