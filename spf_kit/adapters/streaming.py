"""Rewriting a safetensors file tensor by tensor: memory for one weight, whatever the size of the file."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from spf_kit.adapters.index import IndexedLayer
from spf_kit.adapters.layers import load_layer
from spf_kit.adapters.tensors import DTYPES, NAMES, all_finite, is_floating, read_tensor, tensor_bytes
from spf_kit.errors import UserError
from spf_kit.files import CHUNK, copy_bytes
from spf_kit.headers import DTYPE_BITS, Header, TensorInfo, encode_header


class Change(NamedTuple):
    """A LoRA's layer on the disk and its weight, for a tensor or a third of its rows (OpenCLIP's q, k, v)."""

    layer: IndexedLayer
    factor: float
    third: int | None = None


Progress = Callable[[int, int, str], None]  # done, total, text

COMPUTABLE = frozenset(("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"))


def rewrite(
    header: Header,
    changes: Mapping[str, Sequence[Change]],
    target: Path,
    *,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Write the file anew: its tensors in their order, `changes` added to some, floating ones as `dtype`.

    Sums are in float32 and rounded once, to the tensor's own type unless `dtype` is given. What is neither
    changed nor converted keeps its bytes.

    Raises UserError if a result does not fit its type, a layer is damaged, or there is no room on the disk.
    """
    described = {name: (_type_of(info, dtype), info.shape) for name, info in header.tensors.items()}
    _check_room(header, described, target)
    with open(header.path, "rb") as source, open(target, "xb") as file:
        file.write(encode_header(described, metadata))
        for name, info in header.tensors.items():
            if name in changes or described[name][0] != info.dtype:
                weight = merged(read_tensor(header, name, source), changes.get(name, ()), header.path, name)
                file.write(tensor_bytes(_rounded(weight, described[name][0], header.path, name)))
            else:
                _copy(source, info, file)
            if progress:
                progress(name)


def merged(weight: Tensor, changes: Sequence[Change], path: Path, name: str) -> Tensor:
    """W + sum of weight * difference in float32; every difference is that from W itself."""
    if not changes:
        return weight
    if NAMES[weight.dtype] not in COMPUTABLE:
        raise UserError(
            f"{str(path)!r} holds {name!r} quantised as {NAMES[weight.dtype]}: merge into the checkpoint "
            "that it was made from"
        )
    total = weight.to(torch.float32, copy=True)
    for indexed, factor, third in changes:
        here, before = (total, weight) if third is None else (t.chunk(3)[third] for t in (total, weight))
        load_layer(indexed).add_to(here, factor, before)
    return total


def _rounded(weight: Tensor, dtype: str, path: Path, name: str) -> Tensor:
    result = weight.to(DTYPES[dtype])
    if not all_finite(result) and all_finite(weight):
        largest = weight.abs().max().item()
        raise UserError(
            f"{str(path)!r}: the weight {name!r} would become {largest:.4g}, too large for {dtype}: lower "
            "the LoRA's weight or give --dtype float32"
        )
    return result


def _type_of(info: TensorInfo, dtype: torch.dtype | None) -> str:
    return NAMES[dtype] if dtype is not None and is_floating(info.dtype) else info.dtype


def _copy(source: BinaryIO, info: TensorInfo, target: BinaryIO) -> None:
    source.seek(info.start)
    copy_bytes(source, info.nbytes, target)


def _check_room(header: Header, described: Mapping[str, tuple[str, tuple[int, ...]]], target: Path) -> None:
    """A full disk is better told before gigabytes are written."""
    needed = CHUNK + sum(
        info.count * DTYPE_BITS[described[name][0]] // 8 for name, info in header.tensors.items()
    )
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise UserError(
            f"cannot write {str(target.parent)!r}: the result needs {needed / 2**30:.1f} GB, the disk has "
            f"{free / 2**30:.1f} GB left: free some space or choose another place"
        )
