"""Noise processes: how a picture becomes noise, and what a model predicts on the way (epsilon, v, flow).

All three are z_t = a_t x_0 + s_t eps with coefficients (a, s) of the timestep:

    epsilon, v_prediction   a = sqrt(abar_t), s = sqrt(1 - abar_t)      Ho et al. 2020, arXiv 2006.11239
    flow                    a = 1 - sigma,    s = sigma = t / 1000      rectified flow, arXiv 2403.03206

and differ in the target of the prediction: eps; v = a eps - s x_0 (Salimans & Ho 2022, arXiv 2202.00512);
eps - x_0. Shapes: latents, noise and predictions (B, C, h, w), timesteps (B,).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import Tensor

from spf_kit.errors import UserError

PredictionType = Literal["epsilon", "v_prediction", "flow"]


class NoiseProcess:
    """One model's noise process. `alphas_cumprod` (T,) is abar; a flow has none."""

    def __init__(
        self,
        prediction_type: PredictionType,
        alphas_cumprod: Tensor | None = None,
        *,
        num_train_timesteps: int = 1000,
    ) -> None:
        """Raises ValueError if the two do not fit: a flow with abar, epsilon with a terminal SNR of zero
        (there the noisy latent is the noise itself and its prediction says nothing)."""
        if prediction_type not in get_args(PredictionType):
            raise ValueError(f"prediction_type {prediction_type!r} is none of {get_args(PredictionType)}")
        if (prediction_type == "flow") != (alphas_cumprod is None):
            raise ValueError("a flow has no alphas_cumprod, epsilon and v_prediction need them")
        if prediction_type == "epsilon" and alphas_cumprod is not None and float(alphas_cumprod.min()) <= 0:
            raise ValueError("epsilon prediction cannot have a terminal SNR of zero; v_prediction can")
        self.prediction_type = prediction_type
        self.alphas_cumprod = alphas_cumprod
        self.num_train_timesteps = num_train_timesteps if alphas_cumprod is None else len(alphas_cumprod)

    @classmethod
    def from_scheduler(cls, config: Mapping[str, Any], *, source: str) -> NoiseProcess:
        """From a diffusers scheduler's config (`scheduler_config.json`); `source` names it in errors.

        Raises UserError for predictions and schedules that are not supported.
        """
        if "FlowMatch" in str(config.get("_class_name", "")):
            return cls("flow", num_train_timesteps=int(config.get("num_train_timesteps", 1000)))
        if str(config.get("_class_name", "")).startswith("EDM"):
            raise UserError(f"{source}: EDM's noise ({config['_class_name']}) is not supported")
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(
                f"{source}: the prediction_type {prediction_type!r} is not supported; "
                "epsilon, v_prediction and flow matching are"
            )
        from diffusers import DDPMScheduler

        keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
        chosen = {key: config[key] for key in keys if key in config}
        # epsilon checkpoints with this flag only sample that way; their training needs the schedule as it was
        rescale = bool(config.get("rescale_betas_zero_snr")) and prediction_type == "v_prediction"
        known = ("scaled_linear", "linear", "squaredcos_cap_v2", "sigmoid")
        if chosen.get("beta_schedule", "linear") not in known and chosen.get("trained_betas") is None:
            raise UserError(
                f"{source}: the beta_schedule {chosen['beta_schedule']!r} is not supported; "
                f"there are: {', '.join(known)}"
            )
        try:
            schedule = DDPMScheduler(**chosen, rescale_betas_zero_snr=rescale)
            return cls(prediction_type, schedule.alphas_cumprod)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{source}: the config of its scheduler cannot be used ({error})") from error

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t = a x_0 + s eps."""
        a, s = self._coefficients(t, latents)
        return a * latents + s * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the model should predict at z_t."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "flow":
            return noise - latents
        a, s = self._coefficients(t, latents)
        return a * noise - s * latents

    def clean(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The clean latents x_0 that the prediction stands for."""
        a, s = self._coefficients(t, noisy)
        if self.prediction_type == "epsilon":
            return (noisy - s * prediction) / a
        if self.prediction_type == "flow":
            return noisy - s * prediction
        return a * noisy - s * prediction

    def noise(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The noise eps that the prediction stands for."""
        a, s = self._coefficients(t, noisy)
        if self.prediction_type == "epsilon":
            return prediction
        if self.prediction_type == "flow":
            return noisy + a * prediction
        return s * noisy + a * prediction

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio (a / s)^2, (B,) float32; infinite where a flow's sigma is 0."""
        a, s = self._scales(t)
        return (a / s) ** 2

    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        """Timesteps (B,) from numbers in [0, 1): int64 in [0, T - 1], for a flow float in [0, 1000)."""
        scaled = uniform * self.num_train_timesteps
        if self.prediction_type == "flow":
            return scaled
        return scaled.long().clamp_(max=self.num_train_timesteps - 1)

    def _scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, s) of the timesteps, each (B,) float32 where t lives."""
        if self.alphas_cumprod is None:
            sigma = t.float() / self.num_train_timesteps
            return 1 - sigma, sigma
        if self.alphas_cumprod.device != t.device:
            self.alphas_cumprod = self.alphas_cumprod.to(t.device)  # once: t stays on one device
        abar = self.alphas_cumprod[t].float()
        return abar.sqrt(), (1 - abar).sqrt()

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(a, s) as (B, 1, 1, 1) in the dtype of `like`, computed in float32."""
        shape = (-1,) + (1,) * (like.ndim - 1)
        a, s = self._scales(t)
        return a.to(like).view(shape), s.to(like).view(shape)
