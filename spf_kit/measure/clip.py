"""A CLIP pair: for the losses that use one, and for the evaluation where no loss did.

Shapes: N texts, B pictures, H x W pixels, pictures (B, 3, H, W) in [0, 1], D embedding features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spf_kit.errors import UserError

if TYPE_CHECKING:
    from spf_kit.data.captions import Caption
    from spf_kit.families.base import Family

CLIP_KEY = "spf_kit.clip"  # in a LoRA's metadata: the fingerprint of the pair that its losses used
LEAK = 0.1  # slope of a loss' pictures outside [0, 1]


def folder_of(family: Family, model: str | Path | None) -> Path | None:
    """Where the CLIP pair for a base lies: `[clip] model`, else the embedded base's own, else nowhere."""
    if model or family.name != "embedded":
        return Path(model) if model else None
    from spf_kit import embedded

    return embedded.base_path() / "clip"


def watching(family: Family, model: str | Path | None) -> ClipPair | None:
    """The pair that looks at drawn pictures, if there is one: on the CPU where the base's modules take turns.

    Raises UserError if it cannot be loaded.
    """
    folder = folder_of(family, model)
    return ClipPair.load(folder, device="cpu" if family.offload else family.device) if folder else None


class ClipPair:
    """A CLIP image and text tower, frozen.

    Embeddings are L2-normalised, a similarity is a cosine in [-1, 1]. Pictures are scaled so that the short
    side fits, cut to the centre square, and normalised as the folder's preprocessor says.
    """

    def __init__(
        self, model: Any, tokenizer: Any, mean: Sequence[float], std: Sequence[float], name: str
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.size = int(model.config.vision_config.image_size)
        self.mean, self.std = (torch.tensor(x).view(3, 1, 1).to(model.device) for x in (mean, std))
        self.name = name
        self._texts: dict[str, Tensor] = {}

    @classmethod
    def load(
        cls, folder: str | Path, *, device: torch.device | str = "cpu", weights: bool = True
    ) -> ClipPair:
        """From a folder as `CLIPModel.save_pretrained` writes it, with tokenizer and preprocessor.

        Without `weights` the model stays on the meta device: shapes and types.
        Raises UserError if it is no such folder.
        """
        from accelerate import init_empty_weights
        from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
        from transformers.utils import logging

        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise UserError(
                f"clip.model = {str(folder)!r} is no folder of a CLIP model (it has no config.json): give "
                "the folder that holds config.json, model.safetensors and the tokenizer"
            )
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            if weights:
                model = CLIPModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
            else:
                with init_empty_weights(include_buffers=False):
                    model = CLIPModel(CLIPConfig.from_pretrained(folder, local_files_only=True)).float()
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"clip.model = {str(folder)!r} is no complete CLIP model: {reason}") from error
        finally:
            if bars:
                logging.enable_progress_bar()
        mean, std = _normalisation(folder)
        return cls(model.to(device if weights else "meta"), tokenizer, mean, std, f"CLIP {folder.name!r}")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights: the same pair in another folder is the same pair."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    # --- for losses: on the pair's device -----------------------------------------------------------------

    def image(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to (B, D) of length 1, differentiable.

        What lies outside [0, 1] is not cut off but pressed to a tenth: CLIP never saw such pixels, yet they
        need a gradient to come back.
        """
        pixels = _square(pictures.to(self.model.device, self.model.dtype), self.size)
        inside = pixels.clamp(0, 1)
        return self._embedded(inside + LEAK * (pixels - inside)).to(pictures.dtype)

    def text(self, texts: Sequence[str]) -> Tensor:
        """N texts to (N, D) of length 1, without gradient. Each text is computed once."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            self._texts |= dict(zip(new, self.embed_texts(new).to(self.model.device)))
        return torch.stack([self._texts[text] for text in texts])

    # --- for the evaluation: any number, on the CPU -------------------------------------------------------

    @torch.no_grad()
    def embed_pictures(self, pictures: Tensor, batch_size: int = 64) -> Tensor:
        """(N, 3, H, W) in [0, 1] to (N, D) of length 1, on the CPU."""
        batches = [batch.to(self.model.device) for batch in pictures.split(batch_size)]
        return torch.cat([self._embedded(_square(b, self.size).clamp(0, 1)).cpu() for b in batches])

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """N texts to (N, D) of length 1, on the CPU; texts beyond the window are cut."""
        window = self.model.config.text_config.max_position_embeddings
        parts = []
        for start in range(0, len(texts), batch_size):
            tokens = self.tokenizer(
                list(texts[start : start + batch_size]), padding="max_length", max_length=window,
                truncation=True, return_tensors="pt",
            ).to(self.model.device)  # fmt: skip
            parts.append(_pooled(self.model.get_text_features(**tokens)).float().cpu())
        return F.normalize(torch.cat(parts), dim=-1)

    def prefers_full(self, pictures: Tensor, captions: Sequence[Caption]) -> list[bool]:
        """Whether each picture is nearer to its c_full than to its c_base."""
        return (self.margins(pictures, captions) > 0).tolist()

    def margins(self, pictures: Tensor, captions: Sequence[Caption]) -> Tensor:
        """cos(picture, c_full) - cos(picture, c_base), (N,) in [-2, 2]."""
        image = self.embed_pictures(pictures)
        full = self.embed_texts([caption.full for caption in captions])
        base = self.embed_texts([caption.base for caption in captions])
        return (image * (full - base)).sum(dim=-1)

    def _embedded(self, pixels: Tensor) -> Tensor:
        """(B, 3, size, size) in [0, 1] to (B, D) of length 1."""
        normal = (pixels - self.mean) / self.std
        return F.normalize(_pooled(self.model.get_image_features(pixel_values=normal)), dim=-1)


def _pooled(features: Any) -> Tensor:
    """transformers 5 hands out the towers' output with the projection as `pooler_output`, 4 the tensor."""
    return features if isinstance(features, Tensor) else features.pooler_output


def _square(pictures: Tensor, size: int) -> Tensor:
    """The short side to `size` pixels (antialiased bicubic, as CLIP's preprocessor), then the middle. A
    little outside [0, 1] at sharp edges: the preprocessor's bytes end there."""
    height, width = pictures.shape[-2:]
    shape = (size * height // min(height, width), size * width // min(height, width))
    if shape != (height, width):
        pictures = F.interpolate(pictures, shape, mode="bicubic", antialias=True)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return pictures[..., top : top + size, left : left + size]


def _normalisation(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    """(mean, std) of the folder's preprocessor; without one, those of OpenAI's CLIP."""
    import json

    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    file = folder / "preprocessor_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return config.get("image_mean", OPENAI_CLIP_MEAN), config.get("image_std", OPENAI_CLIP_STD)
