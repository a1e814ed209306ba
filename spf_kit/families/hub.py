"""Models on the Hugging Face hub, through diffusers' own download and cache."""

from __future__ import annotations

import json
import re
import socket
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from spf_kit.errors import UserError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_UNET = "unet/config.json"


def is_hub_id(model: str) -> bool:
    """Does it look like `owner/name`? A path with a suffix of weights does not."""
    weights = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
    return bool(_ID.fullmatch(model)) and not model.lower().endswith(weights)


def unet_config(model: str) -> dict[str, Any]:
    """The UNet's config of a model on the hub; fetches a few kilobytes, or nothing if cached.

    Raises UserError if it is not there, is no diffusers model with a UNet, or the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(model, _UNET, local_files_only=not _reachable())
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
        raise UserError(_failure(model, error)) from error
    return dict(json.loads(Path(file).read_text("utf-8")))


def download(model: str) -> Path:
    """The model's folder in the hub's cache, fetched if need be: .safetensors only, no safety checker, and in
    half precision where the model is published so (half the download, and what people train on).

    Raises UserError if that fails.
    """
    offline = not _reachable()
    try:
        try:
            return _fetched(model, "fp16", offline)
        except ValueError as error:
            if "no such modeling files" not in str(error):
                raise
            return _fetched(model, None, offline)  # published in full alone
    except Exception as error:
        raise UserError(_failure(model, error)) from error


def _fetched(model: str, variant: str | None, offline: bool) -> Path:
    from diffusers import DiffusionPipeline

    skip = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    return Path(
        DiffusionPipeline.download(
            model, use_safetensors=True, variant=variant, local_files_only=offline, **skip
        )
    )


def _reachable() -> bool:
    """Can the hub's name be resolved? Without that its client retries for half a minute, loudly."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True  # the proxy resolves names
    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def _failure(model: str, error: Exception) -> str:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "LocalEntryNotFoundError" in kinds:
        return (
            f"the base model {model!r} is no path here and not in the Hugging Face cache, and the hub cannot "
            "be reached; check the path, or go online for the first download"
        )
    if "EntryNotFoundError" in kinds:
        return f"the hub's model {model!r} has no Stable Diffusion model in diffusers' layout (no {_UNET})"
    if kinds & {"RepositoryNotFoundError", "GatedRepoError", "HFValidationError"}:
        return (
            f"the base model {model!r} is neither a path here nor a public model on the Hugging Face hub; "
            "check the spelling, or log in with `hf auth login` if it is private or gated"
        )
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return f"the base model {model!r} cannot be fetched from the Hugging Face hub: {reason}"
