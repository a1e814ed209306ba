"""Is the estimate right? Peaks of steps without values beside the resident memory of the same steps.

    python bench/estimate.py [--write]

Each setting runs twice in processes of its own: once without values, accounted as the CPU allocates, and once
on real tensors, where the kernel's high-water mark (VmHWM) above what was resident before the step is
measured. glibc hands freed blocks back at once (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_), so that the
resident memory follows the living. Weights, adapter and optimizer state, which both have from the start, are
subtracted. `--write` puts the table into docs/memory.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOC = ROOT / "docs" / "memory.md"
BEGIN, END = "<!-- bench/estimate.py -->", "<!-- end -->"
SIDE = 256  # pixels, for the embedded base: large enough that activations outweigh what kernels need inside
PLAIN = {"train.batch_size": 2, "data.resolution": SIDE}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "naive": ("naive", {}),
    "naive, one picture": ("naive", {"train.batch_size": 1}),
    "naive, four pictures": ("naive", {"train.batch_size": 4}),
    "naive, checkpointing": ("naive", {"train.gradient_checkpointing": True, "train.batch_size": 4}),
    "naive, rank 64": ("naive", {"adapter.rank": 64}),
    "naive, DoRA": ("naive", {"adapter.dora": True}),
    "naive, accumulation and EMA": ("naive", {"train.gradient_accumulation": 2, "train.ema": 0.9}),
    "naive, AdamW 8-bit": ("naive", {"train.optimizer": "adamw8bit"}),
    "naive, lying pictures": ("naive", {"size": [48, 80]}),
    "output-preservation": ("output-preservation", {}),
    "inverted-mask": ("inverted-mask", {}),
    "spf": ("spf", {}),
    "spf, all layers tapped": ("spf", {"loss.text_consistency.layers": ["all"]}),
    "spf, checkpointing": ("spf", {"train.gradient_checkpointing": True}),
    "prior-preservation": ("prior-preservation", {}),
}


def resolved(name: str) -> tuple[Any, tuple[int, int]]:
    """The preset of a setting, and (h, w) of its latents."""
    from spf_kit import config

    recipe, own = SETTINGS[name]
    own = {**PLAIN, **own}
    size = own.pop("size", [SIDE // 4, SIDE // 4])
    sets = [f"{key}={json.dumps(value)}" for key, value in own.items()]
    return config.load("glasses", recipe=recipe, sets=sets), (size[0], size[1])


def bare(name: str) -> int:
    """Bytes at the peak of a step without values, beyond what it begins with."""
    from spf_kit.estimate.opened import opened

    preset, size = resolved(name)
    with opened(preset, size, on_gpu=False) as run:
        moment = run.rehearsal.demanding()[0]
        run.rehearsal.settle()
        before = run.rehearsal.tracker.total
        return run.rehearsal.step(size, moment).total - before


def real(name: str) -> int:
    """Bytes of resident memory at the peak of the step on real tensors, beyond what it begins with."""
    import torch

    from spf_kit import families
    from spf_kit.adapters.inject import AdapterHandle
    from spf_kit.estimate.rehearsal import Rehearsal
    from spf_kit.training import tools

    class Silent:
        """A tracker that does not look: the step runs as the trainer's."""

        def __getattr__(self, name: str) -> Any:
            import contextlib

            return contextlib.nullcontext if name == "part" else lambda *_: None

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

        peak = None

    torch.set_num_threads(1)
    preset, size = resolved(name)
    family = families.load(preset.config.base)
    plugins, _ = tools.split_by_clip(preset.plugins, preset.config, family)
    for module in family.modules():  # mapped weights become resident: reading them is no part of the step
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()
    handle = AdapterHandle.inject(family, preset.config.adapter)
    silent: Any = Silent()
    rehearsal = Rehearsal(preset.config, plugins, family, handle, silent)
    moment = rehearsal.demanding()[0]
    rehearsal.step((8, 8), moment)  # libraries load their code and make their buffers
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts anew
    before = _status("VmRSS")
    rehearsal.step(size, moment)
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def measure(kind: str, name: str) -> int:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "16384",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_TOP_PAD_": "0",
        "MALLOC_MMAP_MAX_": "1000000",
    }
    done = subprocess.run(
        [sys.executable, __file__, "--one", kind, name], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/memory.md")
    parser.add_argument("--only", help="settings whose name holds this")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print({"bare": bare, "real": real}[asked.one[0]](asked.one[1]))
        return
    rows, mib = ["| setting | estimated MiB | measured MiB | ratio |", "| --- | --- | --- | --- |"], 2**20
    print(*rows, sep="\n")
    for name in SETTINGS:
        if asked.only and asked.only not in name:
            continue
        expected, found = measure("bare", name), measure("real", name)
        rows.append(f"| {name} | {expected / mib:.1f} | {found / mib:.1f} | {expected / found:.3f} |")
        print(rows[-1], flush=True)
    if asked.write:
        head, rest = DOC.read_text(encoding="utf-8").split(BEGIN)
        table = "\n".join([BEGIN, *rows, END])
        DOC.write_text(head + table + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
