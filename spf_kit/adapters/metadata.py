"""What a LoRA file says of itself: `ss_*` as kohya's trainer writes it, `modelspec.*` 1.0.1, and `spf_kit.*`.

Loaders and sharing sites read the first two. Only metadata holds times, so that the same run gives the same
tensors. https://github.com/kohya-ss/sd-scripts (train_network.py), https://github.com/Stability-AI/ModelSpec.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spf_kit import __version__
from spf_kit.adapters.hashes import legacy_hash
from spf_kit.files import atomic, copy_bytes, sha256
from spf_kit.headers import encode_header, read_header

if TYPE_CHECKING:
    from spf_kit.config import Resolved
    from spf_kit.schema import Config

STRENGTH_KEY = "spf_kit.strength"  # how the strength was chosen, `measure.strength.Calibration`
_VERSIONS = {"sd15": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}  # kohya's names
_SAI = "https://github.com/Stability-AI/generative-models"
_ARCHITECTURES = {"sd2": "stable-diffusion-v2-512", "sdxl": "stable-diffusion-xl-v1-base"}


@dataclass(frozen=True)
class Run:
    """The facts of a training run that neither the preset nor the data tells."""

    steps: int  # optimizer steps done
    batches_per_epoch: int
    started_at: float  # seconds since 1970
    finished_at: float
    session_id: str  # the same for all files of one run
    prediction_type: str = "epsilon"  # of the base: "epsilon", "v_prediction", "flow"
    processes: int = 1
    regularisation_pictures: int = 0  # prior pictures


def training_metadata(resolved: Resolved, data: Mapping[str, Any], run: Run) -> dict[str, str]:
    """All metadata of a trained LoRA but the hashes, which `files.write` adds.

    Args:
        data: what `Dataset.info()` says.
    """
    config = resolved.config
    values: dict[str, Any] = {
        **_about_run(config, run),
        **_about_network(config),
        **_about_optimisation(config),
        **_about_data(config, data, run),
        **_about_base(config, resolved.family, run),
    }
    return {
        **{f"ss_{key}": str(value) for key, value in values.items()},
        **_modelspec(config, resolved.family, run),
        "spf_kit.version": __version__,
        "spf_kit.family": resolved.family,
        "spf_kit.config": resolved.to_toml(),
        "spf_kit.data": json.dumps(data, sort_keys=True),
    }


def amend(path: str | Path, entries: Mapping[str, str]) -> None:
    """Add or replace metadata of a LoRA, a .safetensors file or a peft folder; its tensors keep their bytes.

    Raises UserError if it cannot be read or written, ValueError for the `ss_` keys, which its hashes cover.
    """
    covered = [key for key in entries if key.startswith(("ss_", "sshs_"))]
    if covered:
        raise ValueError(f"the hashes cover {covered[0]!r}: write the file anew")
    path = Path(path)
    for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
        header = read_header(file)
        tensors = {name: (info.dtype, info.shape) for name, info in header.tensors.items()}
        with atomic(file) as temporary, open(file, "rb") as source, open(temporary, "xb") as target:
            target.write(encode_header(tensors, dict(sorted({**header.metadata, **entries}.items()))))
            source.seek(header.data_start)
            copy_bytes(source, sum(info.nbytes for info in header.tensors.values()), target)


# --- kohya's part -----------------------------------------------------------------------------------------


def _about_run(config: Config, run: Run) -> dict[str, Any]:
    return {
        "session_id": run.session_id,
        "training_started_at": run.started_at,
        "training_finished_at": run.finished_at,
        "output_name": config.attribute.name,
        "seed": config.train.seed,
        "steps": run.steps,
        "max_train_steps": run.steps,
        "epoch": math.ceil(run.steps / max(_steps_per_epoch(config, run), 1)),
        "num_epochs": math.ceil(run.steps / max(_steps_per_epoch(config, run), 1)),
        "num_batches_per_epoch": run.batches_per_epoch,
        "training_comment": f"spf-kit {__version__}",
        "sd_scripts_commit_hash": None,
    }


def _steps_per_epoch(config: Config, run: Run) -> int:
    return math.ceil(run.batches_per_epoch / config.train.gradient_accumulation)


def _about_network(config: Config) -> dict[str, Any]:
    adapter = config.adapter
    alpha = float(adapter.rank if adapter.alpha is None else adapter.alpha)
    if adapter.rank_stabilized:
        alpha *= math.sqrt(adapter.rank)  # as in the file, where alpha / rank is the scale
    arguments: dict[str, Any] = {}
    if "convolutions" in adapter.targets:
        rank = adapter.ranks.get("convolutions", adapter.rank)
        arguments |= {"conv_dim": rank, "conv_alpha": adapter.alphas.get("convolutions", alpha)}
    if adapter.dora:  # kohya's own module has no DoRA, LyCORIS' has
        arguments |= {"algo": "locon", "dora_wd": True, "wd_on_output": True}
    if adapter.kind != "lora":
        arguments["algo"] = "diag-oft" if adapter.kind == "oft" else adapter.kind
    if adapter.kind == "lokr":
        arguments |= {"factor": adapter.factor, "decompose_both": adapter.decompose_both}
    return {
        "network_module": "lycoris.kohya" if "algo" in arguments else "networks.lora",
        "network_dim": adapter.rank,
        "network_alpha": 0.0 if adapter.kind == "oft" else alpha,  # there it would limit the rotation
        "network_dropout": adapter.dropout or None,
        "network_args": json.dumps(arguments),
    }


def _about_optimisation(config: Config) -> dict[str, Any]:
    train = config.train
    arguments = ",".join(f"{key}={value}" for key, value in train.optimizer_args.items())
    text_rate = train.text_encoder_learning_rate
    if text_rate is None:
        text_rate = train.learning_rate / 2
    return {
        "learning_rate": train.learning_rate,
        "unet_lr": train.learning_rate,
        "text_encoder_lr": text_rate if "text-encoder" in config.adapter.targets else None,
        "optimizer": train.optimizer + (f"({arguments})" if arguments else ""),
        "lr_scheduler": train.schedule,
        "lr_warmup_steps": train.warmup,
        "gradient_checkpointing": train.gradient_checkpointing,
        "gradient_accumulation_steps": train.gradient_accumulation,
        "max_grad_norm": train.max_grad_norm,
        "mixed_precision": train.mixed_precision,
        "full_fp16": False,
        "noise_offset": train.noise_offset or None,
        "zero_terminal_snr": bool(config.base.zero_terminal_snr),
        "prior_loss_weight": _prior_weight(config),
        "loss_type": ",".join(entry.id for entry in config.loss) or None,
        "min_snr_gamma": _loss_option(config, "min_snr_gamma"),
        "debiased_estimation": bool(_loss_option(config, "debiased")),
        **_NOT_HERE,
    }


# what kohya's trainer can do and this one does not: its metadata tell them too, and readers compare files
_NOT_HERE: Mapping[str, Any] = {
    "lowram": False, "multires_noise_iterations": None, "multires_noise_discount": None,
    "adaptive_noise_scale": None, "noise_offset_random_strength": False, "ip_noise_gamma": None,
    "ip_noise_gamma_random_strength": False, "scale_weight_norms": None, "huber_schedule": None,
    "huber_c": None, "caption_dropout_every_n_epochs": 0, "caption_tag_dropout_rate": 0.0,
    "face_crop_aug_range": None,
}  # fmt: skip


def _prior_weight(config: Config) -> float | None:
    """Of the loss on prior pictures; None without one."""
    found = (entry.model_extra or {} for entry in config.loss if entry.plugin == "prior_preservation")
    return next((float(options.get("weight", 1.0)) for options in found), None)


def _loss_option(config: Config, key: str) -> Any:
    """The value of a loss' own key; None where no loss has it."""
    values = ((entry.model_extra or {}).get(key) for entry in config.loss)
    return next((value for value in values if value is not None), None)


