"""The picture's own features stay: the queries of cross-attention."""

from __future__ import annotations

from spf_kit.losses import Field, Loss, Needs, Step, Tensor, at_least_float32, register


@register("fine_grained")
class FineGrained(Loss):
    """L_fine = mean over layers l, pixels q, features d of |(1 - M_l) (Q_res[l] - Q_ref[l])|^2: (B,).

    Q[l] are the query features of cross-attention layer l, (h_l w_l, d), which carry the picture, from the
    response path (adapter on, c_full) and the reference path (adapter off, c_base). M_l is the mask resized
    to layer l: 1 - M keeps the alignment off the place where the target shall act. Without a mask, M = 0.

    `relative` divides each layer's by the mean square of its Q_ref: layers differ by orders of magnitude, and
    the largest would decide alone. It is our addition.

    Source: SPF-Portrait (arXiv:2504.00396), the fine-grained part of its alignment.
    """

    layers: list[str] = Field(["all"], min_length=1, description='"all", "down", "mid", "up", "1/2" or names')
    layer_weights: dict[str, float] = Field({}, description='factors of layers, as {"1/4" = 0.5}; others: 1')
    relative: bool = Field(False, description="divide by the mean square of the base's queries")

    @property
    def needs(self) -> Needs:
        return Needs.of("response", "reference", layers=self.layers)

    def __call__(self, step: Step) -> Tensor:
        terms = []
        for response, reference in zip(step.response.layers(self.layers), step.reference.layers(self.layers)):
            base = at_least_float32(reference.queries)
            difference = at_least_float32(response.queries) - base  # (B, Q, d)
            if step.mask is not None:
                difference = difference * (1 - response.resize(step.mask)).to(difference)
            term = difference.square().mean(dim=(1, 2))
            if self.relative:
                term = term / base.square().mean(dim=(1, 2)).clamp(min=1e-12)
            terms.append(term * response.factor_in(self.layer_weights))
        return sum(terms[1:], terms[0]) / len(terms)
