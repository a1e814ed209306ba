"""Keep the update of the weights small, whatever it does."""

from __future__ import annotations

from typing import Literal

from spf_kit.losses import Field, Loss, Needs, Step, Tensor, model_validator, register


@register("weight_norm")
class WeightNorm(Loss):
    """L_norm = sum over adapted layers l of |W'_l - W_l|_F^2, the same for each sample: (B,).

    W' is the weight with the adapter. For LoRA that is |alpha / r * up_l down_l|_F^2 with the factors up
    (outputs, r) and down (r, inputs). The norm is that of the change of the weights, not of the factors:
    weight decay in the place where it means something. Zero for a new adapter. It knows nothing of pictures:
    a smaller update of everything, the plainest way to less pollution (and less response). `mean` divides by
    the number of layers, so that weights suit adapters of any size.

    Costs no pass. The magnitudes of DoRA are left out.

    Source: the penalty form of the max-norm regularisation of LoRA weights in today's trainers
    (kohya-ss/sd-scripts, `scale_weight_norms`, which rescales instead); L2 towards the pre-trained weights is
    L2-SP (Li et al. 2018, arXiv:1802.01483).
    """

    reduce: Literal["sum", "mean"] = Field("sum", description="over the adapted layers")

    @model_validator(mode="after")
    def _no_mask(self) -> WeightNorm:
        if self.mask is not None:
            raise ValueError(f"mask = {self.mask!r} is of pictures and weights have none: remove it")
        return self

    @property
    def needs(self) -> Needs:
        return Needs.of(weights=True)

    def __call__(self, step: Step) -> Tensor:
        norms = step.update_norms()
        total = norms.sum() if self.reduce == "sum" else norms.mean()
        return total.expand(len(step.latents))