def _about_data(config: Config, data: Mapping[str, Any], run: Run) -> dict[str, Any]:
    settings, folders = config.data, data.get("folders", {})
    directories = {
        name: {"n_repeats": counts["repeats"], "img_count": counts["pictures"]}
        for name, counts in folders.items()
    }
    buckets = {
        number: {"resolution": [bucket["width"], bucket["height"]], "count": bucket["samples"]}
        for number, bucket in enumerate(data.get("buckets", []))
    }
    sides = [side for bucket in buckets.values() for side in bucket["resolution"]]
    return {
        "num_train_images": data.get("samples", 0),
        "num_reg_images": run.regularisation_pictures,
        "batch_size_per_device": config.train.batch_size,
        "total_batch_size": config.train.batch_size * config.train.gradient_accumulation * run.processes,
        "resolution": f"({settings.resolution}, {settings.resolution})",
        "enable_bucket": settings.buckets,
        "bucket_no_upscale": not settings.upscale,
        "bucket_info": json.dumps({"buckets": buckets}),
        "min_bucket_reso": min(sides, default=None),
        "max_bucket_reso": max(sides, default=None),
        "color_aug": False,
        "flip_aug": settings.flip,
        "random_crop": settings.crop == "random",
        "shuffle_caption": settings.shuffle_tags,
        "keep_tokens": settings.keep_tokens,
        "caption_dropout_rate": settings.caption_dropout,
        "max_token_length": None if settings.chunks == 1 else 75 * settings.chunks,
        "cache_latents": settings.cache != "none",
        "tag_frequency": json.dumps(data.get("tag_frequencies", {})),
        "dataset_dirs": json.dumps(directories),
        "reg_dataset_dirs": json.dumps({}),
    }


