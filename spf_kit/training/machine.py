"""The machine of a run: device, threads, random state and signals (all put back afterwards), memory."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import torch

SMALL_MODEL = 30_000_000  # UNet parameters


def device() -> str:
    """The device that this process computes on: the first GPU that torch can use, else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def choose_threads(parameters: int) -> int:
    """CPU threads for a model of so many UNet parameters: one for a small model, else torch's default.

    Measured on two cores with the embedded base (4.0M parameters, batches of four): a step takes 122 ms with
    one thread and 89 ms with two while nothing else runs, but minutes with two while the cores are busy,
    for its operations are shorter than the hand-over between threads. The choice looks at the model alone,
    so that a seed gives the same LoRA on every day.
    """
    return 1 if parameters < SMALL_MODEL else torch.get_num_threads()


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Give the caller's thread count and random state back, however the run ends."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)


@contextlib.contextmanager
def resting(module: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Meanwhile a module's weights are in the host's memory: off a GPU, where the room serves others."""
    if device.type != "cuda" or next(module.parameters()).is_meta:  # not loaded yet
        yield
        return
    module.to("cpu")
    torch.cuda.empty_cache()
    try:
        yield
    finally:
        module.to(device)


class Stop:
    """Set by the first Ctrl-C or SIGTERM and looked at between steps; a second one interrupts at once."""

    def __init__(self) -> None:
        self.requested = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[Stop]:
        """Handle the signals meanwhile. Only a process's main thread may, so elsewhere this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        names = (signal.SIGINT, signal.SIGTERM)
        before = {name: signal.signal(name, self._handle) for name in names}
        try:
            yield self
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
