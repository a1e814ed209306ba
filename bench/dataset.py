"""What data cost: the scan of many pictures, memory, caching beside a plain loop, waiting in a step.

    python bench/dataset.py [--counts 1000 10000 100000] [--parts scan caching waiting]

Pictures are generated: 32 x 32 pixels, no two alike, each with a caption of its own. Every scan runs in a
process of its own; its memory is what that process holds after the scan beyond what it held before, and the
peak meanwhile. CPU seconds, on one thread but for the scan's own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from spf_kit import config, families
from spf_kit.data.cache import LatentCache, View
from spf_kit.data.dataset import Dataset, survey
from spf_kit.schema import Base, Data
from spf_kit.training import session
from spf_kit.training.run_folder import RunFolder

MIB = 2**20
TARGET = "wearing glasses"


def write_pictures(folder: Path, count: int, side: int = 32) -> Path:
    """Noise of few pixels, enlarged: small files that decode like others. A folder for each thousand."""
    random = np.random.default_rng(0)
    for number in range(count):
        place = folder / f"{number // 1000:03d}"
        if number % 1000 == 0:
            place.mkdir(parents=True)
        pixels = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
        image.save(place / f"{number:06d}.png", compress_level=1)
        (place / f"{number:06d}.txt").write_text(f"a portrait, person {number}, {TARGET}")
    return folder


def memory(field: str = "VmRSS") -> int:
    """Bytes, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


# --- the scan ---------------------------------------------------------------------------------------------


def scanned(folder: Path) -> dict[str, Any]:
    """Scan, check and batches of a folder, without encoding."""
    family = families.load(Base())
    data = Data(path=str(folder), resolution=32, bucket_step=16, cache="none")
    before, wall, cpu = memory(), time.perf_counter(), time.process_time()
    survey(data, TARGET, family)
    survey_wall, survey_cpu = time.perf_counter() - wall, time.process_time() - cpu
    dataset = Dataset.prepare(data, TARGET, family)
    held, peak = memory() - before, memory("VmHWM")
    dataset.batch(0, 0, 4)  # draws the order of the epoch
    took = []
    for step in range(1, 101):
        began = time.process_time()
        dataset._draw(0, 0, step)
        took.append(time.process_time() - began)
    return {
        "pictures": len(dataset), "wall": survey_wall, "cpu": survey_cpu, "held": held, "peak": peak,
        "draw": median(took), "texts": len(dataset.texts() or ()),
    }  # fmt: skip


def scans(counts: list[int]) -> None:
    print("| pictures | scan, wall s | CPU s | CPU ms a picture | held MiB | KiB a picture | peak MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for count in counts:
        with tempfile.TemporaryDirectory() as temporary:
            folder = write_pictures(Path(temporary) / "pictures", count)
            command = [sys.executable, __file__, "--child", str(folder)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        each = found["cpu"] / count * 1e3
        print(
            f"| {count} | {found['wall']:.1f} | {found['cpu']:.1f} | {each:.2f} "
            f"| {found['held'] / MIB:.0f} | {found['held'] / count / 1024:.2f} "
            f"| {found['peak'] / MIB:.0f} |",
            flush=True,
        )


# --- caching ----------------------------------------------------------------------------------------------


def plain_loop(paths: list[Path], vae: Any, side: int) -> float:
    """Pictures per CPU second of the loop that everyone writes."""
    began = time.process_time()
    for path in paths:
        image = Image.open(path).convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            vae.encode(pixels).latent_dist.mode()
    return len(paths) / (time.process_time() - began)


def caching(count: int = 64, side: int = 64, rounds: int = 5) -> None:
    """In memory and on disk, cold and warm, beside the plain loop; in turn."""
    family = families.load(Base())
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["SPF_KIT_CACHE"] = f"{temporary}/cache"
        folder = write_pictures(Path(temporary) / "pictures", count, side)
        data = Data(path=str(folder), resolution=side, bucket_step=16, cache="none")
        entries = Dataset.prepare(data, TARGET, family).entries
        views = [View(entry.picture, entry.bucket) for entry in entries]
        paths = [entry.picture.path for entry in entries]
        rates: dict[str, list[float]] = {}
        for turn in range(rounds):
            os.environ["SPF_KIT_CACHE"] = f"{temporary}/cache-{turn}"
            rates.setdefault("plain loop over the VAE", []).append(plain_loop(paths, family.vae, side))
            for name, kind in (("memory", "memory"), ("disk", "disk"), ("disk, again", "disk")):
                cache = LatentCache(kind, family)
                began = time.process_time()
                cache.prepare(views)
                rates.setdefault(name, []).append(count / (time.process_time() - began))
    print("\n| caching | pictures per CPU second | beside the plain loop |\n| --- | --- | --- |")
    base = rates["plain loop over the VAE"]
    for name, values in rates.items():
        ratio = median(a / b for a, b in zip(values, base))
        print(f"| {name} | {median(values):.0f} ({min(values):.0f} to {max(values):.0f}) | {ratio:.2f} |")


# --- waiting ----------------------------------------------------------------------------------------------


def waiting(steps: int = 40) -> None:
    """The share of a training step that goes into its batch: `glasses`, embedded base, batch of four."""
    print("\n| cache | recipe | step, CPU ms | batch, CPU ms | share |\n| --- | --- | --- | --- | --- |")
    torch.set_num_threads(1)
    for kind in ("memory", "disk"):
        for recipe in ("naive", "spf"):
            with tempfile.TemporaryDirectory() as temporary:
                os.environ["SPF_KIT_CACHE"] = f"{temporary}/cache"
                sets = ["train.steps=1000", "preview.every=0", f"data.cache={kind}"]
                resolved = config.load("glasses", recipe=recipe, sets=sets)
                processes = session.accelerator(resolved.config.train)
                run = RunFolder(Path(temporary) / "run")
                s = session.open_session(resolved, run, processes, lambda *_: None, 1)
                whole, parts = [], []
                for number in range(501, 501 + steps):
                    began = time.process_time()
                    s._batch(s.dataset, 0, number, 0)
                    parts.append(time.process_time() - began)
                    began = time.process_time()
                    s.updater.backward(s.forward(number, 0).loss)
                    s.updater.gradients()
                    s.updater.apply(number)
                    whole.append(time.process_time() - began)
            step, batch = median(whole), median(parts)
            print(f"| {kind} | {recipe} | {step * 1e3:.1f} | {batch * 1e3:.2f} | {batch / step:.2%} |")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parts = {"scan": None, "caching": caching, "waiting": waiting}
    parser.add_argument("--parts", nargs="+", default=list(parts), choices=list(parts))
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        print(json.dumps(scanned(options.child)))
        return
    if "scan" in options.parts:
        scans(options.counts)
    if "caching" in options.parts:
        caching()
    if "waiting" in options.parts:
        waiting()


if __name__ == "__main__":
    main()
