"""Stable Diffusion 1.x: one CLIP text encoder, epsilon or v prediction, 4 latent channels.

The embedded base is the same architecture in small: all sizes come from the configs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spf_kit.errors import UserError, nearest
from spf_kit.families import loading, text
from spf_kit.families.attention import use_attention
from spf_kit.families.base import Condition, Family
from spf_kit.families.noise import NoiseProcess
from spf_kit.families.schedulers import make_scheduler
from spf_kit.families.sources import COMPONENTS, Source, fingerprint
from spf_kit.probes import Spans

# Module names by target group. On SD1.5 the first three are the 192 layers of kohya's default network, all
# four those of its LoCon but time_emb_proj, which steers by the timestep and not by picture or text.
# proj_in and proj_out work on each position alone, so they stand with the feed-forward layers.
TARGETS = {
    "unet": {
        "cross-attention": r"\.attn2\.(to_q|to_k|to_v|to_out\.0)$",
        "self-attention": r"\.attn1\.(to_q|to_k|to_v|to_out\.0)$",
        "feed-forward": r"\.ff\.net\.(0\.proj|2)$|\.attentions\.\d+\.proj_(in|out)$",
        "convolutions": r"\.resnets\.\d+\.(conv1|conv2|conv_shortcut)$|\.(down|up)samplers\.0\.conv$",
    },
    "text_encoder": {"text-encoder": r"\.self_attn\.(q_proj|k_proj|v_proj|out_proj)$|\.mlp\.(fc1|fc2)$"},
}


def target_modules(component: str, module: nn.Module, groups: Iterable[str]) -> list[str]:
    """The names of a component's layers in these target groups, in `named_modules()` order."""
    patterns = [re.compile(pattern) for group, pattern in TARGETS[component].items() if group in groups]
    return [name for name, _ in module.named_modules() if any(p.search(name) for p in patterns)]


