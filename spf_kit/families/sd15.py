"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, epsilon or v prediction, 4 latent channels.

2.x ("sd2") reads another text encoder and has other numbers of heads; both are in the configs. The embedded
base is the architecture of 1.5 in small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spf_kit.families import text
from spf_kit.families.base import Condition
from spf_kit.families.schedulers import make_scheduler
from spf_kit.families.stable_diffusion import StableDiffusionFamily, target_modules

__all__ = ["SD15Family", "target_modules"]


class SD15Family(StableDiffusionFamily):
    """See `Family`. Made by `spf_kit.families.load`."""

    # --- text ---

    def encode_text(self, captions: Sequence[str], *, clip_skip: int = 1, chunks: int = 1) -> Condition:
        encoder = self._encoder("text_encoder")
        ids = self.windows(captions, chunks)["text_encoder"]
        return {"encoder_hidden_states": text.hidden_states(encoder, ids, clip_skip=clip_skip)}

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        encoder = self._encoder("text_encoder")
        ids = self.windows(texts, chunks=1)["text_encoder"].flatten(0, 1)
        pooled = encoder(ids.to(encoder.device)).pooler_output.float()
        return pooled / pooled.norm(dim=-1, keepdim=True)

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
