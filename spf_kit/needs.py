"""What plugins can ask the trainer for. It runs the union of what the active ones need, each thing once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

from torch import Tensor

from spf_kit.errors import UserError

PassName = Literal["reference", "reference_full", "reference_blank", "response", "plain", "blank"]
Decoder = Literal["vae", "linear"]
Path = Literal["whole", "asked", "plain"]

PASSES: Mapping[PassName, tuple[bool, str]] = {
    # name: (adapter on?, caption). Adapter-off passes come first, nothing toggles before the backward.
    "reference": (False, "base"),
    "reference_full": (False, "full"),
    "reference_blank": (False, "blank"),
    "response": (True, "full"),
    "plain": (True, "base"),
    "blank": (True, "blank"),
}


@dataclass(frozen=True)
class Prior:
    """An own batch of pictures of the general class, drawn by the frozen base before the training starts.

    `path` names a folder of ready pictures with captions instead; "" draws them from the captions' c_base.
    """

    count: int = 64
    path: str = ""
    steps: int = 25
    cfg: float = 5.0


@dataclass(frozen=True)
class Needs:
    """What a plugin reads.

    Those with one value for the whole run (`prior`, `picture_masks`, those of the plain path) may be asked
    for by several plugins only with the same value.
    """

    passes: frozenset[PassName] = frozenset({"response"})
    prior: Prior | None = None
    attention: frozenset[tuple[PassName, str]] = frozenset()  # cross-attention: of which pass, which layers
    phrases: bool = False  # `step.spans` and `step.embed`
    clip: bool = False  # `step.clip`: the CLIP pair of `[clip] model`
    decode: frozenset[Decoder] = frozenset()  # `step.decode`
    weights: bool = False  # `step.update_norms`
    picture_masks: str | None = None  # `step.picture_mask`: a folder of mask pictures
    plain_share: float | None = None  # see `Needs.of`
    blank_share: float | None = None  # of the plain samples: "" in place of c_base
    plain_walk: int | None = None  # steps of the base's own way out of noise, whose latents they take

    @classmethod
    def of(cls, *passes: PassName, layers: Iterable[str] = (), **others: Any) -> Needs:
        """Needs of these passes, and in each of them the attention of `layers` (see `probes.matches`).

        With `plain_share` the plugin sees that share of the samples and no other, and finds as `step.plain`
        their adapter-on pass, which takes c_base in place of c_full and so costs nothing. Plugins without it
        see the rest. A `blank_share` of the plain samples has the empty caption, in the reference too. With
        `plain_walk` their noisy latents are the frozen base's own on its way out of noise, in so many steps,
        instead of the data's (see `training.walks`); `step.latents`, `noise` and `target` say nothing there.
        """
        attention = frozenset((name, pattern) for name in passes for pattern in layers)
        if others.get("plain_walk") and not (others.get("plain_share") and "reference" in passes):
            raise ValueError("plain_walk goes with plain_share and the pass reference, whose steps it takes")
        return cls(frozenset(passes), attention=attention, **others)

    @property
    def path(self) -> Path:
        """Which samples the plugin sees: those on the plain path, the others, or without any pass all.

        Mask pictures are of the others too: losses read masks there.
        """
        if self.plain_share is not None:
            return "plain"
        return "asked" if self.passes or self.picture_masks is not None else "whole"

    def __or__(self, other: Needs) -> Needs:
        """What both need. Raises UserError if they ask for one thing with two values."""
        return Needs(
            **{f.name: _both(f.name, *(getattr(n, f.name) for n in (self, other))) for f in fields(Needs)}
        )

    @classmethod
    def nothing(cls) -> Needs:
        return cls(frozenset())


NAMES = {
    "prior": "prior pictures",
    "plain_share": "shares of plain samples",
    "blank_share": "shares of blank captions",
    "plain_walk": "lengths of walks",
    "picture_masks": "mask folders",
}


def _both(name: str, one: Any, other: Any) -> Any:
    if isinstance(one, bool | frozenset):
        return one | other
    if one is not None and other is not None and one != other:
        raise UserError(
            f"two losses need different {NAMES[name]} ({one} and {other}): give them the same settings"
        )
    return other if one is None else one


class Clip(Protocol):
    """A CLIP pair; embeddings are L2-normalised."""

    def image(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to (B, D), differentiable."""

    def text(self, texts: Sequence[str]) -> Tensor:
        """N texts to (N, D), without gradient."""


@dataclass(frozen=True)
class Tools:
    """What the trainer offers beside the passes; each is there only if an active plugin needs it."""

    embed: Callable[[Sequence[str]], Tensor] | None = None
    decode: Callable[[Tensor, Decoder], Tensor] | None = None
    clip: Clip | None = None
    update_norms: Callable[[], Tensor] | None = None
