"""What merging LoRAs into an SDXL checkpoint costs beside copying the file, in one run.

    python bench/merge.py [--rounds 3] [--folder /tmp] [--only lora ...]

Writes a single file with the true shapes of SDXL (6.9 GB, float16, random values) and LoRAs of every kind
into a temporary folder, which needs 15 GB. Then, in turn, in processes of their own: `cp` and `sync` of the
file, and `spf-kit merge`, which ends with the same `fsync`. Prints seconds, the ratio to the copy just
before, and the peak of resident memory above a process that has imported the libraries and nothing else.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from common import Shape, single_file_shapes, timed

from spf_kit.adapters import files
from spf_kit.adapters.layers import LohaLayer, LokrLayer, LoraLayer, OftLayer, Update
from spf_kit.adapters.parts import factorize
from spf_kit.families import ldm_keys
from spf_kit.families.detect import shipped_config
from spf_kit.families.loading import empty_module
from spf_kit.families.sources import components_of
from spf_kit.headers import encode_header

Modules = dict[tuple[str, str], Shape]
IDLE = "import spf_kit.adapters.compute, spf_kit.adapters.merge, spf_kit.cli, spf_kit.workflow, rich.progress"
KINDS, TOGETHER = ("lora", "locon", "dora", "loha", "lokr", "oft"), "together"
BLOCK = 8 * 2**20  # random values that are written over and over


def adaptable() -> Modules:
    """The weights of SDXL that LoRAs change, by component and module."""
    found: Modules = {}
    for component in components_of("sdxl"):
        for name, parameter in empty_module(component, shipped_config("sdxl", component)).named_parameters():
            name, shape = ldm_keys.standard_name(component, name), tuple(parameter.shape)
            if name.endswith(".weight") and len(shape) in (2, 4) and component != "vae":
                found[component, name.removesuffix(".weight")] = shape
    return found


def write_checkpoint(path: Path, tensors: dict[str, Shape]) -> Path:
    """Random values, and no holes: a file system reads and copies those faster."""
    values = (torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02).half().numpy().tobytes()
    left = 2 * sum(math.prod(shape) for shape in tensors.values())
    with path.open("wb") as file:
        file.write(encode_header({key: ("F16", shape) for key, shape in tensors.items()}, {}))
        while left:
            left -= file.write(values[: min(len(values), left)])
        os.fsync(file.fileno())
    return path


def attention(modules: Modules) -> Modules:
    """What kohya's trainer changes by default: 722 layers of the UNet, 72 and 192 of the text encoders."""
    return {
        (component, module): shape
        for (component, module), shape in modules.items()
        if (".attentions." if component == "unet" else ".layers.") in module
    }


def convolutions(modules: Modules) -> Modules:
    return {key: shape for key, shape in modules.items() if key[0] == "unet" and len(shape) == 4}


def layers_of(kind: str, modules: Modules) -> dict[tuple[str, str], Update]:
    """The layers of a LoRA of a kind, in float16."""
    generator = torch.Generator().manual_seed(1)

    def draw(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=generator) * 0.02).half()

    def lora(shape: Shape, rank: int, dora: bool = False) -> LoraLayer:
        tail = [1] * (len(shape) - 2)
        magnitude = draw(shape[0], 1, *tail).abs() + 0.6 if dora else None
        return LoraLayer(draw(rank, *shape[1:]), draw(shape[0], rank, *tail), float(rank), magnitude)

    def loha(shape: Shape, rank: int) -> LohaLayer:
        columns = math.prod(shape[1:])
        return LohaLayer(
            draw(shape[0], rank), draw(rank, columns), draw(shape[0], rank), draw(rank, columns), float(rank)
        )

    def lokr(shape: Shape) -> LokrLayer:
        (a, c), (b, d) = factorize(shape[0], 8), factorize(shape[1], 8)
        return LokrLayer(1.0, lokr_w1=draw(a, b), lokr_w2=draw(c, d, *shape[2:]))

    wide = attention(modules) | convolutions(modules)
    if kind in ("lora", "dora"):
        return {key: lora(shape, 16, kind == "dora") for key, shape in attention(modules).items()}
    if kind == "oft":
        return {k: OftLayer(draw(shape[0] // 8, 8, 8), 0.0) for k, shape in attention(modules).items()}
    make = {"locon": lambda shape: lora(shape, 8), "loha": lambda shape: loha(shape, 8), "lokr": lokr}[kind]
    return {key: make(shape) for key, shape in wide.items()}


def copied(source: Path, target: Path) -> float:
    """Seconds of `cp` and of writing it to the disk."""
    seconds = timed("cp", source, target)[0] + timed("sync", target)[0]
    target.unlink()
    return seconds


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where the temporary folder is made")
    parser.add_argument("--only", nargs="+", choices=(*KINDS, TOGETHER), help="some of the merges")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        modules = adaptable()
        base = write_checkpoint(folder / "sdxl.safetensors", single_file_shapes("sdxl"))
        wanted = options.only or [*KINDS, TOGETHER]
        made = {
            kind: files.write(files.LoraFile(layers_of(kind, modules)), folder / f"{kind}.safetensors")
            for kind in KINDS
            if kind in wanted or TOGETHER in wanted
        }
        merges = {name: list(made.values()) if name == TOGETHER else [made[name]] for name in wanted}
        print(f"{base.stat().st_size / 1e9:.2f} GB, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        measure(base, merges, folder / "out.safetensors", options.rounds)


def measure(base: Path, merges: dict[str, list[Path]], output: Path, rounds: int) -> None:
    idle = timed(sys.executable, "-c", IDLE)[1]
    rows: dict[str, list[tuple[float, float, int]]] = {name: [] for name in merges}
    for number in range(rounds):
        for name, paths in merges.items():
            copy = copied(base, output)
            merge = (sys.executable, "-m", "spf_kit", "merge", *paths)
            took, peak = timed(*merge, "--into", base, "--output", output)
            output.unlink()
            rows[name].append((copy, took, peak))
            print(f"round {number + 1}: cp + sync {copy:.1f} s, {name} {took:.1f} s", file=sys.stderr)
    print(f"{'':10} {'cp + sync':>9} {'merge':>7} {'ratio':>6} {'peak above idle':>16}")
    for name, found in rows.items():
        copy, took = (median(row[column] for row in found) for column in (0, 1))
        ratio, above = median(took / copy for copy, took, _ in found), max(peak for *_, peak in found) - idle
        print(f"{name:10} {copy:7.1f} s {took:5.1f} s {ratio:6.2f} {above / 1e6:13.0f} MB")


if __name__ == "__main__":
    main()
