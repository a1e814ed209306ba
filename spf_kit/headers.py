"""Safetensors headers, read with distrust: names, shapes and metadata without a tensor's bytes.

A safetensors file is 8 bytes of header length (little endian), a JSON header, then the tensors' bytes:
https://github.com/huggingface/safetensors#format. Reading the header alone tells everything but the values,
and takes milliseconds for a file of any size. Imports no torch.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spf_kit.errors import UserError

MAX_HEADER = 32 * 2**20  # bytes; the largest real headers, with a thumbnail inside, have a few megabytes
MAX_DIMENSIONS = 16

# bits of one element; https://github.com/huggingface/safetensors/blob/main/safetensors/src/tensor.rs
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

# floating numbers of a byte and more
FLOATING = frozenset((
    "F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ",
))  # fmt: skip

# types that Python reads by itself, and what `struct` calls them
NUMBERS: Mapping[str, str] = {"F16": "e", "F32": "f", "F64": "d", "I64": "q", "I32": "i", "BF16": "H"}


# the types that models are saved in: torch's name, then what else users say
_SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "F32": ("float32", "fp32", "f32"), "F16": ("float16", "fp16", "f16", "half"),
    "BF16": ("bfloat16", "bf16"),
}  # fmt: skip
LONG_NAMES: Mapping[str, str] = {name: spellings[0] for name, spellings in _SPELLINGS.items()}


def weight_type(name: str) -> str:
    """What a header calls a type that models are saved in: "F16" for `"float16"`, `"fp16"` or `"half"`.

    Raises UserError for other names.
    """
    for found, spellings in _SPELLINGS.items():
        if name.removeprefix("torch.").lower() in spellings:
            return found
    raise UserError(f"the dtype {name!r} is unknown: choose float32, float16 or bfloat16")


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """What a tensor takes in a file."""
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the header describes it; `start` and `end` are positions in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself: tensors in the order of their bytes, and metadata."""

    path: Path
    tensors: dict[str, TensorInfo]
    data_start: int
    metadata: dict[str, str] = field(default_factory=dict)

    def scalar(self, name: str) -> float:
        """The value of a tensor with one floating or integer element (a LoRA's alpha).

        Raises UserError if it has more elements or a type that is not a plain number.
        """
        info = self.tensors[name]
        if info.count != 1 or info.dtype not in NUMBERS:
            raise UserError(
                f"{str(self.path)!r} is damaged: the tensor {name!r} should hold one number but has type "
                f"{info.dtype} and shape {list(info.shape)}"
            )
        return self.values(name)[0]

    def values(self, name: str) -> list[float]:
        """All values of a small tensor, one after another. Its type must be among `NUMBERS`."""
        info = self.tensors[name]
        with open(self.path, "rb") as file:
            file.seek(info.start)
            data = file.read(info.nbytes)
        found = struct.unpack(f"<{info.count}{NUMBERS[info.dtype]}", data)
        if info.dtype == "BF16":  # the upper half of a float32
            found = struct.unpack(
                f"<{info.count}f", struct.pack(f"<{info.count}I", *(v << 16 for v in found))
            )
        return [float(value) for value in found]


def read_header(path: str | Path) -> Header:
    """Read and check a safetensors header; the tensors' bytes are not touched.

    Raises UserError, one sentence, if the file is missing, not safetensors (a pickle, a web page, a Git LFS
    pointer), truncated, or has lengths, offsets or shapes that do not fit each other or the file.
    """
    path = Path(path)
    try:
        if (mode := path.stat().st_mode) and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UserError(f"{str(path)!r} is a pipe or a device, not a .safetensors file")  # may never end
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            text = file.read(length) if 2 <= length <= min(MAX_HEADER, size - 8) else b""
    except FileNotFoundError:
        raise UserError(f"the file {str(path)!r} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{str(path)!r} is a folder, not a .safetensors file") from None
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    if not text.startswith(b"{"):
        raise UserError(_what_instead(path, size, length))
    try:
        content = _parse(text)
        tensors, metadata = _check_header(content, size - 8 - length, 8 + length)
    except ValueError as error:
        raise UserError(f"{str(path)!r} is damaged: {error}; download or copy it again") from None
    return Header(path, tensors, 8 + length, metadata)


def _parse(text: bytes) -> Any:
    """Raises ValueError, a sentence's end, unless it is JSON in UTF-8 that names nothing twice."""
    try:
        return json.loads(text.decode(), object_pairs_hook=_no_duplicates)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"its header is not JSON ({error})") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("its header names a tensor twice")
    return content


def _check_header(content: Any, data_size: int, start: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors in the order of their bytes, which they must cover without gap or overlap; the metadata."""
    if not isinstance(content, dict):
        raise ValueError("its header is not a JSON object")
    metadata = content.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata is not a table of texts")
    for name in (*content, *metadata, *metadata.values()):
        if not is_text(name):
            raise ValueError(f"its header holds {name[:80]!r}, which is no text: half a UTF-16 pair")
    tensors = {}
    for name, entry in content.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            numbers = [*shape, begin, end]
            bits = DTYPE_BITS[dtype]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"its header describes the tensor {name!r} wrongly") from None
        if any(type(n) is not int or n < 0 or n >= 2**63 for n in numbers) or len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"the tensor {name!r} has an impossible shape or position")
        needed = -(-math.prod(shape) * bits // 8)
        if end - begin != needed:
            raise ValueError(f"the tensor {name!r} has {end - begin} bytes, its shape and type need {needed}")
        tensors[name] = TensorInfo(dtype, shape, start + begin, start + end)
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    position = start
    for name, info in tensors.items():
        if info.start != position:
            raise ValueError(f"the tensor {name!r} overlaps another or leaves a gap")
        position = info.end
    if position != start + data_size:
        missing = position - start - data_size
        raise ValueError(
            f"it ends {missing} bytes too early" if missing > 0 else f"it has {-missing} bytes too many"
        )
    return tensors, metadata


def is_text(value: str) -> bool:
    """Whether it can be written: JSON's escapes also spell halves of pairs, which UTF-8 does not have."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _what_instead(path: Path, size: int, length: int) -> str:
    with open(path, "rb") as file:
        start = file.read(64)
    convert = "which can run code when it is opened: convert it to .safetensors first"
    if size == 0:
        return f"{str(path)!r} is empty"
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return f"{str(path)!r} is a pickle (.ckpt, .pt, .bin), {convert}"
    if start.startswith(b"version https://git-lfs"):
        return f"{str(path)!r} is a Git LFS pointer, not the file itself: run `git lfs pull`"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return f"{str(path)!r} is a web page, not a .safetensors file: the download failed, try again"
    if length > size - 8 and start[8:9] == b"{" and length <= MAX_HEADER:
        return f"{str(path)!r} is damaged: it ends within its header; download or copy it again"
    if start[8:9] == b"{" and length > MAX_HEADER:
        return (
            f"{str(path)!r} is damaged: its header claims {length} bytes, more than the {MAX_HEADER} allowed"
        )
    return f"{str(path)!r} is not a .safetensors file"


def encode_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str], *, always: bool = False
) -> bytes:
    """The bytes before the data: length and JSON. Tensors, (dtype, shape) by name, lie in the given order.

    Without metadata there is no table for them, unless `always`, as safetensors writes an empty one given.
    Padded with spaces to a multiple of 8, as safetensors does, so that the data is aligned for mapping.
    """
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata or always else {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * DTYPE_BITS[dtype] // 8
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
