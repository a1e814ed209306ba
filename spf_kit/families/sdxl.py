"""Stable Diffusion XL: two text encoders, a pooled text, and how the picture was cut (arXiv 2307.01952).

Shapes: B samples, n chunks of L tokens, D = D_1 + D_2 features of both encoders, P of the projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from spf_kit.families import text
from spf_kit.families.base import Condition
from spf_kit.families.schedulers import make_scheduler
from spf_kit.families.stable_diffusion import StableDiffusionFamily


class SDXLFamily(StableDiffusionFamily):
    """See `Family`. Made by `spf_kit.families.load`.

    Conditions: `encoder_hidden_states` (B, n L, D), the encoders' last layers but one side by side;
    `text_embeds` (B, P), the second encoder's projected embedding; `framing` (B, 6), where known.
    """

    text_components = ("text_encoder", "text_encoder_2")
    text_encoder_2: Any

    @property
    def tokenizer_2(self) -> Any:
        """That of the second text encoder: the same vocabulary, other padding."""
        return self.tokenizers[1]

    def _vae_dtype(self) -> torch.dtype:
        """SDXL's VAE overflows in half precision, unless its config says that it has been mended."""
        mended = self._sources["vae"].configs["vae"].get("force_upcast", True) is False
        return torch.float32 if self.dtype == torch.float16 and not mended else self.dtype

    @property
    def kohya_unet_names(self) -> Literal["diffusers", "sai"]:  # type: ignore[override]
        """SAI's, whose numbers every loader reads for blocks of two layers, as all published models have."""
        layers = self.unet.config.layers_per_block
        sizes = {layers} if isinstance(layers, int) else {*layers}
        return "sai" if sizes == {2} else "diffusers"

    # --- text ---

    def encode_text(self, captions: Sequence[str], *, clip_skip: int = 1, chunks: int = 1) -> Condition:
        """`clip_skip` 1 is the last layer but one, as SDXL was trained: diffusers' pipeline calls that None,
        and 2 what it calls 1."""
        encoders = [self._encoder(component) for component in self.text_components]
        both = [
            text.penultimate(encoder, ids, clip_skip=clip_skip)
            for encoder, ids in zip(encoders, self.windows(captions, chunks).values(), strict=True)
        ]
        states = torch.cat([states for states, _ in both], dim=-1)
        return {"encoder_hidden_states": states, "text_embeds": both[1][1]}

    def negative(self, text: str, condition: Condition) -> Condition:
        """Nothing is zeros rather than an encoded empty text, where the model says so (SDXL's own does)."""
        if not text and self._pipeline_config.get("force_zeros_for_empty_prompt", True):
            return {name: torch.zeros_like(value) for name, value in condition.items()}
        return condition

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """By the second encoder, in the space that it shares with pictures."""
        encoder = self._encoder("text_encoder_2")
        ids = self.windows(texts, chunks=1)["text_encoder_2"].flatten(0, 1)
        pooled = encoder(ids.to(encoder.device)).text_embeds.float()
        return pooled / pooled.norm(dim=-1, keepdim=True)

    # --- the model ---

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """Without `framing` a picture counts as whole and of its own size: (H, W, 0, 0, H, W)."""
        framing = condition.get("framing")
        if framing is None:
            h, w = (side * self.latent_factor for side in noisy_latents.shape[2:])
            framing = torch.tensor([[h, w, 0, 0, h, w]]).expand(len(noisy_latents), -1)
        added = {
            "text_embeds": condition["text_embeds"].to(self.device, self.dtype),
            # float32 in any precision: bfloat16 would round a width of 3001 to 3008
            "time_ids": framing.to(self.device, torch.float32),
        }
        states = condition["encoder_hidden_states"].to(self.device, self.dtype)
        prediction: Tensor = self.unet(
            noisy_latents.to(self.dtype), timesteps, encoder_hidden_states=states, added_cond_kwargs=added
        ).sample
        return prediction.to(noisy_latents.dtype)

    def pipeline(self, scheduler: str = "ddim") -> Any:
        from diffusers import StableDiffusionXLPipeline

        made = make_scheduler(scheduler, self._scheduler_config)  # first: a wrong name must not load encoders
        self.reload_encoders()
        pipeline = StableDiffusionXLPipeline(
            vae=self.vae, text_encoder=self.text_encoder, text_encoder_2=self.text_encoder_2,
            tokenizer=self.tokenizer, tokenizer_2=self.tokenizer_2, unet=self.unet, scheduler=made,
            force_zeros_for_empty_prompt=self._pipeline_config.get("force_zeros_for_empty_prompt", True),
            add_watermarker=False,
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def prompt_arguments(self, condition: Condition, negative: Condition | None) -> dict[str, Tensor | None]:
        return {
            **super().prompt_arguments(condition, negative),
            "pooled_prompt_embeds": condition["text_embeds"],
            "negative_pooled_prompt_embeds": None if negative is None else negative["text_embeds"],
        }