class SD15Family(Family):
    """See `Family`. Made by `spf_kit.families.load`."""

    def __init__(
        self,
        source: Source,
        *,
        vae_source: Source | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        attention: str = "sdpa",
    ) -> None:
        """Raises UserError if weights are missing or misshapen, or the attention backend cannot be used."""
        self.name, self.base_id = source.name, source.location
        self.device, self.dtype = torch.device(device), dtype
        self._sources = dict.fromkeys(COMPONENTS, source)
        if vae_source is not None:
            self._sources["vae"] = vae_source
        self._attention, self._hash = attention, ""
        self._scheduler_config = source.scheduler_config
        self.noise = NoiseProcess.from_scheduler(source.scheduler_config, source=source.location)
        self.tokenizer = source.tokenizer()
        self.vae = self.text_encoder = None
        self.reload_encoders()
        # from the modules: their libraries fill in what a config file leaves out
        self.latent_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.latent_channels = int(self.vae.config.latent_channels)
        self.scaling_factor = float(self.vae.config.scaling_factor)
        self._window = int(self.text_encoder.config.max_position_embeddings)
        self._text_level = loading.TEXT_LEVEL if hasattr(self.text_encoder, "text_model") else ""
        self._check_channels(source.configs["unet"])
        self.unet = self._load("unet")
        use_attention(attention, self.unet, self.device)
        size = self.unet.config.sample_size or 64  # latents; a pair for models that are not square
        self.resolution = (size if isinstance(size, int) else min(size)) * self.latent_factor

    def _load(self, component: str) -> Any:
        return loading.load_module(self._sources[component], component, dtype=self.dtype, device=self.device)

    def _check_channels(self, unet: Mapping[str, Any]) -> None:
        if unet.get("in_channels", 4) != self.latent_channels:
            raise UserError(
                f"the VAE of {self._sources['vae'].location!r} has {self.latent_channels} latent channels, "
                f"but the UNet takes {unet.get('in_channels', 4)}; choose a VAE made for this family"
            )

    # --- text ---

    def encode_text(self, captions: Sequence[str], *, clip_skip: int = 1, chunks: int = 1) -> Condition:
        if self.text_encoder is None:
            raise RuntimeError("the text encoder was freed; call reload_encoders() first")
        ids = text.windows(self.tokenizer, list(captions), chunks=chunks, length=self._window)
        return {"encoder_hidden_states": text.hidden_states(self.text_encoder, ids, clip_skip=clip_skip)}

    def count_tokens(self, text_: str) -> int:
        return len(text.token_ids(self.tokenizer, text_))

    def cut_words(self, text_: str, chunks: int = 1) -> list[str]:
        return text.cut_words(self.tokenizer, text_, chunks * (self._window - 2))

    def spans(self, phrases: Sequence[str], target: str, chunks: int = 1) -> Spans:
        return text.spans(self.tokenizer, phrases, target, chunks=chunks, length=self._window)

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        if self.text_encoder is None:
            raise RuntimeError("the text encoder was freed; call reload_encoders() first")
        ids = text.windows(self.tokenizer, list(texts), chunks=1, length=self._window).flatten(0, 1)
        pooled = self.text_encoder(ids.to(self.text_encoder.device)).pooler_output.float()
        return pooled / pooled.norm(dim=-1, keepdim=True)

    # --- pictures ---

    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        if self.vae is None:
            raise RuntimeError("the VAE was freed; call reload_encoders() first")
        distribution = self.vae.encode(pixels.to(self.device, self.dtype)).latent_dist
        return (
            distribution.mean.float() * self.scaling_factor,
            distribution.std.float() * self.scaling_factor,
        )

    def decode(self, latents: Tensor) -> Tensor:
        if self.vae is None:
            raise RuntimeError("the VAE was freed; call reload_encoders() first")
        pictures = self.vae.decode(latents.to(self.device, self.dtype) / self.scaling_factor).sample
        return (pictures.float() / 2 + 0.5).clamp(0, 1)

    # --- the model ---

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        states = condition["encoder_hidden_states"].to(self.device, self.dtype)
        prediction: Tensor = self.unet(
            noisy_latents.to(self.dtype), timesteps, encoder_hidden_states=states
        ).sample
        return prediction.to(noisy_latents.dtype)

    def pipeline(self, scheduler: str = "ddim") -> Any:
        from diffusers import StableDiffusionPipeline

        made = make_scheduler(scheduler, self._scheduler_config)  # first: a wrong name must not load encoders
        self.reload_encoders()
        pipeline = StableDiffusionPipeline(
            vae=self.vae, text_encoder=self.text_encoder, tokenizer=self.tokenizer, unet=self.unet,
            scheduler=made, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    # --- adapters and names ---

    def adapter_modules(self, groups: Iterable[str]) -> dict[str, list[str]]:
        """Raises UserError for an unknown group, RuntimeError if the text encoder is wanted while freed."""
        wanted = list(groups)
        known = [group for patterns in TARGETS.values() for group in patterns]
        for group in wanted:
            if group not in known:
                hint = nearest(group, known, phrase="- did you mean {!r}?")
                raise UserError(f"unknown target {group!r}; there are: {', '.join(known)}{hint}")
        loaded, found = self.components(), {}
        for component, patterns in TARGETS.items():
            if not patterns.keys().isdisjoint(wanted):
                if component not in loaded:
                    raise RuntimeError("the text encoder was freed; call reload_encoders() first")
                found[component] = target_modules(component, loaded[component], wanted)
        return found

    def file_module_name(self, component: str, module: str) -> str:
        if component != "text_encoder":
            return module
        return loading.TEXT_LEVEL + module.removeprefix(loading.TEXT_LEVEL)

    def runtime_module_name(self, component: str, module: str) -> str:
        if component != "text_encoder":
            return module
        # the level is there or not by the version of transformers, and known also while the encoder is freed
        return self._text_level + module.removeprefix(loading.TEXT_LEVEL)

    def base_hash(self) -> str:
        if not self._hash:
            self._hash = fingerprint({name: source.weights(name) for name, source in self._sources.items()})
        return self._hash

    # --- memory ---

    def free_encoders(self) -> None:
        self.vae = self.text_encoder = None

    def reload_encoders(self) -> None:
        if self.vae is None:
            self.vae = self._load("vae")
            use_attention(self._attention, self.vae, self.device)
        if self.text_encoder is None:
            self.text_encoder = self._load("text_encoder")

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass: less memory, about a third more time."""
        self.unet.enable_gradient_checkpointing()
        if self.text_encoder is not None:
            self.text_encoder.gradient_checkpointing_enable()
