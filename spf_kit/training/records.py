"""`report/` in a run folder: what a run keeps so that its page can be built, now or years later.

    run.json                     what was decided before the first step, the origin of every setting
    data.json                    the pictures' names and captions, thumbnails, what the check found
    previews/step-000200.json    the pictures and maps of a preview; step 0 is the base alone
    proof.json                   pictures of the evaluation: the first prompts, and the worst ones
    strengths.json               the same prompts at strengths from 0 to 1.5
    seconds.json                 time and memory by part

Pictures stand in them as data URLs: each file appears whole, and with one flush to the disk. Nothing here
knows what the page looks like.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field

from spf_kit.data.pictures import open_picture
from spf_kit.errors import UserError
from spf_kit.files import atomic

if TYPE_CHECKING:
    from PIL.Image import Image

FOLDER = "report"
RUN, DATA, PROOF, STRENGTHS, SECONDS = "run.json", "data.json", "proof.json", "strengths.json", "seconds.json"
PREVIEWS = "previews"
SIDE = 512  # pixels of a kept picture, at most
THUMBNAIL = 160
LOSSLESS_BELOW = 129  # pixels: compression would be seen in what is enlarged on the page
QUALITY = 85
TINT = (1.0, 0.85, 0.1)
# how a mask lights a picture: its share where the mask is 0, more of it and of the tint where it is 1
DARK, LIGHT, TINTED = 0.35, 0.4, 0.25

# what a browser shows as a picture and never runs
DataUrl = Annotated[str, Field(pattern=r"^data:image/(webp|png|jpeg);base64,[A-Za-z0-9+/]+=*$")]
Step = Annotated[int, Field(ge=0, lt=10**9)]
Bytes = Annotated[int, Field(ge=0, lt=10**18)]
MapKind = Literal["mask", "target", "phrase", "change"]


class Map(BaseModel):
    """Where something acts in one picture: a veil to lay over it, clear where it is 1."""

    label: str
    kind: MapKind
    picture: DataUrl


class Case(BaseModel):
    """One prompt of a preview, drawn with the target and without."""

    prompt: str
    seed: int
    asked: DataUrl
    plain: DataUrl
    maps: list[Map] = []


class PreviewRecord(BaseModel):
    """One preview. Step 0 is the base model."""

    step: Step
    target: str
    steps: int  # of the sampler
    cfg: float
    cases: list[Case]


class Entry(BaseModel):
    """One picture of the data."""

    file: str
    text: str  # the caption as it was written
    base: str  # c_base
    width: int
    height: int
    bucket: tuple[int, int]
    repeats: int
    sha256: str
    thumbnail: DataUrl | None = None


class DataRecord(BaseModel):
    """The data and what the check found."""

    target: str
    entries: list[Entry]
    warnings: dict[str, list[str]] = {}


class Setting(BaseModel):
    """One effective setting."""

    key: str
    value: Any
    origin: str


class RunRecord(BaseModel):
    """What was decided before the first step."""

    preset: str  # the file's name
    family: str
    steps: Step
    started: float = Field(ge=0, lt=2**35)  # a time that every system can name
    samples: int = 0  # of an epoch
    settings: list[Setting] = []
    versions: dict[str, str] = {}
    machine: dict[str, str] = {}
    hashes: dict[str, str] = {}
    memory: dict[str, Bytes] = {}  # by part, by count of the tensors
    plugins: list[str] = []  # files given with --plugin


class ProofCase(BaseModel):
    """One evaluated prompt: the base and the LoRA at the same seed, asked and not."""

    prompt: str
    seed: int
    why: str = ""  # why it was chosen; "": it is one of the first
    responds: bool | None = None
    changed: list[str] = []
    leaked: list[str] = []
    base_plain: DataUrl
    base_asked: DataUrl
    asked: DataUrl
    plain: DataUrl


class ProofRecord(BaseModel):
    """Pictures that show what the evaluation's numbers say."""

    target: str
    cases: list[ProofCase]


class StrengthRow(BaseModel):
    """One prompt over the strengths."""

    prompt: str
    seed: int
    asked: bool
    pictures: list[DataUrl]


