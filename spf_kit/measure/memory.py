"""Memory: what a process has used at its peak, and what optimizers hold, by exact count.

What a training needs is measured on a step without values (`spf_kit.estimate`); the count is for optimizers
that cannot take such a step.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping

import torch

Shape = tuple[int, ...]

# bitsandbytes: tensors below this keep float32 states; 8-bit states have a float32 scale for each block,
# and one float32 table of 256 values for each kind of state in an optimizer
EIGHT_BIT_FROM, BLOCK, TABLE = 4096, 256, 256

# {optimizer: (signed, unsigned) full-size states of a parameter}; their 8-bit tables differ
STATES: Mapping[str, tuple[int, int]] = {
    "adamw": (1, 1),
    "adam": (1, 1),
    "pagedadamw": (1, 1),
    "lion": (1, 0),
    "sgd": (1, 0),
    "adamw8bit": (1, 1),
    "adam8bit": (1, 1),
    "lamb8bit": (1, 1),
    "pagedadamw8bit": (1, 1),
    "pagedadam8bit": (1, 1),
    "lion8bit": (1, 0),
    "pagedlion8bit": (1, 0),
    "lars8bit": (1, 0),
    "sgd8bit": (1, 0),
    "rmsprop8bit": (1, 0),
    "adagrad8bit": (1, 0),
    "ademamix8bit": (2, 1),
    "pagedademamix8bit": (2, 1),
    "prodigy": (2, 2),
    "adamw_schedulefree": (1, 1),
    "radam_schedulefree": (1, 1),
    "sgd_schedulefree": (1, 0),
}


# --- what was used ----------------------------------------------------------------------------------------


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Bytes at the peak: of torch's allocations on a CUDA device, else of the process's resident memory."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)  # macOS counts bytes, Linux kibibytes


# --- what an optimizer will hold ----------------------------------------------------------------------------


def optimizer_bytes(name: str, shapes: Iterable[Shape]) -> int | None:
    """Bytes of an optimizer's state for parameters of these shapes; None for one whose state is not known.

    8-bit states hold a byte for each value, a float32 scale for each block of 256 values and a float32 table
    of 256 values for each kind of state; parameters under 4,096 values keep float32. Step counters do not
    count; Prodigy's copy of the first weights does, also where they are 0 and it keeps none.
    """
    name, shapes = name.lower().replace("-", "_"), list(shapes)
    if name == "adafactor":
        return sum(map(_adafactor, shapes))
    if name not in STATES:
        return None
    sizes = [math.prod(shape) for shape in shapes]
    signed, unsigned = STATES[name]
    if not name.endswith("8bit"):
        return 4 * (signed + unsigned) * sum(sizes)
    small = [size for size in sizes if size < EIGHT_BIT_FROM]
    large = [size for size in sizes if size >= EIGHT_BIT_FROM]
    scales = sum(4 * math.ceil(size / BLOCK) for size in large)
    tables = 4 * TABLE * (bool(signed) + bool(unsigned)) if large else 0
    return (signed + unsigned) * (4 * sum(small) + sum(large) + scales) + tables


def _adafactor(shape: Shape) -> int:
    """Second moments of rows and columns (of the last two dimensions), for a vector of each value."""
    if len(shape) < 2:
        return 4 * math.prod(shape)
    return 4 * (math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1])


def human(size: int) -> str:
    """Bytes as people read them: 1.5 GiB."""
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
