"""Outside a mask, hold the tuned model to the frozen base."""

from __future__ import annotations

from typing import Literal

from spf_kit.losses import Field, Loss, Needs, Step, Tensor, model_validator, per_sample, register, x0_weight


@register("inverted_mask")
class InvertedMask(Loss):
    """L_inv = |(1 - M) (eps_on(z_t, t, c_full) - eps_off(z_t, t, c))|^2, mean over channels and pixels:
    (B, C, h, w) and M (B, 1, h, w) to (B,).

    `on` is the model with the adapter, `off` the same weights without it, M the mask that `mask` names: where
    the target may act. c is c_full, as the trainers below have it: outside the mask the adapter changes
    nothing; exactly zero for an adapter without effect. Or c_base (`caption`): there also the base's own
    answer to the target words is undone, which is stricter and not zero at the start.

    1 - M stands inside the square, as in SPF-Portrait's other alignment terms, so that one mask means the
    same to all of them: it scales the difference that is to vanish. The trainers below multiply the square.
    Both are the same for masks of 0 and 1; a half-masked pixel counts a quarter here and a half there.

    `x0_weight` is our addition, off by default: what the function of that name in `spf_kit.losses` says.

    Costs one pass without gradient; none with caption = "base" where another plugin reads the reference.

    Source: `inverted_mask_prior` of ostris/ai-toolkit (weight 0.5 by default) and
    `masked_prior_preservation_weight` of Nerogar/OneTrainer; both take their masks from pictures (here the
    plugin `masked`), any other mask serves as well.
    """

    caption: Literal["full", "base"] = Field(
        "full", description="what the frozen base reads: c_full or c_base"
    )

    x0_weight: float | None = Field(
        None, gt=0, description="at high noise differences count as of the clean picture, at most so often"
    )

    @model_validator(mode="after")
    def _masked(self) -> InvertedMask:
        if self.mask is None:
            raise ValueError(
                f"{self.name} acts outside a mask and has none: set mask to the id of a mask that stands "
                'before it, as mask = "control_map"'
            )
        return self

    @property
    def needs(self) -> Needs:
        return Needs.of("response", "reference_full" if self.caption == "full" else "reference")

    def __call__(self, step: Step) -> Tensor:
        base = step.run("reference_full") if self.caption == "full" else step.reference
        outside = 1 - step.mask  # type: ignore[operator]  # never without: see the validator
        loss = per_sample((outside * (step.response.prediction - base.prediction)).square())
        return loss * x0_weight(step, self.x0_weight)
