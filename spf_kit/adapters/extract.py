"""A LoRA out of two checkpoints: W_tuned - W_base, layer by layer, cut to a rank.

Tensor by tensor: of the models never more than one layer is in memory, of the result all of it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from spf_kit import families
from spf_kit.adapters import files, formats, keys
from spf_kit.adapters.files import LoraFile
from spf_kit.adapters.guess import family_name
from spf_kit.adapters.index import LayerKey
from spf_kit.adapters.layers import Update
from spf_kit.adapters.low_rank import Share, cut_matrix, whole_residual
from spf_kit.adapters.metadata import base_metadata
from spf_kit.adapters.streaming import Progress
from spf_kit.adapters.tensors import parse_dtype, read_tensor
from spf_kit.errors import UserError
from spf_kit.families.folder import FolderSource
from spf_kit.families.sources import Place, Source, Weights, components_of
from spf_kit.files import refuse_existing
from spf_kit.headers import FLOATING, Header, read_header

# matrices that no loader takes a LoRA for: tables, and the projection that lies the other way round in files
_NO_LAYERS = ("embeddings.token_embedding", "embeddings.position_embedding", "text_projection")
# the LoRA's type by that of a weight; 8 bits are too few for it
_OWN = {torch.float64: torch.float32, torch.float32: torch.float32, torch.bfloat16: torch.bfloat16}


@dataclass
class Found:
    """What two models differ in."""

    layers: dict[LayerKey, Update] = field(default_factory=dict)
    shares: dict[LayerKey, Share] = field(default_factory=dict)
    equal: int = 0  # layers without a difference
    beyond: Counter[str] = field(default_factory=Counter)  # differing tensors that a LoRA cannot hold
    absent: list[str] = field(default_factory=list)  # components that one of the models lacks


def extract(
    tuned: str | Path,
    base: str | Path,
    output: str | Path,
    rank: int,
    *,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the LoRA, in kohya's format, which makes `base` most like `tuned`.

    Args:
        tuned, base: .safetensors files or diffusers folders of one family.
        rank: of every layer; smaller matrices get what they have.
        dtype: of the tensors; None takes the widest type of the tuned weights, float32 at most.

    Returns:
        JSON-able: `residual` is the relative Frobenius norm of what the rank leaves out, of all layers
        together; `worst` names the layer that lost most; `beyond` counts differing tensors that no LoRA can
        hold; `absent` names components that one of the models lacks.

    Raises:
        UserError: a model is missing or damaged, the two are of different families or sizes or do not differ
            in any layer, a value is NaN or infinite, or `output` exists without `overwrite`.
    """
    output, kept = Path(output), parse_dtype(dtype) if dtype else None
    if rank < 1:
        raise UserError(f"--rank {rank} is no rank: give 1 or more")
    files.check_name(output, "kohya")
    refuse_existing(output, overwrite)
    sources = families.open_source(str(tuned)), families.open_source(str(base))
    if sources[0].name != sources[1].name:
        names = [family_name(source.name) for source in sources]
        raise UserError(
            f"{str(tuned)!r} is of {names[0]} and {str(base)!r} of {names[1]}: give the base that it was "
            "tuned on"
        )
    found = _differences(*sources, rank, kept, progress)
    if not found.layers:
        beyond = f"; {_told(found.beyond)} differ" if found.beyond else ""
        raise UserError(
            f"{str(tuned)!r} and {str(base)!r} differ in no layer that a LoRA can hold{beyond}: there is "
            "nothing to extract"
        )
    residual = whole_residual(found.shares.values())
    worst = max(found.shares, key=lambda key: found.shares[key].residual)
    made = LoraFile(found.layers, _metadata(sources[0], sources[1], rank, residual))
    made.unet_names = "sai" if sources[1].name == "sdxl" else "diffusers"
    files.write(made, output, "kohya", kept or made.dtype)
    beyond = f"; a LoRA cannot hold the differences of {_told(found.beyond)}" if found.beyond else ""
    return {
        "tuned": str(tuned),
        "base": str(base),
        "output": str(output),
        "family": sources[1].name,
        "layers": len(found.layers),
        "equal": found.equal,
        "beyond": dict(found.beyond),
        "absent": found.absent,
        "rank": max(made.ranks),
        "residual": residual,
        "worst": {"layer": f"{worst[0]}: {worst[1]}", "residual": found.shares[worst].residual},
        "dtype": str(kept or made.dtype).removeprefix("torch."),
        "sentence": f"{output}: {len(found.layers)} layers, {found.equal} without a difference left out; "
        f"rank {rank} leaves out {residual:.2%} of the difference, {found.shares[worst].residual:.2%} in the "
        f"worst layer{beyond}",
    }


def _differences(
    tuned: Source, base: Source, rank: int, dtype: torch.dtype | None, progress: Progress | None
) -> Found:
    found, places = Found(), []
    for component in components_of(base.name):
        pairs = _pairs(tuned, base, component)
        places += [(component, name, *pair) for name, pair in pairs.items()]
        if not pairs:
            found.absent.append(component)
    with ExitStack() as stack:
        reader = Reader(stack)
        for number, (component, name, theirs, ours) in enumerate(places, start=1):
            tensor = reader.tensor(theirs)
            difference = _difference(tensor, reader.tensor(ours), component, name, tuned, base)
            is_layer, key = (
                _is_layer(component, name, tensor.dim()),
                (component, name.removesuffix(".weight")),
            )
            if difference is None:
                found.equal += is_layer
            elif is_layer:
                cut = cut_matrix(difference, rank, seed=number)
                kept = dtype or _OWN.get(tensor.dtype, torch.float16)
                down, up = (formats.cast(factor, kept, name) for factor in (cut.layer.down, cut.layer.up))
                found.layers[key] = replace(cut.layer, down=down, up=up)
                found.shares[key] = Share(cut.kept, cut.lost)
            else:
                found.beyond[_sort(component, name)] += 1
            if progress:
                progress(number, len(places), name)
    return found


