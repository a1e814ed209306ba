"""Aspect-ratio buckets: which sizes pictures are brought to, and which of them make a batch.

A batch has one size, so pictures of like shape are grouped. Every size has sides that are multiples of
`step` and an area of at most resolution^2, so that the largest batch needs no more memory than a square one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from spf_kit.data.random import permutation

MAX_ASPECT = 2.5  # longer side over shorter; a picture beyond it is cropped
CENTER = (0.5, 0.5)

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """A picture size in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def bucket_sizes(resolution: int, step: int, max_aspect: float = MAX_ASPECT) -> list[Bucket]:
    """All sizes for this resolution, narrowest first; the square among them.

    Raises ValueError if not even the square of side `step` fits.
    """
    if step > resolution:
        raise ValueError(f"sides in multiples of {step} cannot make a picture of {resolution} pixels")
    square = resolution // step * step
    sizes = {Bucket(square, square)}
    for width in range(step, resolution + 1, step):
        height = resolution * resolution // width // step * step
        if height <= max_aspect * width:
            sizes |= {Bucket(width, height), Bucket(height, width)}
    return sorted(sizes)


def nearest_bucket(width: int, height: int, sizes: Sequence[Bucket]) -> Bucket:
    """The size whose aspect ratio is nearest, by the logarithm (2:1 and 1:2 are as far from square)."""
    aspect = math.log(width / height)
    return min(sizes, key=lambda b: (abs(aspect - math.log(b.width / b.height)), -b.width * b.height, b))


def crop_box(width: int, height: int, bucket: Bucket, offset: tuple[float, float] = CENTER) -> Box:
    """The largest part of a picture that has the bucket's shape, as (left, top, right, bottom).

    `offset`: where it lies in what overlaps, 0 = left or top, 1 = right or bottom.
    """
    wide = min(float(width), height * bucket.width / bucket.height)
    high = min(float(height), width * bucket.height / bucket.width)
    left, top = (width - wide) * offset[0], (height - high) * offset[1]
    # rounding must not push the box out of the picture by a part of a pixel
    return left, top, min(float(width), left + wide), min(float(height), top + high)


def framing(
    width: int, height: int, bucket: Bucket, offset: tuple[float, float] = CENTER, flip: bool = False
) -> tuple[int, ...]:
    """How a picture is cut: its height and width, top and left of the shown part, and the part's size.

    Top and left count pixels of the picture once it has been scaled (and mirrored), as SDXL was told them.
    """
    left, top, right, bottom = crop_box(width, height, bucket, offset)
    scale_x, scale_y = bucket.width / (right - left), bucket.height / (bottom - top)
    start = width - right if flip else left
    return height, width, round(top * scale_y), round(start * scale_x), bucket.height, bucket.width


def kept_share(width: int, height: int, bucket: Bucket) -> float:
    """How much of the picture's area is left after the crop."""
    left, top, right, bottom = crop_box(width, height, bucket)
    return (right - left) * (bottom - top) / (width * height)


def to_pixels(image: Image.Image, bucket: Bucket, offset: tuple[float, float], flip: bool) -> Tensor:
    """An RGB picture cropped, scaled and perhaps mirrored: (3, H, W) float32 in [-1, 1].

    Cropped and scaled in one step with Lanczos' filter, which Pillow widens when it reduces (antialiasing).
    A picture that has the size already is not touched.
    """
    pixels = np.asarray(cut(image, bucket, offset, flip), dtype=np.float32) / 127.5 - 1.0
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def cut(image: Image.Image, bucket: Bucket, offset: tuple[float, float], flip: bool) -> Image.Image:
    """What `to_pixels` shows of a picture, in its own mode: masks take the same way as their pictures."""
    box = crop_box(image.width, image.height, bucket, offset)
    scaled = image.resize((bucket.width, bucket.height), Image.Resampling.LANCZOS, box=box)
    return scaled.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else scaled


# --- batches ----------------------------------------------------------------------------------------------

Rounds = Sequence[Sequence[int]]


def batch_count(groups: Sequence[Rounds], size: int) -> int:
    """Batches in an epoch: a bucket's last batch may be smaller, and none is dropped."""
    return sum(math.ceil(sum(map(len, rounds)) / size) for rounds in groups)


def epoch_batches(groups: Sequence[Rounds], size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch, a function of its arguments alone.

    `groups`: for each bucket its sample numbers in rounds; a picture that counts three times stands in three
    rounds. Rounds follow each other, each in a random order, so that a picture's repeats spread over the
    epoch instead of meeting in one batch. The batches of all buckets are then mixed.
    """
    batches: list[list[int]] = []
    for number, rounds in enumerate(groups):
        order: list[int] = []
        for turn, samples in enumerate(rounds):
            places = permutation(len(samples), seed, "samples", epoch, number, turn)
            order += [samples[i] for i in places]
        batches += [order[i : i + size] for i in range(0, len(order), size)]
    return [batches[i] for i in permutation(len(batches), seed, "batches", epoch)]