def base_metadata(family: str, model: str, prediction_type: str = "epsilon") -> dict[str, str]:
    """What loaders read to learn which base a LoRA is for, where no training tells it."""
    path = Path(model)
    hashed = {"ss_sd_model_hash": legacy_hash(path)} if path.is_file() else {}
    return {
        "ss_base_model_version": _version(family, prediction_type),
        "ss_v2": str(family == "sd2"),
        "ss_sd_model_name": path.name,
        **hashed,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": _architecture(family, prediction_type),
        "modelspec.implementation": "diffusers",
    }


def _version(family: str, prediction_type: str) -> str:
    """kohya names 1.x and 2.x models that predict v apart, SDXL's not."""
    v = family in ("sd15", "sd2") and prediction_type == "v_prediction"
    return _VERSIONS.get(family, family) + ("_v" if v else "")


def _about_base(config: Config, family: str, run: Run) -> dict[str, Any]:
    """Names without folders: a shared file does not tell where its maker keeps things."""
    base = config.base
    values: dict[str, Any] = {
        "base_model_version": _version(family, run.prediction_type),
        "v2": family == "sd2",
        "clip_skip": base.clip_skip if base.clip_skip > 1 else None,
        "sd_model_name": Path(base.model).name,
    }
    if Path(base.model).is_file():
        values |= {"sd_model_hash": legacy_hash(base.model), "new_sd_model_hash": sha256(base.model)}
    if base.vae:
        values["vae_name"] = Path(base.vae).name
        if Path(base.vae).is_file():
            values |= {"vae_hash": legacy_hash(base.vae), "new_vae_hash": sha256(base.vae)}
    return values


def scaled_alphas(metadata: Mapping[str, str], factor: float) -> dict[str, str]:
    """kohya's entries about alpha after every alpha of the file was multiplied; what is no number stays."""
    found, arguments = dict(metadata), parse_json(metadata, "ss_network_args")
    alpha = parse_json(metadata, "ss_network_alpha")
    if isinstance(alpha, int | float):
        found["ss_network_alpha"] = str(alpha * factor)
    if isinstance(arguments, dict) and isinstance(arguments.get("conv_alpha"), int | float):
        arguments["conv_alpha"] *= factor
        found["ss_network_args"] = json.dumps(arguments)
    return found


# --- ModelSpec --------------------------------------------------------------------------------------------


def _modelspec(config: Config, family: str, run: Run) -> dict[str, str]:
    """https://github.com/Stability-AI/ModelSpec 1.0.1; `hash_sha256` joins when the file is written."""
    side = config.data.resolution
    fields = {
        "sai_model_spec": "1.0.1",
        "architecture": _architecture(family, run.prediction_type),
        # whose names the tensors have
        "implementation": _SAI if family == "sdxl" and config.output.format == "kohya" else "diffusers",
        "implementation_version": f"spf-kit/{__version__}",
        "title": config.attribute.name,
        "description": f"Adds {config.attribute.name} to pictures whose prompt asks for it",
        "usage_hint": f"Put '{config.attribute.target}' into the prompt",
        "resolution": f"{side}x{side}",
        "date": datetime.fromtimestamp(run.finished_at, UTC).isoformat(timespec="seconds"),
        "trigger_phrase": config.attribute.target,
        "prediction_type": "v" if run.prediction_type == "v_prediction" else run.prediction_type,
    }
    if config.base.clip_skip > 1:
        fields["encoder_layer"] = str(config.base.clip_skip)
    return {f"modelspec.{key}": value for key, value in fields.items()}


def _architecture(family: str, prediction_type: str) -> str:
    if family == "sd2" and prediction_type == "v_prediction":
        return "stable-diffusion-v2-768-v/lora"
    return f"{_ARCHITECTURES.get(family, 'stable-diffusion-v1')}/lora"


def parse_json(metadata: Mapping[str, str], key: str) -> Any:
    """The value of a metadata entry that holds JSON; None if there is none or it is broken.

    Without NaN and infinity, which Python reads and JSON has not, and halves of UTF-16 pairs.
    """
    try:
        value = json.loads(metadata[key])
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (KeyError, ValueError, RecursionError):
        return None
    return value
