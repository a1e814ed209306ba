"""Masks that somebody drew, one picture of weights for each training picture."""

from __future__ import annotations

from spf_kit.losses import Field, Mask, Needs, Step, Tensor, register


@register("masked")
class Masked(Mask):
    """M = max(G, unmasked), or max(1 - G, unmasked) with `invert`: (B, 1, h, w) in [0, 1], without gradient.

    G is the given mask picture, white = 1, black = 0, after the very rotation, scaling, crop and mirroring of
    its picture, averaged over the pixels of each latent pixel.

    With `denoising` as its reader, only what is white is learnt; `unmasked` lets the rest be learnt a little,
    so that it is not forgotten. With `inverted_mask`, what is white may change and the rest is held.

    Source: the masked training of today's trainers: kohya-ss/sd-scripts (`masked_loss`, `alpha_mask`; masks
    reduced by area there too) and Nerogar/OneTrainer (`unmasked_weight`, max(G, unmasked) there too).
    """

    path: str = Field(
        "alpha",
        min_length=1,
        description='folder of mask pictures; "alpha": the pictures\' own alpha channel',
    )
    invert: bool = Field(False, description="black counts, white does not")
    unmasked: float = Field(0.0, ge=0, le=1, description="least weight of any pixel")

    @property
    def needs(self) -> Needs:
        return Needs.of(picture_masks=self.path)

    def __call__(self, step: Step) -> Tensor:
        given = step.picture_mask
        return (1 - given if self.invert else given).clamp(min=self.unmasked)

    def of_plain(self, step: Step) -> Tensor:
        return self(step)
