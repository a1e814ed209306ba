"""DreamBooth's prior preservation: keep drawing the general class as the base model does."""

from __future__ import annotations

from spf_kit.losses import Field, Loss, Needs, Prior, Step, Tensor, model_validator, per_sample, register


@register("prior_preservation")
class PriorPreservation(Loss):
    """L_prior = |target' - eps_on(z'_t', t', c_prior)|^2, mean over channels and pixels: (B', C, h, w) to B'.

    z'_t' are noisy prior pictures with their own noise and timesteps, drawn by the frozen base before the
    training starts from the captions' c_base (or taken from the folder `path`), and target' is what was added
    to them (noise, velocity or flow). The model with the adapter must still denoise its own earlier pictures.

    The prior pictures are other pictures than the batch's, so a mask over the batch means nothing here.

    Source: Ruiz et al. 2022, DreamBooth, arXiv:2208.12242, equation 2 (lambda there is `weight` here).
    """

    count: int = Field(64, ge=1, description="prior pictures that the frozen base draws")
    path: str = Field("", description="folder of ready prior pictures with captions, instead of drawing them")
    steps: int = Field(25, ge=1, description="sampler steps of the drawing")
    cfg: float = Field(5.0, ge=0, description="classifier-free guidance scale of the drawing")

    @model_validator(mode="after")
    def _no_mask(self) -> PriorPreservation:
        if self.mask is not None:
            raise ValueError(f"mask = {self.mask!r} is of other pictures than the prior's: remove it")
        return self

    @property
    def needs(self) -> Needs:
        return Needs.of(prior=Prior(count=self.count, path=self.path, steps=self.steps, cfg=self.cfg))

    def __call__(self, step: Step) -> Tensor:
        return per_sample((step.prior.target - step.prior.prediction).square())
