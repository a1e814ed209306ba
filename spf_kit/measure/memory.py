"""Memory: what a process has used at its peak, and what a training will hold, by exact count of its tensors.

The count is of what stays for the whole run: frozen weights, adapter, gradients, optimizer state. The
activations of a step come on top; they depend on batch size, resolution and attention backend.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spf_kit.adapters.chosen import chosen
from spf_kit.adapters.fit import adaptable
from spf_kit.adapters.index import index
from spf_kit.adapters.parts import NAMES
from spf_kit.adapters.weights import parse
from spf_kit.headers import read_header
from spf_kit.measure.clip import folder_of

if TYPE_CHECKING:
    from spf_kit.families.base import Family
    from spf_kit.losses import Needs
    from spf_kit.schema import Adapter, Config

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


# --- what will be held ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One kind of tensor that a training holds from its first step to its last."""

    name: str
    bytes: int
    detail: str


@dataclass(frozen=True)
class Account:
    """All of them. `complete` is false if an optimizer's state could not be counted."""

    items: list[Item]
    complete: bool = True

    @property
    def total(self) -> int:
        return sum(item.bytes for item in self.items)

    def lines(self) -> list[str]:
        """For people."""
        said = [f"{item.name}: {human(item.bytes)} ({item.detail})" for item in self.items]
        least = "" if self.complete else "at least "
        return [*said, f"together: {least}{human(self.total)}; the activations of a step come on top"]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: bytes."""
        parts = {item.name: item.bytes for item in self.items}
        return {"bytes": parts, "total_bytes": self.total, "complete": self.complete, "activations": "on top"}


def account(config: Config, family: Family, needs: Needs | None = None) -> Account:
    """What training `config` on `family` holds. Reads shapes and types only, so meta tensors do.

    The VAE and the text encoder do not count where their results are kept instead: latents in memory or on
    disk, and text encodings unless the text encoder is trained or tags are shuffled. `needs`, of all losses,
    says who keeps the VAE to decode with and who brings a CLIP pair.
    """
    train, data = config.train, config.data
    shapes = adapter_shapes(family, config.adapter)
    parameters = [shape for group in shapes.values() for shape in group]
    count = sum(map(math.prod, parameters))
    items = [Item("UNet", module_bytes(family.unet), f"frozen, {config.base.dtype}")]
    earlier = [layer for path, _ in map(parse, config.adapter.on) for layer in index(path).layers.items()]
    texts_change = "text-encoder" in config.adapter.targets or data.shuffle_tags
    # kept for previews: one loaded anew would lack what an earlier LoRA changes in it
    texts_change = texts_change or any(component != "unet" for (component, _), _ in earlier)
    if texts_change:
        kind = "adapted" if "text-encoder" in config.adapter.targets else "frozen"
        for name, encoder in family.text_encoders().items():
            items.append(Item(name.replace("_", " "), module_bytes(encoder), f"{kind}, {config.base.dtype}"))
    if family.vae is not None and (data.cache == "none" or (needs and "vae" in needs.decode)):
        dtype = str(family.vae.dtype).removeprefix("torch.")  # SDXL's is wider than the rest
        items.append(Item("VAE", module_bytes(family.vae), f"frozen, {dtype}"))
    if needs and needs.clip and (folder := folder_of(family, config.clip.model)):
        items.append(Item("CLIP pair", clip_bytes(folder), "frozen, float32"))
    layers, kind = ", ".join(config.adapter.targets), NAMES[config.adapter.kind]
    if earlier:
        held = sum(layer.parameters for _, layer in earlier)
        items.append(Item("earlier LoRAs", 4 * held, f"frozen: {held:,} float32"))
    items.append(
        Item("adapter", 4 * count, f"{kind}, rank {config.adapter.rank} on {layers}: {count:,} float32")
    )
    items.append(Item("gradients", 4 * count, "float32"))
    state = optimizer_bytes(train.optimizer, parameters)
    if state is not None:
        items.append(Item("optimizer", state, f"state of {train.optimizer}"))
    if train.ema is not None:
        items.append(Item("EMA", 4 * count, "float32"))
    return Account(items, complete=state is not None)


def module_bytes(module: nn.Module) -> int:
    """Parameters and buffers in their own types, each shared tensor once; adapters not included."""
    names = ("lora_A", "lora_B", "lora_magnitude", "hada_", "lokr_", "oft_R")
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return sum(t.numel() * t.element_size() for name, t in tensors if not any(part in name for part in names))


def clip_bytes(folder: Path) -> int:
    """A CLIP pair's tensors, loaded as float32."""
    headers = [read_header(file) for file in sorted(folder.glob("*.safetensors"))]
    return sum(4 * math.prod(entry.shape) for header in headers for entry in header.tensors.values())


def adapter_shapes(family: Family, adapter: Adapter) -> dict[str, list[Shape]]:
    """Shapes of the parameters that `adapter` adds, by component."""
    layers = {component: adaptable(root) for component, root in family.components().items()}
    found: dict[str, list[Shape]] = {}
    for (component, name), spec in chosen(family, adapter).items():
        weight: Any = layers[component][name].weight
        found.setdefault(component, []).extend(spec.parts(tuple(weight.shape)).values())
    return found


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
