"""What the scripts of this folder share: shapes of single files, and processes with their time and memory."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from spf_kit.adapters.tensors import tensor_bytes
from spf_kit.families import ldm_keys
from spf_kit.families.detect import shipped_config
from spf_kit.families.loading import empty_module
from spf_kit.families.sources import components_of
from spf_kit.headers import encode_header

Shape = tuple[int, ...]


def single_file_shapes(family: str) -> dict[str, Shape]:
    """The tensors of a family's single file, by their names in the LDM or SAI layout."""
    tensors: dict[str, Shape] = {}
    for component in components_of(family):
        config = shipped_config(family, component)
        names = ldm_keys.key_map(component, config, ldm_keys.prefix_of(component, family))
        for name, tensor in empty_module(component, config).state_dict().items():
            key, shape = names.to_ldm(ldm_keys.standard_name(component, name)), tuple(tensor.shape)
            assert key is not None, name
            if key in tensors:  # q, k and v of OpenCLIP share a tensor
                shape = (tensors[key][0] + shape[0], *shape[1:])
            tensors[key] = (*shape, 1, 1) if ldm_keys.is_vae_attention_weight(key) else shape
    return tensors


TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def write_checkpoint(path: Path, dtype: str = "F16", family: str = "sd15") -> Path:
    """In the LDM or SAI layout, of one of `TYPES`: norms do nothing, other weights are small and random."""
    shapes = dict(sorted(single_file_shapes(family).items()))
    noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    with open(path, "wb") as file:
        file.write(encode_header({name: (dtype, shape) for name, shape in shapes.items()}, {"format": "pt"}))
        for name, shape in shapes.items():
            file.write(tensor_bytes(_values(name, shape, noise).to(TYPES[dtype])))
    return path


def _values(name: str, shape: tuple[int, ...], noise: Tensor) -> Tensor:
    if len(shape) < 2:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    count = torch.Size(shape).numel()
    deviation = 0.5 * torch.Size(shape[1:]).numel() ** -0.5
    return noise.repeat(-(-count // len(noise)))[:count].reshape(shape) * deviation


def timed(*command: str | Path, environment: Mapping[str, str] = os.environ) -> tuple[float, int]:
    """Seconds and peak resident memory in bytes of a process. Raises RuntimeError if it fails.

    The peak is asked of the system while the process runs: what `wait4` tells counts this process too, from
    which the other was started.
    """
    began, peak = time.perf_counter(), 0
    words = [str(part) for part in command]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, env=dict(environment))
    while process.poll() is None:
        peak = max(peak, _high_water_mark(process.pid))
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise RuntimeError(f"{words} ended with {process.returncode}")
    return seconds, peak


def _high_water_mark(pid: int) -> int:
    """VmHWM in bytes; 0 for a process that has just ended, or not become what it shall be."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
