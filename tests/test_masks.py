"""Mask pictures: they go where their pictures go, are checked with them, and reach the losses."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from spf_kit import config, embedded
from spf_kit.data.dataset import Batch, Dataset, survey
from spf_kit.data.decoding import decode_alpha, decode_mask
from spf_kit.data.masks import Masks
from spf_kit.errors import UserError
from spf_kit.schema import Data
from spf_kit.training import trainer

TARGET = "wearing glasses"
ORIENTATION = 0x0112
STORED = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
SHAPES = [(150, 90), (90, 150), (64, 64), (203, 160), (80, 64), (131, 77)]


class FakeFamily:
    """A VAE that averages squares of 4 x 4 pixels: its latents show the picture itself."""

    vae_tiling = False
    latent_factor = 4
    dtype = torch.float32
    device = torch.device("cpu")
    vae = object()

    def latents_key(self) -> str:
        return "v1"

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        n, c, h, w = pixels.shape
        mean = pixels.reshape(n, c, h // 4, 4, w // 4, 4).mean(dim=(3, 5))
        return mean, torch.ones_like(mean)


FAMILY: Any = FakeFamily()


def blobs(width: int, height: int, seed: int) -> Image.Image:
    """Random ellipses in random greys: no symmetry, and edges at every latent pixel's scale."""
    random = np.random.default_rng(seed)
    image = Image.new("L", (width, height), int(random.integers(256)))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = random.uniform(0, width), random.uniform(0, height)
        a, b = random.uniform(4, width / 3), random.uniform(4, height / 3)
        draw.ellipse((x - a, y - b, x + a, y + b), fill=int(random.integers(256)))
    return image


