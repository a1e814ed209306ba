"""Do files of the true shapes load everywhere? Each loader's count of the keys that it takes and ignores.

    python bench/true_shape.py [--threads 1] [--skip-training]

A Stable Diffusion 1.5 checkpoint with random weights (LDM layout, float16, 2 GB) is written to a temporary
folder, a LoRA is trained on it by the command line (2 steps, 2 pictures, 128 pixels), and its layers are
written in every format there is. Stable Diffusion XL's layers are made without training. Loaders get the
architectures without weights (the meta device): what they take is what has an adapter afterwards, and its
scale is compared with that of the file.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from common import timed, write_checkpoint
from torch import nn

from spf_kit.adapters import files, keys
from spf_kit.adapters.files import LoraFile
from spf_kit.adapters.fit import match
from spf_kit.adapters.index import LayerKey
from spf_kit.adapters.layers import LAYERS
from spf_kit.adapters.parts import new_parts
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
    "train.batch_size=1", "train.optimizer=adamw", "train.gradient_checkpointing=false",
    "train.mixed_precision=no", "base.dtype=float32",  # what any CPU computes with
]  # fmt: skip


# --- the checkpoint, and a LoRA that is trained on it -----------------------------------------------------


def train(checkpoint: Path, folder: Path, threads: int) -> Path:
    """Two steps by the command line; prints seconds and peak memory."""
    data = folder / "pictures"
    data.mkdir()
    for picture in sorted(data_path("glasses").glob("*.png"))[:2]:
        for file in (picture, picture.with_suffix(".txt")):
            (data / file.name).write_bytes(file.read_bytes())
    sets = [
        *SETTINGS,
        f"adapter.rank={RANK}",
        f"adapter.alpha={ALPHA}",
        f"adapter.targets={json.dumps(TARGETS)}",
    ]
    sets.append(f"train.threads={threads}")
    command = [sys.executable, "-m", "spf_kit", "train", "glasses", "--recipe", "naive", "--steps", "2"]
    places = ["--base", checkpoint, "--data", data, "--output", folder / "run"]
    alone = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    seconds, peak = timed(*command, *places, *(f"--set={text}" for text in sets), environment=alone)
    print(f"trained 2 steps on it in {seconds:.0f} s, at most {peak / 2**30:.1f} GB", flush=True)
    return folder / "run" / "glasses.safetensors"


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
    parser.add_argument("--skip-training", action="store_true", help="make SD 1.5's LoRA as SDXL's")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lora = made("sd15", "lora")
        if not options.skip_training:
            checkpoint = write_checkpoint(folder / "base.safetensors")
            size, tensors = checkpoint.stat().st_size / 2**30, len(read_header(checkpoint).tensors)
            print(f"a checkpoint of {size:.2f} GB, {tensors} tensors", flush=True)
            lora = files.read(train(checkpoint, folder, options.threads))
            lora.path = None
        count(lora, "lora", "sd15", folder)
        for family, kind in (
            ("sd15", "loha"),
            ("sd15", "lokr"),
            ("sdxl", "lora"),
            ("sdxl", "loha"),
            ("sdxl", "lokr"),
        ):
            count(made(family, kind), kind, family, folder)


if __name__ == "__main__":
    main()
