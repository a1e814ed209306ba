"""Pictures during the run: the same prompts and seeds every time, asked for the attribute and not, and where
the masks of the run act on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spf_kit.data.captions import derive
from spf_kit.files import atomic
from spf_kit.losses import Mask
from spf_kit.schema import Config
from spf_kit.training.overlays import overlays

if TYPE_CHECKING:
    from spf_kit.families.base import Family
    from spf_kit.training.step import Model

Progress = Callable[[int, int, str], None]
BATCH = 16


@dataclass(frozen=True)
class Preview:
    """Draws `samples/step-000200.png`: a column for each prompt, a row with the target, one without, and one
    for each mask over the pictures with the target."""

    config: Config
    model: Model
    prompts: Sequence[str]  # c_base
    masks: Sequence[Mask] = ()

    @property
    def family(self) -> Family:
        return self.model.family

    def due(self, step: int) -> bool:
        every = self.config.preview.every
        return bool(every and self.prompts) and step % every == 0

    def draw(self, folder: Path, step: int, progress: Progress) -> tuple[Path, Any]:
        """Draw and save with the weights as they are. Returns the file and its pixels, (H, W, 3) uint8.

        An encoder that had been freed is freed again.
        """
        import numpy as np

        from spf_kit.sampling import generate, to_pil
        from spf_kit.sampling.contact_sheet import sheet

        settings, target = self.config.preview, self.config.attribute.target
        bases = list(self.prompts[: settings.count])
        full = [f"{base}, {target}" if base else target for base in bases]
        seeds = [settings.seed + i for i in range(len(bases))]
        freed = self.family.freed
        try:
            pictures = generate(
                self.family, [*full, *bases], [*seeds, *seeds], steps=settings.steps, cfg=settings.cfg,
                clip_skip=self.config.base.clip_skip, chunks=self.config.data.chunks, batch_size=BATCH,
                progress=progress,
            )  # fmt: skip
            captions = [derive(base, target) for base in bases]
            lit = overlays(self.model, self.masks, self.config, pictures[: len(bases)], captions, seeds)
        finally:
            self.family.free_encoders(freed)
        drawn = to_pil(pictures)
        picture = sheet(
            [drawn[: len(bases)], drawn[len(bases) :], *(to_pil(row) for row in lit.values())],
            row_labels=[target, f"without: {target}", *lit],
            column_labels=bases,
            title=f"{self.config.attribute.name}, step {step}",
            note=f"seeds {seeds[0]} to {seeds[-1]}, {settings.steps} steps, guidance {settings.cfg:g}",
        )
        path = folder / f"step-{step:06d}.png"
        with atomic(path) as temporary:
            picture.save(temporary)
        return path, np.asarray(picture.convert("RGB"))