class StrengthRecord(BaseModel):
    """The LoRA at several strengths."""

    target: str
    strengths: list[float]
    rows: list[StrengthRow]


class Seconds(BaseModel):
    """Time of each part in seconds, and the largest memory in bytes by the end of it."""

    seconds: dict[str, Annotated[float, Field(ge=0, lt=1e12)]] = {}
    memory: dict[str, Bytes] = {}


# --- files ------------------------------------------------------------------------------------------------

Record = TypeVar("Record", bound=BaseModel)


def preview_file(folder: Path, step: int) -> Path:
    """`folder` is that of the run."""
    return folder / FOLDER / PREVIEWS / f"step-{step:06d}.json"


def save(record: BaseModel, path: Path) -> None:
    """Write a record, whole or not at all. Raises UserError if the disk refuses."""
    with atomic(path) as temporary:
        text = json.dumps(record.model_dump(mode="json"), ensure_ascii=False)
        # file names that are no Unicode: what is unreadable on the page need not be kept
        temporary.write_bytes(text.encode("utf-8", "replace"))


def load(kind: type[Record], path: Path) -> Record:
    """Read a record back. Raises OSError or ValueError."""
    return kind.model_validate_json(path.read_bytes())


# --- pictures ---------------------------------------------------------------------------------------------


def data_url(picture: Image, side: int = SIDE) -> str:
    """A picture as WebP, scaled down to `side` pixels; small ones keep every bit."""
    if max(picture.size) > side:
        picture = picture.copy()
        picture.thumbnail((side, side))
    exact = max(picture.size) < LOSSLESS_BELOW
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=exact, quality=60 if exact else QUALITY, method=4)
    return _url("webp", buffer.getvalue())


def veil(mask: Any) -> str:
    """A mask (h, w) of numbers in [0, 1] as a picture to lay over another one: there the result is that of
    `overlays.lit`, dark where the mask is 0 and tinted where it is 1."""
    import numpy as np
    from PIL import Image as Pillow

    m = np.asarray(mask, dtype=np.float32).clip(0, 1)[..., None]
    alpha = 1 - (DARK + LIGHT * m)  # what is left of the picture is 1 - alpha
    colour = TINTED * m * np.asarray(TINT, dtype=np.float32) / alpha
    rgba = np.concatenate([colour, alpha], axis=-1)
    buffer = io.BytesIO()
    Pillow.fromarray((rgba * 255).round().astype("uint8")).save(buffer, "PNG", optimize=True)
    return _url("png", buffer.getvalue())


def thumbnail(path: Path) -> str | None:
    """A small copy of a picture file, upright; None if it cannot be made: a page can do without."""
    from PIL import Image as Pillow
    from PIL import ImageOps

    try:
        with Pillow.open(path) as opened:
            if opened.format == "JPEG":  # of a photograph an eighth is decoded, in a twentieth of the time
                opened.draft("RGB", (2 * THUMBNAIL, 2 * THUMBNAIL))
                return data_url(ImageOps.exif_transpose(opened).convert("RGB"), THUMBNAIL)
        return data_url(open_picture(path), THUMBNAIL)
    except (OSError, ValueError, SyntaxError, UserError, Pillow.DecompressionBombError):
        return None


def _url(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


# --- keeping on going -------------------------------------------------------------------------------------


def attempt(what: str, act: Callable[[], None], warn: Callable[[str], None]) -> bool:
    """Do something that a run can do without: what goes wrong is told in a sentence, and the run goes on."""
    try:
        act()
    except Exception as error:  # a full disk, too little memory: nothing of it is worth a run
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        warn(f"{what}: {reason}; the run goes on without")
        return False
    return True


def spread(items: Iterable[Any], most: int) -> list[Any]:
    """At most `most` of them, evenly, first and last among them."""
    found = list(items)
    if len(found) <= most:
        return found
    if most < 2:
        return found[-1:] if most else []
    return [found[round(i * (len(found) - 1) / (most - 1))] for i in range(most)]
