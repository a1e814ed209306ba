"""Single .safetensors files in the LDM layout: reading them, and writing a diffusers folder as one.

Keys and shapes do not tell a model's numbers of heads, its tokenizers or its noise schedule. For the
published Stable Diffusion models they are known; for other sizes `write_single_file` puts them into the
header's metadata: `spf_kit.base` (the family's name), `spf_kit.<component>` and `spf_kit.scheduler`
(configs as JSON) and `spf_kit.tokenizer`, `spf_kit.tokenizer_2`. Tools that drop the metadata leave an
embedded base that is still known by its sizes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spf_kit.errors import UserError
from spf_kit.families import ldm_keys
from spf_kit.families.detect import embedded_folder, family_of_file, shipped_config
from spf_kit.families.folder import FolderSource
from spf_kit.families.prediction import scheduler_of
from spf_kit.families.sources import Place, Source, Weights, components_of, read
from spf_kit.files import atomic
from spf_kit.headers import DTYPE_BITS, Header, encode_header, read_header

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_FLOATS = ("F64", "F32", "F16", "BF16")


class SingleFileSource(Source):
    """A checkpoint in the LDM layout. Only its header has been read, and of a 2.x model a bias."""

    pipeline_config: dict[str, Any] = {}

    def __init__(self, path: Path) -> None:
        self.header, self.location = read_header(path), str(path)
        self.name = family_of_file(self.header)
        self.configs = configs_of(self.header)
        stored = _stored(self.header, "scheduler")
        self.scheduler_config = stored or scheduler_of(self.header, self.name)
        if self.name == "sd2" and stored is None and self.scheduler_config["prediction_type"] == "epsilon":
            self.configs["unet"]["sample_size"] = 64  # the models of 512 pixels predict epsilon

    def weights(self, component: str) -> Weights:
        maps: dict[str, ldm_keys.KeyMap] = {}
        found = {}
        for key in self.header.tensors:
            place = ldm_keys.locate(key)
            if place is None or place.component != component:
                continue
            names = maps.get(place.prefix)
            if names is None:
                config = self.configs[component]
                names = maps[place.prefix] = ldm_keys.key_map(component, config, place.prefix)
            found.update(self._places(key, place, names.all_diffusers(place.key)))
        if not found:
            remedy = (
                "; name one with `vae` in [base]" if component == "vae" else "; get the complete checkpoint"
            )
            raise UserError(f"{self.location!r} holds no {component}{remedy}")
        return found

    def _places(self, key: str, place: ldm_keys.Located, names: list[str]) -> dict[str, Place]:
        file, transposed = self.header.path, ldm_keys.is_transposed(place.key)
        if not names and place.prefix in ldm_keys.OPEN_CLIP:
            return {}  # the last layer, which no Stable Diffusion 2.x reads, and what compares with pictures
        # other unknown keys keep their own name, so that the loader can name them
        return {
            name: Place(file, key, ldm_keys.third_of(place.key, name), transposed) for name in names or [key]
        }

    def tokenizer(self, component: str = "text_encoder") -> Any:
        from spf_kit.families.tokenizer import clip_tokenizer, load_tokenizer, pad_of, unpack

        packed = self.header.metadata.get(f"spf_kit.{_tokenizer(component)}")
        if packed is not None:
            try:
                return unpack(packed)
            except (OSError, ValueError, AttributeError) as error:
                raise UserError(
                    f"{self.location!r}: the tokenizer in its metadata is damaged ({error})"
                ) from error
        if self.name == "embedded":
            return load_tokenizer(embedded_folder() / "tokenizer")
        return clip_tokenizer(pad_of(self.name, component))


def configs_of(header: Header) -> dict[str, dict[str, Any]]:
    """The components' configs of a single file: from its metadata, else of the family that its sizes show."""
    name = family_of_file(header)
    return {
        component: _stored(header, component) or shipped_config(name, component)
        for component in components_of(name)
    }


def merge_targets(header: Header) -> dict[tuple[str, str], str]:
    """(component, module) to the file's weight key, for every layer that a LoRA can change."""
    return ldm_keys.merge_targets(header.tensors, configs_of(header))


def _tokenizer(component: str) -> str:
    return component.replace("text_encoder", "tokenizer")


