"""What the families of Stable Diffusion share: loading, pictures, targets, names, memory.

Whatever differs (how many text encoders, how they are read, what else the UNet is told) is in `sd15.py` and
`sdxl.py`. All sizes come from the configs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spf_kit.errors import UserError, nearest
from spf_kit.families import loading, text
from spf_kit.families.attention import use_attention
from spf_kit.families.base import Family
from spf_kit.families.noise import NoiseProcess
from spf_kit.families.offload import HOST, take_turns
from spf_kit.families.prediction import as_asked
from spf_kit.families.sources import Source, fingerprint
from spf_kit.families.vae import widen_inputs
from spf_kit.probes import Spans

if TYPE_CHECKING:
    from spf_kit.schema import Base

# Module names by target group. On SD1.5 the first three are the 192 layers of kohya's default network, all
# four those of its LoCon but time_emb_proj, which steers by the timestep and not by picture or text.
# proj_in and proj_out work on each position alone, so they stand with the feed-forward layers.
_TEXT = {"text-encoder": r"\.self_attn\.(q_proj|k_proj|v_proj|out_proj)$|\.mlp\.(fc1|fc2)$"}
TARGETS = {
    "unet": {
        "cross-attention": r"\.attn2\.(to_q|to_k|to_v|to_out\.0)$",
        "self-attention": r"\.attn1\.(to_q|to_k|to_v|to_out\.0)$",
        "feed-forward": r"\.ff\.net\.(0\.proj|2)$|\.attentions\.\d+\.proj_(in|out)$",
        "convolutions": r"\.resnets\.\d+\.(conv1|conv2|conv_shortcut)$|\.(down|up)samplers\.0\.conv$",
    },
    "text_encoder": _TEXT,
    "text_encoder_2": _TEXT,
}
GROUPS = list(dict.fromkeys(group for patterns in TARGETS.values() for group in patterns))


def target_modules(component: str, module: nn.Module, groups: Iterable[str]) -> list[str]:
    """The names of a component's layers in these target groups, in `named_modules()` order."""
    patterns = [re.compile(pattern) for group, pattern in TARGETS[component].items() if group in groups]
    return [name for name, _ in module.named_modules() if any(p.search(name) for p in patterns)]


