"""The C library's heap, where it is glibc: weights beside it, and freed memory back to the system.

glibc takes large blocks from the system each by itself and gives them back when they are freed. Yet after the
first few of them it raises the limit by itself, up to 32 MiB, and puts weights into the heap: what the text
encoders leave there are holes, which activations then spread over. Weights of their own and a lower limit
keep the heap small: 0.12 GiB less of a training at Stable Diffusion 1.5's true shape. MKL keeps what it packs
matrices into for the next product, in each thread: 0.03 GiB there, and products take no longer without.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's names of its settings
_OWN = 128 * 2**10  # bytes from which a block has a mapping of its own: glibc's first limit
# half of its last one: the heap grows less by what convolutions copy weights into, and a step takes no
# longer. Far lower ones cost page faults, half of the time again in convolutions
_LARGE = 16 * 2**20


def keep_no_buffers() -> None:
    """MKL gives back what it packed matrices into. To be called before torch is imported: then MKL asks."""
    os.environ.setdefault("MKL_DISABLE_FAST_MM", "1")


@contextlib.contextmanager
def weights() -> Iterator[None]:
    """Blocks that are allocated meanwhile lie beside the heap, unless it has room. Afterwards glibc keeps to
    a limit of 16 MiB, for what lies beside the heap and for what is free at its end."""
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, _OWN)
    try:
        yield
    finally:
        library.mallopt(_MMAP_THRESHOLD, _LARGE)
        library.mallopt(_TRIM_THRESHOLD, _LARGE)


def return_freed() -> None:
    """Give the heap's freed memory back to the system, before what is loaded next needs room."""
    gc.collect()
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@cache
def _glibc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    with contextlib.suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL("libc.so.6")
        return library if library.mallopt and library.malloc_trim else None
    return None
