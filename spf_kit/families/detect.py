"""Which family a model belongs to, from names, shapes and configs alone. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from spf_kit.errors import UserError
from spf_kit.headers import Header

SUPPORTED = "this version trains Stable Diffusion 1.x, 2.x and XL models and the embedded base"
_NAMES = {"sd15": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "Stable Diffusion XL"}
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
    ("conditioner.embedders.0.model.", "an SDXL refiner"),
    ("edm_mean", "a checkpoint with EDM's noise (Playground 2.5)"),
    ("edm_vpred.", "a checkpoint with EDM's noise (CosXL)"),
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
    """The family's name by a single-file checkpoint in the LDM layout.

    Raises UserError, one sentence, for LoRAs, parts of models and architectures that are not supported.
    """
    path, keys = str(header.path), header.tensors
    first = keys.get(f"{UNET}input_blocks.0.0.weight")
    if any(part in key for key in keys for part in _LORA):
        raise UserError(f"{path!r} is a LoRA, not a base model; give the checkpoint that it was trained on")
    for part, kind in _OTHER_ARCHITECTURES:
        if any(part in key for key in keys):
            raise UserError(not_supported(path, kind))
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
    kind = "sd15"
    if any(key.startswith("cond_stage_model.model.") for key in keys) or context == _sizes("sd2")[1]:
        kind = "sd2"
    if any(key.startswith("conditioner.embedders.1.model.") for key in keys):
        kind = "sdxl"
    if f"{UNET}label_emb.0.0.weight" in keys:
        if kind == "sd2":
            raise UserError(not_supported(path, "a Stable unCLIP model"))
        kind = "sdxl"  # perhaps without its text encoders, which the loader then names
    return family_of_sizes(
        path, channels, width, context, kind=kind, declared=header.metadata.get("spf_kit.base")
    )


def family_of_unet(location: str, config: Mapping[str, Any]) -> str:
    """The family's name by a diffusers UNet's config. Raises UserError if it is not supported."""
    class_name = config.get("_class_name", "UNet2DConditionModel")
    if class_name != "UNet2DConditionModel":
        raise UserError(not_supported(location, f"a {class_name} model"))
    widths, context = config.get("block_out_channels", [0]), config.get("cross_attention_dim", 0)
    channels = config.get("in_channels", 4)
    if not _sizes_listed(widths) or type(channels) is not int:
        raise UserError(
            f"the config of the unet of {location!r} is damaged: block_out_channels = {widths!r:.60}, "
            f"in_channels = {channels!r:.60}; copy it again"
        )
    added = config.get("addition_embed_type")
    if added == "text_time" and context == 1280:
        raise UserError(not_supported(location, "an SDXL refiner"))
    if (
        added not in (None, "text_time")
        or config.get("encoder_hid_dim_type")
        or config.get("class_embed_type")
        or config.get("num_class_embeds")
    ):
        raise UserError(not_supported(location, "a UNet with more inputs than picture, time and text"))
    if not isinstance(context, int):
        raise UserError(not_supported(location, "a UNet with several text widths"))
    # what tells 2.x from 1.x in any size: its projections are matrices, not convolutions
    plain = "sd2" if config.get("use_linear_projection") else "sd15"
    kind = "sdxl" if added else plain
    # a folder states all its sizes, so any size of the architecture can be loaded from one
    return family_of_sizes(location, channels, widths[0], context, kind=kind, declared=kind)


def _sizes_listed(widths: Any) -> bool:
    return isinstance(widths, (list, tuple)) and bool(widths) and all(type(width) is int for width in widths)


def family_of_sizes(
    location: str, channels: int, width: int, context: int, *, kind: str, declared: str | None
) -> str:
    """The family by its layout and the UNet's input channels, first width and text width.

    `kind` is the layout: "sd15" (which the embedded base shares), "sd2" or "sdxl"; `declared` is the family
    that the model says it is of, which settles other sizes.
    """
    if channels in _INPUTS:
        raise UserError(not_supported(location, f"{_INPUTS[channels]} ({channels} input channels)"))
    candidates = (kind, "embedded") if kind == "sd15" else (kind,)
    for name in candidates:
        if (width, context) == _sizes(name):
            return name
    if declared is not None and declared in candidates:
        return declared
    raise UserError(
        f"{location!r} has the layout of {_NAMES[kind]} but other sizes (width {width}, text width "
        f"{context}) and does not say which; give the diffusers folder that it was made from"
    )


def shipped_config(name: str, component: str) -> dict[str, Any]:
    """A config that ships with the package: of a published family, or from the embedded base's folder."""
    if name != "embedded":
        file = CONFIGS / name / f"{component}.json"
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


def not_supported(location: str, kind: str) -> str:
    """The sentence for a model of another kind."""
    return f"{location!r} is {kind}, which is not supported yet; {SUPPORTED}"
