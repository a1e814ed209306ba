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

MAPPED = 16 * 2**20  # bytes handed out of a file before it is opened anew
SAMPLE = 1024  # values from each end and from the middle of a tensor that the fingerprint reads


COMPONENTS = ("unet", "vae", "text_encoder")


def components_of(family: str) -> tuple[str, ...]:
    """The components that a model of this family has."""
    return (*COMPONENTS, "text_encoder_2") if family == "sdxl" else COMPONENTS


@dataclass(frozen=True)
class Place:
    """Where one tensor lies, and how it comes out of what is stored."""

    file: Path
    key: str
    third: int | None = None  # which third of the rows; OpenCLIP keeps q, k and v in one tensor
    transposed: bool = False


Weights = Mapping[str, Place]  # parameter names as diffusers and transformers write them into files


class Source(ABC):
    """A model on disk. Nothing but headers and configs is read until `read` is called."""

    location: str  # as the user gave it, for messages
    name: str  # "sd15", "sd2", "sdxl" or "embedded"
    configs: dict[str, dict[str, Any]]  # of the components
    scheduler_config: dict[str, Any]
    pipeline_config: dict[str, Any]  # of `model_index.json`; empty for a file

    @abstractmethod
    def weights(self, component: str) -> Weights:
        """Where the component's tensors lie. Raises UserError if the model has no such component."""

    @abstractmethod
    def tokenizer(self, component: str = "text_encoder") -> Any:
        """The CLIPTokenizer of a text encoder."""


def read(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Each tensor with its name, one after another, mapped from the file: pages are read when touched.

    Pages that were touched stay in memory as long as the mapping does. So a file is mapped anew from time to
    time: the pages of tensors that nobody keeps go with the old mapping.
    """
    from safetensors import SafetensorError, safe_open

    files: dict[Path, Any] = {}
    with ExitStack() as stack:
        handed_out = 0
        for name, place in weights.items():
            try:
                if handed_out > MAPPED:
                    stack.close()
                    files.clear()
                    handed_out = 0
                if place.file not in files:
                    files[place.file] = stack.enter_context(safe_open(place.file, framework="pt"))
                tensor = _stored(files[place.file], place)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{str(place.file)!r} cannot be read at {place.key!r}: {error}") from error
            handed_out += tensor.nbytes
            yield name, tensor
            del tensor


def _stored(file: Any, place: Place) -> Tensor:
    """The tensor of an open file, or its part."""
    if place.third is None:
        tensor: Tensor = file.get_tensor(place.key)
        return tensor.T.contiguous() if place.transposed else tensor
    rows = file.get_slice(place.key)
    size = rows.get_shape()[0] // 3
    part: Tensor = rows[place.third * size : (place.third + 1) * size]
    return part


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
