"""Where a model's weights, configs and tokenizer come from: what folders and single files have in common."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spf_kit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

COMPONENTS = ("unet", "vae", "text_encoder")
SAMPLE = 1024  # values from each end and from the middle of a tensor that the fingerprint reads


@dataclass(frozen=True)
class Place:
    """Where one tensor lies."""

    file: Path
    key: str


Weights = Mapping[str, Place]  # parameter names as diffusers and transformers write them into files


class Source(ABC):
    """A model on disk. Nothing but headers and configs is read until `read` is called."""

    location: str  # as the user gave it, for messages
    name: str  # "sd15" or "embedded"
    configs: dict[str, dict[str, Any]]  # of the components
    scheduler_config: dict[str, Any]

    @abstractmethod
    def weights(self, component: str) -> Weights:
        """Where the component's tensors lie. Raises UserError if the model has no such component."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """The CLIPTokenizer of the text encoder."""


def read(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Each tensor with its name, one after another, mapped from the file: pages are read when touched."""
    from safetensors import SafetensorError, safe_open

    with ExitStack() as stack:
        files: dict[Path, Any] = {}
        for name, place in weights.items():
            try:
                if place.file not in files:
                    files[place.file] = stack.enter_context(safe_open(place.file, framework="pt"))
                tensor = files[place.file].get_tensor(place.key)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{str(place.file)!r} cannot be read at {place.key!r}: {error}") from error
            yield name, tensor


def fingerprint(components: Mapping[str, Weights]) -> str:
    """A hash of what the weights are: names, number and values of every tensor, hex, 32 digits.

    Of each tensor at most 3 x 1,024 values are read (both ends and the middle), so that gigabytes take
    seconds; a merge or a fine-tune moves every value of the tensors it touches. The values count as stored,
    widened to float64: a folder and a single file with the same values agree, whatever the layout of the file
    and the dtype that the model then runs in. A half-precision copy differs, rightly: it is another model.
    """
    import torch

    digest = hashlib.sha256()
    for component, weights in sorted(components.items()):
        for name, tensor in read(dict(sorted(weights.items()))):
            if name.endswith("position_ids"):
                continue  # 0 to 76 in early files, and no weight
            flat, count = tensor.reshape(-1), tensor.numel()
            if count > 3 * SAMPLE:
                middle = count // 2
                flat = torch.cat([flat[:SAMPLE], flat[middle : middle + SAMPLE], flat[-SAMPLE:]])
            digest.update(f"{component}:{name}:{count}:".encode())
            digest.update(flat.to(torch.float64).numpy().tobytes())
    return digest.hexdigest()[:32]
