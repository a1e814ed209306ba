"""The base model that a command draws with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from spf_kit.errors import UserError

if TYPE_CHECKING:
    from spf_kit.families.base import Family
    from spf_kit.schema import Base


def load_base(model: str | None, *, metadata: dict[str, str] | None = None, dtype: str = "float32") -> Family:
    """The base model that pictures are drawn with: the one named, else the one that a LoRA was trained on.

    Raises UserError if neither names one that can be opened.
    """
    from spf_kit import families
    from spf_kit.training.machine import device

    return families.load(choose_base(model, metadata=metadata, dtype=dtype), device=device())


def choose_base(model: str | None, *, metadata: dict[str, str] | None = None, dtype: str = "float32") -> Base:
    """What `load_base` loads. Raises UserError if what a LoRA says of its base cannot be."""
    from spf_kit import schema

    own = _own_base(metadata or {})
    trained_on = str(own.get("model", ""))
    there = trained_on and Path(trained_on).exists()
    chosen = model or (trained_on if there else "embedded")
    base = schema.Base(model=chosen, dtype=dtype)
    if Path(chosen).name == Path(trained_on).name:
        # what the preset had to say of this model is true of it still, wherever it lies now
        said = {key: own[key] for key in ("prediction_type", "zero_terminal_snr") if key in own}
        try:
            base = schema.Base.model_validate({**base.model_dump(), **said})
        except ValueError:
            raise UserError(
                f"the LoRA says of its base {said}, in its metadata 'spf_kit.config', which no base can be: "
                "the file was edited or damaged, use an earlier copy of it"
            ) from None
    return base


def _own_base(metadata: dict[str, str]) -> dict[str, Any]:
    """`[base]` of a LoRA's own effective preset, if it was trained here."""
    import tomllib

    try:
        return dict(tomllib.loads(metadata.get("spf_kit.config", ""))["base"])
    except (KeyError, TypeError, ValueError, RecursionError):  # broken TOML is a ValueError
        return {}
