"""Do files of the true shapes load everywhere? Each loader's count of the keys that it takes and ignores.

    python bench/true_shape.py [--threads 1] [--families sd15 sdxl] [--skip-training]

Checkpoints with random weights (Stable Diffusion 1.5 in float16, 2 GB; XL in bfloat16, 6.9 GB; LDM layout)
are written to a temporary folder, which needs 25 GB. On each a LoRA is trained by the command line (2 steps,
2 pictures, 128 pixels), goes through every format and back, and is merged into the checkpoint, beside `cp` of
the same file. Its layers, and a LoHa and a LoKr on the same ones, are written in every format there is.
Loaders get the architectures without weights (the meta device): what they take is what has an adapter
afterwards, and its scale is compared with that of the file. Training takes 6 GB for 1.5 and 10 GB for XL.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from common import timed, write_checkpoint
from merge import IDLE, copied
from torch import nn

from spf_kit.adapters import convert, files, keys
from spf_kit.adapters.files import LoraFile
from spf_kit.adapters.fit import match
from spf_kit.adapters.index import LayerKey
from spf_kit.adapters.layers import LAYERS
from spf_kit.adapters.parts import new_parts
from spf_kit.adapters.resize import share
from spf_kit.console import quiet_libraries
from spf_kit.embedded import data_path
from spf_kit.families import ldm_keys
from spf_kit.families.detect import shipped_config
from spf_kit.families.loading import empty_module
from spf_kit.families.sources import components_of
from spf_kit.headers import read_header

RANK, ALPHA = 4, 2.0
TARGETS = ["cross-attention", "self-attention", "feed-forward", "convolutions", "text-encoder"]
SETTINGS = [
    "evaluate.enabled=false", "preview.every=0", "train.log_tensorboard=false", "data.resolution=128",
    "train.batch_size=1", "train.optimizer=adamw", "train.mixed_precision=no",
    f"adapter.rank={RANK}", f"adapter.alpha={ALPHA}", f"adapter.targets={json.dumps(TARGETS)}",
]  # fmt: skip
OWN_SETTINGS = {  # what a CPU computes with, in the memory that most have
    "sd15": ["base.dtype=float32", "train.gradient_checkpointing=false"],
    "sdxl": ["base.dtype=bfloat16", "train.gradient_checkpointing=true"],
}
TYPES = {"sd15": "F16", "sdxl": "BF16"}  # of the checkpoints


# --- the checkpoint, and a LoRA that is trained on it -----------------------------------------------------


def train(family: str, checkpoint: Path, folder: Path, threads: int) -> Path:
    """Two steps by the command line; prints seconds and peak memory."""
    data = folder / "pictures"
    data.mkdir(exist_ok=True)
    for picture in sorted(data_path("glasses").glob("*.png"))[:2]:
        for file in (picture, picture.with_suffix(".txt")):
            (data / file.name).write_bytes(file.read_bytes())
    sets = [*SETTINGS, *OWN_SETTINGS[family], f"train.threads={threads}"]
    command = [sys.executable, "-m", "spf_kit", "train", "glasses", "--recipe", "naive", "--steps", "2"]
    places = ["--base", checkpoint, "--data", data, "--output", folder / family]
    alone = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    seconds, peak = timed(*command, *places, *(f"--set={text}" for text in sets), environment=alone)
    print(f"trained 2 steps on it in {seconds:.0f} s, at most {peak / 1e9:.1f} GB", flush=True)
    return folder / family / "glasses.safetensors"


def round_trip(lora: Path, folder: Path) -> None:
    """From kohya's format through the others and back by `convert`; prints what changed on the way."""
    path, before = lora, files.read(lora)
    for format in ("diffusers", "peft", "kohya"):
        target = folder / (f"trip-{format}" if format == "peft" else f"trip-{format}.safetensors")
        convert.convert(path, target, format, overwrite=True)
        path = target
    after = files.read(path)
    same = before.layers.keys() == after.layers.keys()
    changed = max(share(layer, after.layers[key]).residual for key, layer in before.layers.items())
    print(f"through diffusers and peft and back: {len(after.layers)} layers, ", end="")
    print(f"{'the same' if same else 'OTHERS'}, what they add changed by at most {changed:.1e}", flush=True)


def merge_beside_copy(lora: Path, checkpoint: Path, output: Path) -> None:
    """Prints seconds and memory of the merge, and seconds of the copy just before."""
    idle = timed(sys.executable, "-c", IDLE)[1]
    copy = copied(checkpoint, output)
    merge = (sys.executable, "-m", "spf_kit", "merge", lora, "--into", checkpoint, "--output", output)
    seconds, peak = timed(*merge)
    output.unlink()
    print(f"cp and sync {copy:.1f} s, merge {seconds:.1f} s ({seconds / copy:.2f} times), ", end="")
    print(f"{(peak - idle) / 1e6:.0f} MB above idle", flush=True)


# --- layers of a family -----------------------------------------------------------------------------------


def modules(family: str) -> dict[str, nn.Module]:
    """What a LoRA may change, without weights."""
    own = [component for component in components_of(family) if component != "vae"]
    return {component: empty_module(component, shipped_config(family, component)) for component in own}


@cache
def adaptable(family: str) -> dict[LayerKey, tuple[int, ...]]:
    """Shapes of all that the targets name, by the names in files."""
    found: dict[LayerKey, tuple[int, ...]] = {}
    for component, root in modules(family).items():
        for name, module in root.named_modules():
            key = (component, file_name(component, name))
            is_matrix = isinstance(module, (nn.Linear, nn.Conv2d))
            known = keys.target_group(*key) != "other" and "embedding" not in name
            if is_matrix and known and "text_projection" not in name:
                found[key] = tuple(module.weight.shape)
    return found


