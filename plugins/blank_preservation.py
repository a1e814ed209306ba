"""Hold the tuned model to the frozen base where it is asked for nothing."""

from __future__ import annotations

from spf_kit.losses import Loss, Needs, Step, Tensor, per_sample, register


@register("blank_preservation")
class BlankPreservation(Loss):
    """L_blank = |eps_on(z_t, t, "") - eps_off(z_t, t, "")|^2, mean over channels and pixels: (B, C, h, w) to
    (B,).

    `on` is the model with the adapter, `off` the same weights without it, "" the empty caption, which is also
    the unconditional half of classifier-free guidance: whatever the adapter changes there is in every
    picture. Exactly zero for an adapter without effect. With a mask only the masked pixels are held.

    Costs two passes more: one without gradient (off) and one with (on).

    Source: `blank_prompt_preservation` of ostris/ai-toolkit; it is knowledge distillation from the frozen
    base (Hinton et al. 2015, arXiv:1503.02531) on the empty caption.
    """

    @property
    def needs(self) -> Needs:
        return Needs.of("blank", "reference_blank")

    def __call__(self, step: Step) -> Tensor:
        difference = step.run("blank").prediction - step.run("reference_blank").prediction
        return per_sample(difference.square(), step.mask)
