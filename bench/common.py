"""What the scripts of this folder share: shapes of single files, and processes with their time and memory."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from spf_kit.families import ldm_keys
from spf_kit.families.detect import shipped_config
from spf_kit.families.loading import empty_module
from spf_kit.families.sources import components_of

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
