"""What a step of stage two costs beside a naive step, and each part of it: interleaved in one run.

    python bench/spf_step.py [--rounds 20] [--preset glasses]

CPU seconds of forward, backward and update on the embedded base, one thread; medians and ratios to naive.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from spf_kit import config
from spf_kit.training import session
from spf_kit.training.run_folder import RunFolder

TEXT, FINE = "loss.text_consistency.enabled=false", "loss.fine_grained.enabled=false"
VARIANTS = {
    "naive": ("naive", []),
    "spf": ("spf", []),
    "spf without text_consistency": ("spf", [TEXT]),
    "spf without text_consistency and fine_grained": ("spf", [TEXT, FINE]),
    "spf-paper without response_enhancement": ("spf-paper", ["loss.response_enhancement.enabled=false"]),
    "spf-paper, linear decoder": ("spf-paper", []),
    "output-preservation": ("output-preservation", []),
    "inverted-mask": ("inverted-mask", []),
}
STEPS = 1000  # of the run; the measured ones lie in its second half


def opened(preset: str, recipe: str, sets: list[str], folder: Path) -> Any:
    """A session that is ready to train."""
    quiet = ["evaluate.enabled=false", "preview.every=0", "train.threads=1", "train.log_tensorboard=false"]
    resolved = config.load(preset, recipe=recipe, sets=[*quiet, f"train.steps={STEPS}", *sets])
    processes = session.accelerator(resolved.config.train)
    return session.open_session(resolved, RunFolder(folder), processes, lambda *_: None, 1)


def step(s: Any, number: int) -> float:
    began = time.process_time()
    s.updater.backward(s.forward(number, 0).loss)
    s.updater.gradients()
    s.updater.apply(number)
    return time.process_time() - began


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--preset", default="glasses")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        sessions = {
            name: opened(options.preset, recipe, sets, Path(temporary) / str(number))
            for number, (name, (recipe, sets)) in enumerate(VARIANTS.items())
        }
        seconds: dict[str, list[float]] = {name: [] for name in sessions}
        for number in range(options.rounds + 2):
            for name, s in sessions.items():
                seconds[name].append(step(s, STEPS // 2 + 1 + number))
    naive = median(seconds["naive"][2:])
    for name, values in seconds.items():
        measured = sorted(values[2:])
        low, high = measured[len(measured) // 10], measured[-1 - len(measured) // 10]
        print(
            f"{name:48} {median(measured) * 1000:7.1f} ms  x{median(measured) / naive:.2f}  "
            f"({low / naive:.2f} to {high / naive:.2f})"
        )


if __name__ == "__main__":
    main()
