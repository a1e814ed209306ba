"""Batches of a small model side by side on a CPU's cores.

The operations of a model of a few million parameters are too short to be divided between threads: torch's
default of one thread a core makes them slower, many times over where other programs run too. So each core
draws its own batch, with one thread inside the operations. Real models, and GPUs, take one batch at a time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import nn

SMALL_MODEL = 30_000_000  # parameters; an operation of a larger one keeps several threads busy

In = TypeVar("In")
Out = TypeVar("Out")


def lanes(model: nn.Module) -> int:
    """How many batches of `model` run at once: this process's cores for a small model on a CPU, else 1."""
    first = next(model.parameters())
    if first.device.type != "cpu" or sum(p.numel() for p in model.parameters()) >= SMALL_MODEL:
        return 1
    if hasattr(os, "sched_getaffinity"):  # Linux: what the process may use, not what the machine has
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def split(count: int, batch_size: int, lanes: int) -> list[range]:
    """The numbers below `count` in ranges of at most `batch_size`, small enough to give every lane one."""
    size = min(batch_size, -(-count // lanes)) if lanes > 1 else batch_size
    return [range(start, min(start + size, count)) for start in range(0, count, max(size, 1))]


def in_order(
    function: Callable[[In], Out], items: Sequence[In], lanes: int, *, stop: threading.Event | None = None
) -> Generator[Out, None, None]:
    """`map(function, items)`, in `lanes` threads; the results come in order. With one lane in this thread.

    When the results are not read to the end (an error, Ctrl-C), `stop` is set, what has not begun is dropped,
    and what has is waited for: `function` may look at `stop` to end early. torch's thread count comes back.
    """
    if lanes == 1:
        yield from map(function, items)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(lanes, "spf-kit", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(function, items)
    finally:
        if stop is not None:
            stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)