def _stored(header: Header, name: str) -> dict[str, Any] | None:
    text = header.metadata.get(f"spf_kit.{name}")
    if text is None:
        return None
    try:
        config = dict(json.loads(text))
        for prefix in ldm_keys.PREFIXES.get(name, ()):
            ldm_keys.key_map(name, config, prefix)  # the names must follow from it
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{str(header.path)!r}: its metadata {f'spf_kit.{name}'!r} is damaged ({error})"
        ) from error
    return config


# --- writing ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file to come, and where its rows are now."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    places: tuple[Place, ...]


def write_single_file(folder: Path | str, path: Path | str, dtype: str | None = None) -> Path:
    """Write a diffusers folder as one file in its family's layout, tensor by tensor, and return its path.

    `dtype` is float32, float16 or bfloat16; None keeps each tensor's own. Raises UserError if the folder is
    not of a supported family, or the file cannot be written (it then does not exist).
    """
    source, path = FolderSource(Path(folder)), Path(path)
    # wide types first, as safetensors has them: each tensor then begins at a multiple of its own width
    entries = sorted(_entries(source, dtype), key=lambda entry: (-DTYPE_BITS[entry.dtype], entry.key))
    header = encode_header({entry.key: (entry.dtype, entry.shape) for entry in entries}, _metadata(source))
    # rows of q, k and v follow each other: one after another they are the tensor that holds all three
    places = {f"{n} {entry.key}": place for entry in entries for n, place in enumerate(entry.places)}
    types = [entry.dtype for entry in entries for _ in entry.places]
    with atomic(path) as temporary, temporary.open("wb") as file:
        file.write(header)
        for kind, (_, tensor) in zip(types, read(places), strict=True):
            file.write(_bytes(tensor, kind))
    return path


def _entries(source: Source, dtype: str | None) -> Iterator[_Entry]:
    headers: dict[Path, Header] = {}
    for component in components_of(source.name):
        prefix = ldm_keys.prefix_of(component, source.name)
        names = ldm_keys.key_map(component, source.configs[component], prefix)
        grouped: dict[str, dict[str, Place]] = {}
        for name, place in source.weights(component).items():
            if name.endswith("position_ids"):
                continue  # computed, and no weight
            key = names.to_ldm(name)
            if key is None:
                raise UserError(
                    f"{source.location!r}: {component} {name} has no place in the single-file layout"
                )
            grouped.setdefault(key, {})[name] = place
            if place.file not in headers:
                headers[place.file] = read_header(place.file)
        for key, parts in grouped.items():
            order = names.all_diffusers(key)
            if len(parts) != len(order):
                raise UserError(
                    f"{source.location!r} is not complete: of {', '.join(order)} it holds {len(parts)}"
                )
            yield _entry(key, [parts[name] for name in order], headers, dtype)


def _entry(key: str, places: list[Place], headers: dict[Path, Header], dtype: str | None) -> _Entry:
    info = headers[places[0].file].tensors[places[0].key]
    shape = (len(places) * info.shape[0], *info.shape[1:]) if info.shape else ()
    if ldm_keys.is_vae_attention_weight(key) and len(shape) == 2:
        shape = (*shape, 1, 1)
    if ldm_keys.is_transposed(key):
        shape, places = shape[::-1], [replace(place, transposed=True) for place in places]
    kept = info.dtype if info.dtype in _FLOATS else "F32"
    return _Entry(key, _DTYPES[dtype] if dtype else kept, shape, tuple(places))


def _bytes(tensor: Tensor, dtype: str) -> memoryview:
    import torch

    to = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    return memoryview(tensor.to(to).contiguous().reshape(-1).view(torch.uint8).numpy())


def _metadata(source: FolderSource) -> dict[str, str]:
    from spf_kit.families.tokenizer import pack

    stored = {"format": "pt", "spf_kit.base": source.name}
    for component in components_of(source.name):
        stored[f"spf_kit.{component}"] = json.dumps(source.configs[component])
        if component.startswith("text_encoder"):
            stored[f"spf_kit.{_tokenizer(component)}"] = pack(source.tokenizer(component))
    stored["spf_kit.scheduler"] = json.dumps(source.scheduler_config)
    return stored