class StableDiffusionFamily(Family):
    """See `Family`. Made by `spf_kit.families.load`."""

    def __init__(
        self,
        source: Source,
        *,
        vae_source: Source | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        attention: str = "sdpa",
        base: Base | None = None,
        weights: bool = True,
        unet: bool = True,
    ) -> None:
        """`base` settles how the UNet is quantised and laid out, and what the model predicts where its own
        files do not or are wrong. Without `weights` the modules stay on the meta device; without `unet` that
        one does, until `load_unet`.

        Raises UserError if weights are missing or misshapen, or the attention backend cannot be used.
        """
        self.name, self.base_id = source.name, source.location
        self.device, self.dtype = torch.device(device), dtype
        self._sources = dict.fromkeys(("unet", "vae", *self.text_components), source)
        if vae_source is not None:
            self._sources["vae"] = vae_source
        self._attention, self._weights = attention, weights
        self._hashes: dict[tuple[str, ...], str] = {}
        self.quantize = base.quantize if base else None
        self.vae_tiling, self._vae_slicing = (base.vae_tiling, base.vae_slicing) if base else (False, False)
        self._channels_last = base.channels_last if base else None
        self.offload = bool(base and base.offload) and self.device.type == "cuda"
        config = as_asked(source.scheduler_config, base) if base else dict(source.scheduler_config)
        self._scheduler_config, self._pipeline_config = config, source.pipeline_config
        self.noise = NoiseProcess.from_scheduler(config, source=source.location)
        self.tokenizers = [source.tokenizer(component) for component in self.text_components]
        self.tokenizer = self.tokenizers[0]
        self.free_encoders()
        self.reload_encoders()
        # from the modules: their libraries fill in what a config file leaves out
        self.latent_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.latent_channels = int(self.vae.config.latent_channels)
        self.scaling_factor = float(self.vae.config.scaling_factor)
        self._window = int(self.text_encoder.config.max_position_embeddings)
        # the level is there or not by the version of transformers, and known also while an encoder is freed
        self._text_levels = {
            name: loading.TEXT_LEVEL if hasattr(encoder, "text_model") else ""
            for name, encoder in self.text_encoders().items()
        }
        self._check_channels(source.configs["unet"])
        self.unet = self._load("unet", weights=unet)
        use_attention(attention, self.unet, self.device)
        self._take_turns("unet")
        size = self.unet.config.sample_size or 64  # latents; a pair for models that are not square
        self.resolution = (size if isinstance(size, int) else min(size)) * self.latent_factor

    def _load(self, component: str, *, weights: bool = True) -> Any:
        source = self._sources[component]
        how: dict[str, Any] = {
            "dtype": self._vae_dtype() if component == "vae" else self.dtype,
            "quantize": self.quantize if component == "unet" else None,
            "channels_last": self._channels_last if component == "unet" else False,
        }
        if not (self._weights and weights):
            return loading.bare_module(source, component, **how)
        # what takes turns waits for its first one in the host's memory
        device = HOST if self.offload and component != "unet" else self.device
        return loading.load_module(source, component, device=device, **how)

    def _vae_dtype(self) -> torch.dtype:
        return self.dtype

    def _check_channels(self, unet: Mapping[str, Any]) -> None:
        if unet.get("in_channels", 4) != self.latent_channels:
            raise UserError(
                f"the VAE of {self._sources['vae'].location!r} has {self.latent_channels} latent channels, "
                f"but the UNet takes {unet.get('in_channels', 4)}; choose a VAE made for this family"
            )

    def _encoder(self, component: str) -> Any:
        """A component that may have been freed. Raises RuntimeError if it has been."""
        module = getattr(self, component)
        if module is None:
            name = "VAE" if component == "vae" else component.replace("_", " ")
            raise RuntimeError(f"the {name} was freed; call reload_encoders() first")
        return module

    # --- text ---

    def windows(self, captions: Sequence[str], chunks: int) -> dict[str, Tensor]:
        """Each text encoder's token ids, (B, n, L)."""
        return {
            component: text.windows(tokenizer, list(captions), chunks=chunks, length=self._window)
            for component, tokenizer in zip(self.text_components, self.tokenizers, strict=True)
        }

    def count_tokens(self, text_: str) -> int:
        return max(len(text.token_ids(tokenizer, text_)) for tokenizer in self.tokenizers)

    def cut_words(self, text_: str, chunks: int = 1) -> list[str]:
        room = chunks * (self._window - 2)
        return max((text.cut_words(tokenizer, text_, room) for tokenizer in self.tokenizers), key=len)

    def spans(self, phrases: Sequence[str], target: str, chunks: int = 1) -> Spans:
        """Raises UserError if the text encoders' tokenizers do not agree: their states stand side by side."""
        found = [
            text.spans(tokenizer, phrases, target, chunks=chunks, length=self._window)
            for tokenizer in self.tokenizers
        ]
        if any(spans != found[0] for spans in found[1:]):
            raise UserError(
                f"{self.base_id!r} has tokenizers that split {target!r} or its caption differently: losses "
                "on phrases cannot tell where they stand; take a recipe without them, or CLIP's tokenizers"
            )
        return found[0]

    # --- pictures ---

    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        distribution = self._encoder("vae").encode(pixels.to(self.device, self.dtype)).latent_dist
        return (
            distribution.mean.float() * self.scaling_factor,
            distribution.std.float() * self.scaling_factor,
        )

    def decode(self, latents: Tensor) -> Tensor:
        vae = self._encoder("vae")
        pictures = vae.decode(latents.to(self.device, self.dtype) / self.scaling_factor).sample
        return (pictures.float() / 2 + 0.5).clamp(0, 1)

    # --- adapters and names ---

    def adapter_modules(self, groups: Iterable[str]) -> dict[str, list[str]]:
        """Raises UserError for an unknown group, RuntimeError if a text encoder is wanted while freed."""
        wanted = list(groups)
        for group in wanted:
            if group not in GROUPS:
                hint = nearest(group, GROUPS, phrase="- did you mean {!r}?")
                raise UserError(f"unknown target {group!r}; there are: {', '.join(GROUPS)}{hint}")
        found = {}
        for component in ("unet", *self.text_components):
            if not TARGETS[component].keys().isdisjoint(wanted):
                found[component] = target_modules(component, self._encoder(component), wanted)
        return found

    def file_module_name(self, component: str, module: str) -> str:
        if component == "unet" or module.startswith("text_projection"):
            return module
        return loading.TEXT_LEVEL + module.removeprefix(loading.TEXT_LEVEL)

    def runtime_module_name(self, component: str, module: str) -> str:
        if component == "unet" or module.startswith("text_projection"):
            return module
        return self._text_levels[component] + module.removeprefix(loading.TEXT_LEVEL)

    def base_hash(self) -> str:
        """Of the weights as files hold them, quantised or not."""
        return self._content_hash(tuple(self._sources))

    def latents_key(self) -> str:
        tiled = "/tiled" if self.vae_tiling else ""
        return f"{self._content_hash(('vae',))}/{self._vae_dtype()}/{self.scaling_factor}{tiled}"

    def text_keys(self, captions: Sequence[str], *, clip_skip: int = 1, chunks: int = 1) -> list[str]:
        made_by = f"{self.name}/{self._content_hash(self.text_components)}/{self.dtype}/{clip_skip}/"
        keys = [hashlib.sha256(made_by.encode()) for _ in captions]
        for ids in self.windows(captions, chunks).values():
            for key, row in zip(keys, ids):
                key.update(row.numpy().tobytes())
        return [key.hexdigest() for key in keys]

    def _content_hash(self, components: tuple[str, ...]) -> str:
        if components not in self._hashes:
            places = {name: self._sources[name].weights(name) for name in components}
            self._hashes[components] = fingerprint(places)
        return self._hashes[components]

    # --- memory ---

    def load_unet(self) -> None:
        if self._weights and next(self.unet.parameters()).is_meta:
            self.unet = self._load("unet")
            use_attention(self._attention, self.unet, self.device)
            self._take_turns("unet")

    def reload_encoders(self) -> None:
        for component in self.freed:
            self._reload(component)

    def _reload(self, component: str) -> None:
        setattr(self, component, self._load(component))
        if component == "vae":
            use_attention(self._attention, self.vae, self.device)
            if self.vae_tiling:
                self.vae.enable_tiling()
            if self._vae_slicing:
                self.vae.enable_slicing()
            if self._vae_dtype() != self.dtype:
                widen_inputs(self.vae)
        self._take_turns(component)

    def _take_turns(self, component: str) -> None:
        if self.offload:
            take_turns(self, component)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Family:
        super().to(device, dtype)
        if self.vae is not None and self.vae.dtype != self._vae_dtype():
            self._reload("vae")  # converting it back would not bring its digits back
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass: less memory, about a third more time."""
        self.unet.enable_gradient_checkpointing()
        for encoder in self.text_encoders().values():
            encoder.gradient_checkpointing_enable()
