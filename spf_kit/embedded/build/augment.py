"""Faults that decoded and generated pictures have: blur, noise, small shifts, the VAE's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor


def blur(x: Tensor) -> Tensor:
    """Binomial 3 x 3 blur, (B, 3, H, W)."""
    line = torch.tensor([0.25, 0.5, 0.25], dtype=x.dtype)
    kernel = (line[:, None] * line).expand(3, 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)


def chance(x: Tensor, share: float) -> Tensor:
    """(B, 1, 1, 1) bool, true with probability `share`."""
    return torch.rand(len(x), 1, 1, 1) < share


@torch.no_grad()
def augment(x: Tensor, vae: AutoencoderKL | None = None, share: float = 1 / 3) -> Tensor:
    """Pictures in [-1, 1], (B, 3, 64, 64), each with some of the faults.

    With a VAE, a `share` of the pictures, the first, are decoded from latents with noise on them.
    """
    x = x.clone()
    if vae is not None:
        count = int(len(x) * share)
        z = vae.encode(x[:count]).latent_dist.mode()
        noise = torch.rand(count, 1, 1, 1) * 0.35 / vae.config.scaling_factor
        x[:count] = vae.decode(z + noise * torch.randn_like(z)).sample.float()
    soft = blur(x)
    x = torch.where(chance(x, 0.5), soft, x)
    x = torch.where(chance(x, 0.2), blur(blur(soft)), x)
    small = F.interpolate(F.interpolate(x, scale_factor=0.5, mode="area"), scale_factor=2, mode="bilinear")
    x = torch.where(chance(x, 0.1), small, x)
    x = x + torch.rand(len(x), 1, 1, 1) * 0.12 * torch.randn_like(x)
    x = x * (1 + 0.12 * (torch.rand(len(x), 1, 1, 1) - 0.5)) + 0.12 * (torch.rand(len(x), 3, 1, 1) - 0.5)
    dx, dy = (int(v) for v in torch.randint(-2, 3, (2,)))
    padded = F.pad(x, (2, 2, 2, 2), mode="replicate")
    return padded[:, :, 2 + dy : 66 + dy, 2 + dx : 66 + dx].clamp(-1, 1)
