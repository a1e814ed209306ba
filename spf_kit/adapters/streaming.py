"""Rewriting a safetensors file block by block on all cores: memory for some blocks, whatever the file's size.

What is not changed is copied by the system, without passing through Python; what is changed goes through a
core's cache once: read, widened, added to, rounded, written.
"""

from __future__ import annotations

import math
import shutil
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

    Raises UserError if a result does not fit its type, a layer is damaged, or there is no room on the disk.
    """
    described = {name: (_type_of(info, dtype), info.shape) for name, info in header.tensors.items()}
    _check_room(header, described, target)
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
        if not part.computed:
            self._transfer.copy(part.start, part.target, part.size)
            return
        name = part.names[0]
        weight = _Weight(self._header.tensors[name], self._transfer, self._own.scratch)
        dtype = self._described[name][0]
        target = _Target(
            self._header.path, name, dtype, part.target, self._transfer, weight, self._own.scratch
        )
        layers = self._changes.get(name, ())
        if sum(4 * change.layer.parameters for change in layers) <= self._held:
            self._by_rows(weight, target, layers)
        else:
            with self._whole:
                self._by_layers(weight, target, layers)

    def _by_rows(self, weight: _Weight, target: _Target, changes: Sequence[Change]) -> None:
        """All layers in memory, one block of the weight after another."""
        layers = [load_layer(change.layer) for change in changes]
        adders = [_Placed.of(layer, change, weight) for layer, change in zip(layers, changes)]
        for rows in row_ranges(weight.shape, layers):
            total = weight.read(rows)
            before = total
            if any(adder.reads_weight for adder in adders):
                before = self._own.scratch("before", total.shape).copy_(total)
            for adder in adders:
                adder.add(total, before, rows, self._own.scratch)
            target.write(total, rows)

    def _by_layers(self, weight: _Weight, target: _Target, changes: Sequence[Change]) -> None:
        """The weight in memory, one layer after another: for any number of LoRAs."""
        whole = torch.empty(weight.shape[0], weight.columns)
        for rows in row_ranges(weight.shape, []):
            whole[rows.start : rows.stop] = weight.read(rows)
        for change in changes:
            self._add(whole, change, weight)
        for rows in row_ranges(weight.shape, []):
            target.write(whole[rows.start : rows.stop], rows)

    def _add(self, whole: Tensor, change: Change, weight: _Weight) -> None:
        """One layer to a weight that is in memory whole; the layer goes when this returns."""
        layer = load_layer(change.layer)
        adder = _Placed.of(layer, change, weight)
        for rows in row_ranges(weight.shape, [layer]):
            total = whole[rows.start : rows.stop]
            adder.add(total, weight.read(rows) if adder.reads_weight else total, rows, self._own.scratch)


class _Weight:
    """A tensor of the source, read by rows into float32."""

    def __init__(self, info: TensorInfo, transfer: Transfer, scratch: Scratch) -> None:
        self._info, self._transfer, self._scratch = info, transfer, scratch
        self.shape = info.shape or (1,)
        self.columns = math.prod(self.shape[1:])

    def read(self, rows: range, name: str = "weight") -> Tensor:
        """(n, k) float32, the scratch of that name."""
        width = self.columns * DTYPES[self._info.dtype].itemsize
        data = self._transfer.read(self._info.start + rows.start * width, len(rows) * width)
        stored = data.view(DTYPES[self._info.dtype]).view(len(rows), self.columns)
        return self._scratch(name, stored.shape).copy_(stored)


class _Placed:
    """An adder for a tensor's rows, or for those of one third of it."""

    def __init__(self, adder: Adder, factor: float, first: int, last: int) -> None:
        self._adder, self._factor, self._first, self._last = adder, factor, first, last
        self.reads_weight = adder.reads_weight

    @classmethod
    def of(cls, layer: Update, change: Change, weight: _Weight) -> _Placed:
        shape, first = weight.shape, 0
        if change.third is not None:
            shape = (shape[0] // 3, *shape[1:])
            first = change.third * shape[0]
        last = first + shape[0]

        def blocks() -> Iterator[tuple[int, Tensor]]:
            for rows in row_ranges(shape, [layer]):
                yield rows.start, weight.read(range(first + rows.start, first + rows.stop))

        return cls(Adder(layer, shape, blocks), change.factor, first, last)

    def add(self, total: Tensor, before: Tensor, rows: range, scratch: Scratch) -> None:
        low, high = max(rows.start, self._first), min(rows.stop, self._last)
        if low < high:
            here = slice(low - rows.start, high - rows.start)
            self._adder.add(total[here], before[here], low - self._first, self._factor, scratch)


class _Target:
    """Where a tensor's rows go, rounded to its type there."""

    def __init__(
        self,
        path: Path,
        name: str,
        dtype: str,
        start: int,
        transfer: Transfer,
        source: _Weight,
        scratch: Scratch,
    ) -> None:
        self._path, self._name, self._dtype = path, name, dtype
        self._start, self._transfer, self._source, self._scratch = start, transfer, source, scratch

    def write(self, total: Tensor, rows: range) -> None:
        """Raises UserError if a value is too large for the type. `total` is (n, k) float32."""
        dtype = DTYPES[self._dtype]
        result, largest = self._scratch("result", total.shape, dtype).copy_(total), torch.finfo(dtype).max
        low, high = torch.aminmax(total) if total.numel() else (0.0, 0.0)
        # the comparisons are false for NaN; what is NaN or infinite in the base stays so
        if not (-largest <= low and high <= largest) and self._overflows(total, result, rows):
            raise UserError(
                f"{str(self._path)!r}: the weight {self._name!r} would become {total.abs().max():.4g}, too "
                f"large for {self._dtype}: lower the LoRA's weight or give --dtype float32"
            )
        self._transfer.write(self._start + rows.start * total.shape[1] * dtype.itemsize, result)

    def _overflows(self, total: Tensor, result: Tensor, rows: range) -> bool:
        if all_finite(result):
            return False
        return all_finite(total) or all_finite(self._source.read(rows, "source"))


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


def _check_room(header: Header, described: Mapping[str, tuple[str, tuple[int, ...]]], target: Path) -> None:
    """A full disk is better told before gigabytes are written."""
    needed = CHUNK + sum(_nbytes(*one) for one in described.values())
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise UserError(
            f"cannot write {str(target.parent)!r}: the result needs {needed / 2**30:.1f} GB, the disk has "
            f"{free / 2**30:.1f} GB left: free some space or choose another place"
        )
