"""Put trained parts into a StableDiffusionPipeline folder in half precision, each part swapped in whole.

    python -m spf_kit.embedded.build.assemble --parts work --output spf_kit/embedded/base

Parts are looked for as `tokenizer/`, `clip/clip`, `clip/text_encoder`, `vae/`, `unet/unet`, `judge/`; a part
that is not there yet is created with random weights, so that the folder always loads.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ModelMixin, UNet2DConditionModel

from spf_kit.embedded.build import attributes as at
from spf_kit.embedded.build import judge as judge_build
from spf_kit.embedded.build import tokenizer as tokenizer_build
from spf_kit.embedded.build.clip import new_clip
from spf_kit.embedded.build.clip import save as save_clip
from spf_kit.embedded.build.unet import new_unet
from spf_kit.embedded.build.vae import new_vae
from spf_kit.embedded.judge import AttributeJudge, JudgeNetwork

SCHEDULER = {  # Stable Diffusion 1.5's
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.30.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.30.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def swap(new: Path, place: Path) -> None:
    """Replace the folder `place` by `new`, with no moment in which it is half written."""
    old = place.with_name(place.name + ".old")
    if place.exists():
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def half(model: ModelMixin, folder: Path) -> None:
    model.to(torch.float16).save_pretrained(folder)


def clean(folder: Path) -> None:
    """Drop what names the place the weights came from; stored in half, but to be computed with in float32.

    Without the second, transformers loads the text encoder in half beside a UNet in float32.
    """
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        if "dtype" in config:
            config["dtype"] = "float32"
            for tower in ("text_config", "vision_config"):
                config.get(tower, {}).pop("dtype", None)
        path.write_text(json.dumps(config, indent=2) + "\n")


def make(part: str, parts: Path, folder: Path) -> None:
    """Write one part into `folder`, trained if it is there, random otherwise."""
    tokenizer_build.build(folder.parent / "tokenizer.made")
    tokenizer = tokenizer_build.CLIPTokenizer.from_pretrained(folder.parent / "tokenizer.made")
    torch.manual_seed(0)
    if part == "tokenizer":
        tokenizer.save_pretrained(folder)
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(folder.parent / "tokenizer.made" / name, folder / name)
    elif part in ("clip", "text_encoder"):
        source = parts / "clip" / part
        if not source.exists():
            save_clip(new_clip(tokenizer), tokenizer, folder.parent / "random")
            source = folder.parent / "random" / part
        shutil.copytree(source, folder)
    elif part == "vae":
        trained = (parts / "vae" / "config.json").exists()
        half(AutoencoderKL.from_pretrained(parts / "vae") if trained else new_vae(), folder)
    elif part == "unet":
        source = parts / "unet" / "unet"
        half(UNet2DConditionModel.from_pretrained(source) if source.exists() else new_unet(), folder)
    elif part == "judge":
        source = parts / "judge"
        if (source / "config.json").exists():
            judge = AttributeJudge.load(source)
        else:
            network = JudgeNetwork(sum(judge_build.SIZES), judge_build.WIDTHS)
            judge = AttributeJudge(network, {name: list(v) for name, v in at.ATTRIBUTES.items()})
        judge.save(folder, judge_build.WIDTHS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--only", nargs="*", default=["tokenizer", "clip", "text_encoder", "vae", "unet", "judge"]
    )
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")
    (options.output / "scheduler").mkdir(exist_ok=True)
    (options.output / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(SCHEDULER, indent=2) + "\n"
    )
    new = options.parts / "assembled"  # beside the parts: a rename needs the same file system, so copy over
    for part in options.only:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        make(part, options.parts, new / part)
        clean(new / part)
        beside = options.output / f".{part}.new"
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(new / part, beside)
        swap(beside, options.output / part)
    shutil.rmtree(new)
    size = sum(path.stat().st_size for path in options.output.rglob("*") if path.is_file())
    print(f"{size / 1e6:.2f} MB in {options.output}")


if __name__ == "__main__":
    main()
