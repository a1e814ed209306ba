"""What this machine can do, tried and not guessed, and one sentence on each thing that is off."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spf_kit import __version__, launch

PACKAGES = (
    "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "bitsandbytes", "xformers",
    "pydantic", "typer", "rich", "pillow",
)  # fmt: skip
OPTIONAL = ("xformers",)
WANTED_MEMORY = 4  # GiB; less does not hold a real model
WANTED_DISK = 2  # GiB; a run with checkpoints, and some cache


def examine() -> dict[str, Any]:
    """Everything as JSON-able data; `problems` holds a sentence for each thing that is off, or is empty.

    Nothing here raises: what cannot be tried is a problem that is reported.
    """
    problems: list[str] = []
    found: dict[str, Any] = {
        "spf-kit": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} ({platform.machine()})",
        "packages": _packages(problems),
    }
    try:
        found |= _processor(problems)
        found |= _devices(problems)
    except Exception as error:  # torch itself is missing or broken
        problems.append(f"torch cannot be used ({_reason(error)}): install it anew from https://pytorch.org")
    found["processes"] = _processes(problems)
    found["bfloat16"] = _attempt(_try_bfloat16, "bfloat16 matrix products", problems)
    found["bitsandbytes"] = _attempt(_try_bitsandbytes, "bitsandbytes' 8-bit optimizers", problems)
    found["quantized base"] = _attempt(_try_quantized, "quantised layers", problems)
    found["xformers"] = _xformers(problems)
    try:
        found["disk"] = _places(problems)
    except OSError as error:
        problems.append(f"the working folder cannot be examined ({_reason(error)}): change to another one")
    found["problems"] = problems
    return found


# --- facts ------------------------------------------------------------------------------------------------


def _packages(problems: list[str]) -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
            if name not in OPTIONAL:
                problems.append(f"the package {name} is not installed: pip install {name}")
    return versions


def _processor(problems: list[str]) -> dict[str, Any]:
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory()
    total = min(memory.total, _container_limit() or memory.total)
    free = min(memory.available, total)
    if free < WANTED_MEMORY * 2**30:
        problems.append(
            f"only {_gib(free)} GiB of memory are free: a real model needs {WANTED_MEMORY} and more; close "
            "other programs (the embedded base runs all the same)"
        )
    return {"cores": allowed, "memory": {"total_gib": _gib(total), "available_gib": _gib(free)}}


def _container_limit() -> int | None:
    """Bytes that a Linux control group allows; None without a limit."""
    with contextlib.suppress(OSError, ValueError):
        return int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
    return None


def _devices(problems: list[str]) -> dict[str, Any]:
    import torch

    devices: list[dict[str, Any]] = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            free = torch.cuda.mem_get_info(index)[0]
            sizes = {"memory_gib": _gib(facts.total_memory), "free_gib": _gib(free)}
            devices.append({"device": f"cuda:{index}", "name": facts.name, **sizes})
            if free < WANTED_MEMORY * 2**30:
                problems.append(f"cuda:{index} has only {_gib(free)} GiB free: close what else uses it")
    elif torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": "Apple GPU"})
    elif shutil.which("nvidia-smi"):
        problems.append(
            f"there is an NVIDIA driver but torch {torch.__version__} cannot use it: install torch for CUDA "
            "from https://pytorch.org"
        )
    else:
        problems.append(
            "there is no GPU that torch can use: the embedded base trains in minutes, a real model takes days"
        )
    processor = {"device": "cpu", "name": platform.processor() or platform.machine()}
    return {"devices": devices or [processor], "threads": torch.get_num_threads()}


# --- trials -----------------------------------------------------------------------------------------------


def _attempt(trial: Callable[[], str], what: str, problems: list[str]) -> str:
    """What the trial found, or "no" and a problem. The libraries' own messages are swallowed."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return trial()
    except Exception as error:
        problems.append(f"{what} do not work here: {_reason(error)}")
        return "no"


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _processes(problems: list[str]) -> str:
    """Of this command, as accelerate's launcher started them."""
    problems += launch.advice()
    if launch.count() == 1:
        return "1 (accelerate launch starts several)"
    return _attempt(_try_processes, f"{launch.count()} processes together", problems)


