"""From the command to the first step, by part; and sampling beside the plain diffusers pipeline.

    python bench/start.py [--rounds 5] [--base embedded] [--parts start sampling]

Start: `glasses` with the recipe spf in a process of its own; wall and CPU seconds of each part, medians.
Sampling: the same LoRA, prompts and seeds through `spf_kit.sampling` and through StableDiffusionPipeline with
`load_lora_weights`, in turn, on the embedded base and one core (with more of them spf-kit draws on each); CPU
seconds, and how far the pictures are apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

PROMPTS = [f"a portrait, {hair} hair, wearing glasses" for hair in ("black", "brown", "red", "blond")]


# --- start ------------------------------------------------------------------------------------------------


def child(base: str, spawned: float) -> None:
    """Prints [(part, wall seconds, CPU seconds), ...]: each from the end of the part before it."""
    marks: list[tuple[str, float, float]] = [("", spawned, 0.0)]

    def mark(part: str) -> None:
        marks.append((part, time.time(), time.process_time()))

    mark("Python")
    import spf_kit.cli  # noqa: F401

    mark("the command line")
    from spf_kit import config

    with tempfile.TemporaryDirectory() as temporary:
        sets = ["evaluate.enabled=false", "preview.every=0", "train.log_tensorboard=false"]
        resolved = config.load("glasses", base=base, recipe="spf", steps=1, sets=sets)
        mark("the preset, and torch for its losses")
        import diffusers  # noqa: F401
        import transformers  # noqa: F401

        mark("import diffusers and transformers")
        import peft  # noqa: F401

        mark("import peft, and bitsandbytes by it")
        from spf_kit.training import trainer

        mark("import what is ours")
        phase = ["before the base"]

        def report(done: int, total: int, values: dict[str, Any]) -> None:
            if values["phase"] != phase[0]:
                mark(phase[0])
                phase[0] = values["phase"]

        trainer.train(resolved, Path(temporary) / "run", report=report)
    rows = [
        (part if part != marks[-1][0] else f"{part}, adapter, first step", wall - before[1], cpu - before[2])
        for before, (part, wall, cpu) in pairwise(marks)
    ]
    print(json.dumps(rows))


def start(base: str, rounds: int) -> None:
    runs = []
    for _ in range(rounds):
        command = [sys.executable, __file__, "--child", base, str(time.time())]
        runs.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    print("| part | wall s | CPU s |\n| --- | --- | --- |")
    for place, (part, *_) in enumerate(runs[0]):
        wall, cpu = (median(run[place][column] for run in runs) for column in (1, 2))
        print(f"| {part} | {wall:.2f} | {cpu:.2f} |")
    wall, cpu = (median(sum(row[column] for row in run) for run in runs) for column in (1, 2))
    print(f"| **to the end of the first step** | {wall:.2f} | {cpu:.2f} |")


# --- sampling ---------------------------------------------------------------------------------------------


def sampling(rounds: int, steps: int = 20) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    from spf_kit import families
    from spf_kit.adapters import files
    from spf_kit.adapters.inject import AdapterHandle
    from spf_kit.families.detect import embedded_folder
    from spf_kit.sampling import generate
    from spf_kit.schema import Adapter, Base

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    family = families.load(Base())
    handle = AdapterHandle.inject(family, Adapter(rank=8))
    draw = torch.Generator().manual_seed(0)
    for parameter in handle.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.02)
    seeds = list(range(len(PROMPTS)))
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "lora.safetensors"
        files.write(handle.to_lora_file({}), file, "kohya", "float32")
        pipeline = StableDiffusionPipeline.from_pretrained(embedded_folder(), safety_checker=None)
        pipeline.load_lora_weights(str(file))
    pipeline.scheduler = family.pipeline("ddim").scheduler
    pipeline.set_progress_bar_config(disable=True)

    def ours() -> torch.Tensor:
        return generate(family, PROMPTS, seeds, steps=steps, cfg=5.0, batch_size=len(PROMPTS))

    def theirs() -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(
            PROMPTS, generator=generators, num_inference_steps=steps, guidance_scale=5.0, output_type="pt"
        ).images

    seconds: dict[str, list[float]] = {"spf-kit": [], "diffusers": []}
    apart = 0.0
    for number in range(rounds + 1):
        pictures = []
        for name, function in (("spf-kit", ours), ("diffusers", theirs)):
            began = time.process_time()
            pictures.append(function())
            seconds[name] += [time.process_time() - began] if number else []
        apart = max(apart, float((pictures[0] - pictures[1]).abs().max()))
    ratio = median(a / b for a, b in zip(seconds["spf-kit"], seconds["diffusers"]))
    print("\n| sampling, 4 pictures | CPU s |\n| --- | --- |")
    for name, values in seconds.items():
        print(f"| {name} | {median(values):.2f} ({min(values):.2f} to {max(values):.2f}) |")
    print(f"\nratio {ratio:.3f}; the pictures differ by at most {apart:.1e} of 1")


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], float(sys.argv[3]))
        return
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--base", default="embedded")
    parser.add_argument("--parts", nargs="+", default=["start", "sampling"], choices=["start", "sampling"])
    options = parser.parse_args()
    if "start" in options.parts:
        start(options.base, options.rounds)
    if "sampling" in options.parts:
        sampling(options.rounds)


if __name__ == "__main__":
    main()
