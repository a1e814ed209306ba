"""Does the merged checkpoint do what base and LoRAs do together? Two models, one input, one comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spf_kit.adapters import files
from spf_kit.adapters.earlier import attach_weighted
from spf_kit.adapters.merge_plan import Weighted
from spf_kit.adapters.weights import Weights
from spf_kit.errors import UserError

if TYPE_CHECKING:
    from spf_kit.families.base import Family

PROMPTS = ("a portrait of a woman, red hair, blue background", "")
SEED = 0
# relative to the largest value: rounding of one weight, grown through the network
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}


def check(loras: Sequence[Weighted], into: str | Path, merged: str | Path) -> dict[str, Any]:
    """Compare base + LoRAs at run time with the merged checkpoint, in float32, on fixed noise and prompts.

    Returns:
        JSON-able: for the UNet's prediction and the text encoder's states the largest absolute
        difference, the largest value, and their quotient; `agrees` if all are within the file's rounding.

    Raises:
        UserError: the merged checkpoint does something else; it is not deleted.
    """
    expected = _outputs(into, loras)
    found = _outputs(merged, ())
    tolerance = TOLERANCE[_coarsest(merged)]
    told: dict[str, Any] = {}
    for name in expected:
        largest = float(expected[name].abs().max())
        difference = float((expected[name] - found[name]).abs().max())
        told[name] = {
            "max_difference": difference,
            "max_value": largest,
            "relative": difference / max(largest, 1e-12),
        }
    worst = max(told[name]["relative"] for name in expected)
    told |= {"agrees": worst <= tolerance, "tolerance": tolerance}
    told["sentence"] = f"base + LoRA at run time and merged differ by {worst:.1e} of the largest value"
    if not told["agrees"]:
        raise UserError(
            f"{str(merged)!r} does not do what base and LoRA do: they differ by {worst:.1e} of the largest "
            f"value, rounding explains {tolerance:.0e}; merge with --dtype float32 to rule rounding out"
        )
    return told


@torch.no_grad()
def _outputs(model: str | Path, loras: Sequence[Weighted]) -> dict[str, Tensor]:
    """What a model predicts for fixed inputs, with LoRAs attached."""
    from spf_kit import families
    from spf_kit.schema import Base

    family = families.load(Base(model=str(model), dtype="float32"))
    side = max(family.resolution // family.latent_factor // 4, 8)
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn((len(PROMPTS), family.latent_channels, side, side), generator=generator)
    timesteps = torch.tensor([700, 200])
    with _attached(family, loras):
        condition = family.encode_text(list(PROMPTS))
        prediction = family.predict(noise, timesteps, condition)
    return {"unet": prediction.float(), "text_encoder": condition["encoder_hidden_states"].float()}


@contextmanager
def _attached(family: Family, loras: Sequence[Weighted]) -> Iterator[None]:
    """Each component of each LoRA at its own strength."""
    with ExitStack() as stack:
        for number, (path, given) in enumerate(loras):
            weights = given if isinstance(given, Weights) else Weights(float(given))
            for handle in attach_weighted(family, files.read(path), weights, f"check_{number}"):
                stack.callback(handle.remove)
        yield


def _coarsest(model: str | Path) -> torch.dtype:
    """The type of the merged weights with the fewest digits."""
    from spf_kit.adapters.merge_plan import open_target
    from spf_kit.adapters.tensors import DTYPES
    from spf_kit.headers import FLOATING

    target = open_target(model)
    places = (place for own in target.places.values() for place in own.values())
    names = {target.headers[place.file].tensors[place.key].dtype for place in places}
    types = {DTYPES[name] for name in names if name in FLOATING}
    return max(types, key=lambda dtype: TOLERANCE.get(dtype, 0))
