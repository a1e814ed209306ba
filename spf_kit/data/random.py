"""Random numbers that are keyed, not streamed.

Every draw names what it is for: `randn((4, 64, 64), seed, "noise", step, sample_id)`. The same key gives the
same numbers whatever was drawn before it, in which batch a sample stands, on which device or in how many
processes: an interrupted run continues with the numbers it would have had, and a run on two GPUs sees the
same noise as a run on one. Generators live on the CPU for that reason; move the result.

Normal numbers are drawn in float32 and may differ in the last bit between processors with and without AVX2
(torch has two code paths); integers and uniform numbers do not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor

Key = int | str | bool | None


def key_seed(seed: int, *keys: Key) -> int:
    """A 64-bit seed from SHA-256 of the key: 1 and "1" differ, and ("ab", "c") differs from ("a", "bc")."""
    name = json.dumps([seed, *keys], separators=(",", ":"), ensure_ascii=True)
    return int.from_bytes(hashlib.sha256(name.encode("ascii")).digest()[:8], "big")


def generator(seed: int, *keys: Key) -> torch.Generator:
    """A fresh CPU generator for this key."""
    return torch.Generator("cpu").manual_seed(key_seed(seed, *keys))


def randn(shape: Sequence[int], seed: int, *keys: Key) -> Tensor:
    """Standard normal float32 numbers on the CPU, a function of shape and key alone."""
    return torch.randn(tuple(shape), generator=generator(seed, *keys))


def uniform(seed: int, *keys: Key) -> float:
    """One number in [0, 1)."""
    return float(torch.rand((), generator=generator(seed, *keys), dtype=torch.float64))


def permutation(count: int, seed: int, *keys: Key) -> list[int]:
    """The numbers 0 to count - 1 in a random order."""
    return shuffle(count, generator(seed, *keys))


def shuffle(count: int, source: torch.Generator) -> list[int]:
    """The numbers 0 to count - 1 in an order drawn from `source`."""
    order: list[int] = torch.randperm(count, generator=source).tolist()
    return order
