"""What a single-file checkpoint predicts: epsilon or v, and whether its noise ends in pure noise.

Its keys and shapes do not say. In this order: `base.prediction_type` of the preset; what the file declares,
by empty tensors `v_pred` and `ztsnr` (as fine-tunes mark themselves) or by its ModelSpec metadata; for
Stable Diffusion 2.x one bias, whose spread differs between the two published models; else epsilon.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from spf_kit.errors import UserError
from spf_kit.families.detect import shipped_config
from spf_kit.headers import NUMBERS, Header

if TYPE_CHECKING:
    from spf_kit.schema import Base

_V = ("v", "v_prediction", "v-prediction", "vpred")
_EPSILON = ("epsilon", "eps")
# ComfyUI tells the 2.x models apart by this bias: where v is predicted, its deviation is above the bound
_TELLING = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
_BOUND = 0.09


def scheduler_of(header: Header, family: str) -> dict[str, Any]:
    """The noise schedule of a file that stores none: the family's, with the file's own prediction."""
    config = shipped_config(family, "scheduler")
    declared = _declared(header)
    if declared is None and family == "sd2" and _spread(header) > _BOUND:
        declared = "v_prediction"
    config["prediction_type"] = declared or "epsilon"
    if config["prediction_type"] == "v_prediction":
        config["rescale_betas_zero_snr"] = "ztsnr" in header.tensors
    return config


def as_asked(config: Mapping[str, Any], base: Base) -> dict[str, Any]:
    """A scheduler's config with what `[base]` of the preset says of the prediction.

    Raises UserError if the two settings exclude each other.
    """
    asked: dict[str, Any] = dict(config)
    if base.prediction_type is not None:
        asked["prediction_type"] = base.prediction_type
    if base.zero_terminal_snr and asked.get("prediction_type", "epsilon") == "epsilon":
        raise UserError(
            f"base.zero_terminal_snr = true, but {base.model!r} predicts epsilon, which says nothing where "
            "all is noise; set base.prediction_type = 'v_prediction' if it does predict v"
        )
    if base.zero_terminal_snr is not None:
        asked["rescale_betas_zero_snr"] = base.zero_terminal_snr
    return asked


def _declared(header: Header) -> str | None:
    if "v_pred" in header.tensors:
        return "v_prediction"
    said = header.metadata.get("modelspec.prediction_type", header.metadata.get("modelspec.predict_key", ""))
    if said.lower() in _V:
        return "v_prediction"
    if said.lower() in _EPSILON:
        return "epsilon"
    architecture = header.metadata.get("modelspec.architecture", "").partition("/")[0]
    return {"stable-diffusion-v2-768-v": "v_prediction", "stable-diffusion-v2-512": "epsilon"}.get(
        architecture
    )


def _spread(header: Header) -> float:
    """The standard deviation of the telling bias; 0 where there is none, or it is damaged."""
    if _TELLING not in header.tensors or header.tensors[_TELLING].dtype not in NUMBERS:
        return 0.0
    values = header.values(_TELLING)
    return statistics.pstdev(values) if all(map(math.isfinite, values)) else 0.0
