"""The base model that a command draws with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from spf_kit.errors import UserError, nearest

if TYPE_CHECKING:
    from spf_kit.console import Console
    from spf_kit.families.base import Family
    from spf_kit.schema import Base


def load_base(
    model: str | None,
    *,
    metadata: dict[str, str] | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    console: Console | None = None,
) -> Family:
    """The base model that pictures are drawn with: the one named, else the one that a LoRA was trained on.

    Args:
        dtype: of its weights; None chooses, see `precision`.
        quantize: how the UNet's linear layers are kept, see `families.quantized`.
        console: told if the type is slow here.

    Raises:
        UserError: neither names a model that can be opened, or an option is unknown or cannot be used here.
    """
    from spf_kit import families
    from spf_kit.training.machine import device

    chosen = choose_base(model, metadata=metadata, dtype=dtype, quantize=quantize, console=console)
    return families.load(chosen, device=device())


def choose_base(
    model: str | None,
    *,
    metadata: dict[str, str] | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    console: Console | None = None,
) -> Base:
    """What `load_base` loads. Raises UserError as it does, if nothing is to be opened for that."""
    from spf_kit import schema
    from spf_kit.training.machine import device

    own = _own_base(metadata or {})
    trained_on = str(own.get("model", ""))
    there = trained_on and Path(trained_on).exists()
    chosen, place = model or (trained_on if there else "embedded"), device()
    base = schema.Base(model=chosen, dtype=precision(dtype, chosen, place), quantize=_kind(quantize))  # type: ignore[arg-type]
    if console is not None and base.dtype == "float16" and place == "cpu":
        console.warn("float16 is many times slower than float32 on a CPU: bf16 halves the memory too")
    if Path(chosen).name == Path(trained_on).name:
        base = _as_trained(base, own)
    return base


def precision(wanted: str | None, model: str, device: str) -> str:
    """The type named, else float16 for real models on CUDA, where it takes half the memory and time, and
    float32 elsewhere.

    Raises UserError for an unknown type, and as `families.detect` does.
    """
    from spf_kit import families
    from spf_kit.adapters.tensors import parse_dtype

    if wanted is not None:
        return str(parse_dtype(wanted)).removeprefix("torch.")
    is_real = device == "cuda" and families.detect(model) != families.EMBEDDED
    return "float16" if is_real else "float32"


def _kind(quantize: str | None) -> str | None:
    from spf_kit.schema import Quantization

    known = get_args(Quantization)
    if quantize is not None and quantize not in known:
        raise UserError(
            f"--quantize {quantize!r} is unknown: choose {', '.join(known)}{nearest(quantize, known)}"
        )
    return quantize


def _as_trained(base: Base, own: dict[str, Any]) -> Base:
    """What the preset had to say of this model is true of it still, wherever it lies now."""
    said = {key: own[key] for key in ("prediction_type", "zero_terminal_snr") if key in own}
    try:
        return type(base).model_validate({**base.model_dump(), **said})
    except ValueError:
        raise UserError(
            f"the LoRA says of its base {said}, in its metadata 'spf_kit.config', which no base can be: "
            "the file was edited or damaged, use an earlier copy of it"
        ) from None


def _own_base(metadata: dict[str, str]) -> dict[str, Any]:
    """`[base]` of a LoRA's own effective preset, if it was trained here."""
    import tomllib

    try:
        return dict(tomllib.loads(metadata.get("spf_kit.config", ""))["base"])
    except (KeyError, TypeError, ValueError, RecursionError):  # broken TOML is a ValueError
        return {}
