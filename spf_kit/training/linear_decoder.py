"""A linear map that stands for the VAE's decoder where a loss needs the picture only roughly.

Shapes: N pictures, B samples, C latent channels, h x w latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from spf_kit.families.base import Family


@dataclass(frozen=True)
class LinearDecoder:
    """rgb = W z + b in every latent pixel: (B, C, h, w) to (B, 3, h, w).

    The least-squares fit to the VAE's pictures averaged to the latents' size. Nothing is cut off: values
    leave [0, 1] a little, and the gradient lives everywhere.
    """

    weight: Tensor  # (3, C)
    bias: Tensor  # (3,)
    r2: float  # share of the variance of the VAE's small pictures that it explains

    @classmethod
    @torch.no_grad()
    def fit(cls, family: Family, latents: Sequence[Tensor]) -> LinearDecoder:
        """From N latents (C, h, w) of any sizes, as `family` scales them; its VAE must be loaded."""
        rows, colours = [], []
        for z in latents:
            picture = family.decode(z[None].to(family.device))
            small = F.interpolate(picture, z.shape[1:], mode="area")
            rows.append(z.flatten(1).T.cpu())
            colours.append(small[0].flatten(1).T.cpu())
        z, rgb = torch.cat(rows).double(), torch.cat(colours).double()  # (pixels, C), (pixels, 3)
        ones = torch.ones_like(z[:, :1])
        solution = torch.linalg.lstsq(torch.cat([z, ones], dim=1), rgb, driver="gelsd").solution
        left = rgb - z @ solution[:-1] - solution[-1]
        spread = (rgb - rgb.mean(dim=0)).square().sum()
        matrix = solution.float().to(family.device)
        return cls(matrix[:-1].T.contiguous(), matrix[-1], 1 - float(left.square().sum() / spread))

    def __call__(self, latents: Tensor) -> Tensor:
        """Differentiable, in the dtype of the latents."""
        weight, bias = self.weight.to(latents), self.bias.to(latents)
        return torch.einsum("bchw,dc->bdhw", latents, weight) + bias.view(3, 1, 1)

    @property
    def sentence(self) -> str:
        """How good it is, for the user."""
        return f"the linear decoder explains {self.r2:.0%} of the VAE's picture at the latents' size"
