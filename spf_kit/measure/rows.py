"""One model's row of the evaluation: pictures drawn, judged, and added up over the prompts.

Shapes: N prompts, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spf_kit.measure.drift import Probe
from spf_kit.measure.judges import ClipPair, Judge, Pictures
from spf_kit.measure.pixels import mae, outside, ssim
from spf_kit.sampling import generate

if TYPE_CHECKING:
    from torch import Tensor

    from spf_kit import schema
    from spf_kit.data.captions import Caption
    from spf_kit.families.base import Family

Row = dict[str, Any]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Setup:
    """What does not depend on the model that is measured."""

    family: Family
    captions: list[Caption]
    seeds: list[int]
    config: schema.Evaluate
    judge: Judge
    clip: ClipPair | None
    clip_skip: int
    chunks: int
    scheduler: str

    def draw(self, progress: Progress | None) -> Pictures:
        """Pictures of the model as it is now, adapters as they are: c_full and c_base in one go."""
        texts = [c.full for c in self.captions] + [c.base for c in self.captions]
        return Pictures(*self._drawn(texts, self.seeds * 2, progress).chunk(2))

    def asked(self, progress: Progress | None) -> Tensor:
        """Those of c_full alone, (N, 3, H, W)."""
        return self._drawn([c.full for c in self.captions], self.seeds, progress)

    def _drawn(self, texts: list[str], seeds: list[int], progress: Progress | None) -> Tensor:
        return generate(
            self.family, texts, seeds, steps=self.config.steps, cfg=self.config.cfg,
            scheduler=self.scheduler, clip_skip=self.clip_skip, chunks=self.chunks,
            batch_size=self.config.batch_size, progress=progress,
        )  # fmt: skip

    def probes(self, base: Pictures) -> tuple[Probe, Probe]:
        """For drift without and with the target, each on the base's pictures of those prompts."""
        settings = {
            "clip_skip": self.clip_skip, "chunks": self.chunks, "batch_size": 2 * self.config.batch_size,
        }  # fmt: skip
        plain = Probe(self.family, base.plain, [c.base for c in self.captions], self.seeds, **settings)
        asked = Probe(self.family, base.asked, [c.full for c in self.captions], self.seeds, **settings)
        return plain, asked

    def described(self) -> dict[str, Any]:
        """The settings that every row repeats, so that it can stand alone."""
        return {
            "target": self.captions[0].target,
            "prompts": [c.base for c in self.captions],
            "seeds": self.seeds,
            "sampler": self.scheduler,
            "steps": self.config.steps,
            "guidance": self.config.cfg,
            "clip_skip": self.clip_skip,
            "judge": self.judge.name,
            "clip": self.clip.name if self.clip else None,
        }


def row_of(
    setup: Setup, model: Pictures, base: Pictures, drift: tuple[Sequence[float], Sequence[float]]
) -> Row:
    """One model's numbers: the shares over the prompts, and what each prompt gave."""
    verdicts = setup.judge(model, base, setup.captions)
    ssim_outside, mae_outside = (values.tolist() for values in outside(base.plain, model.asked))
    ssim_plain, mae_plain = ssim(base.plain, model.plain).tolist(), mae(base.plain, model.plain).tolist()
    margins = setup.clip.margins(model.asked, setup.captions).tolist() if setup.clip else None
    per_prompt = [
        {
            "prompt": caption.base,
            "seed": setup.seeds[n],
            "responds": verdicts[n].responds,
            "kept": verdicts[n].kept,
            "changed": list(verdicts[n].changed),
            "leaked": list(verdicts[n].leaked),
            "clip_margin": margins[n] if margins else None,
            "ssim_outside": ssim_outside[n],
            "mae_outside": mae_outside[n],
            "ssim_plain": ssim_plain[n],
            "mae_plain": mae_plain[n],
            "drift_plain": drift[0][n],
            "drift_target": drift[1][n],
        }
        for n, caption in enumerate(setup.captions)
    ]
    measured = ("ssim_outside", "mae_outside", "ssim_plain", "mae_plain", "drift_plain", "drift_target")
    return {
        "response": _share([v.responds for v in verdicts]),
        "preservation": _mean([v.kept for v in verdicts]),
        "leakage": _share([bool(v.leaked) for v in verdicts]),
        **{key: _mean([prompt[key] for prompt in per_prompt]) for key in measured},
        "response_clip": _share([margin > 0 for margin in margins]) if margins else None,
        "changed": _counts([v.changed for v in verdicts]),
        "leaked": _counts([v.leaked for v in verdicts]),
        **setup.described(),
        "per_prompt": per_prompt,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _share(values: Sequence[bool | None]) -> float | None:
    """Share of true ones; None where nobody could judge."""
    return None if any(value is None for value in values) else sum(map(bool, values)) / len(values)


def _counts(lists: Sequence[Sequence[str]]) -> dict[str, float]:
    """Share of the prompts in which each thing occurs, most frequent first: what pollution consists of."""
    names = [name for names in lists for name in names]
    shares = {name: names.count(name) / len(lists) for name in dict.fromkeys(names)}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def summary(row: Row) -> Row:
    """A row without its lists: what goes into a LoRA's metadata and beside a table."""
    return {key: value for key, value in row.items() if not isinstance(value, list | dict)} | {
        "count": len(row["prompts"])
    }
