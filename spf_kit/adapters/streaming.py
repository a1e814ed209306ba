"""Rewriting a safetensors file part by part: memory for some blocks, whatever the file's size.

What is not changed is copied by the system, without passing through Python, and before torch is there: its
import takes as long as copying gigabytes. What is changed is `compute`'s. Imports no torch by itself.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from spf_kit.adapters.index import FLOATS, IndexedLayer
from spf_kit.adapters.transfer import Transfer
from spf_kit.errors import UserError
from spf_kit.files import CHUNK
from spf_kit.headers import FLOATING, Header, TensorInfo, encode_header, nbytes


class Change(NamedTuple):
    """A LoRA's layer on the disk and its weight, for a tensor or a third of its rows (OpenCLIP's q, k, v)."""

    layer: IndexedLayer
    factor: float
    third: int | None = None


Progress = Callable[[int, int, str], None]  # done, total, text

COPIED = 16 * 2**20  # bytes that are copied at a time: others may write in between


@dataclass(frozen=True)
class Part:
    """A range of the file that is copied, or one tensor that is computed; the tensors that end with it."""

    start: int  # in the source
    target: int
    size: int  # in the source
    names: Sequence[str]
    computed: bool = False

    @property
    def name(self) -> str:
        """The tensor that is computed."""
        (only,) = self.names
        return only


def rewrite(
    header: Header,
    changes: Mapping[str, Sequence[Change]],
    target: Path,
    *,
    metadata: Mapping[str, str],
    dtype: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Write the file anew: its tensors in their order, `changes` added to some, floating ones as `dtype`.

    Sums are in float32 and rounded once, to the tensor's own type unless `dtype` ("F16") is given. What is
    neither changed nor converted keeps its bytes. As many threads as torch has compute at once, each another
    tensor, and one copies. `progress` hears each tensor's name when it is written.

    Raises UserError if a result does not fit its type or a layer is damaged.
    """
    described = {name: (_type_of(info, dtype), info.shape) for name, info in header.tensors.items()}
    head = encode_header(described, metadata)
    for name in changes:
        _check_computable(header, name)
    parts = list(_parts(header, described, changes, len(head)))
    with open(target, "xb") as file:
        file.write(head)
        file.truncate(len(head) + sum(nbytes(*one) for one in described.values()))
    written = progress or (lambda name: None)
    computed = [part for part in parts if part.computed]
    with ExitStack() as stack:
        transfer = stack.enter_context(Transfer(header.path, target))
        copied = stack.enter_context(Copied(transfer, [part for part in parts if not part.computed]))
        if computed:
            from spf_kit.adapters.compute import Computation

            computation = Computation(header, described, changes, transfer)
            for part in stack.enter_context(closing(computation.all(computed))):
                written(part.name)
                for name in copied.so_far():
                    written(name)
        for name in copied.to_the_end():
            written(name)


class Copied:
    """Parts that a thread of its own copies, as far as it is."""

    def __init__(self, transfer: Transfer, parts: Iterable[Part]) -> None:
        self._transfer, self._parts = transfer, parts
        self._written: deque[str] = deque()
        self._stop, self._pool = threading.Event(), ThreadPoolExecutor(1, "spf-kit-copy")

    def __enter__(self) -> Self:
        self._running = self._pool.submit(self._run)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()

    def so_far(self) -> Iterator[str]:
        """The names of tensors that were copied since the last time. Raises what stopped the copying."""
        if self._running.done():
            self._running.result()
        while self._written:
            yield self._written.popleft()

    def to_the_end(self) -> Iterator[str]:
        """Wait for the others."""
        wait([self._running])
        yield from self.so_far()

    def _run(self) -> None:
        for part in self._parts:
            if self._stop.is_set():
                return
            self._transfer.copy(part.start, part.target, part.size)
            self._transfer.settle(part.target, part.size)
            self._written.extend(part.names)


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
        position += nbytes(dtype, shape)
    if names:
        yield from _copies(start, position - size, size, names)


def _copies(start: int, target: int, size: int, names: Sequence[str]) -> Iterator[Part]:
    """A range in pieces; all its names belong to the last."""
    for offset in range(0, max(size, 1), COPIED):
        last = offset + COPIED >= size
        yield Part(start + offset, target + offset, min(COPIED, size - offset), names if last else ())


def _check_computable(header: Header, name: str) -> None:
    dtype = header.tensors[name].dtype
    if dtype not in FLOATS:
        raise UserError(
            f"{str(header.path)!r} holds {name!r} quantised as {dtype}: merge into the checkpoint that it "
            "was made from"
        )


def _type_of(info: TensorInfo, dtype: str | None) -> str:
    return dtype if dtype is not None and info.dtype in FLOATING else info.dtype


def room_for(header: Header, dtype: str | None) -> int:
    """Bytes of the file that `rewrite` makes, and some for its header."""
    return CHUNK + sum(nbytes(_type_of(info, dtype), info.shape) for info in header.tensors.values())
