"""The diffusion model's own loss: predict what was added to the picture."""

from __future__ import annotations

import math
from typing import Literal

from spf_kit.losses import Field, Loss, Step, Tensor, clean_weight, model_validator, per_sample, register


@register("denoising")
class Denoising(Loss):
    """L_dm = w(t) * d(target - prediction), averaged over channels and pixels: (B, C, h, w) to (B,).

    `target` is the noise, the velocity or the flow, as the base model predicts. With r = target - prediction

        l2     d(r) = r^2
        l1     d(r) = |r|
        huber  d(r) = 2 delta (sqrt(r^2 + delta^2) - delta)     r^2 for small r, 2 delta |r| for large r

    The weights w(t) are all defined on the error of the clean picture, lambda(t) |x0 - x0_hat|^2, and then
    carried over to what the base predicts, so that one name means the same for all three kinds of model:

        lambda(t) = min(SNR, gamma)     min-SNR-gamma (Hang et al. 2023, arXiv:2303.09556; gamma = 5 there)
        lambda(t) = sqrt(SNR)           debiased estimation (Yu et al. 2023, arXiv:2310.08442)

        |x0 - x0_hat|^2 = |r|^2 / SNR                 epsilon: x0 = (z - sigma eps) / alpha
                        = |r|^2 / (SNR + 1)           v:       x0 = alpha z - sigma v
                        = |r|^2 / (1 + sqrt(SNR))^2   flow:    x0 = z - s v, SNR = ((1 - s) / s)^2

    So min-SNR gives min(SNR, gamma) / SNR for epsilon and min(SNR, gamma) / (SNR + 1) for v, and the debiased
    weight is 1 / sqrt(SNR) for epsilon. Huber: Khrapov et al. 2024, arXiv:2403.16728.

    `x0_weight` is our addition: lambda(t) = min(max(SNR, 1), gamma), and w(t) is at most `x0_weight`. So at
    high noise, where a sampler decides what a picture is of, errors count as of the clean picture; in
    epsilon prediction they are small numbers there. With gamma = 1, epsilon: min(1 / SNR, x0_weight).

    Samples whose timestep is not in [min_timestep, max_timestep], shares of the schedule, give exactly 0.
    """

    kind: Literal["l2", "l1", "huber"] = Field("l2", description="distance d(r) of prediction and target")
    huber_delta: float = Field(0.1, gt=0, description="where huber turns from square to linear")
    min_snr_gamma: float | None = Field(None, gt=0, description="min-SNR weighting; 5 is usual, unset: none")
    debiased: bool = Field(False, description="debiased-estimation weighting; not together with min-SNR")
    x0_weight: float | None = Field(
        None, gt=0, description="at high noise errors count as of the clean picture, at most so often"
    )
    min_timestep: float = Field(0.0, ge=0, le=1, description="share of the schedule from which it acts")
    max_timestep: float = Field(1.0, ge=0, le=1, description="share of the schedule up to which it acts")

    @model_validator(mode="after")
    def _range(self) -> Denoising:
        if self.min_timestep >= self.max_timestep:
            raise ValueError(
                f"min_timestep = {self.min_timestep} must be less than max_timestep = {self.max_timestep}"
            )
        return self

    @model_validator(mode="after")
    def _one_weighting(self) -> Denoising:
        if self.debiased and self.min_snr_gamma is not None:
            raise ValueError("min_snr_gamma and debiased are two weightings of the same thing: choose one")
        if self.debiased and self.x0_weight is not None:
            raise ValueError("x0_weight and debiased are two weightings of the same thing: choose one")
        return self

    def __call__(self, step: Step) -> Tensor:
        loss = per_sample(self.distance(step.target - step.response.prediction), step.mask)
        loss = loss * self.timestep_weight(step.process.snr(step.timesteps), step.process.prediction_type)
        share = step.timesteps / step.process.num_train_timesteps
        return loss * ((share >= self.min_timestep) & (share <= self.max_timestep))

    def distance(self, residual: Tensor) -> Tensor:
        """d(r), elementwise."""
        if self.kind == "l1":
            return residual.abs()
        if self.kind == "huber":
            delta = self.huber_delta
            return 2 * delta * ((residual.square() + delta**2).sqrt() - delta)
        return residual.square()

    def timestep_weight(self, snr: Tensor, prediction_type: str) -> Tensor | float:
        """w(t) of a signal-to-noise ratio, (B,) to (B,); 1 where no weighting is chosen."""
        # lambda times factor, simplified by hand: SNR = 0 and SNR = inf exist, at the ends of a flow
        if self.debiased:
            root = snr.sqrt()
            over = {"epsilon": root, "v_prediction": root + 1 / root, "flow": root + 2 + 1 / root}
            return 1 / over[prediction_type]
        if self.x0_weight is not None:
            return clean_weight(snr, prediction_type, self.x0_weight, self.min_snr_gamma or math.inf)
        if self.min_snr_gamma is None:
            return 1.0
        if prediction_type == "epsilon":
            return (self.min_snr_gamma / snr).clamp(max=1.0)
        clean = snr.clamp(max=self.min_snr_gamma)
        return clean / (snr + 1 if prediction_type == "v_prediction" else (1 + snr.sqrt()) ** 2)
