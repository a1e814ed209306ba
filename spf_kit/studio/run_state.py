"""How a run stands, from its folder and the processes: for any page, at any time."""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spf_kit.studio import processes

TAIL = 2**16  # bytes: several lines of metrics


@dataclass(frozen=True)
class RunState:
    """`step` of `steps` are done; `steps` is 0 where they are counted in epochs."""

    running: bool
    step: int
    steps: int
    begun: bool  # its folder holds a run
    finished: bool  # its LoRA is written
    words: str  # what it said last

    def sentence(self, name: str) -> str:
        """For people."""
        done = f"step {self.step}" + (f" of {self.steps}" if self.steps else "")
        if self.running:
            what = "starting" if not self.step else f"training, {done}"
            return f"{name}: {'measuring and drawing' if self.finished else what}"
        if self.finished:
            return f"{name}: finished at {done}. {self.words}".strip()
        if self.begun:
            return f"{name}: stopped at {done}. {self.words}".strip()
        return f"{name}: {self.words}" if self.words else f"{name}: not started"


def look(run: Path) -> RunState:
    """Look at a run folder, which need not be there yet."""
    config = _config(run)
    name = config.get("attribute", {}).get("name", "")
    step = last_step(run)
    steps = config.get("train", {}).get("steps", 0)
    written = (
        any((run / file).exists() for file in (f"{name}.safetensors", f"{name}-peft")) if name else False
    )
    running = processes.find(run) is not None
    finished = written and (not steps or step >= steps)
    return RunState(running, step, steps, bool(config), finished, processes.last_words(run))


def last_step(run: Path) -> int:
    """The step of the last whole line of a run's metrics; 0 where there is none."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            lines = file.read().split(b"\n")[:-1]
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _config(run: Path) -> dict[str, Any]:
    try:
        return tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
