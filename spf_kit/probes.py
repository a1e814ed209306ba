"""What probes hand out: the attention of single layers, and where the parts of a caption stand.

The common vocabulary of families, which fill these, and of plugins, which read them.

Shapes: B samples, h x w latent size, Q pixels of a layer, L token positions, d features, H heads.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Spans:
    """Token positions of a caption's parts, among the L of the text condition. What was cut has none."""

    base: tuple[int, ...]  # of c_base: the same in c_base and in c_full
    phrases: tuple[tuple[int, ...], ...]  # of each phrase of c_base, in order; commas belong to none
    target: tuple[int, ...]  # of c_tar, in c_full


@dataclass(frozen=True)
class LayerProbe:
    """One cross-attention layer in one pass. Gradient flows through it if the pass had one.

    What is kept are the projections that the layer computed anyway; maps are made only when somebody reads
    them, with an explicit softmax, whatever backend the layer itself used.
    """

    name: str
    factor: int  # latent pixels of one of its pixels' side: 1, 2, 4, 8
    size: tuple[int, int]  # (h_l, w_l), Q = h_l w_l
    queries: Tensor  # (B, Q, d), all heads side by side
    keys: Tensor  # (B, L, d)
    heads: int
    scale: float

    @cached_property
    def maps(self) -> Tensor:
        """A: softmax(scale q k^T) over the tokens, mean over heads: (B, Q, L) float32."""
        q, k = (self._by_head(x) for x in (self.queries, self.keys))
        scores = (self.scale * q) @ k.transpose(-1, -2)
        return scores.softmax(dim=-1).mean(dim=1)

    def _by_head(self, x: Tensor) -> Tensor:
        """(B, n, d) to (B, H, n, d / H), at least float32: losses subtract nearly equal maps."""
        return at_least_float32(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def rows(self, index: Tensor) -> LayerProbe:
        """The same layer for some of the samples."""
        return replace(self, queries=self.queries[index], keys=self.keys[index])

    def resize(self, mask: Tensor) -> Tensor:
        """A picture of weights (B, 1, h, w) at this layer's size, averaged: (B, Q, 1)."""
        if mask.shape[2:] != self.size:
            mask = F.interpolate(at_least_float32(mask), self.size, mode="area")
        return mask.flatten(2).transpose(1, 2)

    def factor_in(self, weights: Mapping[str, float]) -> float:
        """This layer's weight in `{pattern: weight}`: of the last pattern that means it, else 1."""
        found = [weight for pattern, weight in weights.items() if matches(self.name, self.factor, [pattern])]
        return found[-1] if found else 1.0

    def picture(self, values: Tensor, size: Sequence[int]) -> Tensor:
        """Values at this layer's pixels, (B, Q) or (B, Q, n), as pictures of another size: (B, n, h, w)."""
        values = values.unsqueeze(-1) if values.ndim == 2 else values
        picture = values.transpose(1, 2).unflatten(-1, self.size)
        return F.interpolate(picture, tuple(size), mode="bilinear", align_corners=False)


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def matches(name: str, factor: int, patterns: Iterable[str]) -> bool:
    """Whether a layer is meant by one of the patterns of a plugin's `layers`.

    "all"; "down", "mid" or "up"; "1/2", the layers whose sides are half of the latents'; or a layer's name,
    where * stands for anything.
    """
    return any(
        pattern == "all"
        or pattern == f"1/{factor}"
        or (pattern in ("down", "mid", "up") and name.startswith(f"{pattern}_block"))
        or fnmatch.fnmatchcase(name, pattern)
        for pattern in patterns
    )


def select(layers: Mapping[str, LayerProbe], patterns: Iterable[str]) -> list[LayerProbe]:
    """The layers that the patterns mean, in the model's order."""
    wanted = list(patterns)
    return [layer for layer in layers.values() if matches(layer.name, layer.factor, wanted)]


def token_mask(positions: Sequence[Sequence[int]], length: int, device: torch.device | str = "cpu") -> Tensor:
    """1 at the token positions of each of B captions, else 0: (B, L) float32."""
    mask = torch.zeros((len(positions), length))
    for row, found in enumerate(positions):
        mask[row, list(found)] = 1.0
    return mask.to(device)