def file_name(component: str, module: str) -> str:
    return module if component == "unet" else ldm_keys.standard_name(component, module)


def made(family: str, kind: str) -> LoraFile:
    """An adapter of small random values for every layer."""
    draw, layers = torch.Generator().manual_seed(0), {}
    for key, shape in adaptable(family).items():
        parts = {
            part: torch.randn(size, generator=draw) * 0.01
            for part, size in new_parts(kind, shape, RANK).items()
        }
        layers[key] = LAYERS[kind].from_parts(parts, ALPHA, shape)
    version = {"sd15": "sd_v1", "sdxl": "sdxl_base_v1-0"}[family]
    return LoraFile(layers, {"ss_base_model_version": version})


# --- loaders ----------------------------------------------------------------------------------------------


def ours(path: Path, family: str) -> dict[LayerKey, float]:
    """The layers that fit, with their scales."""
    lora = files.read(path)
    places: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for (component, module), shape in adaptable(family).items():
        places.setdefault(component, {})[keys.flatten(module)] = (module, shape)
    return {key: lora.layers[key].scale for key in match(lora, places, base=family, family=family)}


def diffusers(path: Path, family: str) -> dict[LayerKey, float]:
    import diffusers as library

    own = modules(family)
    nothing: dict[str, Any] = dict.fromkeys(("vae", "tokenizer", "feature_extractor"))
    if family == "sdxl":
        pipeline = library.StableDiffusionXLPipeline(
            **own, **nothing, tokenizer_2=None, scheduler=library.DDIMScheduler(), add_watermarker=False
        )
    else:
        pipeline = library.StableDiffusionPipeline(
            **own, **nothing, scheduler=library.DDIMScheduler(), safety_checker=None,
            requires_safety_checker=False,
        )  # fmt: skip
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    return adapted(own)


def peft(path: Path, family: str) -> dict[LayerKey, float]:
    from peft import PeftModel

    own = modules(family)
    for component, root in own.items():
        PeftModel.from_pretrained(root, path / component, low_cpu_mem_usage=True)
    return adapted(own)


def adapted(own: Mapping[str, nn.Module]) -> dict[LayerKey, float]:
    """The modules that have an adapter now, with its scale."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        (component, file_name(component, name)): next(iter(module.scaling.values()))
        for component, root in own.items()
        for name, module in root.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


LOADERS: Mapping[str, Callable[[Path, str], dict[LayerKey, float]]] = {
    "ours": ours,
    "diffusers": diffusers,
    "peft": peft,
}
FORMATS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "lora": {"kohya": ("ours", "diffusers"), "diffusers": ("ours", "diffusers"), "peft": ("ours", "peft")},
    "loha": {"kohya": ("ours",), "peft": ("ours", "peft")},
    "lokr": {"kohya": ("ours",), "peft": ("ours", "peft")},
}


def count(lora: LoraFile, kind: str, family: str, folder: Path) -> None:
    """One line for each format: the file's keys, and for each loader those taken, ignored, wrongly scaled."""
    for format, loaders in FORMATS[kind].items():
        path = folder / (f"{family}-{kind}" if format == "peft" else f"{family}-{kind}-{format}.safetensors")
        files.write(lora, path, format, "float16")  # type: ignore[arg-type]
        held, told = list(layers_of(path)), []
        for loader in loaders:
            found = LOADERS[loader](path, family)
            taken = sum(key in found for key in held)
            # diffusers' files have the scale in their tensors
            wanted = {key: 1.0 if format == "diffusers" else lora.layers[key].scale for key in found}
            wrong = sum(abs(scale - wanted[key]) > 1e-6 for key, scale in found.items())
            told.append(
                f"{loader} took {taken}, ignored {len(held) - taken}, scaled {wrong} layers otherwise"
            )
        size = sum(file.stat().st_size for file in _weights(path)) / 2**20
        print(f"{family} {kind} {format}, {len(held)} keys, {size:.1f} MB: {'; '.join(told)}", flush=True)


def layers_of(path: Path) -> Iterator[LayerKey]:
    """The layer of each key; peft's folders tell the components, not its names."""
    for file in _weights(path):
        for name in read_header(file).tensors:
            key = keys.parse(name)
            assert key is not None, name
            yield (file.parent.name if path.is_dir() else key.component), key.module


def _weights(path: Path) -> list[Path]:
    return sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--families", nargs="+", choices=tuple(TYPES), default=list(TYPES))
    parser.add_argument("--folder", type=Path, default=None, help="where the temporary folder is made")
    parser.add_argument("--skip-training", action="store_true", help="make LoRAs as LoHas: of random values")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    quiet_libraries()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        for family in options.families:
            lora = made(family, "lora")
            if not options.skip_training:
                lora = trained(family, Path(temporary), options.threads)
            count(lora, "lora", family, Path(temporary))
            for kind in ("loha", "lokr"):
                count(made(family, kind), kind, family, Path(temporary))


def trained(family: str, folder: Path, threads: int) -> LoraFile:
    """A LoRA that has been all the way: trained, converted, merged. The checkpoint goes again."""
    checkpoint = write_checkpoint(folder / f"{family}.safetensors", TYPES[family], family)
    size, tensors = checkpoint.stat().st_size / 1e9, len(read_header(checkpoint).tensors)
    print(f"{family}: a checkpoint of {size:.2f} GB, {tensors} tensors", flush=True)
    path = train(family, checkpoint, folder, threads)
    round_trip(path, folder)
    merge_beside_copy(path, checkpoint, folder / "merged.safetensors")
    checkpoint.unlink()
    lora = files.read(path)
    lora.path = None
    return lora


if __name__ == "__main__":
    main()
