"""Live memory of tensors while code runs: every storage from its allocation until nothing refers to it.

    with Tracker() as tracker:
        with tracker.part("activations"):
            loss = model(x)
        loss.backward()
    tracker.peak.parts       # {"activations": ...}: bytes at the moment when the sum was largest

Works on real tensors and on those of a FakeTensorMode (enter that one first). What an operation allocates and
frees within itself (workspaces of convolutions) is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LITERAL = torch.ops.aten.lift_fresh.default  # of `torch.tensor(...)`: numbers of the host's


@dataclass
class _Block:
    """One storage that is alive."""

    size: int  # bytes, rounded as the allocator does
    part: str
    alive: Any  # the weak reference that tells when it dies


@dataclass(frozen=True)
class Peak:
    """The moment at which most was alive."""

    total: int = 0  # bytes
    parts: dict[str, int] = field(default_factory=dict)  # bytes by part; they add up to `total`


class Tracker(TorchDispatchMode):
    """Follows the storages that operations return. Views and in-place results count once.

    Autograd keeps what it saved for the backward pass alive, so that this needs no rule of its own; neither
    do gradient checkpointing and what it computes again.
    """

    def __init__(self, granule: int = 1) -> None:
        """`granule`: bytes in whose multiples the allocator hands out memory."""
        super().__init__()
        self.granule = granule
        self.current = "activations"
        self.total = 0  # bytes alive
        self.parts: dict[str, int] = {}
        self.peak = Peak()
        self._blocks: dict[int, _Block] = {}

    # --- what the caller says -----------------------------------------------------------------------------

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is allocated within the block belongs to this part; an inner block wins."""
        before, self.current = self.current, name
        try:
            yield
        finally:
            self.current = before

    def hold(self, tensors: Iterable[Tensor], part: str) -> None:
        """Count tensors that were there before; those that are followed already change their part."""
        for tensor in tensors:
            block = self._blocks.get(tensor.untyped_storage()._cdata)
            if block is None:
                self._allocate(tensor, part)
            else:
                self._count(block.part, -block.size)
                block.part = part
                self._count(part, block.size)

    def reset_peak(self) -> None:
        """Forget what was; what is alive now is the least that the next peak can be."""
        self.peak = Peak(self.total, dict(self.parts))

    # --- what torch says ----------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self.compute(func, types, args, kwargs or {})
        if func is LITERAL:
            return result
        new = [t for t in tensors(result) if t.untyped_storage()._cdata not in self._blocks]
        if new:
            # what came in and is not followed was there before (inputs on the host); its views are not new
            given = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
            for tensor in new:
                storage = tensor.untyped_storage()._cdata
                if storage not in given and storage not in self._blocks:
                    self._allocate(tensor, self.current)
        return result

    def compute(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """The operation itself."""
        return func(*args, **kwargs)

    def _allocate(self, tensor: Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // self.granule) * self.granule
        self._blocks[key] = _Block(size, part, weakref.ref(storage, partial(self._free, key)))
        self._count(part, size)
        if self.total > self.peak.total:
            self.peak = Peak(self.total, dict(self.parts))

    def _free(self, key: int, _: Any) -> None:
        block = self._blocks.pop(key)
        self._count(block.part, -block.size)

    def _count(self, part: str, size: int) -> None:
        self.total += size
        self.parts[part] = self.parts.get(part, 0) + size


def tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from tensors(value)
