"""Who says what a picture shows: an attribute classifier, a CLIP pair, and plain pixels.

A judge compares one model's pictures with the base's pictures of the same seeds and gives each prompt a
`Verdict`; the shares of response, preservation and leakage follow from these (DESIGN.md, "Evaluation JSON").
No judge may be a model that a loss of the judged LoRA used.

Shapes: N prompts, H x W pixels, pictures (N, 3, H, W) in [0, 1], D embedding features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from spf_kit.errors import UserError
from spf_kit.measure.pixels import outside, ssim

if TYPE_CHECKING:
    from spf_kit.data.captions import Caption
    from spf_kit.embedded.judge import AttributeJudge

SAME = 0.9  # SSIM under which a person notices that a plain picture is not the base's


@dataclass(frozen=True)
class Verdict:
    """What one prompt's two pictures show."""

    responds: bool | None  # the target shows where it was asked for; None: nobody here can tell
    kept: float  # share of the rest that equals the base's picture, in [0, 1]
    changed: tuple[str, ...]  # what of the rest differs in the picture that was asked for the target
    leaked: tuple[str, ...]  # what differs in the plain picture, the target included


@dataclass(frozen=True)
class Pictures:
    """What one model draws from the same seeds, `asked` for c_full and `plain` for c_base, (N, 3, H, W)."""

    asked: Tensor
    plain: Tensor


class Judge(Protocol):
    """Judges one model's pictures beside the untrained base's."""

    name: str

    def __call__(self, model: Pictures, base: Pictures, captions: Sequence[Caption]) -> list[Verdict]:
        """One verdict for each of the N captions."""
        ...


class ByAttributes:
    """The embedded base's own classifier: what people would name in a portrait.

    Kept are all attributes but the target's and those that the target covers (a winter hat covers hair). A
    target phrase that the classifier does not know is left to the CLIP pair; then nothing is covered.
    """

    def __init__(
        self, target: str, clip: ClipPair | None = None, judge: AttributeJudge | None = None
    ) -> None:
        from spf_kit.embedded.judge import COVERED, TARGETS, AttributeJudge

        self.judge = judge or AttributeJudge.load()
        self.target = next((known for known in TARGETS if known.lower() == target.strip().lower()), None)
        self.clip = clip
        self.name = "attribute classifier"
        covered: Sequence[str] = ()
        if self.target is not None:
            covered = (TARGETS[self.target][0], *COVERED[self.target])
        elif clip is not None:
            self.name += f"; response by {clip.name}"
        else:
            self.name += "; nobody judges the response"
        self.rest = [name for name in self.judge.attributes if name not in covered]

    def __call__(self, model: Pictures, base: Pictures, captions: Sequence[Caption]) -> list[Verdict]:
        seen_asked, seen_plain, seen_base = map(self.judge, (model.asked, model.plain, base.plain))
        responds = self._responds(model.asked, captions)
        verdicts = []
        for n in range(len(captions)):
            changed = tuple(a for a in self.rest if seen_asked[a][n] != seen_base[a][n])
            leaked = tuple(a for a in self.judge.attributes if seen_plain[a][n] != seen_base[a][n])
            verdicts.append(Verdict(responds[n], 1 - len(changed) / len(self.rest), changed, leaked))
        return verdicts

    def _responds(self, asked: Tensor, captions: Sequence[Caption]) -> Sequence[bool | None]:
        if self.target is not None:
            shown: list[bool] = self.judge.shows(asked, self.target).tolist()
            return shown
        if self.clip is not None:
            return self.clip.prefers_full(asked, captions)
        return [None] * len(captions)


class ByPixels:
    """For models that no classifier knows. Response: the CLIP pair finds the picture nearer to c_full than to
    c_base. Kept: SSIM outside the quarter of the picture that changed most. Leaked: a plain picture whose
    SSIM to the base's is under 0.9, or in which CLIP sees the target though it does not in the base's."""

    def __init__(self, clip: ClipPair | None = None) -> None:
        self.clip = clip
        self.name = f"pixels and {clip.name}" if clip else "pixels (no CLIP model: response is not measured)"

    def __call__(self, model: Pictures, base: Pictures, captions: Sequence[Caption]) -> list[Verdict]:
        kept = outside(base.plain, model.asked)[0].clamp(0, 1).tolist()
        same = ssim(base.plain, model.plain).tolist()
        responds: Sequence[bool | None] = [None] * len(captions)
        leaks: Sequence[bool] = [False] * len(captions)
        if self.clip is not None:
            responds = self.clip.prefers_full(model.asked, captions)
            now = self.clip.prefers_full(model.plain, captions)
            before = self.clip.prefers_full(base.plain, captions)
            leaks = [shows and not showed for shows, showed in zip(now, before, strict=True)]
        return [
            Verdict(
                responds[n],
                kept[n],
                ("surroundings",) if kept[n] < SAME else (),
                ("picture",) * (same[n] < SAME) + ("target",) * leaks[n],
            )
            for n in range(len(captions))
        ]


class ClipPair:
    """A CLIP image and text tower: which of two texts a picture is nearer to.

    Embeddings are L2-normalised, a similarity is a cosine in [-1, 1]. Pictures are scaled so that the short
    side fits, cut to the centre square, and normalised as the folder's preprocessor says.
    """

    def __init__(
        self, model: Any, tokenizer: Any, mean: Sequence[float], std: Sequence[float], name: str
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.size = int(model.config.vision_config.image_size)
        self.mean, self.std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
        self.name = name

    @classmethod
    def load(cls, folder: str | Path, *, device: torch.device | str = "cpu") -> ClipPair:
        """From a folder as `CLIPModel.save_pretrained` writes it, with tokenizer and preprocessor.

        Raises UserError if it is no such folder.
        """
        from transformers import CLIPModel, CLIPTokenizer
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
            model = CLIPModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"clip.model = {str(folder)!r} is no complete CLIP model: {reason}") from error
        finally:
            if bars:
                logging.enable_progress_bar()
        mean, std = _normalisation(folder)
        return cls(model.to(device), tokenizer, mean, std, f"CLIP {folder.name!r}")

    @torch.no_grad()
    def embed_pictures(self, pictures: Tensor, batch_size: int = 64) -> Tensor:
        """(N, 3, H, W) in [0, 1] to (N, D) of length 1, on the CPU."""
        parts = []
        for batch in pictures.split(batch_size):
            pixels = ((_square(batch, self.size) - self.mean) / self.std).to(self.model.device)
            parts.append(_pooled(self.model.get_image_features(pixel_values=pixels)).float().cpu())
        return F.normalize(torch.cat(parts), dim=-1)

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


def _pooled(features: Any) -> Tensor:
    """transformers 5 hands out the towers' output with the projection as `pooler_output`, 4 the tensor."""
    return features if isinstance(features, Tensor) else features.pooler_output


def _square(pictures: Tensor, size: int) -> Tensor:
    """The short side to `size` pixels (antialiased bicubic, as CLIP's preprocessor), then the middle."""
    height, width = pictures.shape[-2:]
    scale = size / min(height, width)
    shape = (max(size, round(height * scale)), max(size, round(width * scale)))
    if shape != (height, width):
        pictures = F.interpolate(pictures, shape, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return pictures[..., top : top + size, left : left + size]


def _normalisation(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    """(mean, std) of the folder's preprocessor; without one, those of OpenAI's CLIP."""
    import json

    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    file = folder / "preprocessor_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return config.get("image_mean", OPENAI_CLIP_MEAN), config.get("image_std", OPENAI_CLIP_STD)