def save(image: Image.Image, path: Path, orientation: int = 1) -> None:
    """The picture as a camera held in some way stores it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    turn = STORED.get(orientation)
    (image.transpose(turn) if turn is not None else image).save(path, exif=exif)


def settings(folder: Path, **values: Any) -> Data:
    return Data(**{"path": str(folder), "resolution": 64, "bucket_step": 16, "cache": "none", **values})


def batches(folder: Path, masks: str | Path, count: int = 24, size: int = 1, **values: Any) -> list[Batch]:
    dataset = Dataset.prepare(settings(folder, **values), TARGET, FAMILY, masks=str(masks))
    return [dataset.batch(3, step, size) for step in range(count)]


@pytest.fixture
def drawn(tmp_path: Path) -> tuple[Path, Path]:
    """Grey pictures, and as their masks the very same pictures, each stored upright or turned on its own."""
    pictures, masks = tmp_path / "pictures", tmp_path / "masks"
    for number, (width, height) in enumerate(SHAPES):
        image = blobs(width, height, number)
        save(image.convert("RGB"), pictures / f"{number}.png", (1, 6, 3, 8, 6, 1)[number])
        save(image, masks / f"{number}.png", (1, 1, 8, 3, 6, 6)[number])
        (pictures / f"{number}.txt").write_text("a man")
    return pictures, masks


@pytest.fixture
def square(tmp_path: Path) -> tuple[Path, Path]:
    """Three pictures of 64 x 64 with captions, and a folder for their masks."""
    pictures, masks = tmp_path / "pictures", tmp_path / "masks"
    masks.mkdir()
    for name in ("a", "b", "sub/c"):
        save(blobs(64, 64, len(name)).convert("RGB"), pictures / f"{name}.jpg")
        (pictures / f"{name}.txt").write_text("a man")
    return pictures, masks


def shown(batch: Batch) -> Tensor:
    """What the latents of the fake VAE show, as weights: (B, 1, h, w)."""
    return (batch.mean[:, :1] + 1) / 2


# --- geometry ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_mask_goes_where_its_picture_goes(drawn: tuple[Path, Path], crop: str) -> None:
    """Rotation, scaling, crop and mirroring: a mask that is the picture stays the picture."""
    seen = batches(*drawn, crop=crop, flip=True)
    assert {flag for batch in seen for flag in batch.flipped} == {False, True}
    by_picture: dict[tuple[str, bool], list[Tensor]] = {}
    for batch in seen:
        assert batch.masks is not None
        assert batch.masks.shape == (1, 1, *batch.mean.shape[2:])
        assert batch.masks.dtype == torch.float32
        assert torch.allclose(batch.masks, shown(batch), atol=1e-5)
        assert not torch.allclose(batch.masks, shown(batch).flip(3), atol=0.1)
        by_picture.setdefault((batch.sample_ids[0], batch.flipped[0]), []).append(batch.masks)
    moves = [not torch.equal(masks[0], mask) for masks in by_picture.values() for mask in masks[1:]]
    assert len(moves) > 5
    assert any(moves) == (crop == "random")


def test_a_cached_picture_has_the_same_mask(drawn: tuple[Path, Path]) -> None:
    for fresh, kept in zip(batches(*drawn, flip=True), batches(*drawn, flip=True, cache="memory")):
        assert torch.equal(fresh.masks, kept.masks)
        assert torch.equal(fresh.mean, kept.mean)


def test_latent_pixels_are_averages(square: tuple[Path, Path]) -> None:
    pictures, masks = square
    checks = np.zeros((64, 64), np.uint8)
    checks[:32, ::2] = 255  # half of each latent pixel
    checks[32:, :2] = 255  # of the first column, half
    for name in ("a", "b", "sub/c"):
        save(Image.fromarray(checks), masks / f"{name}.png")
    (batch,) = batches(pictures, masks, 1, 3)
    expected = torch.zeros(16, 16)
    expected[:8], expected[8:, 0] = 0.5, 0.5
    assert torch.allclose(batch.masks, expected.expand(3, 1, 16, 16), atol=1e-6)


def test_each_sample_has_its_own_mask(square: tuple[Path, Path]) -> None:
    pictures, masks = square
    levels = {"a.jpg": 0, "b.jpg": 255, "sub/c.jpg": 51}
    for name, level in levels.items():
        save(Image.new("L", (64, 64), level), (masks / name).with_suffix(".bmp"))
    (batch,) = batches(pictures, masks, 1, 3)
    assert batch.masks.flatten(1).unique(dim=1).squeeze(1).tolist() == pytest.approx(
        [levels[name] / 255 for name in batch.sample_ids]
    )


def test_the_data_of_a_run_name_each_mask(square: tuple[Path, Path]) -> None:
    pictures, masks = square
    for name in ("a", "b", "sub/c"):
        save(Image.new("L", (64, 64), len(name)), masks / f"{name}.png")
    expected = {
        f"{name}.jpg": hashlib.sha256((masks / f"{name}.png").read_bytes()).hexdigest()
        for name in ("a", "b", "sub/c")
    }
    given = Dataset.prepare(settings(pictures), TARGET, FAMILY, masks=str(masks))
    assert given.info()["mask_hashes"] == expected
    assert Dataset.prepare(settings(pictures), TARGET, FAMILY).info()["mask_hashes"] == {}


def test_a_smaller_mask_of_the_same_shape_serves(drawn: tuple[Path, Path]) -> None:
    pictures, masks = drawn
    for number, (width, height) in enumerate(SHAPES):
        size = (round(width * 0.6), round(height * 0.6))
        save(blobs(width, height, number).resize(size, Image.Resampling.BOX), masks / f"{number}.png")
    for batch in batches(pictures, masks, crop="random", flip=True):
        assert float((batch.masks - shown(batch)).abs().mean()) < 0.06
        assert float((batch.masks - shown(batch).flip(3)).abs().mean()) > 0.06


def test_without_a_reader_there_are_no_masks(square: tuple[Path, Path]) -> None:
    dataset = Dataset.prepare(settings(square[0]), TARGET, FAMILY)
    assert dataset.batch(0, 0, 3).masks is None


# --- what a mask file may be ------------------------------------------------------------------------------


def encoded(image: Image.Image, tmp_path: Path, **options: Any) -> bytes:
    image.save(tmp_path / "mask.png", **options)
    return (tmp_path / "mask.png").read_bytes()


def test_modes_of_mask_pictures(tmp_path: Path) -> None:
    grey = np.array([[0, 64], [128, 255]], np.uint8)

    def read(image: Image.Image, **options: Any) -> list[list[int]]:
        return np.asarray(decode_mask(encoded(image, tmp_path, **options))).tolist()

    image = Image.fromarray(grey)
    assert read(image) == grey.tolist()
    assert read(image.convert("RGB")) == grey.tolist()
    assert read(Image.fromarray(grey.astype(np.uint16) * 257)) == grey.tolist()
    assert read(image.convert("1", dither=Image.Dither.NONE)) == [[0, 0], [255, 255]]
    assert read(image.convert("P")) == grey.tolist()
    # painted on a transparent layer: what is not painted is black, whatever colour lies under it
    layer = Image.merge("LA", (image, Image.fromarray(np.array([[255, 255], [0, 51]], np.uint8))))
    assert read(layer) == [[0, 64], [0, 51]]


def test_alpha_channels(tmp_path: Path) -> None:
    alpha = Image.fromarray(np.array([[0, 64], [128, 255]], np.uint8))
    rgba = Image.merge("RGBA", [Image.new("L", (2, 2), 90)] * 3 + [alpha])

    def read(image: Image.Image, **options: Any) -> list[list[int]] | None:
        found = decode_alpha(encoded(image, tmp_path, **options))
        return None if found is None else np.asarray(found).tolist()

    assert read(rgba) == [[0, 64], [128, 255]]
    assert read(Image.new("RGB", (2, 2))) is None
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
    palette.putpalette([9, 9, 9, 200, 200, 200])
    assert read(palette, transparency=0) == [[0, 255], [255, 0]]
    deep = Image.fromarray(np.array([[0, 300], [65535, 300]], np.uint16))
    assert read(deep, transparency=300) == [[255, 0], [255, 0]]
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    assert read(rgba, exif=exif) == [[255, 128], [64, 0]]


def test_alpha_follows_its_picture(tmp_path: Path) -> None:
    """Black pictures with a drawn alpha channel: over white they show its inverse."""
    pictures = tmp_path / "pictures"
    for number, (width, height) in enumerate(SHAPES):
        grey = blobs(width, height, number).point([0] * 128 + [255] * 128)
        image = Image.merge("RGBA", [Image.new("L", grey.size, 0)] * 3 + [grey])
        save(image, pictures / f"{number}.png", (1, 6, 3, 8, 6, 1)[number])
        (pictures / f"{number}.txt").write_text("a man")
    for batch in batches(pictures, "alpha", crop="random", flip=True):
        assert torch.allclose(batch.masks, 1 - shown(batch), atol=0.005)
        assert not torch.allclose(batch.masks, 1 - shown(batch).flip(3), atol=0.1)


# --- refusals ---------------------------------------------------------------------------------------------


def refusal(pictures: Path, masks: str | Path, **values: Any) -> str:
    """What both the dry run and the training say."""
    data = settings(pictures, **values)
    _, report = survey(data, TARGET, FAMILY, masks=str(masks))
    with pytest.raises(UserError) as caught:
        Dataset.prepare(data, TARGET, FAMILY, masks=str(masks))
    assert len(report.errors) == 1
    assert str(caught.value) == report.errors[0]
    return str(caught.value)


def test_all_missing_masks_stand_in_one_sentence(square: tuple[Path, Path]) -> None:
    pictures, masks = square
    save(Image.new("L", (64, 64)), masks / "B.PNG")  # Windows does not mind
    save(Image.new("L", (64, 64)), masks / "c.png")  # not in `sub`
    assert refusal(pictures, masks) == (
        f"2 of 3 pictures have no mask in {str(masks)!r} (a.jpg, sub/c.jpg): put a picture of the same name "
        "there for each, as 'a.png', white where it counts"
    )
    assert refusal(pictures, "alpha").startswith(
        "3 of 3 pictures have no alpha channel to be the mask (a.jpg, b.jpg, sub/c.jpg): save them with"
    )


def test_pictures_that_are_left_out_need_no_mask(square: tuple[Path, Path]) -> None:
    pictures, masks = square
    for name in ("a", "b"):
        save(Image.new("L", (64, 64)), masks / f"{name}.png")
    save(Image.new("RGB", (40, 40)), pictures / "sub/c.jpg")
    assert "(sub/c.jpg)" in refusal(pictures, masks)
    assert len(Dataset.prepare(settings(pictures, upscale=False), TARGET, FAMILY, masks=str(masks))) == 2


@pytest.mark.parametrize(("spoil", "sentence"), [
    (lambda masks: (masks / "b.png").write_bytes(b"\x89PNG"), "b.png' is not a picture in a known format"),
    (lambda masks: save(Image.new("L", (64, 40)), masks / "b.png"),
     "b.png' has 64x40 pixels and its picture, upright, 64x64: save it in the picture's shape"),
    (lambda masks: save(Image.new("L", (64, 64)), masks / "b.webp"), "'b.jpg' has more than one mask"),
    (shutil.rmtree, "does not exist: name the folder of your mask pictures"),
])  # fmt: skip
def test_bad_masks_are_refused(
    square: tuple[Path, Path], spoil: Callable[[Path], Any], sentence: str
) -> None:
    pictures, masks = square
    for name in ("a", "b", "sub/c"):
        save(Image.new("L", (64, 64)), masks / f"{name}.png")
    assert Masks(str(masks)).errors([]) == []
    spoil(masks)
    assert sentence in refusal(pictures, masks)


def test_masks_and_pictures_are_reported_together(square: tuple[Path, Path]) -> None:
    pictures, masks = square
    (pictures / "a.txt").unlink()
    with pytest.raises(UserError, match=r"(?s)2 things are wrong.*'a.txt' beside it.*have no mask in"):
        Dataset.prepare(settings(pictures), TARGET, FAMILY, masks=str(masks))


def test_a_mask_that_goes_while_training(square: tuple[Path, Path]) -> None:
    pictures, masks = square
    for name in ("a", "b", "sub/c"):
        save(Image.new("L", (64, 64)), masks / f"{name}.png")
    dataset = Dataset.prepare(settings(pictures), TARGET, FAMILY, masks=str(masks))
    before = dataset.info()
    (masks / "b.png").unlink()
    assert dataset.info() == before  # the end of a run asks for it: what was trained must not be lost there
    with pytest.raises(UserError, match=r"b\.png' cannot be opened: .*it was there at the start"):
        dataset.batch(0, 0, 3)


# --- presets and runs -------------------------------------------------------------------------------------


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    """Two embedded pictures; the mask of the first is black, that of the second white."""
    pictures, masks = tmp_path / "pictures", tmp_path / "my masks"
    pictures.mkdir()
    for place, picture in enumerate(sorted(embedded.data_path("glasses").glob("*.png"))[:2]):
        shutil.copy(picture, pictures / f"{place}.png")
        shutil.copy(picture.with_suffix(".txt"), pictures / f"{place}.txt")
        save(Image.new("L", (64, 64), 255 * place), masks / f"{place}.png")
    path = tmp_path / "mine.toml"
    path.write_text(
        '[attribute]\nname = "glasses"\ntarget = "wearing glasses"\n[data]\npath = "pictures"\n'
        "resolution = 32\nbuckets = false\n[preview]\nevery = 0\n[train]\nsteps = 4\nbatch_size = 1\n"
        "threads = 1\ncheckpoint_every = 0\nlog_tensorboard = false\n"
        '[[loss]]\nplugin = "masked"\npath = "my masks"\n'
        '[[loss]]\nplugin = "denoising"\nmask = "masked"\n'
        '[[loss]]\nid = "whole"\nplugin = "denoising"\nweight = 0.5\n'
    )
    return path


def test_paths_of_masks(preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def path(*sets: str) -> str:
        return config.load(str(preset), sets=sets).plugins[0].path

    assert path() == str(tmp_path / "my masks")
    monkeypatch.chdir(tmp_path)
    assert path("loss.masked.path=alpha") == "alpha"
    assert path("loss.masked.path=./alpha") == str(tmp_path / "alpha")
    preset.write_text(preset.read_text().replace("my masks", "alpha"))
    assert path() == "alpha"
    again = tmp_path / "again.toml"
    again.write_text(config.load(str(preset)).to_toml())
    assert config.load(str(again)).plugins[0].path == "alpha"


def test_a_run_learns_only_what_is_white(preset: Path, tmp_path: Path) -> None:
    resolved = config.load(str(preset))
    trainer.check(resolved)
    trainer.train(resolved, tmp_path / "run")
    rows = [json.loads(line)["terms"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert sorted(row["denoising"] == 0 for row in rows) == [False, False, True, True]
    assert all(row["whole"] > 0 for row in rows)
    assert all(row["denoising"] in (0, pytest.approx(row["whole"])) for row in rows)


def test_missing_masks_stop_before_anything_is_written(preset: Path, tmp_path: Path) -> None:
    (tmp_path / "my masks/1.png").unlink()
    resolved = config.load(str(preset))
    for run in (lambda: trainer.check(resolved), lambda: trainer.train(resolved, tmp_path / "run")):
        with pytest.raises(UserError, match=r"1 of 2 pictures has no mask in .* \(1\.png\)"):
            run()
    assert not (tmp_path / "run").exists()
