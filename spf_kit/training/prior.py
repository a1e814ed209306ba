"""Prior pictures: what the frozen base draws for the captions' c_base, or a folder of ready pictures.

Earlier LoRAs (`adapter.on`) are part of the frozen base.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spf_kit.data.dataset import Dataset
from spf_kit.files import atomic
from spf_kit.losses import Prior
from spf_kit.schema import Config

if TYPE_CHECKING:
    from spf_kit.data.cache import Processes
    from spf_kit.families.base import Family

Progress = Callable[[int, int, str], None]
SEED = 1_000_000  # prior pictures have other noise than previews and evaluation


def draw(
    prior: Prior, config: Config, family: Family, prompts: Sequence[str], folder: Path, progress: Progress
) -> None:
    """Draw `prior.count` pictures with captions into `folder`, unless a run before this one has.

    The adapter in training may not be on the family yet. The folder appears whole; it can serve as `path` of
    another run.
    """
    if folder.is_dir():
        return
    from spf_kit.sampling import generate, to_pil

    texts = [prompts[i % len(prompts)] for i in range(prior.count)]
    side = config.data.resolution // config.data.bucket_step * config.data.bucket_step
    pictures = generate(
        family, texts, [SEED + config.train.seed * prior.count + i for i in range(prior.count)],
        steps=prior.steps, cfg=prior.cfg, width=side, height=side, batch_size=config.evaluate.batch_size,
        clip_skip=config.base.clip_skip, chunks=config.data.chunks, progress=progress,
    )  # fmt: skip
    with atomic(folder, folder=True) as temporary:
        for number, (text, picture) in enumerate(zip(texts, to_pil(pictures))):
            picture.save(temporary / f"{number:05d}.png")
            (temporary / f"{number:05d}{config.data.caption_extension}").write_text(text, encoding="utf-8")


def prepare(
    config: Config, family: Family, folder: Path, progress: Progress, processes: Processes | None = None
) -> Dataset:
    """The prior pictures as data: each once an epoch, as they are, captions unshuffled and never dropped."""
    plain = {
        "path": str(folder),
        "flip": False,
        "crop": "center",
        "repeats": 1,
        "shuffle_tags": False,
        "caption_dropout": 0.0,
    }
    data = config.data.model_copy(update=plain)
    return Dataset.prepare(
        data, config.attribute.target, family, clip_skip=config.base.clip_skip, progress=progress,
        processes=processes,
    )  # fmt: skip
