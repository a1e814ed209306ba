"""Pictures during the run: the same prompts and seeds every time, asked for the attribute and not, and where
the masks of the run act on them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from spf_kit.data.captions import Caption, derive
from spf_kit.files import atomic
from spf_kit.losses import Mask
from spf_kit.schema import Config
from spf_kit.training import overlays
from spf_kit.training.records import Case, PreviewRecord, attempt, data_url, veil
from spf_kit.training.records import Map as KeptMap

if TYPE_CHECKING:
    from torch import Tensor

    from spf_kit.families.base import Family
    from spf_kit.training.step import Model

Progress = Callable[[int, int, str], None]


class Drawn(NamedTuple):
    """A preview: its file, that picture's pixels (H, W, 3) uint8, and its parts, encoded when they are asked
    for: only the report wants them, and a run must not fail for want of an encoder."""

    path: Path
    pixels: Any
    record: Callable[[], PreviewRecord]


@dataclass(frozen=True)
class Preview:
    """Draws `samples/step-000200.png`: a column for each prompt, a row with the target, one without, and one
    for each mask over the pictures with the target."""

    config: Config
    model: Model
    prompts: Sequence[str]  # c_base
    masks: Sequence[Mask] = ()
    warn: Callable[[str], None] = field(default=lambda sentence: None)

    @property
    def family(self) -> Family:
        return self.model.family

    def due(self, step: int) -> bool:
        every = self.config.preview.every
        return bool(every and self.prompts) and step % every == 0

    def draw(self, folder: Path, step: int, progress: Progress) -> Drawn:
        """Draw and save with the weights as they are.

        An encoder that had been freed is freed again.
        """
        import numpy as np

        from spf_kit.sampling import to_pil
        from spf_kit.sampling.contact_sheet import sheet

        settings, target, seeds = self.config.preview, self.config.attribute.target, self._seeds
        freed = self.family.freed
        try:
            pictures = self._generate(progress)
            masks, others = self._maps(pictures[: len(seeds)])
        finally:
            self.family.free_encoders(freed)
        shown = masks + [m for m in others if m.kind == "phrase" and settings.phrases and masks]
        lit = {m.label: overlays.lit(pictures[: len(seeds)], m.values) for m in shown}
        drawn = to_pil(pictures)
        picture = sheet(
            [drawn[: len(seeds)], drawn[len(seeds) :], *(to_pil(row) for row in lit.values())],
            row_labels=[target, f"without: {target}", *lit],
            column_labels=self._bases,
            title=f"{self.config.attribute.name}, step {step}",
            note=f"seeds {seeds[0]} to {seeds[-1]}, {settings.steps} steps, guidance {settings.cfg:g}",
        )
        path = folder / f"step-{step:06d}.png"
        with atomic(path) as temporary:
            picture.save(temporary)
        record = functools.partial(self._record, step, drawn, masks + others)
        return Drawn(path, np.asarray(picture.convert("RGB")), record)

    def of_base(self, progress: Progress) -> PreviewRecord:
        """The same prompts and seeds with the adapter off: what the base model draws."""
        from spf_kit.sampling import to_pil

        freed = self.family.freed
        try:
            with self.model.frozen():
                pictures = self._generate(progress)
        finally:
            self.family.free_encoders(freed)
        return self._record(0, to_pil(pictures), [])

    @property
    def _bases(self) -> list[str]:
        return list(self.prompts[: self.config.preview.count])

    @property
    def _captions(self) -> list[Caption]:
        return [derive(base, self.config.attribute.target) for base in self._bases]

    @property
    def _seeds(self) -> list[int]:
        return [self.config.preview.seed + i for i in range(len(self._bases))]

    def _generate(self, progress: Progress) -> Tensor:
        """Asked, then not asked: (2N, 3, H, W)."""
        from spf_kit.sampling import generate

        settings, target = self.config.preview, self.config.attribute.target
        full = [f"{base}, {target}" if base else target for base in self._bases]
        return generate(
            self.family, [*full, *self._bases], self._seeds * 2, steps=settings.steps, cfg=settings.cfg,
            clip_skip=self.config.base.clip_skip, chunks=self.config.data.chunks,
            batch_size=self.config.evaluate.batch_size, progress=progress,
        )  # fmt: skip

    def _maps(self, pictures: Tensor) -> tuple[list[overlays.Map], list[overlays.Map]]:
        """Those of the run's masks, which the preview promises, and those that help to understand it."""
        about = self.model, self.config, pictures, self._captions, self._seeds
        chosen = overlays.drawable(self.masks)
        found = overlays.of_masks(overlays.scene(*about), chosen) if chosen else []
        others: list[overlays.Map] = []
        attempt(
            "attention and changes could not be mapped",
            lambda: others.extend(overlays.acting(*about)),
            self.warn,
        )
        return found, others

    def _record(self, step: int, drawn: Sequence[Any], maps: Sequence[overlays.Map]) -> PreviewRecord:
        settings, captions = self.config.preview, self._captions
        cases = [
            Case(
                prompt=self._bases[n],
                seed=seed,
                asked=data_url(drawn[n]),
                plain=data_url(drawn[len(captions) + n]),
                maps=[
                    KeptMap(label=label, kind=m.kind, picture=veil(m.values[n, 0].float().cpu()))
                    for m in maps
                    if (label := _label(m, caption))
                ],
            )
            for n, (caption, seed) in enumerate(zip(captions, self._seeds))
        ]
        return PreviewRecord(
            step=step,
            target=self.config.attribute.target,
            steps=settings.steps,
            cfg=settings.cfg,
            cases=cases,
        )


def _label(shown: overlays.Map, caption: Caption) -> str:
    """A phrase's map is named by the phrase itself; "" where the caption has no such phrase."""
    if shown.phrase is None:
        return shown.label
    return caption.phrases[shown.phrase] if shown.phrase < len(caption.phrases) else ""
