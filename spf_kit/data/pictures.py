"""A folder of pictures: which files there are, what each shows, what its caption says.

Captions stand in text files beside the pictures (`001.jpg`, `001.txt`) or in a `metadata.jsonl` of the same
folder, one `{"file_name": "001.jpg", "text": "..."}` a line. Subfolders are read too; `10_name` makes each of
its pictures count ten times in an epoch. Hidden files and what macOS, Windows and NAS devices leave behind
are passed over. The order is that of the relative paths, on every system.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from PIL import Image

from spf_kit.data.caption_files import CaptionFiles, relative_name
from spf_kit.data.decoding import Unreadable, decode
from spf_kit.errors import UserError, nearest
from spf_kit.schema import Data

EXTENSIONS = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp"})
OTHER_PICTURES = frozenset(
    {
        ".gif",
        ".tif",
        ".tiff",
        ".heic",
        ".heif",
        ".avif",
        ".jxl",
        ".jp2",
        ".psd",
        ".svg",
        ".dng",
        ".cr2",
        ".nef",
    }
)
SKIPPED_FOLDERS = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN"})
REPEATS = re.compile(r"(\d+)_")
OTHER_FORMAT = "pictures in a format that is not read (save them as PNG or JPEG)"
MOST_REPEATS = 999  # `2023_holiday` is a year

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Picture:
    """What is kept in memory for one file: no pixels."""

    path: Path
    sample_id: str  # path relative to the folder, with "/" on every system
    caption_text: str | None  # None: there is no caption
    repeats: int = 1
    width: int = 0  # upright; 0: not read yet, or unreadable
    height: int = 0
    file_hash: str = ""  # SHA-256 of the file's bytes
    content_hash: str = ""  # SHA-256 of the decoded pixels: equal for a picture saved twice
    animated: bool = False
    error: str = ""  # why it cannot be read, as half a sentence

    @property
    def folder(self) -> str:
        """The subfolder it lies in, "" for the top."""
        return "/".join(PurePosixPath(self.sample_id).parts[:-1])


@dataclass(frozen=True)
class Scan(Sequence[Picture]):
    """The pictures of a folder in order, and what was found wrong beside them."""

    folder: Path
    pictures: list[Picture]
    errors: list[str] = field(default_factory=list)
    warnings: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[Picture]:
        return iter(self.pictures)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.pictures[index]


def open_picture(path: str | Path) -> Image.Image:
    """The picture at `path`, upright 8-bit RGB. Raises UserError if it cannot be read."""
    try:
        return decode(Path(path).read_bytes()).image
    except OSError as error:
        raise UserError(f"the picture {str(path)!r} cannot be opened: {error.strerror or error}") from error
    except Unreadable as error:
        raise UserError(f"the picture {str(path)!r} {error}: replace or remove it") from error


def scan(folder: str | Path, cfg: Data, progress: Progress | None = None) -> Scan:
    """Every picture under `folder`, each file read and fully decoded once.

    Raises UserError if the folder is missing; what is wrong inside it is recorded, not raised.
    """
    found = find(folder, cfg)
    return replace(found, pictures=examine_all(found.pictures, progress))


def find(folder: str | Path, cfg: Data) -> Scan:
    """As `scan`, without opening the pictures."""
    root = existing_folder(folder)
    pictures: list[Picture] = []
    errors: list[str] = []
    warnings: dict[str, list[str]] = {}
    captions = CaptionFiles(root, cfg.caption_extension)
    for directory, names in directories(root, errors):
        repeats = _repeats(directory.relative_to(root), cfg.repeats, warnings)
        captions.enter(directory, names)
        for name in names:
            suffix, sample_id = Path(name).suffix.lower(), relative_name(directory / name, root)
            if suffix in OTHER_PICTURES:
                warnings.setdefault(OTHER_FORMAT, []).append(sample_id)
            elif suffix in EXTENSIONS and repeats == 0:
                warnings.setdefault("pictures left out by a `0_name` folder", []).append(sample_id)
                captions.of(sample_id)
            elif suffix in EXTENSIONS:
                pictures.append(Picture(directory / name, sample_id, captions.of(sample_id), repeats))
    captions.finish(errors, warnings)
    return Scan(root, sorted(pictures, key=lambda p: p.sample_id), errors, warnings)


def existing_folder(folder: str | Path) -> Path:
    """`folder` as a path. Raises UserError if it is not set, a file or missing, with the nearest name."""
    if not str(folder):
        raise UserError("data.path is not set: name the folder of your pictures there or with --data")
    root = Path(folder).expanduser()
    if root.is_dir():
        return root
    if root.exists():
        raise UserError(f"data.path = {str(folder)!r} is a file: name the folder that holds the pictures")
    siblings = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
    hint = nearest(root.name, siblings) or " check data.path or --data"
    raise UserError(f"data.path = {str(folder)!r} does not exist:{hint}")


def examine(picture: Picture) -> Picture:
    """The picture with its size, hashes and, where it cannot be read, the reason."""
    try:
        data = picture.path.read_bytes()
        decoded = decode(data)
    except OSError as error:
        return replace(picture, error=f"cannot be opened ({error.strerror or error})")
    except Unreadable as error:
        return replace(picture, error=str(error))
    image = decoded.image
    content = hashlib.sha256(f"{image.width}x{image.height}".encode())
    content.update(image.tobytes())
    return replace(
        picture,
        width=image.width,
        height=image.height,
        file_hash=hashlib.sha256(data).hexdigest(),
        content_hash=content.hexdigest(),
        animated=decoded.animated,
    )


def examine_all(pictures: Sequence[Picture], progress: Progress | None = None) -> list[Picture]:
    """`examine` for each, in order, on several threads: Pillow and hashlib release the interpreter lock."""
    done: list[Picture] = []
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
    try:
        for picture in pool.map(examine, pictures):
            done.append(picture)
            if progress:
                progress(len(done), len(pictures), "checking pictures")
    finally:  # on Ctrl-C, do not decode the rest first
        pool.shutdown(cancel_futures=True)
    return done


def directories(root: Path, errors: list[str]) -> Iterator[tuple[Path, list[str]]]:
    """Each folder under `root` with its visible files, following links but no loops of them."""

    def unreadable(error: OSError) -> None:
        errors.append(f"the folder {str(error.filename)!r} cannot be read: {error.strerror or error}")

    seen: set[str] = set()
    for directory, folders, names in os.walk(root, followlinks=True, onerror=unreadable):
        real = os.path.realpath(directory)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in SKIPPED_FOLDERS)
        yield Path(directory), sorted(name for name in names if not name.startswith("."))


def _repeats(inside: Path, default: int, warnings: dict[str, list[str]]) -> int:
    """kohya's `10_name`: of the innermost folder that says so, otherwise `data.repeats`."""
    for part in reversed(inside.parts):
        if found := REPEATS.match(part):
            if int(found.group(1)) <= MOST_REPEATS:
                return int(found.group(1))
            warnings.setdefault(
                f"folder names whose number is over {MOST_REPEATS} and not read as repeats", []
            ).append(inside.as_posix())
    return default
