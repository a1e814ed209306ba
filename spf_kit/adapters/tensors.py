"""Tensors from and to safetensors files, one at a time, with headers that have been checked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from spf_kit.adapters import hashes
from spf_kit.errors import UserError
from spf_kit.headers import Header, encode_header, weight_type

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

# safetensors sorts by type first, the later in its own list of types the earlier in the file
_ORDER = {name: number for number, name in enumerate((
    "BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ",
    "F8_E5M2FNUZ", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64",
))}  # fmt: skip


def parse_dtype(name: str | torch.dtype) -> torch.dtype:
    """`"float16"`, `"fp16"`, `"F16"` or a torch type.

    Raises UserError for other names.
    """
    return name if isinstance(name, torch.dtype) else DTYPES[weight_type(name)]


def read_tensor(header: Header, name: str, file: BinaryIO | None = None) -> Tensor:
    """One tensor's own copy, in its own type. `file` is the open file, if more tensors will be read.

    Raises UserError if the file has become shorter or the type is unknown to this torch.
    """
    info = header.tensors[name]
    if info.dtype not in DTYPES:
        raise UserError(
            f"{str(header.path)!r} holds {name!r} in the type {info.dtype}, which torch does not know"
        )
    if file is None:
        with open(header.path, "rb") as opened:
            return read_tensor(header, name, opened)
    if not info.count:
        return torch.empty(info.shape, dtype=DTYPES[info.dtype])
    data = bytearray(info.nbytes)
    file.seek(info.start)
    if file.readinto(data) != info.nbytes:  # type: ignore[attr-defined]
        raise UserError(f"the file {str(header.path)!r} became shorter while it was read")
    return torch.frombuffer(data, dtype=DTYPES[info.dtype]).reshape(info.shape)


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; a tenth of the time of `torch.isfinite(tensor).all()`."""
    if not tensor.numel():
        return True
    values = tensor if tensor.dtype.itemsize > 1 else tensor.to(torch.float32)  # float8 has no arithmetic
    return bool(torch.isfinite(values.abs().max()))  # a maximum with a NaN is NaN


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes as they stand in a file (little endian, row-major)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def sort_for_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The order in which safetensors itself stores tensors: by type, then by name. Hashes depend on it."""
    return dict(sorted(tensors.items(), key=lambda item: (-_ORDER[NAMES[item[1].dtype]], item[0])))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a whole file; the same tensors and metadata give the same bytes, whatever their order."""
    tensors = sort_for_file(tensors)
    with open(path, "xb") as file:
        file.write(header_bytes(tensors, dict(sorted(metadata.items()))))
        for tensor in tensors.values():
            file.write(tensor_bytes(tensor))


def header_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    return encode_header(_described(tensors), metadata)


def _described(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


# --- the hashes that sharing sites and loaders know a file by ---------------------------------------------


def kohya_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """`sshs_model_hash`, `sshs_legacy_hash` and modelspec's `hash_sha256`, as kohya's scripts compute them.

    The first is the hash of the data section alone, so that other metadata does not change it (its first 12
    digits are AutoV3), the second that of the file as with the `ss_` metadata alone. See `hashes` and
    kohya-ss/sd-scripts, library/train_util.py, `precalculate_safetensors_hashes`.
    """
    tensors = sort_for_file(tensors)
    data = [tensor_bytes(tensor) for tensor in tensors.values()]
    model = hashlib.sha256()
    for part in data:
        model.update(part)
    return {
        "sshs_model_hash": model.hexdigest(),
        "sshs_legacy_hash": hashes.legacy_of([hashes.training_header(_described(tensors), metadata), *data]),
        "modelspec.hash_sha256": f"0x{model.hexdigest()}",
    }
