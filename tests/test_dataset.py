"""The data set: sizes, batches, cached latents, random numbers, and all with the real base model."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from spf_kit.data import buckets, entries, random
from spf_kit.data.buckets import Bucket, bucket_sizes, crop_box, nearest_bucket, to_pixels
from spf_kit.data.dataset import Batch, Dataset, survey
from spf_kit.data.split import Split
from spf_kit.errors import UserError
from spf_kit.schema import Base, Data

TARGET = "wearing glasses"


class FakeFamily:
    """A VAE that averages squares of 4 x 4 pixels: linear, so that its latents mirror with the picture."""

    latent_factor = 4
    vae_tiling = False
    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, weights: str = "v1") -> None:
        self.weights, self.encoded, self.vae = weights, 0, object()

    def latents_key(self) -> str:
        return self.weights

    def count_tokens(self, text: str) -> int:
        return len(text.replace(",", " , ").split())

    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.encoded += len(pixels)
        mean = torch.nn.functional.avg_pool2d(pixels, 4)
        return mean, mean.abs() + 0.1


def fake(weights: str = "v1") -> Any:
    return FakeFamily(weights)


@pytest.fixture(autouse=True)
def cache_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test writes into the user's own cache."""
    monkeypatch.setenv("SPF_KIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eleven pictures in three shapes, with captions of which some name the target."""
    root = tmp_path / "pictures"
    shapes = [(64, 64)] * 5 + [(96, 64)] * 4 + [(60, 100)] * 2
    for i, (width, height) in enumerate(shapes):
        put(
            root / f"{i:02}.png",
            f"person {i}, red hair, smile, wall" + (f", {TARGET}" if i % 2 else ""),
            width,
            height,
        )
    return root


def put(path: Path, caption: str, width: int = 64, height: int = 64) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = zlib.crc32(path.name.encode())
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    path.with_suffix(".txt").write_text(caption)


def settings(folder: Path, **values: Any) -> Data:
    return Data(**{"path": str(folder), "resolution": 64, "bucket_step": 16, **values})


def prepared(folder: Path, family: Any = None, **values: Any) -> Dataset:
    return Dataset.prepare(settings(folder, **values), TARGET, family or fake())


def same(one: Batch, other: Batch) -> bool:
    plain = ("captions", "sample_ids", "indices", "flipped", "epoch")
    return (
        all(getattr(one, name) == getattr(other, name) for name in plain)
        and torch.equal(one.mean, other.mean)
        and torch.equal(one.std, other.std)
    )


# --- keyed random numbers ---------------------------------------------------------------------------------


def test_random_numbers_depend_on_their_key_alone() -> None:
    first = random.randn((4, 5), 0, "noise", 7, "a.png")
    random.randn((100,), 0, "other")
    torch.manual_seed(1)
    assert torch.equal(first, random.randn((4, 5), 0, "noise", 7, "a.png"))
    keys: list[tuple[Any, ...]] = [
        (0, "noise", 7), (1, "noise", 7), (0, "noise", "7"), (0, "noise", 8), (0, "noise7"), (0, "noise", 1),
        (0, "nois", "e7"), (0, "noise", True), (0, "noise", 7, 0), (0, "noise", None),
    ]  # fmt: skip
    assert len({random.key_seed(*key) for key in keys}) == len(keys)
    assert random.key_seed(0, "noise", 7) == 5446106359902356932  # frozen: a run resumed after an update


def test_random_numbers_are_distributed_as_they_should() -> None:
    values = torch.cat([random.randn((500,), 0, i) for i in range(40)])
    assert abs(values.mean()) < 0.03
    assert abs(values.std() - 1) < 0.03
    shares = [random.uniform(0, i) for i in range(2000)]
    assert abs(np.mean(shares) - 0.5) < 0.03
    assert 0 <= min(shares) <= max(shares) < 1
    assert sorted(random.permutation(50, 3)) == list(range(50))
    assert random.permutation(50, 3) != random.permutation(50, 4)


# --- buckets ----------------------------------------------------------------------------------------------


@given(st.integers(64, 1024), st.sampled_from([8, 16, 32, 64]))
@limits(max_examples=60, deadline=None)
def test_buckets_are_regular(resolution: int, step: int) -> None:
    sizes = bucket_sizes(resolution, step)
    square = resolution // step * step
    assert Bucket(square, square) in sizes
    assert len(set(sizes)) == len(sizes)
    for b in sizes:
        assert b.width % step == b.height % step == 0
        assert b.width * b.height <= resolution**2
        assert max(b.width, b.height) / min(b.width, b.height) <= buckets.MAX_ASPECT
        assert Bucket(b.height, b.width) in sizes


def test_buckets_of_stable_diffusion() -> None:
    sizes = bucket_sizes(512, 64)
    names = "320x768 384x640 448x576 512x512 576x448 640x384 768x320"
    assert " ".join(map(str, sizes)) == names
    assert nearest_bucket(3000, 2000, sizes) == Bucket(640, 384)
    assert nearest_bucket(2000, 3000, sizes) == Bucket(384, 640)
    assert nearest_bucket(517, 500, sizes) == Bucket(512, 512)
    assert nearest_bucket(9000, 100, sizes) == Bucket(768, 320)
    with pytest.raises(ValueError, match="multiples of 64"):
        bucket_sizes(32, 64)


@given(st.integers(1, 5000), st.integers(1, 5000), st.floats(0, 1), st.floats(0, 1))
@limits(max_examples=100, deadline=None)
def test_a_crop_lies_inside_and_has_the_buckets_shape(width: int, height: int, x: float, y: float) -> None:
    bucket = Bucket(448, 576)
    left, top, right, bottom = crop_box(width, height, bucket, (x, y))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert math.isclose((right - left) / (bottom - top), 448 / 576, rel_tol=1e-6)
    assert math.isclose(right - left, width, rel_tol=1e-6) or math.isclose(bottom - top, height, rel_tol=1e-6)


def test_pixels_are_scaled_cropped_and_mirrored() -> None:
    image = Image.new("RGB", (300, 100), "black")
    image.paste("white", (0, 0, 100, 100))
    image.paste("red", (200, 0, 300, 100))
    bucket = Bucket(32, 32)
    for x, colour in ((0, (1, 1, 1)), (0.5, (-1, -1, -1)), (1, (1, -1, -1))):
        inside = to_pixels(image, bucket, (x, 0.5), False)[:, :, 4:-4]  # at its edge the filter sees more
        assert torch.allclose(inside.mean((1, 2)), torch.tensor(colour, dtype=torch.float32), atol=0.01)
    wide = Bucket(96, 32)
    assert torch.equal(to_pixels(image, wide, (0, 0), True), to_pixels(image, wide, (0, 0), False).flip(2))
    same_size = to_pixels(image, Bucket(300, 100), (0.5, 0.5), False)
    assert torch.equal(
        ((same_size + 1) * 127.5).round().byte().permute(1, 2, 0), torch.from_numpy(np.array(image))
    )


def test_reducing_does_not_alias() -> None:
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255  # one pixel on, one off: grey, when seen from afar
    small = to_pixels(Image.fromarray(stripes), Bucket(96, 96), (0.5, 0.5), False)
    assert small.abs().max() < 0.15


# --- batches ----------------------------------------------------------------------------------------------


def test_an_epoch_shows_each_sample_once_and_each_batch_one_size(folder: Path) -> None:
    dataset = prepared(folder)
    assert len(dataset) == 11
    assert dataset.batches_per_epoch(4) == 2 + 1 + 1
    orders = []
    for epoch in range(3):
        batches = [dataset.batch(0, epoch * 4 + i, 4) for i in range(4)]
        assert sorted(len(b) for b in batches) == [1, 2, 4, 4]
        assert sorted(i for b in batches for i in b.indices) == list(range(epoch * 11, epoch * 11 + 11))
        assert {b.epoch for b in batches} == {epoch}
        shapes = {name: tuple(b.mean.shape[1:]) for b in batches for name in b.sample_ids}
        assert shapes["00.png"] == (3, 16, 16)
        assert shapes["05.png"] == (3, 12, 20)
        assert shapes["10.png"] == (3, 20, 12)
        orders.append([b.sample_ids for b in batches])
    assert orders[0] != orders[1] != orders[2]
    assert [dataset.batch(1, i, 4).sample_ids for i in range(4)] != orders[0]


def test_a_batch_is_a_function_of_its_arguments(folder: Path) -> None:
    values: dict[str, Any] = {"flip": True, "shuffle_tags": True, "caption_dropout": 0.3}
    dataset = prepared(folder, **values)
    forwards = [dataset.batch(5, step, 3) for step in range(12)]
    other = prepared(folder, **values)
    backwards = [other.batch(5, step, 3) for step in reversed(range(12))][::-1]
    assert all(same(a, b) for a, b in zip(forwards, backwards))


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_batch_of_one(folder: Path, world: int) -> None:
    values: dict[str, Any] = {"flip": True, "shuffle_tags": True, "caption_dropout": 0.3, "repeats": 8}
    dataset = prepared(folder, **values)
    assert dataset.batches_per_epoch(4 // world, world) == dataset.batches_per_epoch(4) == 10 + 8 + 4
    for step in range(30):
        whole = dataset.batch(2, step, 4)
        parts = [dataset.batch(2, step, 4 // world, rank, world) for rank in range(world)]
        assert [c for part in parts for c in part.captions] == whole.captions
        assert [i for part in parts for i in part.indices] == whole.indices
        assert [f for part in parts for f in part.flipped] == whole.flipped
        assert torch.equal(torch.cat([part.mean for part in parts]), whole.mean)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_any_number_of_processes_shares_the_batches_that_two_began_with(folder: Path, world: int) -> None:
    dataset = prepared(folder)
    for step in range(dataset.batches_per_epoch(4)):
        whole = dataset.batch(0, step, 4)
        splits = [Split.of(2, rank, world, began=2) for rank in range(world)]
        parts = [part for split in splits for part in dataset.passes(0, step, split)]
        counted = [part for part in parts if part.share]
        assert [i for part in counted for i in part.indices] == whole.indices
        assert [place for part in counted for place in part.places] == list(range(len(whole)))
        assert sum(part.share for part in parts) == pytest.approx(1)
        assert all(1 <= len(part) <= 2 for part in parts)
        assert all(part.share == len(part) / len(whole) for part in counted)
        idle = [part for part in parts if not part.share]
        assert len(idle) == max(0, world - len(whole))
        assert all(part.indices == whole.indices[:1] for part in idle)
        assert dataset.whole(0, step, splits[0]) == (whole.indices, whole.captions)


def test_what_a_sample_shows_does_not_depend_on_the_batch_size(folder: Path) -> None:
    dataset = prepared(folder, flip=True, shuffle_tags=True, caption_dropout=0.3)

    def shown(size: int) -> dict[int, tuple[str, bool]]:
        batches = [dataset.batch(0, step, size) for step in range(dataset.batches_per_epoch(size))]
        return {i: (c.full, f) for b in batches for i, c, f in zip(b.indices, b.captions, b.flipped)}

    assert shown(1) == shown(2) == shown(5)


def test_accumulation_goes_on_through_the_same_batches(folder: Path) -> None:
    dataset = prepared(folder)
    plain = [dataset.batch(0, step, 2).indices for step in range(12)]
    parts = [dataset.batch(0, i // 3, 2, micro=i % 3, accumulation=3).indices for i in range(12)]
    assert plain == parts
    assert dataset.batches_per_epoch(2) == 6
    assert dataset.steps(3, 2) == 18
    assert dataset.steps(3, 2, accumulation=4) == 5
    for wrong in ({"step": -1}, {"rank": 2, "world": 2}, {"micro": 1}):
        with pytest.raises(ValueError, match=r"no (batch|share)"):
            dataset.batch(**{"seed": 0, "step": 0, "batch_size": 1, **wrong})


def test_repeats_count_and_spread_over_the_epoch(tmp_path: Path) -> None:
    put(tmp_path / "p" / "3_few" / "a.png", "a")
    for name in "bcd":
        put(tmp_path / "p" / f"{name}.png", name)
    dataset = prepared(tmp_path / "p", repeats=2)
    assert len(dataset) == 3 + 3 * 2
    for epoch in range(4):
        names = [name for i in range(3) for name in dataset.batch(0, epoch * 3 + i, 3).sample_ids]
        assert Counter(names) == {"3_few/a.png": 3, "b.png": 2, "c.png": 2, "d.png": 2}


def test_twins_of_a_picture_rarely_meet(tmp_path: Path) -> None:
    for name in "abcd":
        put(tmp_path / "p" / f"{name}.png", name)
    dataset = prepared(tmp_path / "p", repeats=10)
    for step in range(30):
        assert len(set(dataset.batch(0, step, 4).sample_ids)) == 4


# --- what a sample says and shows -------------------------------------------------------------------------


def epochs(dataset: Dataset, count: int) -> Iterator[tuple[str, Any, bool, Tensor]]:
    for step in range(count * dataset.batches_per_epoch(4)):
        batch = dataset.batch(0, step, 4)
        yield from zip(batch.sample_ids, batch.captions, batch.flipped, batch.mean)


def test_half_of_the_samples_are_mirrored(folder: Path) -> None:
    dataset = prepared(folder, flip=True)
    plain = {name: mean for name, _, _, mean in epochs(prepared(folder), 1)}
    flips = []
    for name, _, flipped, mean in epochs(dataset, 30):
        flips.append(flipped)
        expected = plain[name].flip(2) if flipped else plain[name]
        assert torch.allclose(mean, expected, atol=1e-6)
    assert 0.42 < np.mean(flips) < 0.58
    assert not any(flipped for _, _, flipped, _ in epochs(prepared(folder), 2))


def test_a_share_of_the_captions_is_dropped(folder: Path) -> None:
    captions = [caption for _, caption, _, _ in epochs(prepared(folder, caption_dropout=0.25), 30)]
    dropped = [c for c in captions if c.full == ""]
    assert 0.19 < len(dropped) / len(captions) < 0.31
    assert all(c.base == "" and c.phrases == () for c in dropped)


def test_captions_derived_and_shuffled(folder: Path) -> None:
    for name, caption, _, _ in epochs(prepared(folder), 1):
        assert caption.base == f"person {int(name[:2])}, red hair, smile, wall"
        assert caption.full == f"{caption.base}, {TARGET}"
    dataset = prepared(folder, shuffle_tags=True, keep_tokens=1)
    bases = {caption.base for name, caption, _, _ in epochs(dataset, 12) if name == "03.png"}
    assert len(bases) >= 4
    assert all(base.startswith("person 3, ") for base in bases)
    assert dataset.texts() is None


def test_texts_are_all_that_can_occur(folder: Path) -> None:
    dataset = prepared(folder, caption_dropout=0.5)
    texts = dataset.texts()
    assert texts is not None
    assert len(texts) == 1 + 2 * 11
    for _, caption, _, _ in epochs(dataset, 3):
        assert {caption.base, caption.full} <= texts
    assert "" in texts


def test_a_long_caption_is_fitted_also_after_shuffling(tmp_path: Path) -> None:
    put(tmp_path / "p" / "a.png", ", ".join(f"tag{i}" for i in range(60)))
    plain = prepared(tmp_path / "p").batch(0, 0, 1).captions[0]
    assert plain.phrases == tuple(f"tag{i}" for i in range(36))  # 36 tags with commas, then 3 tokens
    assert len(prepared(tmp_path / "p", chunks=2).batch(0, 0, 1).captions[0].phrases) == 60
    dataset = prepared(tmp_path / "p", shuffle_tags=True)
    seen = set()
    for step in range(12):
        caption = dataset.batch(0, step, 1).captions[0]
        assert fake().count_tokens(caption.full) <= 75
        assert caption.full.endswith(f", {TARGET}")
        seen |= set(caption.phrases)
    assert len(seen) == 60  # what is cut changes with the order


def test_random_crops_move_and_are_not_cached(tmp_path: Path) -> None:
    put(tmp_path / "p" / "a.png", "a", width=200, height=64)
    family = fake()
    dataset = prepared(tmp_path / "p", family, crop="random", cache="none", buckets=False)
    assert dataset.needs_image_encoder
    assert family.encoded == 0
    crops = [dataset.batch(0, step, 1).mean for step in range(6)]
    assert len({tuple(crop.flatten().tolist()) for crop in crops}) == 6
    assert torch.equal(dataset.batch(0, 3, 1).mean, crops[3])
    with pytest.raises(UserError, match=r"data\.crop = 'random' needs data\.cache = 'none', not 'disk'"):
        prepared(tmp_path / "p", crop="random", cache="disk")


# --- the cache --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "disk", "none"])
def test_every_kind_of_cache_gives_the_same_batches(folder: Path, kind: str) -> None:
    reference = prepared(folder, flip=True)
    dataset = prepared(folder, cache=kind, flip=True)
    assert all(same(reference.batch(0, step, 4), dataset.batch(0, step, 4)) for step in range(6))
    assert dataset.needs_image_encoder is (kind == "none")


def test_the_posterior_is_what_the_vae_says(folder: Path) -> None:
    batch = prepared(folder).batch(0, 0, 4)
    for name, mean, std in zip(batch.sample_ids, batch.mean, batch.std):
        image = Image.open(folder / name)
        if image.size != (64, 64):
            continue
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
        expected = pixels.reshape(3, 16, 4, 16, 4).mean((2, 4))
        assert torch.allclose(mean, expected, atol=1e-6)
        assert torch.allclose(std, expected.abs() + 0.1, atol=1e-6)


def test_memory_encodes_each_picture_once(folder: Path) -> None:
    (folder / "99.png").write_bytes((folder / "00.png").read_bytes())
    (folder / "99.txt").write_text("the same picture")
    family = fake()
    dataset = prepared(folder, family, flip=True)
    assert family.encoded == 22  # 12 files, 11 pictures, 2 sides
    dataset.batch(0, 0, 4)
    assert family.encoded == 22


def test_disk_entries_are_found_again_and_keyed_by_content(folder: Path, cache_place: Path) -> None:
    before = sorted(os.listdir(folder))
    first, again, other = fake(), fake(), fake("v2")
    prepared(folder, first, cache="disk")
    prepared(folder, again, cache="disk")
    assert (first.encoded, again.encoded) == (11, 0)
    assert sorted(os.listdir(folder)) == before
    assert len(list(cache_place.rglob("*.latents"))) == 11
    prepared(folder, other, cache="disk")  # another VAE
    assert other.encoded == 11
    put(folder / "00.png", "a man", 64, 65)  # another picture under the same name
    (folder / "01.png").rename(folder / "renamed.png")  # the same under another
    (folder / "01.txt").rename(folder / "renamed.txt")
    changed = fake()
    prepared(folder, changed, cache="disk")
    assert changed.encoded == 1
    larger = fake()
    prepared(folder, larger, cache="disk", resolution=128)
    assert larger.encoded == 11


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-1], lambda data: b"", lambda data: data[:99] + bytes([data[99] ^ 1]) + data[100:]],
    ids=["cut", "empty", "bit"],
)
def test_damaged_entries_are_made_again(
    folder: Path, cache_place: Path, damage: Callable[[bytes], bytes]
) -> None:
    reference = prepared(folder, cache="disk").batch(0, 0, 4)
    for path in cache_place.rglob("*.latents"):
        path.write_bytes(damage(path.read_bytes()))
    family = fake()
    dataset = prepared(folder, family, cache="disk")
    assert family.encoded == 11
    assert same(dataset.batch(0, 0, 4), reference)
    for path in cache_place.rglob("*.latents"):
        path.unlink()
    assert same(dataset.batch(0, 0, 4), reference)
    for path in cache_place.rglob("*.latents"):
        path.unlink()
    family.vae = None
    with pytest.raises(UserError, match="damaged or removed while training ran: start again with --resume"):
        dataset.batch(0, 0, 4)


def test_a_cache_that_cannot_be_written_says_what_to_do(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("SPF_KIT_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match=r"cannot write .*; set SPF_KIT_CACHE to .*data\.cache = 'memory'"):
        prepared(folder, cache="disk")


def test_the_cache_lies_where_caches_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPF_KIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    for system, place in (("linux", "/x/spf-kit"), ("win32", "/local/spf-kit")):
        monkeypatch.setattr(entries.sys, "platform", system)
        assert entries.cache_folder() == Path(place)
    monkeypatch.setattr(entries.sys, "platform", "darwin")
    assert entries.cache_folder() == Path.home() / "Library" / "Caches" / "spf-kit"


def test_pictures_that_change_or_overflow(folder: Path) -> None:
    dataset = prepared(folder, cache="none")
    put(folder / "00.png", "a man", 64, 66)
    with pytest.raises(UserError, match=r"00\.png' has changed since it was checked"):
        [dataset.batch(0, step, 4) for step in range(4)]
    (folder / "00.png").unlink()
    with pytest.raises(UserError, match=r"00\.png' can no longer be read"):
        [dataset.batch(0, step, 4) for step in range(4)]
    family = fake()
    family.encode_image = lambda pixels: (pixels / 0, pixels)
    put(folder / "00.png", "a man")
    with pytest.raises(UserError, match=r"NaN or infinite latents .*00\.png' in torch\.float32: set base"):
        prepared(folder, family)


# --- the whole --------------------------------------------------------------------------------------------


def test_preparing_refuses_with_everything_and_encodes_nothing(folder: Path) -> None:
    (folder / "00.png").write_bytes(b"junk")
    (folder / "01.txt").unlink()
    family = fake()
    with pytest.raises(UserError, match=r"(?s)2 things are wrong.*00\.png.*01\.png"):
        prepared(folder, family)
    assert family.encoded == 0
    found, report = survey(settings(folder), TARGET, family)
    assert (len(found), len(report.errors)) == (11, 2)


def test_progress_is_reported_to_the_end(folder: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    Dataset.prepare(settings(folder, flip=True), TARGET, fake(), progress=lambda *call: calls.append(call))
    assert calls[0] == (1, 11, "checking pictures")
    assert (11, 11, "checking pictures") in calls
    assert calls[-1] == (22, 22, "encoding pictures")


def test_info_is_json_and_tells_what_there_is(folder: Path) -> None:
    put(folder / "3_more" / "x.png", "person x, smile", 32, 32)
    info = prepared(folder).info()
    assert json.loads(json.dumps(info)) == info
    assert (info["pictures"], info["samples"], info["captions_with_target"]) == (12, 14, 5)
    assert info["folders"] == {"": {"pictures": 11, "repeats": 1}, "3_more": {"pictures": 1, "repeats": 3}}
    assert info["buckets"] == [
        {"width": 48, "height": 80, "pictures": 2, "samples": 2},
        {"width": 64, "height": 64, "pictures": 6, "samples": 8},
        {"width": 80, "height": 48, "pictures": 4, "samples": 4},
    ]
    assert info["tag_frequencies"]["3_more"] == {"person x": 1, "smile": 1, TARGET: 1}
    assert info["tag_frequencies"][""]["red hair"] == 11
    assert list(info["warnings"].values()) == [1]
    assert len(set(info["content_hashes"].values())) == 12


def test_a_misspelt_embedded_set_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no embedded data set 'glases'; did you mean 'glasses'\?"):
        Dataset.prepare(Data(path="embedded:glases", resolution=64, bucket_step=16), TARGET, fake())


# --- with the embedded base model -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family() -> Any:
    from spf_kit import families

    return families.load(Base())


@pytest.fixture(scope="module")
def embedded(family: Any) -> Dataset:
    cfg = Data(path="embedded:glasses", resolution=64, bucket_step=16, flip=True)
    return Dataset.prepare(cfg, TARGET, family)


def test_embedded_pictures_become_the_vaes_latents(embedded: Dataset, family: Any) -> None:
    from spf_kit import embedded as package

    assert len(embedded) == 32
    assert embedded.report.warnings == {}
    batch = embedded.batch(0, 0, 4)
    assert batch.mean.shape == batch.std.shape == (4, family.latent_channels, 16, 16)
    for name, mean, std, flipped in zip(batch.sample_ids, batch.mean, batch.std, batch.flipped):
        image = np.array(Image.open(package.data_path("glasses") / name).convert("RGB"))
        image = image[:, ::-1].copy() if flipped else image
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            posterior = family.vae.encode(pixels).latent_dist
        scale = family.vae.config.scaling_factor
        assert torch.allclose(mean, posterior.mean[0] * scale, atol=1e-5)
        assert torch.allclose(std, posterior.std[0] * scale, atol=1e-5)


def test_embedded_captions_keep_their_base_tokens_in_place(embedded: Dataset, family: Any) -> None:
    captions = [entry.caption for entry in embedded.entries]
    assert all(caption.full.endswith(", " + TARGET) for caption in captions)
    for caption in captions:
        ids = [family.tokenizer(t, add_special_tokens=False).input_ids for t in (caption.base, caption.full)]
        assert ids[1][: len(ids[0])] == ids[0]
    with torch.no_grad():
        base, full = family.encode_text([captions[0].base, captions[0].full])["encoder_hidden_states"]
    count = 1 + family.count_tokens(captions[0].base)
    assert torch.allclose(base[:count], full[:count], atol=1e-5)  # the encoder is causal
    assert not torch.allclose(base[count], full[count], atol=1e-3)
