"""All words keep attending where they attend in the frozen base."""

from __future__ import annotations

from spf_kit.losses import Field, Loss, Needs, Step, Tensor, per_sample, register


@register("attention_drift")
class AttentionDrift(Loss):
    """L_drift = mean over layers l, tokens i, pixels of |A_res[l][i] - A_off[l][i]|^2: (B,).

    A[l] are the cross-attention maps of layer l, mean over heads, (B, h_l w_l, L), with the adapter on
    (A_res) and off (A_off), both on c_full. Every one of the L token positions counts, the target's too,
    and padding: the adapter may change what the words bring but not where. Exactly zero for an adapter
    without effect. With a mask only the masked pixels are held, by its average over each of a layer's pixels.

    SPF's `text_consistency` compares with c_base instead, in the base tokens alone and outside its mask.

    Scale: the maps of one pixel sum to 1 over L = 77, so that the values are small and weights large.

    Costs one pass without gradient.

    Source: attention maps as what to hold are those of Hertz et al. 2022, Prompt-to-Prompt
    (arXiv:2208.01626); as a loss it is attention transfer (Zagoruyko and Komodakis 2017, arXiv:1612.03928).
    The exact form is ours.
    """

    layers: list[str] = Field(["all"], min_length=1, description='"all", "down", "mid", "up", "1/2" or names')

    @property
    def needs(self) -> Needs:
        return Needs.of("response", "reference_full", layers=self.layers)

    def __call__(self, step: Step) -> Tensor:
        base = step.run("reference_full")
        terms = []
        for ours, theirs in zip(step.response.layers(self.layers), base.layers(self.layers)):
            weights = None if step.mask is None else ours.resize(step.mask).to(ours.maps)
            terms.append(per_sample((ours.maps - theirs.maps).square(), weights))
        return sum(terms[1:], terms[0]) / len(terms)
