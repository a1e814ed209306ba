"""A small picture in a LoRA's metadata: made, told by `inspect`, put there by `share`."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from spf_kit import cli
from spf_kit.adapters import files, thumbnail
from spf_kit.adapters.files import LoraFile, LoraLayer
from spf_kit.adapters.inspect import inspect
from spf_kit.errors import UserError
from spf_kit.sharing.folder import Run, share


def picture_of(url: str) -> Image.Image:
    head, data = url.split(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    layer = LoraLayer(torch.ones(2, 8), torch.ones(6, 2), 2.0)
    key = ("unet", "mid_block.attentions.0.proj_in")
    return files.write(LoraFile({key: layer}, {"ss_seed": "1"}), tmp_path / "hat.safetensors")


@pytest.mark.parametrize(
    ("mode", "name"), [("RGB", "a.png"), ("RGBA", "a.png"), ("P", "a.gif"), ("RGB", "a.jpg")]
)
def test_a_thumbnail_is_a_small_jpeg_of_the_picture(mode: str, name: str, tmp_path: Path) -> None:
    colour = {"RGB": (200, 30, 40), "RGBA": (200, 30, 40, 255), "P": 0}[mode]
    picture = Image.new(mode, (1024, 512), colour)
    if mode == "P":
        picture.putpalette([200, 30, 40])
    picture.save(tmp_path / name)
    small = picture_of(thumbnail.make(tmp_path / name))
    assert (small.format, small.mode, small.size) == ("JPEG", "RGB", (256, 128))
    assert all(abs(a - b) < 6 for a, b in zip(small.getpixel((100, 60)), (200, 30, 40), strict=True))


def test_a_turned_photograph_stands_upright_and_nothing_else_of_it_is_kept(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"  # turned by a quarter; its maker
    Image.new("RGB", (400, 200)).save(tmp_path / "a.jpg", exif=exif)
    url = thumbnail.make(tmp_path / "a.jpg")
    assert picture_of(url).size == (128, 256)
    assert b"a camera" not in base64.b64decode(url.split(",")[1])


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (64, 64)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    for name, words in (
        ("text.png", "not a picture"), ("cut.png", "not a picture"), ("none.png", "does not exist"),
        (".", "not a picture"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words) as caught:
            thumbnail.make(tmp_path / name)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_inspect_tells_a_thumbnails_size_and_what_is_wrong_with_it(lora: Path, tmp_path: Path) -> None:
    from spf_kit.adapters.metadata import amend

    Image.new("RGB", (512, 512)).save(tmp_path / "a.png")
    url = thumbnail.make(tmp_path / "a.png")
    size = len(base64.b64decode(url.split(",")[1]))
    for stored, told in (
        (url, {"type": "image/jpeg", "bytes": size, "width": 256, "height": 256}),
        ("https://example.org/a.jpg", {"problem": "not a data URL of a picture"}),
        ("data:text/html;base64,AAAA", {"problem": "not a data URL of a picture"}),
        ("data:image/png;base64,!!", {"type": "image/png", "problem": "not base64"}),
        ("data:image/png;base64,AAAA", {"type": "image/png", "bytes": 3, "problem": "not a picture"}),
    ):  # fmt: skip
        amend(lora, {thumbnail.KEY: stored})
        found = inspect(lora)
        assert found["thumbnail"] == told
        assert "thumbnail" not in found["modelspec"]


def test_share_puts_it_into_the_copy(lora: Path, tmp_path: Path) -> None:
    config = {"attribute": {"name": "hat", "target": "wearing a hat"}}
    run = Run(tmp_path, config, lora, None)
    family = SimpleNamespace(name="embedded", base_id="embedded")
    Image.new("RGB", (512, 256)).save(tmp_path / "a.png")
    url = thumbnail.make(tmp_path / "a.png")
    before = lora.read_bytes()
    share(run, family, tmp_path / "up", count=0, thumbnail=url)
    with safe_open(tmp_path / "up/hat.safetensors", "pt") as file:
        assert file.metadata()[thumbnail.KEY] == url
    assert lora.read_bytes() == before
    told, original = inspect(tmp_path / "up/hat.safetensors"), inspect(lora)
    assert told["hashes"]["sshs_model_hash"] == original["hashes"]["sshs_model_hash"]
    assert told["note"] is None


def test_share_refuses_a_bad_thumbnail_before_it_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    import typer

    for given, words in ((tmp_path / "none.png", "no readable config"), ("first", "--count 1")):
        with pytest.raises(typer.Exit) as ended:
            cli.share(tmp_path, thumbnail=str(given), count=0, json=True)
        assert ended.value.exit_code == 2
        assert words in json.loads(capsys.readouterr().out)["error"]
    assert not (tmp_path / "share").exists()
