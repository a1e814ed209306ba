"""Files appear whole or not at all; headers are read with distrust."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from spf_kit.errors import UserError
from spf_kit.files import FolderSort, atomic, content_hash, refuse_existing, refuse_other_folder, sha256
from spf_kit.headers import MAX_HEADER, encode_header, read_header


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def write(target: Path, content: bytes, error: type[BaseException] | None = None) -> None:
    with atomic(target) as temporary:
        temporary.write_bytes(content)
        if error:
            raise error


def write_folder(target: Path, content: str, error: type[BaseException] | None = None) -> None:
    with atomic(target, folder=True) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / content).write_text(content)
        if error:
            raise error


# --- atomic -----------------------------------------------------------------------------------------------


def test_a_file_takes_its_place_when_it_is_done(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "a.png"
    with atomic(target) as temporary:
        assert temporary.parent == target.parent
        assert temporary.suffix == ".png"  # Pillow chooses the format by it
        temporary.write_bytes(b"new")
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert names(target.parent) == ["a.png"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(error):
        write(target, b"half", error)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_takes_its_place_and_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "run"
    write_folder(target, "1")
    write_folder(target, "2")
    assert names(target / "sub") == ["2"]
    with pytest.raises(RuntimeError):
        write_folder(target, "3", RuntimeError)
    assert names(target / "sub") == ["2"]
    assert names(tmp_path) == ["run"]


def test_a_file_too_large_for_the_disk_is_a_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "a.safetensors"
    target.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write '.*a\.safetensors': the file is too large"):
            write(target, bytes(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a.safetensors"]


@pytest.fixture
def small_disk(tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
    try:
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a small disk needs more rights")
    except OSError:
        pytest.skip("there is no mount command")
    yield disk
    subprocess.run(["umount", str(disk)], check=True, capture_output=True)


def write_by(library: str, target: Path) -> None:
    tensor = torch.zeros(1_000_000)
    with atomic(target) as temporary:
        if library == "python":
            temporary.write_bytes(bytes(1_000_000))
        elif library == "safetensors":
            save_file({"a": tensor}, temporary)
        else:
            torch.save({"a": tensor}, temporary)


@pytest.mark.parametrize("library", ["python", "safetensors", "torch"])
def test_a_full_disk_is_a_sentence_whatever_library_writes(small_disk: Path, library: str) -> None:
    with pytest.raises(UserError, match=r"cannot write '.*a\.bin': the disk is full: free some space"):
        write_by(library, small_disk / "a.bin")
    assert names(small_disk) == []


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(errno.EACCES, "permission denied"), (errno.EROFS, "read-only"), (errno.ENOSPC, "full")],
)
def test_the_remedy_fits_the_error(tmp_path: Path, code: int, remedy: str) -> None:
    target = tmp_path / "a.txt"
    with pytest.raises(UserError, match=remedy) as caught, atomic(target) as temporary:
        raise OSError(code, os.strerror(code), str(temporary))
    assert str(target) in str(caught.value)


def test_a_file_where_a_folder_is_needed_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "a.txt", tmp_path / "file" / "deep" / "a.txt"):
        with pytest.raises(UserError, match="a part of the path is a file"):
            write(target, b"")


def test_errors_about_other_files_are_not_ours(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), atomic(tmp_path / "a.txt"):
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere/else.png")
    with pytest.raises(UserError, match=r"^the user's own$"), atomic(tmp_path / "a.txt"):
        raise UserError("the user's own")


def test_existing_outputs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(UserError, match="exists: choose another --output or add --overwrite"):
        refuse_existing(tmp_path / "a", overwrite=False)
    refuse_existing(tmp_path / "a", overwrite=True)
    refuse_existing(tmp_path / "b", overwrite=False)


def test_a_folder_of_other_things_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sort = FolderSort("box", ("lid",), ("lid", "*.toy"))
    box = tmp_path / "box"
    refuse_other_folder(box, sort)  # nothing is there yet
    box.mkdir()
    refuse_other_folder(box, sort)
    (box / "a.toy").write_text("")
    with pytest.raises(UserError, match=r"is no box but holds 'a\.toy', which would be lost"):
        refuse_other_folder(box, sort)
    (box / "lid").write_text("")
    refuse_other_folder(box, sort)
    (box / "novel.txt").write_text("")
    with pytest.raises(UserError, match=r"holds 'novel\.txt'"):
        refuse_other_folder(box, sort)
    (box / "novel.txt").unlink()
    (box / "in").mkdir()
    monkeypatch.chdir(box / "in")
    for name in (".", "..", str(box)):
        with pytest.raises(UserError, match="is where you are, or above it"):
            refuse_other_folder(name, sort)


def test_hashes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 50_000  # more than one chunk
    (tmp_path / "a").write_bytes(data)
    assert sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()
    assert sha256(tmp_path / "a", start=7) == hashlib.sha256(data[7:]).hexdigest()
    assert content_hash({"a": "x", "b": b"y"}) == content_hash({"b": b"y", "a": "x"})
    assert content_hash({"a": "xb"}) != content_hash({"ax": "b"})


# --- headers ----------------------------------------------------------------------------------------------


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.safetensors"
    tensors = {
        "half": torch.ones(3, 5, dtype=torch.float16), "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4), "number": torch.tensor(7), "ä": torch.ones(2, dtype=torch.float64),
    }  # fmt: skip
    save_file(tensors, path, {"kéy": "välue"})
    return path


def test_a_header_says_what_safetensors_wrote(good: Path) -> None:
    header = read_header(good)
    assert header.metadata == {"kéy": "välue"}
    assert {name: (i.dtype, i.shape) for name, i in header.tensors.items()} == {
        "half": ("F16", (3, 5)), "scalar": ("BF16", ()), "empty": ("F32", (0, 4)), "number": ("I64", ()),
        "ä": ("F64", (2,)),
    }  # fmt: skip
    assert header.scalar("scalar") == 1.5
    assert header.scalar("number") == 7.0
    with pytest.raises(UserError, match="'half' should hold one number"):
        header.scalar("half")


def test_our_header_is_read_by_safetensors(tmp_path: Path) -> None:
    from safetensors import safe_open

    path = tmp_path / "a.safetensors"
    head = encode_header({"b": ("F16", (2, 3)), "a": ("F32", ())}, {"k": 'quotes " and\nlines ü'})
    assert len(head) % 8 == 0
    path.write_bytes(head + bytes(16))
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"k": 'quotes " and\nlines ü'}
        assert file.get_tensor("b").shape == (2, 3)
        assert file.get_tensor("a").dtype == torch.float32
    assert list(read_header(path).tensors) == ["b", "a"]


def test_every_truncation_is_a_sentence(good: Path, tmp_path: Path) -> None:
    data = good.read_bytes()
    for length in range(len(data)):
        path = tmp_path / "short.safetensors"
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"short\.safetensors"):
            read_header(path)
    path.write_bytes(data + b"x")
    with pytest.raises(UserError, match="1 bytes too many"):
        read_header(path)


def file_with(tmp_path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def one(shape: object = (2,), offsets: object = (0, 8), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        ({"a": one(), "b": one()}, 8, "overlaps another or leaves a gap"),
        ({"a": one(), "b": one((2,), (4, 12))}, 12, "overlaps another or leaves a gap"),
        ({"a": one((2,), (4, 12))}, 12, "overlaps another or leaves a gap"),
        ({"a": one((2,), (8, 0))}, 8, "has -8 bytes"),
        ({"a": one((2,), (0, 2**62))}, 8, "its shape and type need"),
        ({"a": one((2**40, 2**40), (0, 8))}, 8, "its shape and type need"),
        ({"a": one((2**70,), (0, 8))}, 8, "impossible shape"),
        ({"a": one((-2,), (0, 8))}, 8, "impossible shape"),
        ({"a": one((2.0,), (0, 8))}, 8, "impossible shape"),
        ({"a": one((True, 2), (0, 8))}, 8, "impossible shape"),
        ({"a": one([1] * 99 + [2])}, 8, "impossible shape"),
        ({"a": one(dtype="F99")}, 8, "wrongly"),
        ({"a": one(dtype=["F32"])}, 8, "wrongly"),
        ({"a": one(offsets=[0])}, 8, "wrongly"),
        ({"a": {"dtype": "F32"}}, 8, "wrongly"),
        ({"a": 3}, 8, "wrongly"),
        ({"a": one()}, 4, "4 bytes too early"),
        ({"a": one()}, 9, "1 bytes too many"),
        ({"__metadata__": {"a": 1}}, 0, "not a table of texts"),
        ({"__metadata__": ["a"]}, 0, "not a table of texts"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":3}', 4, "names a tensor twice"),
        (b'{"a":' * 100_000, 0, "damaged"),
        (b'{"a": \xff}', 0, "damaged"),
        (b'{"a": 1' + b"0" * 9999 + b"}", 0, "damaged"),
        (b"{not json}", 0, "damaged"),
        (b"[1, 2, 3]", 0, "not a .safetensors file"),
    ],
)
def test_hostile_headers_are_sentences(tmp_path: Path, header: object, data: int, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        read_header(file_with(tmp_path, header, bytes(data)))
    assert reason in str(caught.value)
    assert "hostile.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, MAX_HEADER + 1, 100, 1, 0])
def test_a_lying_header_length_allocates_nothing(tmp_path: Path, length: int) -> None:
    with pytest.raises(UserError):
        read_header(file_with(tmp_path, {"a": one((0,), (0, 0))}, length=length))


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04 a torch zip", "is a pickle"),
        (b"\x80\x02}q\x00.", "is a pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>404", "is a web page"),
        (b"\x00" * 64, "is not a .safetensors file"),
    ],
)
def test_other_files_are_named(tmp_path: Path, start: bytes, reason: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(start)
    with pytest.raises(UserError, match=reason):
        read_header(path)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.safetensors' does not exist"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="is a folder"):
        read_header(tmp_path)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_damage_is_more_than_a_sentence(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever bytes of a file are changed, reading gives a header that fits the file, or a UserError."""
    folder = tmp_path_factory.mktemp("fuzz")
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.float16)}, folder / "a", {"k": "v"})
    content = bytearray((folder / "a").read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[position] = data.draw(st.integers(0, 255))
    (folder / "a").write_bytes(content)
    try:
        header = read_header(folder / "a")
    except UserError:
        return
    assert max(info.end for info in header.tensors.values()) == len(content)
