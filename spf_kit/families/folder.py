"""Diffusers folders as a source: `unet/config.json`, `unet/diffusion_pytorch_model.safetensors`, ..."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spf_kit.errors import UserError
from spf_kit.families.detect import PICKLES, SUPPORTED, family_of_unet, not_supported
from spf_kit.families.ldm_keys import standard_name
from spf_kit.families.sources import Place, Source, Weights, components_of
from spf_kit.headers import read_header

_STEMS = ("diffusion_pytorch_model", "model")
_VARIANTS = ("", ".fp16", ".bf16")  # the plain file first: it has the most digits


def family_of_folder(folder: Path) -> str:
    """The family's name by a diffusers folder. Raises UserError if it is not supported."""
    where = str(folder)
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{where!r} is a LoRA folder (peft), not a base model; give the model that it was trained on"
        )
    unet = folder / "unet" / "config.json"
    if unet.is_file():
        index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
        if index.get("requires_aesthetics_score"):
            raise UserError(not_supported(where, "an SDXL refiner"))
        return family_of_unet(where, read_json(unet))
    if (folder / "transformer" / "config.json").is_file() or (folder / "prior").is_dir():
        kind = read_json(folder / "model_index.json").get("_class_name", "another")
        raise UserError(f"{where!r} is a {kind} model, which is not supported yet; {SUPPORTED}")
    checkpoints = sorted(file.name for file in folder.glob("*.safetensors"))
    hint = f"; it holds the file {checkpoints[0]!r}: give that" if checkpoints else ""
    raise UserError(f"the folder {where!r} is not a diffusers model: it has no unet/config.json{hint}")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises UserError if it is missing or damaged."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{str(file)!r} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(file)!r} is damaged: it is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{str(file)!r} is damaged: it is not a JSON object")
    return content


def component_files(folder: Path) -> list[Path]:
    """The .safetensors files of one component: one, or the shards that its index names.

    Raises UserError if there are only pickles, or nothing.
    """
    for stem in _STEMS:
        for variant in _VARIANTS:
            file = folder / f"{stem}{variant}.safetensors"
            if file.is_file():
                return [file]
            for index in (
                f"{stem}{variant}.safetensors.index.json",
                f"{stem}.safetensors.index{variant}.json",
            ):
                if (folder / index).is_file():
                    return [folder / name for name in _shards(folder / index)]
    if any(file.suffix in PICKLES for file in folder.glob("*")):
        raise UserError(
            f"{str(folder)!r} holds its weights as pickles only, which can run any code when opened; "
            "get the model's .safetensors files (the hub has a converter: Space 'safetensors/convert')"
        )
    raise UserError(f"{str(folder)!r} holds no .safetensors weights")


def _shards(index: Path) -> list[str]:
    """The files that an index names, which lie beside it. Raises UserError if it names none."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(n, str) for n in places.values()):
        raise UserError(f"{str(index)!r} is damaged: its weight_map is no table of file names; copy it again")
    return sorted({Path(name).name for name in places.values()})


def component_weights(folder: Path) -> Weights:
    """Where the tensors of the component in this folder lie, by name."""
    return {key: Place(file, key) for file in component_files(folder) for key in read_header(file).tensors}


class FolderSource(Source):
    """A diffusers folder, named as the user gave it (`location` differs from the path for hub models)."""

    def __init__(self, folder: Path, *, location: str | None = None) -> None:
        self.folder, self.location = folder, location or str(folder)
        self.name = family_of_folder(folder)
        components = components_of(self.name)
        for component in components:
            if not (folder / component / "config.json").is_file():
                raise UserError(f"{self.location!r} is not complete: it has no {component}/config.json")
        self.configs = {component: read_json(folder / component / "config.json") for component in components}
        self.scheduler_config = read_json(folder / "scheduler" / "scheduler_config.json")
        index = folder / "model_index.json"
        self.pipeline_config = read_json(index) if index.is_file() else {}

    def weights(self, component: str) -> Weights:
        found = component_weights(self.folder / component)
        return {standard_name(component, name): place for name, place in found.items()}

    def tokenizer(self, component: str = "text_encoder") -> Any:
        from spf_kit.families.tokenizer import clip_tokenizer, load_tokenizer, pad_of

        folder = self.folder / component.replace("text_encoder", "tokenizer")
        if not folder.is_dir() and self.configs[component].get("vocab_size") == 49408:
            return clip_tokenizer(pad_of(self.name, component))
        try:
            return load_tokenizer(folder)
        except (OSError, ValueError) as error:
            raise UserError(
                f"the tokenizer in {str(folder)!r} cannot be read: {str(error).splitlines()[0]}"
            ) from error
