"""Checkpoints: everything that a run needs to go on as if it had never stopped.

`checkpoints/step-000200/` holds `adapter.safetensors` (the weights in training, float32), `state.pt`
(optimizer, scaler, EMA, plugins, walks, the best step so far) and `checkpoint.json` (step, threads, how many
processes began the run, hashes of what is frozen, versions). Nothing in it belongs to one process, so that
any number of them can go on from it.
A checkpoint is written beside and renamed, so that a folder of that name is complete.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spf_kit import __version__
from spf_kit.errors import UserError
from spf_kit.files import atomic

NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, in memory."""

    step: int
    threads: int
    processes: int  # that began the run: the samples in a batch are those of so many
    adapter: Mapping[str, Tensor]
    updater: Mapping[str, Any]
    plugins: Mapping[str, dict[str, Any]]  # each plugin's state by id
    walks: Mapping[str, Any] = field(default_factory=dict)
    selection: Mapping[str, Any] = field(default_factory=dict)  # the best step so far, with its weights
    frozen: Mapping[str, str] = field(default_factory=dict)  # what lies under the adapter, and its hash


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def steps(folder: Path) -> list[int]:
    """The steps of which there are checkpoints, ascending."""
    if not folder.is_dir():
        return []
    found = (NAME.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in found if match)


def save(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write a checkpoint and remove all but the newest `keep`.

    Raises UserError if the disk refuses.
    """
    path = path_of(folder, checkpoint.step)
    with atomic(path, folder=True) as temporary:
        save_file(dict(checkpoint.adapter), temporary / "adapter.safetensors")
        kept = ("updater", "plugins", "walks", "selection")
        torch.save({name: getattr(checkpoint, name) for name in kept}, temporary / "state.pt")
        facts = {
            "step": checkpoint.step,
            "threads": checkpoint.threads,
            "processes": checkpoint.processes,
            "frozen": dict(checkpoint.frozen),
            "versions": {"spf-kit": __version__, "torch": str(torch.__version__)},
        }
        (temporary / "checkpoint.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for step in steps(folder)[:-keep]:
        _remove(path_of(folder, step))
    return path


def load(path: Path) -> Checkpoint:
    """Read a checkpoint. Nothing in it is executed: `state.pt` may hold tensors and plain values only.

    Raises UserError if it is damaged.
    """
    try:
        facts = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
        adapter = load_file(path / "adapter.safetensors")
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        return Checkpoint(
            facts["step"],
            facts["threads"],
            facts["processes"],
            adapter,
            state["updater"],
            state["plugins"],
            state.get("walks", {}),
            state.get("selection", {}),
            facts.get("frozen", {}),
        )
    except Exception as error:  # damage shows as a dozen kinds of error
        raise UserError(
            f"the checkpoint {str(path)!r} cannot be read ({type(error).__name__}: {error}): delete this "
            "folder to go on from the one before"
        ) from error


def _remove(path: Path) -> None:
    """Rename first: a folder half deleted must not look like a checkpoint."""
    aside = path.with_name(f".{path.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def clean(folder: Path) -> None:
    """Remove what an interrupted write or deletion left behind."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.is_dir() and path.name.startswith(".step-"):
                shutil.rmtree(path, ignore_errors=True)
