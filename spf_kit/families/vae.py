"""A VAE of its own (`vae` in [base]): a diffusers folder, or a file with LDM or diffusers names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spf_kit.errors import UserError
from spf_kit.families import ldm_keys
from spf_kit.families.detect import refuse_pickle
from spf_kit.families.folder import component_weights, read_json
from spf_kit.families.sources import Place, Source, Weights
from spf_kit.headers import read_header

_LDM = ldm_keys.PREFIXES["vae"][0]


class VaeSource(Source):
    """Only has the component "vae". A file does not tell its config: that of the base's own VAE counts."""

    name = "VAE"
    scheduler_config: dict[str, Any] = {}
    pipeline_config: dict[str, Any] = {}

    def __init__(self, path: Path, base_config: dict[str, Any]) -> None:
        self.path, self.location = path, str(path)
        if path.is_dir():
            self.path = path / "vae" if (path / "vae" / "config.json").is_file() else path
            if not (self.path / "config.json").is_file():
                raise UserError(f"the VAE {str(path)!r} is not a diffusers folder: it has no config.json")
            self.configs = {"vae": read_json(self.path / "config.json")}
        else:
            refuse_pickle(path)
            self.configs = {"vae": base_config}

    def weights(self, component: str) -> Weights:
        found = component_weights(self.path) if self.path.is_dir() else self._file_weights()
        return {ldm_keys.standard_name("vae", name): place for name, place in found.items()}

    def tokenizer(self, component: str = "text_encoder") -> Any:
        raise RuntimeError("a VAE has no tokenizer")

    def _file_weights(self) -> Weights:
        keys = read_header(self.path).tensors
        if any(key.startswith(_LDM) for key in keys):
            names = {key: key for key in keys if key.startswith(_LDM)}  # a whole checkpoint: its VAE counts
        else:
            names = {key: _LDM + key for key in keys}
        if not any(name.startswith(f"{_LDM}encoder.") for name in names.values()):
            raise UserError(f"{self.location!r} holds no VAE: no tensor begins with 'encoder.'")
        if any(".down_blocks." in key for key in names):
            return {key: Place(self.path, key) for key in names}  # diffusers' own names
        translate = ldm_keys.key_map("vae", self.configs["vae"])
        return {translate.to_diffusers(name) or key: Place(self.path, key) for key, name in names.items()}


def widen_inputs(vae: Any) -> None:
    """Let a VAE that is held in float32 take half-precision latents and pictures, as pipelines give them."""

    def widen(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return inputs[0].to(vae.dtype), *inputs[1:]

    for part in (vae.encoder, vae.decoder, vae.post_quant_conv):
        if part is not None:
            part.register_forward_pre_hook(widen)
