"""Peak resident memory of a whole training run at Stable Diffusion 1.5's true shape, on the CPU.

    python bench/resident.py [--dtype float32 bfloat16] [--stored F16 F32] [--pixels 128] [--steps 3]

A checkpoint with random weights is generated, and `spf-kit train` runs in a process of its own, from its
first import to the LoRA file: naive and spf, rank 8, one picture a step, no previews and no evaluation. The
peak is the system's (VmHWM): weights, activations, libraries, and the file's pages while they are mapped.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from itertools import product
from pathlib import Path

from common import timed, write_checkpoint

from spf_kit.embedded import data_path

GIB = 2**30
LIMITS = {"float32": 3.9, "bfloat16": 2.2}  # GiB that we aim at
SETTINGS = [
    "evaluate.enabled=false", "preview.every=0", "train.batch_size=1", "train.optimizer=adamw",
    "train.gradient_checkpointing=false", "adapter.rank=8", "train.checkpoint_every=0",
]  # fmt: skip


def train(
    checkpoint: Path, data: Path, folder: Path, recipe: str, dtype: str, pixels: int, steps: int
) -> int:
    """Bytes at the peak of one run."""
    precision = {"float32": "no", "bfloat16": "bf16"}[dtype]
    sets = [
        *SETTINGS,
        f"base.dtype={dtype}",
        f"train.mixed_precision={precision}",
        f"data.resolution={pixels}",
    ]
    command = [
        sys.executable, "-m", "spf_kit", "train", "glasses", "--base", checkpoint, "--data", data,
        "--recipe", recipe, "--steps", str(steps), "--output", folder, "--json",
    ]  # fmt: skip
    return timed(*command, *(word for setting in sets for word in ("--set", setting)))[1]


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=list(LIMITS))
    parser.add_argument("--stored", nargs="+", default=["F16"], choices=["F16", "F32"], help="in the file")
    parser.add_argument("--recipe", nargs="+", default=["naive", "spf"])
    parser.add_argument("--checkpoint", type=Path, help="an SD 1.5 file to use instead of writing one")
    parser.add_argument("--pixels", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = folder / "pictures"
        data.mkdir()
        for picture in sorted(data_path("glasses").glob("*.png"))[:2]:
            for file in (picture, picture.with_suffix(".txt")):
                shutil.copy(file, data)
        print(
            "| file | base.dtype | recipe | peak GiB | aim |\n| --- | --- | --- | --- | --- |",
            flush=True,
        )
        for stored in options.stored:
            checkpoint = options.checkpoint or write_checkpoint(folder / "sd15.safetensors", stored)
            for dtype, recipe in product(options.dtype, options.recipe):
                run = folder / f"{stored}-{dtype}-{recipe}"
                peak = train(checkpoint, data, run, recipe, dtype, options.pixels, options.steps)
                print(f"| {stored} | {dtype} | {recipe} | {peak / GIB:.2f} | {LIMITS[dtype]} |", flush=True)


if __name__ == "__main__":
    main()
