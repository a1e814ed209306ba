"""Bytes of a picture file to an upright RGB picture, whatever the file holds."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageCms

WHITE = (255, 255, 255)
ORIENTATION = 0x0112  # EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Unreadable(Exception):
    """These bytes are no picture, or not a whole one. The message is half a sentence: "is truncated"."""


@dataclass(frozen=True)
class Decoded:
    """An RGB picture, and whether the file held more frames than this first one."""

    image: Image.Image
    animated: bool


def decode(data: bytes) -> Decoded:
    """Decode every pixel: EXIF rotation applied, transparency over white, greyscale, palette, 16-bit and
    CMYK to 8-bit RGB, an embedded colour profile to sRGB, the first frame of an animation.

    Raises Unreadable, whatever Pillow stumbles over: a training run must not meet it at step 4,000.
    """
    with _opened(data) as image:
        # cameras put a thumbnail behind the photograph as a second frame (MPO): that is no animation
        animated = bool(getattr(image, "is_animated", False)) and image.format != "MPO"
        return Decoded(_upright(_rgb(image), _orientation(image)), animated)


def decode_mask(data: bytes) -> Image.Image:
    """A picture of weights, upright, 8-bit greyscale. What is transparent in it counts as black.

    Its values are numbers and no colours: a colour profile is not applied. Raises Unreadable.
    """
    with _opened(data) as image:
        if _wide(image):
            grey = _from_wide(image).convert("L")
        else:
            grey = (_rgba(image) if image.has_transparency_data else image).convert("RGB").convert("L")
        alpha = _alpha(image)
        return _upright(grey if alpha is None else ImageChops.multiply(grey, alpha), _orientation(image))


def decode_alpha(data: bytes) -> Image.Image | None:
    """The alpha channel of a picture, upright, 8-bit, 255 where it is opaque; None if it has none.

    Raises Unreadable.
    """
    with _opened(data) as image:
        alpha = _alpha(image)
        return None if alpha is None else _upright(alpha, _orientation(image))


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The picture as it is stored, all pixels read. What fails in it is raised as Unreadable."""
    if not data:
        raise Unreadable("is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            yield image
    except Image.UnidentifiedImageError as error:
        raise Unreadable("is not a picture in a known format") from error
    except Image.DecompressionBombError as error:
        raise Unreadable(f"has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more
        kind = "is truncated" if "truncated" in str(error).lower() else "is damaged"
        raise Unreadable(f"{kind} ({error})") from error


def _rgb(image: Image.Image) -> Image.Image:
    if _wide(image):
        return _from_wide(image)
    profile = image.info.get("icc_profile")
    if image.mode == "CMYK":
        return _to_srgb(image, profile) or image.convert("RGB")
    if image.has_transparency_data:
        image = _over_white(image)
    elif image.mode != "RGB":
        greyscale = image.mode in ("1", "L")
        image = image.convert("RGB")
        profile = None if greyscale else profile  # a grey profile does not describe the RGB copy
    return _to_srgb(image, profile) or image


def _from_wide(image: Image.Image) -> Image.Image:
    """16-bit and 32-bit greyscale (Pillow's own conversion clips at 255 instead of scaling)."""
    values = np.asarray(image).astype(np.float64)
    top = 65535.0 if image.mode != "F" else max(1.0, float(values.max(initial=0)))
    grey = np.clip(np.rint(values * (255 / top)), 0, 255).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    rgba = _rgba(image)
    white = Image.new("RGBA", rgba.size, (*WHITE, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _rgba(image: Image.Image) -> Image.Image:
    transparent = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(transparent, tuple) and max(transparent) > 255:
        # a 16-bit PNG names its transparent colour in 16 bits; Pillow has kept 8 of each channel
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    return image.convert("RGBA")


def _alpha(image: Image.Image) -> Image.Image | None:
    """The alpha channel, also that of a palette or of one transparent colour."""
    if not image.has_transparency_data:
        return None
    if not _wide(image):
        return _rgba(image).getchannel("A")
    transparent = image.info.get("transparency")
    return Image.fromarray(np.where(np.asarray(image) == transparent, 0, 255).astype(np.uint8))


def _wide(image: Image.Image) -> bool:
    """Whether it has more than 8 bits of grey."""
    return image.mode.startswith("I") or image.mode == "F"


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image | None:
    """`image` from its colour profile to sRGB; None where the profile is missing, bad or sRGB already."""
    if not profile:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return None
        target = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    return converted


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # broken EXIF blocks are common and say nothing about the pixels
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = TURNS.get(orientation)
    return image.transpose(turn) if turn is not None else image