def _try_processes() -> str:
    """All meet, tell where they are, and add up a number each."""
    import torch
    from accelerate.utils import gather_object

    from spf_kit.schema import Train
    from spf_kit.training.session import accelerator

    here = accelerator(Train())
    places = gather_object([f"{platform.node()} {here.device}"])
    total = here.reduce(torch.tensor([1.0 + here.process_index], device=here.device), "sum").item()
    backend = here.state.backend
    here.state.destroy_process_group()
    if total != sum(range(1, len(places) + 1)):
        raise RuntimeError(f"{backend} adds the numbers of {len(places)} processes up to {total:g}")
    return f"{len(places)} ({', '.join(places)}), which add up through {backend}"


def _try_bfloat16() -> str:
    """A small product in bfloat16 against the same in float32."""
    import torch

    device = _device()
    a, b = torch.ones(16, 16, device=device), torch.full((16, 16), 0.5, device=device)
    product = (a.bfloat16() @ b.bfloat16()).float()
    if not torch.equal(product, a @ b):
        raise RuntimeError("a matrix product comes out wrong")
    if device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "emulated (slow): use float16 on this GPU"
    return f"works on {device}"


def _try_bitsandbytes() -> str:
    """One step of an 8-bit AdamW, whose state must really be one byte a value."""
    import bitsandbytes
    import torch

    device = _device()
    weight = torch.nn.Parameter(torch.ones(64, 128, device=device))
    optimizer = bitsandbytes.optim.AdamW8bit([weight], lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = optimizer.state[weight]["state1"]
    if state.dtype != torch.uint8:
        raise RuntimeError(f"the state is {state.dtype}, not uint8")
    if not (weight < 1).all():
        raise RuntimeError("a step changes nothing")
    return f"8-bit AdamW works on {device}"


def _try_quantized() -> str:
    """A small layer of each kind against the plain one, forward and backward."""
    import torch

    from spf_kit.families.quantized import KINDS

    device = _device()
    plain = torch.nn.Linear(64, 64)
    x = torch.eye(64, device=device, requires_grad=True)
    for name, kind in KINDS.items():
        layer = kind(plain, torch.float32)
        layer.take(plain.weight, device)
        output = layer.to(device)(x)
        (gradient,) = torch.autograd.grad(output.sum(), x)
        wanted = plain.weight.sum(0).to(device).expand(64, 64)
        for found, exact in ((output.T, plain.weight + plain.bias[:, None]), (gradient, wanted)):
            if (found - exact.to(device)).norm() > 0.3 * exact.norm():
                raise RuntimeError(f"{name} gives something else than the plain layer")
    return f"{', '.join(KINDS)} work on {device}"


def _xformers(problems: list[str]) -> str:
    """Optional: not a problem where it is not installed."""
    try:
        importlib.metadata.version("xformers")
    except importlib.metadata.PackageNotFoundError:
        return "not installed (optional)"
    return _attempt(_try_xformers, "xformers' attention kernels", problems)


def _try_xformers() -> str:
    """Memory-efficient attention against torch's."""
    import torch
    from xformers.ops import memory_efficient_attention

    device = _device()
    dtype = torch.float16 if device == "cuda" else torch.float32
    q, k, v = torch.randn(3, 1, 8, 2, 16, device=device, dtype=dtype).unbind()  # (B, tokens, heads, features)
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    if not torch.allclose(memory_efficient_attention(q, k, v), expected.transpose(1, 2), atol=2e-2):
        raise RuntimeError("its attention differs from torch's")
    return f"works on {device}"


# --- places -----------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where downloaded models lie: what huggingface_hub uses."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub")


def _places(problems: list[str]) -> dict[str, Any]:
    """Free space of the working folder and of the cache, and whether a file can really be written."""
    found: dict[str, Any] = {}
    for name, folder in (("working folder", Path.cwd()), ("cache", cache_folder())):
        there = _existing(folder)
        free = shutil.disk_usage(there).free
        found[name] = {"path": str(folder), "free_gib": _gib(free), "writable": _writable(there)}
        if not found[name]["writable"]:
            remedy = "change to another one" if name == "working folder" else "set HF_HOME to another folder"
            problems.append(f"the {name} {str(folder)!r} cannot be written to: {remedy}")
        elif free < WANTED_DISK * 2**30:
            problems.append(f"the {name} {str(folder)!r} has only {_gib(free)} GiB left: free some space")
    return found


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists and in which it would be made."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"spf-kit")
            file.flush()
    except OSError:
        return False
    return True


def _gib(size: int) -> float:
    return round(size / 2**30, 1)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
