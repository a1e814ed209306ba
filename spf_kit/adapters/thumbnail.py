"""A small picture in a LoRA's metadata: `modelspec.thumbnail`, a data URL, as sharing sites and UIs show it.

https://github.com/Stability-AI/ModelSpec: a JPEG in base64 is what its example has. Imports no torch.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings
from pathlib import Path
from typing import Any

from spf_kit.errors import UserError

KEY = "modelspec.thumbnail"
SIDE = 256  # pixels of the longer side
QUALITY = 85  # of the JPEG: about 15 KB
_URL = re.compile(r"data:(image/[\w.+-]+);base64,")


def make(path: str | Path) -> str:
    """The data URL of a picture, made small.

    Raises UserError if the file is missing or no picture.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                picture.draft("RGB", (2 * SIDE, 2 * SIDE))  # a JPEG is decoded no larger than needed
                upright = ImageOps.exif_transpose(picture)
                upright.thumbnail((SIDE, SIDE))
                small = Image.new("RGB", upright.size, "white")
                cut = upright.convert("RGBA")
                small.paste(cut, mask=cut)
    except FileNotFoundError:
        raise UserError(f"the thumbnail {str(path)!r} does not exist: give a picture, PNG or JPEG") from None
    except (
        UnidentifiedImageError,
        OSError,
        ValueError,
        SyntaxError,
        Warning,
        Image.DecompressionBombError,
    ) as e:
        raise UserError(
            f"the thumbnail {str(path)!r} is not a picture that can be read ({e}): give a PNG or JPEG"
        ) from e
    data = io.BytesIO()
    small.save(data, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def describe(url: str) -> dict[str, Any]:
    """Type, bytes and pixels of a thumbnail; `problem` where it is none. Only its header is decoded."""
    match = _URL.match(url)
    if match is None:
        return {"problem": "not a data URL of a picture"}
    try:
        data = base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError):
        return {"type": match[1], "problem": "not base64"}
    told = {"type": match[1], "bytes": len(data)}
    return {**told, **_size(data)}


def _size(data: bytes) -> dict[str, Any]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as picture:
            return {"width": picture.width, "height": picture.height}
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return {"problem": "not a picture"}
