"""Model families: what a base model is, found out from its files, and loaded. This imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spf_kit.errors import UserError, nearest
from spf_kit.families import detect as _detect
from spf_kit.families import folder as _folder
from spf_kit.families import hub as _hub
from spf_kit.headers import read_header

if TYPE_CHECKING:
    from spf_kit.families.base import Family
    from spf_kit.families.sources import Source
    from spf_kit.schema import Base

EMBEDDED = "embedded"
BARE = ("sd15", "sd2", "sdxl")  # names of architectures: a model without weights, to estimate with


def is_bare(model: str) -> bool:
    """Whether `model` is the name of an architecture, and of nothing that lies here."""
    return model in BARE and not Path(model).exists()


def detect(model: str) -> str:
    """The family's name, "sd15", "sd2", "sdxl" or "embedded": from configs and headers, without a tensor.

    `model` is "embedded", a .safetensors file, a diffusers folder, an architecture's name, or a hub id if no
    such path exists.
    Raises UserError, one sentence, for what is not there, not a base model, or not supported.
    """
    if model == EMBEDDED or is_bare(model):
        return model
    path = Path(model).expanduser()
    if path.is_dir():
        return _folder.family_of_folder(path)
    _detect.refuse_pickle(path)
    if path.exists():
        return _detect.family_of_file(read_header(path))
    return _detect.family_of_unet(model, _hub.unet_config(_hub_id(model)))


def load(base: Base, *, device: str = "cpu", weights: bool = True, unet: bool = True) -> Family:
    """Load `[base]`: frozen, in evaluation mode, in its dtype, on the device.

    Without `weights` nothing but configs is read, and the modules stay on the meta device: shapes and types.
    Without `unet` that one does, until `load_unet`: pictures and captions are encoded before it needs room.
    Raises UserError as `detect` does, and if weights are missing or an option cannot be used.
    """
    import torch

    from spf_kit.families.sd15 import SD15Family
    from spf_kit.families.sdxl import SDXLFamily

    source = open_source(base.model)
    family = SDXLFamily if source.name == "sdxl" else SD15Family
    return family(
        source,
        vae_source=_open_vae(base),
        dtype=getattr(torch, base.dtype),
        device=device,
        attention=base.attention,
        base=base,
        weights=weights,
        unet=unet,
    )


def open_source(model: str) -> Source:
    """Where a model's weights lie; nothing but configs and headers is read, a hub model is downloaded.

    Raises UserError as `detect` does.
    """
    from spf_kit.families.bare import BareSource
    from spf_kit.families.single_file import SingleFileSource

    if is_bare(model):
        return BareSource(model)
    if model == EMBEDDED:
        return _folder.FolderSource(_detect.embedded_folder(), location=EMBEDDED)
    path = Path(model).expanduser()
    if path.is_dir():
        return _folder.FolderSource(path)
    _detect.refuse_pickle(path)
    if path.exists():
        return SingleFileSource(path)
    detect(model)  # a model that is not supported is refused before gigabytes are fetched
    return _folder.FolderSource(_hub.download(_hub_id(model)), location=model)


def _open_vae(base: Base) -> Source | None:
    from spf_kit.families.vae import VaeSource

    return (
        None
        if base.vae is None
        else VaeSource(Path(base.vae).expanduser(), open_source(base.model).configs["vae"])
    )


def _hub_id(model: str) -> str:
    """`model` if it can be a hub id. Raises UserError for a path that is not there, with the nearest one."""
    if _hub.is_hub_id(model):
        return model
    path = Path(model).expanduser()
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    beside += [EMBEDDED] if path.name == model else []
    raise UserError(
        f"the base model {model!r} does not exist; give 'embedded', a .safetensors file, a diffusers folder "
        f"or a hub id such as 'owner/name'{nearest(path.name, beside, phrase='- did you mean {!r}?')}"
    )
