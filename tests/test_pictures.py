"""Pictures: every kind of file, what a folder holds, and everything that can be wrong with it."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from spf_kit.data import decoding
from spf_kit.data.check import Report, check
from spf_kit.data.decoding import Unreadable, decode
from spf_kit.data.pictures import find, open_picture, scan
from spf_kit.errors import UserError
from spf_kit.schema import Data

TARGET = "wearing glasses"
FAMILY: Any = SimpleNamespace(latent_factor=4, count_tokens=lambda text: len(re.findall(r"\w+|,", text)))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = decode(data).image
    assert image.mode == "RGB"
    return np.asarray(image)


def png(color_type: int, depth: int, rows: np.ndarray, **chunks: bytes) -> bytes:
    """A PNG written by hand: Pillow cannot write 16-bit colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = rows.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    body = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in rows)
    extra = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    parts = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


# --- decoding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_lossless_files_come_back_exactly(kind: str) -> None:
    image = noise(17, 11)
    options = {"lossless": True} if kind == "WEBP" else {}
    assert (pixels(encoded(image, kind, **options)) == np.asarray(image)).all()


def test_jpeg_comes_back_nearly() -> None:
    image = noise(4, 3).resize((64, 48), Image.Resampling.BICUBIC)
    difference = np.abs(pixels(encoded(image, "JPEG", quality=95)).astype(int) - np.asarray(image))
    assert difference.mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_rotation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(20, 12), kind, exif=exif)
    reference = ImageOps.exif_transpose(Image.open(io.BytesIO(data)).convert("RGB"))
    assert (pixels(data) == np.asarray(reference)).all()
    assert pixels(data).shape[:2] == ((20, 12) if orientation >= 5 else (12, 20))


def test_a_phone_held_upright_puts_the_sky_on_top() -> None:
    stored = Image.new("RGB", (4, 2), "green")
    stored.paste("blue", (0, 0, 1, 2))  # the sensor's left column is the sky
    exif = Image.Exif()
    exif[0x0112] = 6
    shown = pixels(encoded(stored, exif=exif))
    assert shown.shape == (4, 2, 3)
    assert (shown[0] == (0, 0, 255)).all()


def test_a_broken_exif_block_does_not_lose_the_picture() -> None:
    data = encoded(noise(8, 8), "JPEG", exif=b"Exif\0\0garbage that is no TIFF header")
    assert pixels(data).shape == (8, 8, 3)


def test_transparency_lies_over_white() -> None:
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    image.putpixel((2, 0), (255, 0, 0, 51))
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        shown = pixels(encoded(image, kind, **options))[0]
        assert shown.tolist() == [[255, 0, 0], [255, 255, 255], [255, 204, 204]]


