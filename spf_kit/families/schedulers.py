"""Samplers by the names that users know, over a model's own noise schedule."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from spf_kit.errors import UserError, nearest

# name: (diffusers class, what it sets); the names follow A1111's
SCHEDULERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpm++2m_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": True},
    ),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
_KEPT = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "timestep_spacing", "rescale_betas_zero_snr",
)  # fmt: skip
# Stable Diffusion's latents are not bounded by 1, and its last step goes to abar_0, not to 1
_STABLE_DIFFUSION = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """A fresh diffusers scheduler. `config` is the model's own scheduler config, of whichever class.

    Raises UserError if the name is unknown, with the nearest, or needs a package that is missing.
    """
    import diffusers
    from diffusers.utils import is_scipy_available

    if name not in SCHEDULERS:
        raise UserError(
            f"unknown scheduler {name!r}; there are: {', '.join(SCHEDULERS)}"
            + nearest(name, SCHEDULERS, phrase="- did you mean {!r}?")
        )
    if name == "lms" and not is_scipy_available():
        raise UserError(
            "the scheduler 'lms' needs scipy, which is not installed: pip install scipy, or take 'euler'"
        )
    kind, settings = SCHEDULERS[name]
    model = {key: config[key] for key in _KEPT if config.get(key) is not None}
    if model.get("rescale_betas_zero_snr"):
        model["timestep_spacing"] = "trailing"  # the last timestep, where the SNR is 0, must be sampled
    wanted = {**_STABLE_DIFFUSION, **model, **settings}
    cls = getattr(diffusers, kind)
    known = inspect.signature(cls.__init__).parameters
    return cls(**{key: value for key, value in wanted.items() if key in known})
