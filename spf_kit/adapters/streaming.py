"""Rewriting a safetensors file block by block on all cores: memory for some blocks, whatever the file's size.

What is not changed is copied by the system, without passing through Python; what is changed goes through a
core's cache once: read, widened, added to, rounded, written.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from spf_kit.adapters.index import IndexedLayer
from spf_kit.adapters.layers import load_layer
from spf_kit.adapters.rows import Adder, row_ranges
from spf_kit.adapters.scratch import Scratch
from spf_kit.adapters.tensors import DTYPES, NAMES, all_finite, is_floating
from spf_kit.adapters.transfer import Transfer
from spf_kit.adapters.update import Update
from spf_kit.errors import UserError
from spf_kit.files import CHUNK
from spf_kit.headers import DTYPE_BITS, Header, TensorInfo, encode_header
from spf_kit.parallel import in_order


class Change(NamedTuple):
    """A LoRA's layer on the disk and its weight, for a tensor or a third of its rows (OpenCLIP's q, k, v)."""

    layer: IndexedLayer
    factor: float
    third: int | None = None


Progress = Callable[[int, int, str], None]  # done, total, text

COMPUTABLE = frozenset(("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"))
COPIED = 64 * 2**20  # bytes that one thread copies at a time
HELD = 192 * 2**20  # bytes of layers in float32 that all threads hold; what exceeds it is added one by one
WHOLE = 2  # weights that are in memory whole for that, at once


@dataclass(frozen=True)
class Part:
    """A range of the file that is copied, or one tensor that is computed; the tensors that end with it."""

    start: int  # in the source
    target: int
    size: int  # in the source
    names: Sequence[str]
    computed: bool = False


def rewrite(
    header: Header,
    changes: Mapping[str, Sequence[Change]],
    target: Path,
    *,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Write the file anew: its tensors in their order, `changes` added to some, floating ones as `dtype`.

    Sums are in float32 and rounded once, to the tensor's own type unless `dtype` is given. What is neither
    changed nor converted keeps its bytes. As many threads as torch has work at once, each on another tensor.

    Raises UserError if a result does not fit its type or a layer is damaged.
    """
    described = {name: (_type_of(info, dtype), info.shape) for name, info in header.tensors.items()}
    head = encode_header(described, metadata)
    for name in changes:
        _check_computable(header, name)
    parts = list(_parts(header, described, changes, len(head)))
    with open(target, "xb") as file:
        file.write(head)
        file.truncate(len(head) + sum(_nbytes(*one) for one in described.values()))
    with ExitStack() as stack:
        transfer = stack.enter_context(Transfer(header.path, target))
        lanes = max(min(torch.get_num_threads(), len(parts)), 1)
        rewriter = _Rewriter(header, described, changes, transfer, HELD // lanes)
        done = stack.enter_context(closing(in_order(rewriter.run, parts, lanes)))
        for part, _ in zip(parts, done, strict=True):
            for name in part.names if progress else ():
                progress(name)  # type: ignore[misc]


def _parts(
    header: Header,
    described: Mapping[str, tuple[str, tuple[int, ...]]],
    changes: Mapping[str, Sequence[Change]],
    position: int,
) -> Iterator[Part]:
    """The file's tensors in their order; what lies side by side and keeps its bytes is one range."""
    start, size, names = header.data_start, 0, list[str]()
    for name, info in header.tensors.items():
        dtype, shape = described[name]
        computed = name in changes or dtype != info.dtype
        if size and (computed or size + info.nbytes > COPIED):
            yield from _copies(start, position - size, size, names)
            start, size, names = info.start, 0, []
        if computed:
            yield Part(info.start, position, info.nbytes, [name], computed=True)
            start = info.end
        else:
            size += info.nbytes
            names.append(name)
        position += _nbytes(dtype, shape)
    if names:
        yield from _copies(start, position - size, size, names)


def _copies(start: int, target: int, size: int, names: Sequence[str]) -> Iterator[Part]:
    """A range in pieces; all its names belong to the last."""
    for offset in range(0, max(size, 1), COPIED):
        last = offset + COPIED >= size
        yield Part(start + offset, target + offset, min(COPIED, size - offset), names if last else ())


class _Own(threading.local):
    """What each thread has of its own."""

    def __init__(self) -> None:
        self.scratch = Scratch()


class _Rewriter:
    """What the threads have in common, none of which they change."""

    def __init__(
        self,
        header: Header,
        described: Mapping[str, tuple[str, tuple[int, ...]]],
        changes: Mapping[str, Sequence[Change]],
        transfer: Transfer,
        held: int,
    ) -> None:
        self._header, self._described, self._changes = header, described, changes
        self._transfer, self._held, self._whole = transfer, held, threading.Semaphore(WHOLE)
        self._own = _Own()

    def run(self, part: Part) -> None:
        if part.computed:
            self._compute(part)
            size = _nbytes(*self._described[part.names[0]])
        else:
            self._transfer.copy(part.start, part.target, part.size)
            size = part.size
        self._transfer.settle(part.target, size)

    def _compute(self, part: Part) -> None:
        changes = self._changes.get(part.names[0], ())
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
        name = part.names[0]
        info, dtype = self._header.tensors[name], self._described[name][0]
        shape, start, target = info.shape or (1,), info.start, part.target
        if third is not None:
            shape = (shape[0] // 3, *shape[1:])
            start += third * _nbytes(info.dtype, shape)
            target += third * _nbytes(dtype, shape)
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
        return self.scratch(name, shape).copy_(data.view(dtype).view(shape))

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
        self.transfer.write(self.target + block.start * self.columns * dtype.itemsize, result)

    def _overflows(self, total: Tensor, result: Tensor, block: range) -> bool:
        if all_finite(result):
            return False
        return all_finite(total) or all_finite(self.read(block, "source"))


def _check_computable(header: Header, name: str) -> None:
    dtype = header.tensors[name].dtype
    if dtype not in COMPUTABLE:
        raise UserError(
            f"{str(header.path)!r} holds {name!r} quantised as {dtype}: merge into the checkpoint that it "
            "was made from"
        )


def _type_of(info: TensorInfo, dtype: torch.dtype | None) -> str:
    return NAMES[dtype] if dtype is not None and is_floating(info.dtype) else info.dtype


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def room_for(header: Header, dtype: torch.dtype | None) -> int:
    """Bytes of the file that `rewrite` makes, and some for its header."""
    return CHUNK + sum(_nbytes(_type_of(info, dtype), info.shape) for info in header.tensors.values())
