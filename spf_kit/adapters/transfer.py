"""Bytes between two files, by several threads: read into a buffer that is used again, written, or copied."""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from contextlib import suppress
from mmap import mmap
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from spf_kit.errors import UserError
from spf_kit.files import CHUNK

# the system cannot copy between these files itself
_NO_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM)

CACHED = 512 * 2**20  # bytes of the target that the system may still hold when it is told to forget them


class Transfer:
    """From `source` to `target`, both of which exist. Each thread has its own handles and its own buffer.

    One thread writes at a time: the system lets only one into a file, and the others would not sleep until
    their turn but spin, on cores that have weights to compute.
    """

    def __init__(self, source: Path, target: Path) -> None:
        self._paths = source, target
        self._local, self._writing, self._settling = threading.local(), threading.Lock(), threading.Lock()
        self._settled, self._cached = deque[tuple[int, int]](), 0
        self._opened: list[BinaryIO] = []
        self._system_copies = hasattr(os, "copy_file_range")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._opened:
            file.close()

    def read(self, start: int, size: int) -> memoryview:
        """`size` bytes of the source: this thread's buffer, the same one at the next call."""
        source, _ = self._files()
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < size:
            # pages of its own, not of the heap: their address suits every type
            buffer = self._local.buffer = memoryview(mmap(-1, max(size, 1)))
        part = buffer[:size]
        source.seek(start)
        position = 0
        while position < size:
            count = source.readinto(part[position:])  # type: ignore[attr-defined]
            if not count:
                raise self._shorter()
            position += count
        return part

    def write(self, start: int, data: memoryview) -> None:
        """Bytes to the target."""
        _, target = self._files()
        target.seek(start)
        with self._writing:
            while data:
                data = data[target.write(data) :]

    def copy(self, start: int, to: int, size: int) -> None:
        """A range of the source to the target, without passing through this process where the system can."""
        source, target = self._files()
        while size and self._system_copies:
            try:
                with self._writing:
                    count = os.copy_file_range(source.fileno(), target.fileno(), size, start, to)
            except OSError as error:
                if error.errno not in _NO_COPY:
                    raise
                self._system_copies = False
                break
            if not count:
                raise self._shorter()
            start, to, size = start + count, to + count, size - count
        while size:
            part = self.read(start, min(CHUNK, size))
            self.write(to, part)
            start, to, size = start + len(part), to + len(part), size - len(part)

    def settle(self, start: int, size: int) -> None:
        """Have the system write a range of the target to the disk now, beside what comes next, and forget
        what it has written: the memory serves again, where other memory would have to be found first."""
        if not (size and hasattr(os, "posix_fadvise")):  # advice on no bytes is on all to the end
            return
        ranges = [(start, size)]
        with self._settling:
            self._settled.append((start, size))
            self._cached += size
            while self._cached > CACHED:
                ranges.append(self._settled.popleft())
                self._cached -= ranges[-1][1]
        for start, size in ranges:
            with suppress(OSError):  # a file system that takes no advice
                # Linux begins to write what is not on the disk yet, and forgets what is
                os.posix_fadvise(self._files()[1].fileno(), start, size, os.POSIX_FADV_DONTNEED)

    def _files(self) -> tuple[BinaryIO, BinaryIO]:
        if not hasattr(self._local, "files"):
            source, target = self._paths
            self._local.files = source.open("rb", buffering=0), target.open("r+b", buffering=0)
            self._opened += self._local.files
        return self._local.files  # type: ignore[no-any-return]

    def _shorter(self) -> UserError:
        return UserError(f"the file {str(self._paths[0])!r} became shorter while it was read")