def test_transparency_of_grey_palette_and_key_colours() -> None:
    grey = Image.new("LA", (2, 1), (0, 255))
    grey.putpixel((1, 0), (0, 0))
    assert pixels(encoded(grey))[0].tolist() == [[0, 0, 0], [255, 255, 255]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert pixels(encoded(palette))[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    assert pixels(encoded(palette, transparency=1))[0].tolist() == [[10, 20, 30], [255, 255, 255]]
    keyed = Image.new("RGB", (2, 1), (1, 2, 3))
    keyed.putpixel((1, 0), (4, 5, 6))
    assert pixels(encoded(keyed, transparency=(4, 5, 6)))[0].tolist() == [[1, 2, 3], [255, 255, 255]]


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    grey = pixels(png(0, 16, values))
    assert grey[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]
    colour = np.stack([values, values[:, ::-1], values * 0], axis=-1)
    assert pixels(png(2, 16, colour))[0, 3].tolist() == [255, 0, 0]
    alpha = np.stack([values, np.array([[65535, 65535, 65535, 0]])], axis=-1)
    assert pixels(png(4, 16, alpha))[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


def test_the_transparent_colour_of_a_sixteen_bit_file() -> None:
    values = np.array([[300, 40000]], dtype=np.uint16)
    shown = pixels(png(0, 16, values, tRNS=struct.pack(">H", 300)))
    assert shown[0, :, 0].tolist() == [255, 156]
    colour = np.array([[[300, 300, 300], [40000, 40000, 40000]]], dtype=np.uint16)
    shown = pixels(png(2, 16, colour, tRNS=struct.pack(">HHH", 300, 300, 300)))
    assert shown[0, 0].tolist() == [255, 255, 255]
    assert shown[0, 1].tolist() == [156, 156, 156]


@pytest.mark.parametrize(("ink", "rgb"), [((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 255), (0, 0, 0))])
def test_cmyk_becomes_rgb(ink: tuple[int, ...], rgb: tuple[int, ...]) -> None:
    shown = pixels(encoded(Image.new("CMYK", (16, 16), ink), "JPEG", quality=95))
    assert np.abs(shown.astype(int) - rgb).max() <= 3


def test_bilevel_and_grey_become_rgb() -> None:
    assert pixels(encoded(Image.new("1", (2, 2), 1))).tolist() == [[[255] * 3] * 2] * 2
    assert pixels(encoded(Image.new("L", (1, 1), 77), "JPEG")).tolist() == [[[77] * 3]]


def swapped_profile() -> bytes:
    """An ICC profile of a device whose red and green primaries are exchanged, made from sRGB's."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    entries = {bytes(data[at : at + 4]): at for at in range(132, 132 + 12 * data[131], 12)}
    red, green = entries[b"rXYZ"], entries[b"gXYZ"]
    data[red : red + 4], data[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(data).replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))


def test_a_colour_profile_is_converted_to_srgb() -> None:
    red = Image.new("RGB", (2, 2), (255, 0, 0))
    shown = pixels(encoded(red, icc_profile=swapped_profile()))
    assert np.abs(shown.astype(int) - (0, 255, 0)).max() <= 2
    with_alpha = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    assert pixels(encoded(with_alpha, icc_profile=swapped_profile())).tolist() == [[[255, 255, 255]]]
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert pixels(encoded(red, icc_profile=srgb)).tolist() == np.asarray(red).tolist()
    assert pixels(encoded(red, icc_profile=b"no profile")).tolist() == np.asarray(red).tolist()
    grey = Image.new("L", (1, 1), 77)
    assert pixels(encoded(grey, icc_profile=swapped_profile())).tolist() == [[[77] * 3]]


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    frames = [noise(8, 8, seed) for seed in range(3)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, lossless=True)
    decoded = decode(data)
    assert decoded.animated
    assert (np.asarray(decoded.image) == np.asarray(frames[0])).all()
    assert not decode(encoded(frames[0], kind)).animated


def test_a_camera_file_with_a_thumbnail_is_no_animation() -> None:
    data = encoded(noise(8, 8), "MPO", save_all=True, append_images=[noise(4, 4)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert not decode(data).animated


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_truncated_files_are_found(kind: str, share: float) -> None:
    data = encoded(noise(64, 64), kind)
    with pytest.raises(Unreadable, match=r"truncated|damaged|not a picture"):
        decode(data[: int(len(data) * share)])


def test_other_unreadable_files(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unreadable, match="is empty"):
        decode(b"")
    with pytest.raises(Unreadable, match="not a picture"):
        decode(b"<html>404 not found</html>")
    data = bytearray(encoded(noise(64, 64)))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(Unreadable, match="damaged"):
        decode(bytes(data))
    monkeypatch.setattr(decoding.Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Unreadable, match="more than 200 pixels"):
        decode(encoded(noise(64, 64)))


def test_open_picture_names_the_file(tmp_path: Path) -> None:
    noise(5, 4).save(tmp_path / "a.png")
    assert open_picture(tmp_path / "a.png").size == (5, 4)
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"b\.png' is empty: replace or remove it"):
        open_picture(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"c\.png' cannot be opened: No such file"):
        open_picture(tmp_path / "c.png")


# --- a folder ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the tests put their pictures: a folder of its own, as `tmp_path` may get siblings."""
    (tmp_path / "pictures").mkdir()
    return tmp_path / "pictures"


def put(
    folder: Path, name: str, caption: str | bytes | None = "a man", size: tuple[int, int] = (64, 64)
) -> Path:
    """A picture that differs from all others, with a caption beside it."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(*size, seed=zlib.crc32(name.encode())).save(path)
    if caption is not None:
        text = caption if isinstance(caption, bytes) else caption.encode()
        path.with_suffix(".txt").write_bytes(text)
    return path


def settings(**values: Any) -> Data:
    return Data(**{"resolution": 64, "bucket_step": 16, **values})


def checked(folder: Path, **values: Any) -> Report:
    cfg = settings(**values)
    return check(scan(folder, cfg), cfg, TARGET, FAMILY)


def test_what_a_scan_finds(folder: Path) -> None:
    for name in ("b.png", "a.JPG", "sub/c.webp", "10_faces/d.bmp", "10_faces/deep/e.png", "2_x/3_y/f.png"):
        put(folder, name, f"caption of {name}", size=(20, 10))
    for junk in ("._a.JPG", ".hidden.png", "__MACOSX/g.png", ".git/h.png", "Thumbs.db", "notes.md"):
        (folder / junk).parent.mkdir(exist_ok=True)
        (folder / junk).write_bytes(b"junk")
    found = scan(folder, settings(repeats=4))
    assert [(p.sample_id, p.repeats) for p in found] == [
        ("10_faces/d.bmp", 10), ("10_faces/deep/e.png", 10), ("2_x/3_y/f.png", 3),
        ("a.JPG", 4), ("b.png", 4), ("sub/c.webp", 4),
    ]  # fmt: skip
    assert [p.caption_text for p in found] == [f"caption of {p.sample_id}" for p in found]
    assert {(p.width, p.height, p.error) for p in found} == {(20, 10, "")}
    assert {p.folder for p in found} == {"", "sub", "10_faces", "10_faces/deep", "2_x/3_y"}
    assert not found.errors
    assert not found.warnings
    assert found[3].path == folder / "a.JPG"
    assert list(found) == list(scan(folder, settings(repeats=4)))


def test_size_is_that_of_the_upright_picture(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(20, 10).save(folder / "a.jpg", exif=exif)
    (picture,) = scan(folder, settings())
    assert (picture.width, picture.height) == (10, 20)


def test_links_to_folders_are_followed_but_not_in_circles(folder: Path, tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "a.png")
    put(folder, "b.png")
    (folder / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (folder / "circle").symlink_to(folder, target_is_directory=True)
    assert [p.sample_id for p in find(folder, settings())] == ["b.png", "more/a.png"]


def test_a_folder_that_cannot_be_read_is_not_passed_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder, "a.png")
    put(folder, "locked/b.png")
    real = os.scandir

    def scandir(path: str) -> Any:  # root may read everything, so that a file mode would prove nothing
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert find(folder, settings()).errors == [
        f"the folder {str(folder / 'locked')!r} cannot be read: Permission denied"
    ]


def test_repeats_of_years_and_zero(folder: Path) -> None:
    put(folder, "2023_holiday/a.png")
    put(folder, "0_bad/b.png")
    found = find(folder, settings())
    assert [(p.sample_id, p.repeats) for p in found] == [("2023_holiday/a.png", 1)]
    assert sorted(found.warnings.values()) == [["0_bad/b.png"], ["2023_holiday"]]


@pytest.mark.parametrize(
    ("data", "text", "warned"),
    [
        ("café".encode(), "café", False),
        (b"\xef\xbb\xbf" + "café".encode(), "café", False),
        ("café \u2019".encode("cp1252"), "café \u2019", True),
        (b"caf\xe9 \x81", "café \x81", True),
        ("café".encode("utf-16"), "café", False),
        (b"  a man \r\n", "a man", False),
    ],
)
def test_encodings_of_captions(folder: Path, data: bytes, text: str, warned: bool) -> None:
    put(folder, "a.png", data)
    found = find(folder, settings())
    assert found[0].caption_text == text
    assert bool(found.warnings) is warned


def test_other_places_of_captions(folder: Path) -> None:
    put(folder, "a.png", None)
    put(folder, "b.png", None)
    put(folder, "c.png", None)
    (folder / "a.caption").write_text("from a")
    (folder / "b.png.caption").write_text("from b")
    (folder / "C.CAPTION").write_text("from c")
    for extension in (".caption", "caption"):
        found = find(folder, settings(caption_extension=extension))
        assert [p.caption_text for p in found] == ["from a", "from b", "from c"]


def test_metadata_jsonl(folder: Path) -> None:
    for name in ("a.png", "sub/b.png", "sub/c.png", "d.png"):
        put(folder, name, None)
    (folder / "d.txt").write_text("from the file")
    lines = [
        {"file_name": "a.png", "text": "from text"},
        {"file_name": "sub\\b.png", "caption": "from caption", "extra": 1},
        {"file_name": "./d.png", "text": "from the line"},
        {"file_name": "gone.png", "text": "of nothing"},
    ]
    (folder / "metadata.jsonl").write_text(
        "\n".join(json.dumps(line) for line in lines) + "\n\n", "utf-8-sig"
    )
    (folder / "sub" / "metadata.jsonl").write_text('{"file_name": "c.png", "text": "of the subfolder"}')
    found = find(folder, settings())
    texts = {p.sample_id: p.caption_text for p in found}
    assert texts == {
        "a.png": "from text",
        "d.png": "from the file",
        "sub/b.png": "from caption",
        "sub/c.png": "of the subfolder",
    }
    assert found.warnings["captions without a picture"] == [f"{folder / 'metadata.jsonl'}: gone.png"]
    (twice,) = [items for kind, items in found.warnings.items() if "another caption" in kind]
    assert twice == ["d.png"]


def test_wrong_lines_of_metadata_are_all_named(folder: Path) -> None:
    put(folder, "a.png", "a man")
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "a man"}\n{broken\n{"text": "x"}\n'
        '{"file_name": "a.png", "label": 3}\n{"file_name": "a.png", "text": "again"}\n[1]\n'
    )
    errors = find(folder, settings()).errors
    where = folder / "metadata.jsonl"
    assert [e.split(" ", 1)[0] for e in errors] == [f"{where}:{line}" for line in (2, 3, 4, 5, 6)]
    for error, key in zip(errors, ("JSON", "file_name", "['file_name', 'label']", "second")):
        assert key in error


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "portraits").mkdir()
    with pytest.raises(UserError, match=r"portrait' does not exist: did you mean 'portraits'\?"):
        scan(tmp_path / "portrait", settings())
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        scan(tmp_path / "file", settings())
    with pytest.raises(UserError, match=r"data\.path is not set.*--data"):
        scan("", settings())


# --- the check --------------------------------------------------------------------------------------------


def test_a_good_folder_has_no_findings(folder: Path) -> None:
    put(folder, "a.png", "a man")
    put(folder, "b.png", "a woman, wearing glasses", size=(80, 60))
    report = checked(folder)
    assert (report.errors, report.warnings) == ([], {})
    report.raise_errors()


def test_an_empty_folder_names_itself_and_what_it_may_hold(folder: Path) -> None:
    (folder / "a.heic").write_bytes(b"x")
    report = checked(folder)
    with pytest.raises(UserError, match=r"pictures' holds no pictures: put .*\.png.* files there"):
        report.raise_errors()
    assert report.warnings == {"pictures in a format that is not read (save them as PNG or JPEG)": ["a.heic"]}


def test_every_error_is_listed_at_once(folder: Path) -> None:
    put(folder, "good.png")
    put(folder, "uncaptioned.png", None)
    whole = put(folder, "cut.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    put(folder, "empty.png").write_bytes(b"")
    put(folder, "web.jpg").write_bytes(b"<html>")
    (folder / "metadata.jsonl").write_text("{")
    with pytest.raises(UserError) as caught:
        checked(folder, crop="random", bucket_step=10).raise_errors()
    message = str(caught.value)
    assert message.startswith("7 things are wrong with the data:\n- ")
    for part in (
        "metadata.jsonl:1 is not JSON",
        "data.crop = 'random' needs data.cache = 'none', not 'memory'",
        "data.bucket_step = 10 is no multiple of 4, as this base model needs: use 8 or 12",
        "cut.png' is truncated",
        "empty.png' is empty: replace or remove it",
        "web.jpg' is not a picture in a known format: replace or remove it",
        "uncaptioned.png' has no caption: write 'uncaptioned.txt' beside it",
    ):
        assert part in message


def test_no_captions_at_all_is_one_error_with_the_likely_remedy(folder: Path) -> None:
    put(folder, "a.png", None)
    put(folder, "b.png", None)
    assert len(checked(folder).errors) == 1
    assert (
        "none of the 2 pictures has a .txt caption: write files such as 'a.txt'" in checked(folder).errors[0]
    )
    (folder / "a.caption").write_text("a man")
    assert "set data.caption_extension = '.caption'" in checked(folder).errors[0]


def test_an_unreadable_caption_is_one_error(folder: Path) -> None:
    put(folder, "a.png", None)
    (folder / "a.txt").symlink_to("a.txt")  # a link to itself cannot be opened, not even by root
    (error,) = checked(folder).errors
    assert "a.txt' cannot be opened" in error


def test_warnings_are_counted_and_listed(folder: Path) -> None:
    put(folder, "a.png", "")
    put(folder, "small.png", "a man", size=(32, 32))
    put(folder, "strip.png", "a man", size=(320, 40))
    put(folder, "long.png", ", ".join(["two words"] * 40))
    put(folder, "says.png", "a man with glasses")
    put(folder, "turn.png", "a man looking left")
    put(folder, "twin.png", "a man")
    Image.open(folder / "twin.png").save(folder / "twin.webp", lossless=True)
    frames = [noise(64, 64, seed) for seed in (1, 2)]
    frames[0].save(folder / "z.webp", save_all=True, append_images=frames[1:], lossless=True)
    (folder / "z.txt").write_text("a man")
    (folder / "orphan.txt").write_text("a man")
    (folder / "README.txt").write_text("not a caption")
    report = checked(folder, flip=True)
    assert report.errors == []
    assert report.warnings == {
        "captions without a picture": [str(folder / "orphan.txt")],
        "duplicates": ["twin.webp is the same picture as twin.png"],
        "animations of which only the first frame is used": ["z.webp"],
        "pictures under the resolution of 64, enlarged": ["small.png (32x32, 2 times)"],
        "pictures of which much is cropped away (2.5:1 is the limit)": ["strip.png (320x40, 79% lost)"],
        "pictures with an empty caption (they train on the target alone)": ["a.png"],
        "captions over 75 tokens (data.chunks = 1)": [
            "long.png loses " + repr(", ".join(["two words"] * 16))
        ],
        "captions that speak of the target in other words, which c_base then keeps": [
            "says.png ('a man with glasses')"
        ],
        "captions with 'left' or 'right', which data.flip makes wrong": ["turn.png"],
    }
    assert "1 duplicates: twin.webp is the same picture as twin.png" in report.lines()
    more = Report(warnings={"things": list("abcdefg")})
    assert more.lines(most=2) == ["7 things: a; b and 5 more"]


def test_pictures_left_out(folder: Path) -> None:
    put(folder, "a.png", size=(63, 64))
    put(folder, "b.png", size=(64, 64))
    report = checked(folder, upscale=False)
    assert report.errors == []
    assert report.warnings == {"pictures under the resolution of 64, left out": ["a.png (63x64)"]}
    (folder / "b.png").unlink()
    (folder / "b.txt").unlink()
    assert "leaves out all 1 pictures" in checked(folder, upscale=False).errors[0]


def test_without_buckets_a_wide_picture_loses_its_sides(folder: Path) -> None:
    put(folder, "a.png", size=(96, 64))
    (kind,) = checked(folder, buckets=False).warnings
    assert "data.buckets = true keeps more" in kind
    assert checked(folder).warnings == {}
    assert (
        "data.resolution = 66 is no multiple of 4" in checked(folder, buckets=False, resolution=66).errors[0]
    )


def test_settings_that_cannot_be(folder: Path) -> None:
    put(folder, "a.png")
    assert "set data.bucket_step to 64 or less" in checked(folder, bucket_step=128).errors[0]
    cfg = settings()
    long = check(scan(folder, cfg), cfg, " ".join(["word"] * 80), FAMILY)
    assert "80 tokens but the text window has 75" in long.errors[0]
    assert "attribute.target is empty" in check(scan(folder, cfg), cfg, " ", FAMILY).errors[0]
