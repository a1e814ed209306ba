"""How far two pictures of one seed differ, pixel by pixel, and outside the region that changed.

Shapes: N pictures, H x W pixels; all values in [0, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW, SIGMA = 11, 1.5  # pixels; Wang et al. 2004
REGION = 0.25  # share of the picture that the target may cover


def gaussian(size: int, sigma: float, like: Tensor) -> Tensor:
    """A normalised one-dimensional Gaussian window, (size,)."""
    x = torch.arange(size, dtype=like.dtype, device=like.device) - (size - 1) / 2
    weights = torch.exp(-(x**2) / (2 * sigma**2))
    return weights / weights.sum()


def blur(x_NCHW: Tensor, size: int, sigma: float) -> Tensor:
    """Each channel smoothed by a Gaussian window of odd `size`, mirrored at the borders."""
    channels, half = x_NCHW.shape[1], size // 2
    weights = gaussian(size, sigma, x_NCHW)
    padded = F.pad(x_NCHW, (half, half, half, half), mode="reflect")
    rows = F.conv2d(padded, weights.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels)
    return F.conv2d(rows, weights.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels)


def ssim_map(a_NCHW: Tensor, b_NCHW: Tensor) -> Tensor:
    """Structural similarity at each pixel, mean over the channels: (N, H, W).

        ssim = (2 m_a m_b + c1) (2 s_ab + c2) / ((m_a^2 + m_b^2 + c1) (s_a^2 + s_b^2 + c2))

    Means m, variances s^2 and covariance s_ab in an 11 x 11 Gaussian window of sigma 1.5; c1 = 0.01^2 and
    c2 = 0.03^2 for values in [0, 1]. Source: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment",
    IEEE TIP 13 (2004), with torchmetrics' mirrored borders, so that every pixel has a value.
    """
    if a_NCHW.shape != b_NCHW.shape or a_NCHW.ndim != 4:
        raise ValueError(f"two equal shapes (N, C, H, W) expected, not {a_NCHW.shape} and {b_NCHW.shape}")
    if min(a_NCHW.shape[-2:]) <= WINDOW // 2:
        raise ValueError(f"pictures of {tuple(a_NCHW.shape[-2:])} pixels are smaller than SSIM's window")
    a, b = a_NCHW.double(), b_NCHW.double()  # variances are small differences of large numbers
    parts = blur(torch.cat((a, b, a * a, b * b, a * b)), WINDOW, SIGMA).split(a.shape[0])
    mean_a, mean_b = parts[0], parts[1]
    var_a, var_b = (parts[2] - mean_a**2).clamp(min=0), (parts[3] - mean_b**2).clamp(min=0)
    cov = parts[4] - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    similarity = similarity / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return similarity.mean(dim=1).to(a_NCHW.dtype)


def ssim(a_NCHW: Tensor, b_NCHW: Tensor) -> Tensor:
    """Structural similarity of each pair, (N,); 1 for equal pictures."""
    return ssim_map(a_NCHW, b_NCHW).mean(dim=(1, 2))


def mae(a_NCHW: Tensor, b_NCHW: Tensor) -> Tensor:
    """Mean absolute error of each pair, (N,)."""
    return (a_NCHW - b_NCHW).abs().mean(dim=(1, 2, 3))


def changed_region(a_NCHW: Tensor, b_NCHW: Tensor, share: float = REGION) -> Tensor:
    """Where two pictures differ most: (N, H, W), true on `share` of the pixels.

    The absolute difference, mean over the channels, is smoothed over about a 20th of the picture, so that the
    region is a place and not a scatter of pixels. The share is fixed: an adapter that changes the whole
    picture cannot hide behind a region that grows with its damage, and all are excused the same area.
    """
    height, width = a_NCHW.shape[-2:]
    sigma = max(1.0, min(height, width) / 40)
    size = 2 * min(round(3 * sigma), min(height, width) - 1) + 1
    difference = blur((a_NCHW - b_NCHW).abs().mean(dim=1, keepdim=True), size, sigma)[:, 0].flatten(1)
    count = round(share * difference.shape[1])
    places = difference.topk(count, dim=1).indices
    region = torch.zeros_like(difference, dtype=torch.bool).scatter_(1, places, True)
    return region.view(-1, height, width)


def outside(a_NCHW: Tensor, b_NCHW: Tensor, share: float = REGION) -> tuple[Tensor, Tensor]:
    """(SSIM, mean absolute error) of each pair outside the region that changed, each (N,).

    What lies inside the region is made equal first: SSIM's window reaches over the border, and the wanted
    change must not count against its surroundings.
    """
    region_NHW = changed_region(a_NCHW, b_NCHW, share)
    same = torch.where(region_NHW[:, None], a_NCHW, b_NCHW)
    kept_NHW = (~region_NHW).to(a_NCHW.dtype)
    pixels = kept_NHW.sum(dim=(1, 2))
    similarity = (ssim_map(a_NCHW, same) * kept_NHW).sum(dim=(1, 2)) / pixels
    error = ((a_NCHW - same).abs().mean(dim=1) * kept_NHW).sum(dim=(1, 2)) / pixels
    return similarity, error
