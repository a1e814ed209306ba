"""The caption's own words attend where the frozen base lets them attend."""

from __future__ import annotations

from spf_kit.losses import Field, Loss, Needs, Step, Tensor, register, token_mask


@register("text_consistency")
class TextConsistency(Loss):
    """L_text = mean over layers l, base tokens i, pixels of |(1 - M_l) (A_res[l][i] - A_ref[l][i])|^2, (B,).

    A[l][i] is the cross-attention map of token i in layer l, mean over heads, (h_l, w_l), from the response
    path (adapter on, c_full) and the reference path (adapter off, c_base). Base tokens stand at the same
    positions in both; padding and the end token do not and are left out, as is the begin token, from whose
    share the target takes its own. M_l is the mask resized to layer l: 1 - M keeps the alignment off the
    place where the target shall act. Without a mask, M = 0.

    Scale: the maps of one pixel sum to 1 over all 77 tokens, so the values are small (about 1e-5 on the
    embedded base). `relative` divides each layer's by the mean square of its A_ref, which makes weights
    comparable between bases; it is our addition.

    Source: SPF-Portrait (arXiv:2504.00396), the text-consistent part of its alignment.
    """

    layers: list[str] = Field(["all"], min_length=1, description='"all", "down", "mid", "up", "1/2" or names')
    layer_weights: dict[str, float] = Field({}, description='factors of layers, as {"1/4" = 0.5}; others: 1')
    relative: bool = Field(False, description="divide by the mean square of the base's maps")

    @property
    def needs(self) -> Needs:
        return Needs.of("response", "reference", layers=self.layers, phrases=True)

    def __call__(self, step: Step) -> Tensor:
        pairs = zip(step.response.layers(self.layers), step.reference.layers(self.layers))
        tokens_B1L = None
        terms = []
        for response, reference in pairs:
            if tokens_B1L is None:
                mask = token_mask([spans.base for spans in step.spans], response.keys.shape[1])
                mask = mask.to(response.maps)
                tokens_B1L = (mask / mask.sum(dim=1, keepdim=True).clamp(min=1)).unsqueeze(1)
            difference = response.maps - reference.maps  # (B, Q, L)
            if step.mask is not None:
                difference = difference * (1 - response.resize(step.mask)).to(difference)
            term = (difference.square() * tokens_B1L).sum(dim=2).mean(dim=1)
            if self.relative:
                size = (reference.maps.square() * tokens_B1L).sum(dim=2).mean(dim=1)
                term = term / size.clamp(min=1e-12)
            terms.append(term * response.factor_in(self.layer_weights))
        return sum(terms[1:], terms[0]) / len(terms)
