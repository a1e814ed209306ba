"""Who says what a picture shows: an attribute classifier, a CLIP pair, and plain pixels.

A judge compares one model's pictures with the base's pictures of the same seeds and gives each prompt a
`Verdict`; the shares of response, preservation and leakage follow from these.
No judge may be a model that a loss of the judged LoRA used.

Shapes: N prompts, H x W pixels, pictures (N, 3, H, W) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from spf_kit.measure.clip import ClipPair
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

    Kept are all attributes but the target's and those that the target covers (a winter hat covers hair). What
    cannot be seen in either of two pictures is not compared: dreadlocks fall over a blazer's colour, and the
    classifier, which has to say something, says another colour at the slightest change. A target phrase that
    it does not know is left to the CLIP pair; then the target covers nothing.
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
        seen_asked, seen_plain, seen_base = map(self.judge.read, (model.asked, model.plain, base.plain))
        responds = self._responds(model.asked, captions)
        verdicts = []
        for n in range(len(captions)):
            rest, changed = compared(seen_base[n], seen_asked[n], self.rest)
            leaked = compared(seen_base[n], seen_plain[n], self.judge.attributes)[1]
            verdicts.append(Verdict(responds[n], 1 - len(changed) / max(1, len(rest)), changed, leaked))
        return verdicts

    def _responds(self, asked: Tensor, captions: Sequence[Caption]) -> Sequence[bool | None]:
        if self.target is not None:
            shown: list[bool] = self.judge.shows(asked, self.target).tolist()
            return shown
        if self.clip is not None:
            return self.clip.prefers_full(asked, captions)
        return [None] * len(captions)


def compared(
    base: Mapping[str, str], seen: Mapping[str, str], attributes: Iterable[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which of the attributes can be seen in both pictures, and which of these differ."""
    from spf_kit.embedded.judge import hidden

    # what hides something and came or went has itself changed, and says so
    visible = tuple(a for a in attributes if a not in hidden(base) | hidden(seen))
    return visible, tuple(a for a in visible if base[a] != seen[a])


class ByPixels:
    """For models that no classifier knows. Response: the CLIP pair finds the picture nearer to c_full than to
    c_base. Kept: SSIM outside the quarter of the picture that changed most. Leaked: a plain picture whose
    SSIM to the base's is under 0.9, or in which CLIP sees the target though it does not in the base's."""

    def __init__(self, clip: ClipPair | None = None) -> None:
        self.clip = clip
        self.name = f"pixels and {clip.name}" if clip else "pixels (no CLIP pair: response is not measured)"

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
