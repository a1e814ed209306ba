"""What the training scripts share: pictures to tensors, a log, an average of weights, a seeded start."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


def start(seed: int, threads: int) -> None:
    """Seed everything; tiny models are slower with more threads, so each script says how many it wants."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(threads)


def to_tensor(pictures: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


class Budget:
    """How far a training has come: by processor time, which other work on the machine does not shorten, or
    with `steps` by counting, which alone makes the same weights again."""

    def __init__(
        self, minutes: float, steps: int | None = None, *, spent: float = 0.0, step: int = 0
    ) -> None:
        self.seconds, self.steps, self.spent, self.step = minutes * 60, steps, spent, step
        self._last = time.process_time()

    def advance(self) -> None:
        """One step is done."""
        now = time.process_time()
        self.spent, self.step, self._last = self.spent + now - self._last, self.step + 1, now

    @property
    def share(self) -> float:
        """From 0 to 1, where the training ends."""
        return self.step / self.steps if self.steps else self.spent / self.seconds

    def factor(self, warm_up: float = 0.02) -> float:
        """On the learning rate: linear for a share `warm_up`, then a cosine to 1% of it."""
        if self.share < warm_up:
            return max(self.share / warm_up, 0.01)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (self.share - warm_up) / (1 - warm_up))))


class Average:
    """Exponential moving average of a module's parameters, with the usual warm-up of the decay."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.count = module, decay, 0
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        for key, value in self.module.state_dict().items():
            if value.is_floating_point():
                self.shadow[key].lerp_(value, 1 - decay)
            else:
                self.shadow[key].copy_(value)

    def swap(self) -> None:
        """Exchange the module's weights and their average; call twice to restore."""
        now = {k: v.detach().clone() for k, v in self.module.state_dict().items()}
        self.module.load_state_dict(self.shadow)
        self.shadow = now


class Log:
    """One JSON line an entry, on standard output and in a file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a")
        self.began = time.time()

    def __call__(self, **entry: float | int | str | dict) -> None:
        rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in entry.items()}
        line = json.dumps({"seconds": round(time.time() - self.began, 1), **rounded})
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()
