"""Which family a model belongs to, from names, shapes and configs alone. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from spf_kit.errors import UserError
from spf_kit.headers import Header

SUPPORTED = "this version trains Stable Diffusion 1.x models and the embedded base"
UNET = "model.diffusion_model."
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
CONFIGS = Path(__file__).parent / "configs"

# (part of a key, what the file is); the first hit counts, so the particular stands before the general
_OTHER_ARCHITECTURES = (
    ("joint_blocks.", "a Stable Diffusion 3 checkpoint"),
    ("double_blocks.", "a FLUX checkpoint"),
    ("single_transformer_blocks.", "a FLUX checkpoint"),
    ("motion_modules.", "an AnimateDiff motion module"),
    ("control_model.", "a ControlNet"),
    ("controlnet_cond_embedding.", "a ControlNet"),
    ("conditioner.embedders.1.", "an SDXL checkpoint"),
    ("conditioner.embedders.0.model.", "an SDXL refiner"),
    (f"{UNET}label_emb.", "an SDXL checkpoint"),
    ("add_embedding.linear_1", "an SDXL checkpoint"),
    ("cond_stage_model.model.", "a Stable Diffusion 2.x checkpoint"),
    ("model.diffusion_model.transformer_blocks.", "a checkpoint of a diffusion transformer"),
    ("model.diffusion_model.blocks.", "a checkpoint of a diffusion transformer"),
)
_LORA = (
    "lora_down.", "lora_up.", "lora_A.", "lora_B.", "lora.down.", "lora.up.", "hada_w1_a", "lokr_w1",
    "oft_blocks",
)  # fmt: skip
# input channels of the UNet other than the latents' 4
_INPUTS = {9: "an inpainting model", 8: "an InstructPix2Pix model", 7: "an upscaler", 5: "a depth model"}
_PARTS = (
    ("encoder.down.", "a VAE alone; give it as `vae` of [base] and a complete checkpoint as `model`"),
    ("encoder.down_blocks.", "a VAE alone; give it as `vae` of [base] and a complete checkpoint as `model`"),
    ("down_blocks.", "a UNet alone; give the diffusers folder that it belongs to"),
    ("text_model.", "a text encoder alone; give the diffusers folder that it belongs to"),
    ("emb_params", "a textual inversion embedding, not a base model"),
)


def refuse_pickle(path: Path) -> None:
    """Raises UserError for a file whose name says that it holds pickles, with the way to convert it."""
    if path.suffix.lower() in PICKLES:
        raise UserError(
            f"{str(path)!r} is a pickle, which can run any code when it is opened, so it is not read; "
            "convert it to .safetensors once (A1111: Checkpoint Merger, 'No interpolation', 'safetensors'; "
            "ComfyUI: Load Checkpoint to Save Checkpoint) and give that file"
        )


def family_of_file(header: Header) -> str:
    """The family ("sd15" or "embedded") of a single-file checkpoint in the LDM layout.

    Raises UserError, one sentence, for LoRAs, parts of models and architectures that are not supported.
    """
    path, keys = str(header.path), header.tensors
    first = keys.get(f"{UNET}input_blocks.0.0.weight")
    if any(part in key for key in keys for part in _LORA):
        raise UserError(f"{path!r} is a LoRA, not a base model; give the checkpoint that it was trained on")
    for part, kind in _OTHER_ARCHITECTURES:
        if any(part in key for key in keys):
            raise UserError(_not_supported(path, kind))
    if first is None or len(first.shape) != 4:
        for part, kind in _PARTS:
            if any(key.startswith(part) or f".{part}" in key for key in keys):
                raise UserError(f"{path!r} is {kind}")
        raise UserError(
            f"{path!r} is not a Stable Diffusion checkpoint: it holds no {UNET}input_blocks.0.0.weight"
        )
    width, channels = first.shape[0], first.shape[1]
    context = next(
        (i.shape[1] for k, i in keys.items() if k.endswith("attn2.to_k.weight") and len(i.shape) == 2), 0
    )
    return family_of_sizes(path, channels, width, context, declared=header.metadata.get("spf_kit.base"))


def family_of_unet(location: str, config: Mapping[str, Any]) -> str:
    """The family ("sd15" or "embedded") by a diffusers UNet's config. Raises UserError if not supported."""
    kind = config.get("_class_name", "UNet2DConditionModel")
    if kind != "UNet2DConditionModel":
        raise UserError(_not_supported(location, f"a {kind} model"))
    if config.get("addition_embed_type"):
        cross = config.get("cross_attention_dim")
        raise UserError(_not_supported(location, "an SDXL refiner" if cross == 1280 else "an SDXL model"))
    if config.get("encoder_hid_dim_type") or config.get("class_embed_type") or config.get("num_class_embeds"):
        raise UserError(_not_supported(location, "a UNet with more inputs than picture, time and text"))
    widths, context = config.get("block_out_channels", [0]), config.get("cross_attention_dim", 0)
    if not isinstance(context, int):
        raise UserError(_not_supported(location, "a UNet with several text widths"))
    # a folder states all its sizes, so any size of the architecture can be loaded from one
    declared = None if (widths[0], context) in (_sizes("sd15"), _sizes("embedded")) else "sd15"
    return family_of_sizes(location, config.get("in_channels", 4), widths[0], context, declared=declared)


def family_of_sizes(location: str, channels: int, width: int, context: int, *, declared: str | None) -> str:
    """The family by the UNet's input channels, first width, text width; `declared` settles other sizes."""
    if channels in _INPUTS:
        raise UserError(_not_supported(location, f"{_INPUTS[channels]} ({channels} input channels)"))
    if context == 1024:
        raise UserError(_not_supported(location, "a Stable Diffusion 2.x checkpoint"))
    for name in ("sd15", "embedded"):
        if (width, context) == _sizes(name):
            return name
    if declared in ("sd15", "embedded"):
        return declared
    raise UserError(
        f"{location!r} has the layout of Stable Diffusion 1.x but other sizes (width {width}, text width "
        f"{context}) and does not say which; give the diffusers folder that it was made from"
    )


def shipped_config(name: str, component: str) -> dict[str, Any]:
    """A config that ships with the package: of "sd15", or of the embedded base from its folder."""
    if name == "sd15":
        file = CONFIGS / "sd15" / f"{component}.json"
    else:
        stem = "scheduler_config" if component == "scheduler" else "config"
        file = embedded_folder() / component / f"{stem}.json"
    config: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return config


def embedded_folder() -> Path:
    """The embedded base: a diffusers folder in the package."""
    from spf_kit.embedded import base_path

    return Path(base_path())


@cache
def _sizes(name: str) -> tuple[int, int]:
    """(first width, text width) of a shipped architecture's UNet; (0, 0) if it is not installed."""
    try:
        config = shipped_config(name, "unet")
    except (OSError, ImportError):
        return 0, 0
    return config["block_out_channels"][0], config["cross_attention_dim"]


def _not_supported(location: str, kind: str) -> str:
    return f"{location!r} is {kind}, which is not supported yet; {SUPPORTED}"
