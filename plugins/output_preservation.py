"""Hold the tuned model to the frozen base on captions that do not ask for the attribute."""

from __future__ import annotations

from spf_kit.losses import Loss, Needs, Step, Tensor, per_sample, register


@register("output_preservation")
class OutputPreservation(Loss):
    """L_out = |eps_on(z_t, t, c_base) - eps_off(z_t, t, c_base)|^2, mean over channels and pixels: (B,).

    `on` is the model with the adapter, `off` the same weights without it, and c_base the caption without the
    target phrase: whoever does not ask for the attribute shall get the base model's picture. Exactly zero for
    an adapter that changes nothing. With a mask only the masked pixels are held.

    Costs two passes more: one without gradient (off) and one with (on).

    Source: the "differential output preservation" of today's trainers, e.g. ostris/ai-toolkit; it is
    knowledge distillation from the frozen base (Hinton et al. 2015, arXiv:1503.02531) on c_base.
    """

    @property
    def needs(self) -> Needs:
        return Needs.of("plain", "reference")

    def __call__(self, step: Step) -> Tensor:
        return per_sample((step.plain.prediction - step.reference.prediction).square(), step.mask)