def _pairs(tuned: Source, base: Source, component: str) -> dict[str, tuple[Place, Place]]:
    """The tensors of a component in both models; none if it is not the UNet and one of them lacks it.

    Raises UserError if a tensor of the component is in one alone.
    """
    weights = []
    for source in (tuned, base):
        try:
            weights.append(_trained(source.weights(component)))
        except UserError:
            # a folder says itself which parts it has, so that what cannot be read there is damaged
            if component == "unet" or (isinstance(source, FolderSource) and component != "vae"):
                raise
            return {}
    theirs, ours = weights
    only = sorted(theirs.keys() ^ ours.keys())
    if only:
        here, lacking = (tuned, base) if only[0] in theirs else (base, tuned)
        raise UserError(
            f"{here.location!r} has the {component} tensor {only[0]!r}, {lacking.location!r} has not "
            f"({len(only)} such): they are not of one architecture"
        )
    return {name: (theirs[name], place) for name, place in ours.items()}


def _trained(weights: Weights) -> Mapping[str, Place]:
    return {name: place for name, place in weights.items() if not name.endswith("position_ids")}


def _is_layer(component: str, name: str, dimensions: int) -> bool:
    """Whether every loader takes a LoRA for it: matrices and convolutions of the UNet's blocks and of the
    text encoders' layers."""
    is_weight = name.endswith(".weight") and dimensions in (2, 4) and component != "vae"
    if keys.is_outside(component, name):
        return False
    return is_weight and not any(part in name for part in _NO_LAYERS)


def _sort(component: str, name: str) -> str:
    """What to call a tensor that is no layer."""
    if component == "vae":
        return "VAE tensors"
    if name.endswith(".bias"):
        return "biases"
    if keys.is_outside(component, name):
        return "layers outside the UNet's blocks"
    return "embeddings and projections" if any(part in name for part in _NO_LAYERS) else "norms"


def _told(beyond: Counter[str]) -> str:
    return ", ".join(f"{count} {sort}" for sort, count in beyond.most_common())


def _difference(
    theirs: Tensor, ours: Tensor, component: str, name: str, tuned: Source, base: Source
) -> Tensor | None:
    """W_tuned - W_base in float32 (float64 where one is); None where both hold the same values.

    A copy of the base in half precision does not differ from it: what is compared has the coarser type.
    """
    if theirs.shape != ours.shape and theirs.shape[:2] == ours.shape[:2] and theirs.numel() == ours.numel():
        theirs = theirs.reshape(ours.shape)  # a matrix in one model, a 1x1 convolution in the other
    if theirs.shape != ours.shape:
        raise UserError(
            f"{component} {name} is {list(theirs.shape)} in {tuned.location!r} and {list(ours.shape)} in "
            f"{base.location!r}: they are not of one architecture"
        )
    wide = torch.float64 if torch.float64 in (theirs.dtype, ours.dtype) else torch.float32
    smallest = min(theirs.dtype.itemsize, ours.dtype.itemsize)
    for coarse in {dtype for dtype in (theirs.dtype, ours.dtype) if dtype.itemsize == smallest}:
        if torch.equal(theirs.to(coarse).to(wide), ours.to(coarse).to(wide)):
            return None
    difference = theirs.to(wide) - ours.to(wide)
    if not torch.isfinite(difference).all():
        raise UserError(
            f"{component} {name} holds NaN or infinite values in {tuned.location!r} or {base.location!r}: "
            "get the model again"
        )
    return difference


class Reader:
    """Single tensors of some files, read and not mapped: what is freed is free."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._files: dict[Path, tuple[Header, BinaryIO]] = {}

    def tensor(self, place: Place) -> Tensor:
        """Raises UserError for types that are no numbers to compute with."""
        header, file = self._open(place.file)
        if header.tensors[place.key].dtype not in FLOATING:
            raise UserError(
                f"{str(place.file)!r} holds {place.key!r} quantised as {header.tensors[place.key].dtype}: "
                "give the checkpoint that it was made from"
            )
        tensor = read_tensor(header, place.key, file)
        if place.third is not None:
            tensor = tensor.chunk(3)[place.third]
        return tensor.T.contiguous() if place.transposed else tensor

    def _open(self, path: Path) -> tuple[Header, BinaryIO]:
        if path not in self._files:
            self._files[path] = read_header(path), self._stack.enter_context(path.open("rb"))
        return self._files[path]


def _metadata(tuned: Source, base: Source, rank: int, residual: float) -> dict[str, str]:
    """What loaders show of a LoRA, and what it was made of: names without folders."""
    names = [Path(source.location).name for source in (tuned, base)]
    note = {"tuned": names[0], "base": names[1], "rank": rank, "residual": residual}
    return {
        **base_metadata(base.name, base.location, base.scheduler_config.get("prediction_type", "epsilon")),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "modelspec.title": Path(names[0]).stem,
        "spf_kit.extracted": json.dumps(note),
    }
