"""How strong a LoRA should be: the smallest strength at which it shows nearly all that it has learnt.

Nothing in a training says that strength 1 is the right one. What is learnt in a third of the run is taught to
its end, and pollutes and leaks with strength that nobody asked for; what is learnt slowly wants more. So the
finished LoRA draws the same prompts, asked for the target, from the same seeds at several strengths s, and a
CLIP pair says how much nearer the pictures come to what was asked for:

    margin_i(s) = cos(picture_i, c_full) - cos(picture_i, c_base)
    gain(s)     = mean_i margin_i(s) - margin_i(0)
    response(s) = share of the i with margin_i(s) > 0
    chosen      = the smallest s with response(s) >= 0.98 max_s response(s)
                                  and gain(s) >= keep * max_s gain(s)

0 is the base, earlier LoRAs included. The share says whether the pictures show it; where it is full at once,
because a pair prefers the longer text whatever it sees, the mean still tells strengths apart. Our own
addition; the paper has nothing of it.

Shapes: N prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from spf_kit.measure.clip import watching
from spf_kit.measure.evaluate import SAMPLER, captions_of, prompts_of

if TYPE_CHECKING:
    from spf_kit import schema
    from spf_kit.adapters.inject import AdapterHandle
    from spf_kit.families.base import Family
    from spf_kit.measure.rows import Progress


ALL_BUT = 0.98  # of the largest share of pictures that show the target


@dataclass(frozen=True)
class Answer:
    """What one strength draws."""

    strength: float
    gain: float  # mean margin beyond the base's, in [-4, 4]
    error: float  # the gain's standard error over the prompts; 0 for a single one
    response_clip: float  # share of the pictures that CLIP finds nearer to c_full, in [0, 1]


@dataclass(frozen=True)
class Calibration:
    """The strengths that were tried, and the one that the LoRA gets."""

    answers: tuple[Answer, ...]  # from the weakest on
    keep: float
    count: int  # prompts
    clip: str  # fingerprint of the pair

    @property
    def most(self) -> Answer:
        return max(self.answers, key=lambda answer: answer.gain)

    @property
    def learnt(self) -> bool:
        """False where CLIP sees the target in no picture, or no more of it at any strength than in the base's
        pictures, chance apart."""
        shown = any(answer.response_clip > 0 for answer in self.answers)
        return shown and self.most.gain > 2 * self.most.error

    @property
    def chosen(self) -> Answer:
        """Raises ValueError if nothing was learnt."""
        if not self.learnt:
            raise ValueError("no strength shows the target")
        share = ALL_BUT * max(answer.response_clip for answer in self.answers)
        fitting = (
            a for a in self.answers if a.response_clip >= share and a.gain >= self.keep * self.most.gain
        )
        return next(fitting, self.most)

    def as_dict(self) -> dict[str, Any]:
        """JSON: of the LoRA's metadata and of the command's result."""
        return {
            "chosen": self.chosen.strength if self.learnt else None,
            "keep": self.keep,
            "count": self.count,
            "clip": self.clip,
            "curve": [asdict(answer) for answer in self.answers],
        }

    def sentence(self) -> str:
        """For people."""
        grid = ", ".join(f"{answer.strength:g}" for answer in self.answers)
        if not self.learnt:
            return (
                f"CLIP sees no picture of the target, or no more of it than in the base's, at {grid}: the "
                "LoRA keeps the strength that it was trained at; train for longer, or look at its pictures"
            )
        most = max(answer.response_clip for answer in self.answers)
        last = self.chosen is self.answers[-1]
        return (
            f"strength: {self.chosen.strength:g} of what was trained suffices (CLIP sees the target in "
            f"{self.chosen.response_clip:.0%} of {self.count} pictures, in {most:.0%} at most at {grid}); in "
            "the file that is strength 1" + "; longer training may show more" * last
        )


def calibrate(
    family: Family,
    handle: AdapterHandle,
    config: schema.Calibrate,
    target: str,
    *,
    clip: str | None = None,
    captions: Sequence[str] = (),
    clip_skip: int = 1,
    chunks: int = 1,
    batch_size: int = 16,
    scheduler: str = SAMPLER,
    progress: Progress | None = None,
) -> Calibration | None:
    """Draw at every strength of `config` and compare; None where there is no CLIP pair.

    Args:
        handle: the LoRA on the family; on, and at the strength that it had, when this returns.
        target: c_tar, what is asked for.
        clip: folder of a CLIP pair; the embedded base brings its own.
        captions: of the training data; give the prompts where neither `config` nor the base has any.
        clip_skip, chunks, batch_size, scheduler: as `generate` takes them.
        progress: called as (pictures done, pictures, what).

    Raises UserError if there are no prompts, or the pair cannot be loaded.
    """
    pair = watching(family, clip)
    if pair is None:
        return None
    family.reload_encoders()
    texts = prompts_of(family, config.prompts, captions, "tune", key="calibrate.prompts")
    cases = captions_of(family, texts, target, config.count, chunks)
    seeds = [config.seed + n for n in range(config.count)]
    strengths = sorted(set(config.strengths))

    def margins(number: int, what: str) -> Tensor:
        """(N,)"""
        from spf_kit.sampling import generate

        def tell(done: int, total: int, text: str) -> None:
            if progress:
                progress(number * total + done, (1 + len(strengths)) * total, what)

        pictures = generate(
            family, [case.full for case in cases], seeds, steps=config.steps, cfg=config.cfg,
            scheduler=scheduler, clip_skip=clip_skip, chunks=chunks, batch_size=batch_size,
            progress=tell,
        )  # fmt: skip
        return pair.margins(pictures, cases)

    before = handle.strength
    with handle.disabled():
        base = margins(0, "base")
    answers = []
    try:
        handle.on()
        for number, strength in enumerate(strengths, start=1):
            handle.set_strength(strength)
            found = margins(number, f"strength {strength:g}")
            answers.append(_answer(strength, found, base))
    finally:
        handle.set_strength(before)
    return Calibration(tuple(answers), config.keep, config.count, pair.fingerprint)


def _answer(strength: float, margins: Tensor, base: Tensor) -> Answer:
    gains = (margins - base).double()
    error = float(gains.std() / len(gains) ** 0.5) if len(gains) > 1 else 0.0
    return Answer(strength, float(gains.mean()), error, float((margins > 0).double().mean()))
