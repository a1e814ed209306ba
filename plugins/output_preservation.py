"""Hold the tuned model to the frozen base on captions that do not ask for the attribute."""

from __future__ import annotations

from typing import Literal

import torch

from spf_kit.losses import Field, Loss, Needs, Step, Tensor, model_validator, per_sample, register, x0_weight


@register("output_preservation")
class OutputPreservation(Loss):
    """L_out = |eps_on(z_t, t, c_base) - eps_off(z_t, t, c_base)|^2, mean over channels and pixels:
    (B, C, h, w) to (B,).

    `on` is the model with the adapter, `off` the same weights without it, and c_base the caption without the
    target phrase: whoever does not ask for the attribute shall get the base model's picture. Exactly zero for
    an adapter that changes nothing. With a mask only the masked pixels are held; with `inside` all are, and a
    share s of the weight stands inside the mask M, whatever its size: a pixel counts 1 - s + s M / mean(M).
    A target of a few pixels leaks there, where a mean over the picture sees little of it. On samples of a
    `share` M is what the mask knows of the picture (`Mask.of_plain`).

    `relative` divides each sample's by the mean square of its eps_off, without gradient: the share of the
    prediction that has changed, the same for bases that predict eps, v or a flow. It is our addition.

    Cost: without `share` two passes more in every step, one without gradient (off) and one with (on). With a
    `share` no pass with the adapter on: on that share of the samples it takes c_base in place of c_full, and
    there this loss acts and no other that reads the model. What is left is the pass without gradient, which
    other plugins may read too. The other losses see fewer samples in return: each sample counts alike in the
    sum, so that a share of 0.25 weighs this loss by 0.25 and the others by 0.75. `blank` of these samples
    have the empty caption in both passes: under classifier-free guidance, eps("") + g (eps(c) - eps("")),
    whatever the adapter changes there is in every picture, g - 1 times.

    `walk` takes the noisy latents of that share from the frozen base's own way out of noise, which the pass
    without gradient walks anyway. The data's show the attribute, and on them the base predicts it too: an
    adapter that adds it to a picture without it is not noticed there.

    Source: the "differential output preservation" of today's trainers, e.g. ostris/ai-toolkit; it is
    knowledge distillation from the frozen base (Hinton et al. 2015, arXiv:1503.02531) on c_base. `share`,
    `blank`, `walk`, `inside` and `x0_weight` (see the function of that name in `spf_kit.losses`) are our
    additions.
    """

    share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of the samples with c_base in place of c_full; unset: two passes more",
    )
    blank: float = Field(
        0.0, ge=0, le=1, description='part of that share with "" in place of c_base (guidance draws with it)'
    )
    x0_weight: float | None = Field(
        None, gt=0, description="at high noise differences count as of the clean picture, at most so often"
    )
    walk: int | None = Field(
        None, ge=2, description="steps of the base's own way out of noise, on which it holds; unset: the data"
    )
    inside: float | None = Field(
        None, ge=0, le=1, description="share of the weight inside the mask; unset: all of it, by its size"
    )
    kind: Literal["l2", "relative"] = Field("l2", description="relative: as a share of the base's prediction")

    @model_validator(mode="after")
    def _of_share(self) -> OutputPreservation:
        if self.blank and self.share is None:
            raise ValueError(
                f"blank = {self.blank} is a part of share, which is not set: set share, or use the plugin "
                "blank_preservation"
            )
        if self.walk is not None and self.share is None:
            raise ValueError(f"walk = {self.walk} is of the samples of share, which is not set: set share")
        if self.walk is not None and self.mask is not None:
            raise ValueError(
                f"walk = {self.walk} holds pictures of the base's own, of which mask = {self.mask!r} knows "
                "nothing: remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _masked(self) -> OutputPreservation:
        if self.inside and self.mask is None:
            raise ValueError(
                f"inside = {self.inside} is a share of the weight inside a mask and there is none: set mask "
                'to the id of a mask that stands before it, as mask = "control_map"'
            )
        return self

    @property
    def needs(self) -> Needs:
        if self.share is None:
            return Needs.of("plain", "reference")
        return Needs.of(
            "reference", plain_share=self.share, blank_share=self.blank or None, plain_walk=self.walk
        )

    def __call__(self, step: Step) -> Tensor:
        base = step.reference.prediction
        loss = per_sample((step.plain.prediction - base).square(), self._weights(step))
        loss = loss if self.kind == "l2" else loss / per_sample(base.square())
        return loss * x0_weight(step, self.x0_weight)

    def _weights(self, step: Step) -> Tensor | None:
        """(B, 1, h, w) of each pixel; None: 1."""
        if step.mask is None or self.inside is None:
            return step.mask
        mean = step.mask.mean(dim=(2, 3), keepdim=True)
        within = torch.where(mean > 0, step.mask / mean.clamp(min=1e-6), 1.0)  # an empty one is nowhere
        return 1 - self.inside + self.inside * within
