"""An architecture by its name, "sd15", "sd2" or "sdxl": the published configs, and no weights."""

from __future__ import annotations

from typing import Any

from spf_kit.errors import UserError
from spf_kit.families.detect import shipped_config
from spf_kit.families.sources import Source, Weights, components_of


class BareSource(Source):
    """What `--base sdxl` means: enough to estimate with, nothing to train or draw with."""

    def __init__(self, name: str) -> None:
        self.name = self.location = name
        self.configs = {component: shipped_config(name, component) for component in components_of(name)}
        self.scheduler_config = shipped_config(name, "scheduler")
        self.pipeline_config: dict[str, Any] = {}

    def weights(self, component: str) -> Weights:
        raise UserError(
            f"base.model = {self.name!r} names an architecture and has no weights: that is enough for "
            "`spf-kit estimate`; give a .safetensors file or a diffusers folder"
        )

    def tokenizer(self, component: str = "text_encoder") -> Any:
        from spf_kit.families.tokenizer import clip_tokenizer, pad_of

        return clip_tokenizer(pad_of(self.name, component))
