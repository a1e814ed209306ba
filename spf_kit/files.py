"""Files that appear whole or not at all, and hashes of what is in them. Imports no torch."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from spf_kit.errors import UserError

CHUNK = 4 * 2**20  # bytes; of every copy and every hash

_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space or choose another place",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another place",
    errno.EFBIG: "the file is too large for this disk: choose another place",
    errno.EACCES: "permission denied: choose another place, or close the program that uses it",
    errno.EPERM: "permission denied: choose another place",
    errno.EROFS: "the disk is read-only: choose another place",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another place",
    errno.EEXIST: "a part of the path is a file, not a folder: choose another place",
    errno.EISDIR: "it is a folder: choose another name",
}


# --- writing ----------------------------------------------------------------------------------------------


@contextmanager
def atomic(path: str | Path, *, folder: bool = False, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the place of `path` when the block ends without error.

    The temporary name keeps the suffix, so that libraries which choose the format by it work. With `folder`
    it is an empty folder that exists. Without `durable` nothing waits for the disk, and a power cut may leave
    a damaged file: for what knows its own hash and can be made again. Whatever goes wrong, an interrupt
    included, leaves `path` as it was and removes the temporary. Parent folders are made.

    Raises UserError if the disk is full, write-protected or forbidden, naming `path` and the remedy.
    """
    path = Path(path)
    mark = secrets.token_hex(4)
    temporary = path.with_name(f".{path.stem}.{mark}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if folder:
            temporary.mkdir()
        yield temporary
        if durable:
            _flush(temporary)
        _replace(temporary, path, mark)
        if durable:
            _sync(path.parent)
    except BaseException as error:
        _discard(temporary)
        sentence = _write_error(error, path, temporary)
        if sentence:
            raise UserError(sentence) from error
        raise


@contextmanager
def scratch_folder(beside: str | Path) -> Iterator[Path]:
    """An empty folder on the file system of `beside`, gone when the block ends.

    Raises UserError if it cannot be made, naming `beside` and the remedy.
    """
    beside = Path(beside)
    folder = beside.with_name(f".{beside.stem}.{secrets.token_hex(4)}.tmp")
    try:
        folder.mkdir(parents=True)
        yield folder
    except OSError as error:
        if sentence := _write_error(error, beside, folder):
            raise UserError(sentence) from error
        raise
    finally:
        _discard(folder)


def refuse_existing(path: str | Path, overwrite: bool) -> None:
    """Raises UserError if `path` is there and may not be replaced."""
    if not overwrite and os.path.lexists(path):
        raise UserError(f"the output {str(path)!r} exists: choose another --output or add --overwrite")


class FolderSort(NamedTuple):
    """What tells an output folder of one sort from others, by the names in it."""

    what: str
    marks: tuple[str, ...]  # patterns, each of which must be found
    known: tuple[str, ...] = ("*",)  # patterns of all names that it may hold


def refuse_other_folder(path: str | Path, sort: FolderSort) -> None:
    """An output folder replaces the one that is there with all that is in it, whatever was asked.

    Raises UserError unless that is empty or of the same sort, or if it is or holds the working directory.
    """
    path = Path(path)
    if not path.is_dir():
        return
    if Path.cwd().is_relative_to(path.resolve()):
        raise UserError(f"the output {str(path)!r} is where you are, or above it: choose another --output")
    names = sorted(entry.name for entry in path.iterdir())
    other = [name for name in names if not any(fnmatchcase(name, known) for known in sort.known)]
    if other or (names and not all(any(path.glob(mark)) for mark in sort.marks)):
        raise UserError(
            f"the output {str(path)!r} is no {sort.what} but holds {(other or names)[0]!r}, which would be "
            "lost: choose another --output"
        )


def _write_error(error: BaseException, path: Path, temporary: Path) -> str:
    """One sentence for an error of the disk that concerns our file; '' for every other error."""
    if isinstance(error, shutil.Error):  # copytree's: a list of what went wrong, as texts
        numbers = {int(number) for number in re.findall(r"\[Errno (\d+)\]", str(error))}
        remedies = [_REMEDIES[number] for number in sorted(numbers) if number in _REMEDIES]
        return f"cannot write {str(path)!r}: {remedies[0]}" if remedies else ""
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        # an OSError that names another file (a picture that cannot be read, say) is not about this output
        named = [Path(name) for name in (error.filename, error.filename2) if name is not None]
        ours = (path, temporary, *path.parents)
        if not named or any(name in ours or name.is_relative_to(temporary) for name in named):
            return f"cannot write {str(path)!r}: {_REMEDIES[error.errno]}"
    elif isinstance(error, Exception) and not isinstance(error, UserError):
        # safetensors and torch.save write through their own code and report a full disk as a text
        text = str(error)
        if "No space left on device" in text or "os error 28" in text or _out_of_space(text, path):
            return f"cannot write {str(path)!r}: {_REMEDIES[errno.ENOSPC]}"
    return ""


def _out_of_space(text: str, path: Path) -> bool:
    if "PytorchStreamWriter" not in text and "unexpected pos" not in text:
        return False
    try:
        return shutil.disk_usage(path.parent).free < CHUNK
    except OSError:
        return False


def _flush(path: Path) -> None:
    """fsync a file, or every file of a folder: after the rename the content must be on the disk too."""
    for file in path.rglob("*") if path.is_dir() else (path,):
        if file.is_file():
            with open(file, "r+b") as handle:
                os.fsync(handle.fileno())


def _replace(temporary: Path, path: Path, mark: str) -> None:
    if temporary.is_dir() and path.exists():
        # a folder cannot replace a filled folder in one call: the old one goes aside, and back on failure
        aside = path.with_name(f".{path.name}.{mark}.old")
        os.replace(path, aside)
        try:
            os.replace(temporary, path)
        except BaseException:
            os.replace(aside, path)
            raise
        _discard(aside)
    else:
        os.replace(temporary, path)


def _sync(folder: Path) -> None:
    """Make the rename itself durable, where the system can (Windows cannot open folders)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems refuse; the rename has happened all the same
    finally:
        os.close(handle)


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # what went wrong before is what the user must hear of
            path.unlink(missing_ok=True)


# --- hashes -----------------------------------------------------------------------------------------------


def copy_bytes(source: BinaryIO, count: int, *targets: Any) -> None:
    """Copy `count` bytes to each target, an object with `write` (a file) or `update` (a hash)."""
    sinks = [getattr(target, "write", None) or target.update for target in targets]
    while count:
        block = source.read(min(CHUNK, count))
        if not block:
            raise UserError(f"the file {getattr(source, 'name', '?')!r} became shorter while it was read")
        for sink in sinks:
            sink(block)
        count -= len(block)


def sha256(path: str | Path, *, start: int = 0) -> str:
    """Hash of a file's bytes from `start` to the end, in hexadecimal."""
    with open(path, "rb") as file:
        file.seek(start)
        digest = hashlib.sha256()
        copy_bytes(file, max(os.fstat(file.fileno()).st_size - start, 0), digest)
    return digest.hexdigest()


def content_hash(parts: Mapping[str, str | bytes]) -> str:
    """One hash of named contents, independent of their order."""
    digest = hashlib.sha256()
    for name in sorted(parts):
        part = parts[name]
        data = part.encode() if isinstance(part, str) else part
        for piece in (name.encode(), data):
            digest.update(len(piece).to_bytes(8, "little") + piece)  # lengths: "ab"+"c" is not "a"+"bc"
    return digest.hexdigest()
