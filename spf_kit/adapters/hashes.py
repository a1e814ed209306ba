"""The hashes that sharing sites, loaders and metadata know a file by. Imports no torch.

    sha256            of the whole file; its first 10 digits are AutoV2, A1111's short hash
    sshs_model_hash   of the tensors' part alone; its first 12 digits are AutoV3, whatever the metadata say
    sshs_legacy_hash  8 digits of 64 KB from 1 MB on, of the file as with the `ss_` metadata alone
    autov1            the same of the file as it is: A1111's oldest

https://github.com/kohya-ss/sd-scripts, library/train_util.py, `precalculate_safetensors_hashes`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from spf_kit.headers import Header, encode_header

FREE = 2**30  # bytes; what is smaller takes less than a second, and is hashed without being asked
START, LENGTH = 0x100000, 0x10000  # bytes of a file that A1111's oldest hash is of
_BLOCK = 4 * 2**20


def of_file(header: Header, *, whole: bool = False) -> dict[str, str]:
    """All of them; those of whole files beyond `FREE` only if asked, else as the metadata tell them."""
    told = {"autov1": legacy_hash(header.path), "sshs_legacy_hash": kohya_legacy_hash(header)}
    data = header.metadata.get("sshs_model_hash")
    if whole or header.path.stat().st_size <= FREE:
        file, data = _digests(header)
        told |= {"sha256": file, "autov2": file[:10]}
    return {**told, "autov3": data[:12], "sshs_model_hash": data} if data else told


def contradicts(hashes: Mapping[str, str], metadata: Mapping[str, str]) -> bool:
    """Whether the metadata tell another hash of the tensors: these were changed after the file was saved."""
    stored = metadata.get("sshs_model_hash")
    return bool(stored) and hashes.get("sshs_model_hash", stored) != stored


def legacy_hash(path: str | Path) -> str:
    """A1111's oldest model hash (AutoV1): 8 digits of the hash of 64 KB from the first megabyte on."""
    with open(path, "rb") as file:
        return legacy_of([file.read(START + LENGTH)])


def kohya_legacy_hash(header: Header) -> str:
    """`legacy_hash` of the file that has the same tensors and no metadata but the training's."""
    described = {name: (info.dtype, info.shape) for name, info in header.tensors.items()}
    head = training_header(described, header.metadata)
    with open(header.path, "rb") as file:
        file.seek(header.data_start)
        return legacy_of([head, file.read(max(START + LENGTH - len(head), 0))])


def legacy_of(parts: Iterable[bytes | memoryview]) -> str:
    """`legacy_hash` of a file that consists of these parts; no more of them are taken than it needs."""
    digest, position = hashlib.sha256(), 0
    for part in parts:
        digest.update(part[max(START - position, 0) : max(START + LENGTH - position, 0)])
        position += len(part)
        if position >= START + LENGTH:
            break
    return digest.hexdigest()[:8]


def training_header(
    described: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """What stands before the tensors, (dtype, shape) by name, in the file that kohya's hashes cover: with the
    `ss_` metadata alone, and an empty table where there are none."""
    training = {key: value for key, value in sorted(metadata.items()) if key.startswith("ss_")}
    return encode_header(described, training, always=True)


def _digests(header: Header) -> tuple[str, str]:
    """sha256 of the whole file and of its tensors, side by side: hashing lets other threads run."""
    whole, data = hashlib.sha256(), hashlib.sha256()
    with ThreadPoolExecutor(1) as beside:
        for number, block in enumerate(_blocks(header)):
            started = beside.submit(whole.update, block)
            if number:
                data.update(block)
            started.result()
    return whole.hexdigest(), data.hexdigest()


def _blocks(header: Header) -> Iterator[bytes]:
    """All before the tensors at once, then those by pieces."""
    with open(header.path, "rb") as file:
        yield file.read(header.data_start)
        while block := file.read(_BLOCK):
            yield block
