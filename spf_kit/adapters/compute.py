"""The tensors of a checkpoint that LoRAs change: read, widened, added to, rounded, written.

Each goes through a core's cache once, block by block: memory for some blocks, whatever its size.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spf_kit.adapters.layers import load_layer
from spf_kit.adapters.rows import Adder, row_ranges
from spf_kit.adapters.scratch import Scratch
from spf_kit.adapters.streaming import Change, Part
from spf_kit.adapters.tensors import DTYPES, all_finite, tensor_bytes
from spf_kit.adapters.transfer import Transfer
from spf_kit.adapters.update import Update
from spf_kit.errors import UserError
from spf_kit.headers import Header, nbytes
from spf_kit.parallel import in_order

HELD = 192 * 2**20  # bytes of layers in float32 that all threads hold; what exceeds it is added one by one
WHOLE = 2  # weights that are in memory whole for that, at once


class _Own(threading.local):
    """What each thread has of its own."""

    def __init__(self) -> None:
        self.scratch = Scratch()


class Computation:
    """The tensors that change; what the threads have in common, none of which they change."""

    def __init__(
        self,
        header: Header,
        described: Mapping[str, tuple[str, tuple[int, ...]]],
        changes: Mapping[str, Sequence[Change]],
        transfer: Transfer,
    ) -> None:
        self._header, self._described, self._changes = header, described, changes
        self._transfer, self._own = transfer, _Own()
        self._held, self._whole = HELD // torch.get_num_threads(), threading.Semaphore(WHOLE)

    def all(self, parts: Sequence[Part]) -> Generator[Part, None, None]:
        """Compute and write the parts, on as many threads as torch has; each when it is done, in order."""
        yield from in_order(self._run, parts, max(min(torch.get_num_threads(), len(parts)), 1))

    def _run(self, part: Part) -> Part:
        self._compute(part)
        self._transfer.settle(part.target, nbytes(*self._described[part.name]))
        return part

    def _compute(self, part: Part) -> None:
        changes = self._changes.get(part.name, ())
        needed = sum(4 * change.layer.parameters for change in changes)
        for third in range(3) if any(change.third is not None for change in changes) else (None,):
            rows = self._rows(part, third)
            own = [change for change in changes if change.third == third]
            if needed <= self._held:
                self._all_layers(rows, own)
            else:
                with self._whole:
                    self._one_by_one(rows, own)

    def _rows(self, part: Part, third: int | None) -> _Rows:
        name = part.name
        info, dtype = self._header.tensors[name], self._described[name][0]
        shape, start, target = info.shape or (1,), info.start, part.target
        if third is not None:
            shape = (shape[0] // 3, *shape[1:])
            start += third * nbytes(info.dtype, shape)
            target += third * nbytes(dtype, shape)
        place = f"{str(self._header.path)!r}: the weight {name!r}"
        return _Rows(place, shape, info.dtype, dtype, start, target, self._transfer, self._own.scratch)

    def _all_layers(self, rows: _Rows, changes: Sequence[Change]) -> None:
        """All layers in memory, one block of the weight after another."""
        layers = [load_layer(change.layer) for change in changes]
        adder = self._adder(rows, layers, changes)
        for block in row_ranges(rows.shape, layers):
            rows.write(adder.changed(rows.read(block), block.start, self._own.scratch), block)

    def _one_by_one(self, rows: _Rows, changes: Sequence[Change]) -> None:
        """The weight in memory, one layer after another: for any number of LoRAs."""
        whole = torch.empty(rows.shape[0], rows.columns)
        for block in row_ranges(rows.shape, []):
            whole[block.start : block.stop] = rows.read(block)
        for change in changes:
            self._add(whole, rows, change)
        for block in row_ranges(rows.shape, []):
            rows.write(whole[block.start : block.stop], block)

    def _add(self, whole: Tensor, rows: _Rows, change: Change) -> None:
        """One layer to a weight that is in memory whole; the layer goes when this returns."""
        layers = [load_layer(change.layer)]
        adder = self._adder(rows, layers, [change])
        for block in row_ranges(rows.shape, layers):
            total = whole[block.start : block.stop]
            before = rows.read(block) if adder.reads_weight else total
            adder.add(total, before, block.start, self._own.scratch)

    def _adder(self, rows: _Rows, layers: Sequence[Update], changes: Sequence[Change]) -> Adder:
        def blocks() -> Iterator[tuple[int, Tensor]]:
            for block in row_ranges(rows.shape, layers):
                yield block.start, rows.read(block)

        factors = (change.factor for change in changes)
        return Adder(list(zip(layers, factors, strict=True)), rows.shape, blocks)


@dataclass(frozen=True)
class _Rows:
    """A weight of the source and its place in the target, or a third of it: read and written by rows."""

    name: str  # for sentences
    shape: tuple[int, ...]
    before: str  # the types
    after: str
    start: int  # in the source
    target: int
    transfer: Transfer
    scratch: Scratch

    @property
    def columns(self) -> int:
        return math.prod(self.shape[1:])

    def read(self, block: range, name: str = "weight") -> Tensor:
        """(n, k) float32, the scratch of that name."""
        dtype, shape = DTYPES[self.before], (len(block), self.columns)
        width = self.columns * dtype.itemsize
        data = self.transfer.read(self.start + block.start * width, len(block) * width)
        return self.scratch(name, shape).copy_(torch.frombuffer(data, dtype=dtype).view(shape))

    def write(self, total: Tensor, block: range) -> None:
        """Round (n, k) float32 to the target's type. Raises UserError if a value is too large for it."""
        dtype = DTYPES[self.after]
        result, largest = self.scratch("result", total.shape, dtype).copy_(total), torch.finfo(dtype).max
        low, high = (end.item() for end in torch.aminmax(total)) if total.numel() else (0.0, 0.0)
        # the comparisons are false for NaN; what is NaN or infinite in the base stays so
        if not (-largest <= low and high <= largest) and self._overflows(total, result, block):
            raise UserError(
                f"{self.name} would become {total.abs().max():.4g}, too large for {self.after}: lower the "
                "LoRA's weight or give --dtype float32"
            )
        self.transfer.write(self.target + block.start * self.columns * dtype.itemsize, tensor_bytes(result))

    def _overflows(self, total: Tensor, result: Tensor, block: range) -> bool:
        if all_finite(result):
            return False
        return all_finite(total) or all_finite(self.read(block, "source"))
