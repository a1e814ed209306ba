"""What a run keeps for its page, and the page's parts by themselves: curves, pictures, time, size."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from spf_kit.report import build, plots, watch
from spf_kit.report.reader import gather
from spf_kit.training import keeping, records


def test_thumbnails_stand_upright_and_in_colour(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    wide = Image.new("RGB", (800, 400), "red")
    wide.save(tmp_path / "turned.jpg", exif=exif)
    wide.convert("P").save(tmp_path / "palette.png")
    for name, size in (("turned.jpg", (80, 160)), ("palette.png", (160, 80))):
        url = records.thumbnail(tmp_path / name)
        assert url is not None
        small = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
        assert small.size == size
        assert small.getpixel((40, 40))[0] > 200 > 60 > small.getpixel((40, 40))[2]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert records.thumbnail(tmp_path / "broken.png") is None


@pytest.mark.parametrize(
    ("folder", "config"), [("nowhere", None), ("empty", ""), ("foreign", "[project]\nname = 1\n")]
)
def test_what_is_no_run_is_one_sentence(
    spf_kit: Callable[..., Any], tmp_path: Path, folder: str, config: str | None
) -> None:
    if config is not None:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.toml").write_text(config)
    for arguments in ([folder], [folder, folder]):
        ended = spf_kit("report", *arguments)
        assert ended.code == 2
        assert "Traceback" not in ended.err
        assert f"'{folder}' is not a run folder" in ended.err
    assert not list(tmp_path.rglob("*.html"))


def test_the_base_beside_a_lora_without_effect_is_its_picture(pictures: Path, tmp_path: Path) -> None:
    from spf_kit import config
    from spf_kit.training import trainer

    sets = [
        "train.steps=2", "preview.every=1", "preview.steps=2", "preview.count=2", "train.threads=1",
        "train.batch_size=1", "train.learning_rate=1e-30", "train.log_tensorboard=false",
    ]  # fmt: skip
    resolved = config.load("glasses", recipe="naive", data=str(pictures), sets=sets)
    trainer.train(resolved, tmp_path / "r").handle.remove()
    base, first, second = gather(tmp_path / "r").previews
    assert (base.step, first.step, second.step) == (0, 1, 2)
    assert keeping._of_same(records.preview_file(tmp_path / "r", 0), second)
    dark = records.veil([[0.0] * 16] * 16)
    for case, old in zip(first.cases, base.cases):
        assert (case.asked, case.plain) == (old.asked, old.plain)
        assert case.asked != case.plain
        assert [m.picture for m in case.maps if m.label == "changed when not asked"] == [dark]
    second.cases[0].seed += 1
    assert not keeping._of_same(records.preview_file(tmp_path / "r", 0), second)


def test_slow_thumbnails_do_not_hold_up_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    now, made = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def slow(path: Path) -> None:
        made.append(path)
        now[0] += 4

    monkeypatch.setattr(records, "thumbnail", slow)
    picture = {"width": 1, "height": 1, "repeats": 1, "content_hash": "", "path": Path("a")}
    entries = [
        SimpleNamespace(
            picture=SimpleNamespace(sample_id=str(number), **picture),
            caption=SimpleNamespace(text="", base=""),
            bucket=SimpleNamespace(width=64, height=64),
        )
        for number in range(9)
    ]
    data = SimpleNamespace(entries=entries, target="t", report=SimpleNamespace(warnings={}))
    kept = keeping._data(SimpleNamespace(dataset=data))  # type: ignore[arg-type]
    assert (len(kept.entries), len(made)) == (9, 3)


def test_pictures_that_cannot_be_kept_change_nothing(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same LoRA without previews, with them, and where neither the base nor a record can be had."""
    import torch

    from spf_kit import config
    from spf_kit.training import preview, trainer

    def failing(*arguments: Any, **more: Any) -> str:
        raise RuntimeError("no encoder")

    weights, told = {}, []
    for name, every, broken in (
        ("none", 0, ()), ("all", 1, ()), ("no base", 1, ("of_base",)), ("no record", 1, ("_record",)),
    ):  # fmt: skip
        for method in broken:
            monkeypatch.setattr(preview.Preview, method, failing)
        sets = [
            "train.steps=3", f"preview.every={every}", "preview.steps=2", "preview.count=1",
            "train.threads=1", "train.batch_size=1", "train.log_tensorboard=false", "adapter.dropout=0.2",
        ]  # fmt: skip
        resolved = config.load("glasses", recipe="naive", data=str(pictures), sets=sets)
        result = trainer.train(
            resolved, tmp_path / name, report=lambda *a: told.extend(a[2].get("warnings", ()))
        )
        weights[name] = result.handle.state_dict()
        result.handle.remove()
        monkeypatch.undo()
    for name in ("all", "no base", "no record"):
        assert all(torch.equal(weights["none"][key], value) for key, value in weights[name].items()), name
    assert [sentence for sentence in told if "no encoder" in sentence] == [
        "the report's records could not be written: no encoder; the run goes on without"
    ] * 2
    steps = {name: [kept.step for kept in gather(tmp_path / name).previews] for name in weights}
    assert steps == {"none": [], "all": [0, 1, 2, 3], "no base": [1, 2, 3], "no record": []}


def test_smaller_scales_are_tried_until_the_page_fits() -> None:
    asked: list[float] = []

    def make(scale: float) -> str:
        asked.append(scale)
        return "x" * int(1000 * scale + 10)

    assert len(build.within(make, limit=400)) < 400
    assert asked == [1.0, 0.5, 0.2]


def test_a_curve_is_where_its_numbers_are() -> None:
    found = plots.chart("c", [("a", [(0, 0.0), (50, 5.0), (100, 10.0)])], 100, edges=[(0, "1"), (25, "2")])
    assert found is not None
    xs, ys = zip(*(map(float, pair.split(",")) for pair in found.lines[0].path[1:].split()))
    assert xs == (0, 500, 1000)
    top = 10.5  # 5% of room
    assert ys == pytest.approx([1000 * (1 - v / top) for v in (0, 5, 10)], abs=0.06)
    assert [(t.at, t.text) for t in found.edges] == [(25, "2")]
    assert [t.text for t in found.y] == ["0", "5", "10"]
    zero = next(t for t in found.y if t.text == "0")
    assert zero.at == 100


def test_many_steps_become_few_points_with_a_band() -> None:
    points = [(step, float(step % 2)) for step in range(1, 10_001)]
    found = plots.chart("c", [("a", points)], 10_000, dots=[(5000, "here")])
    assert found is not None
    values = [value for _, value in found.lines[0].values]
    assert len(values) == plots.BINS
    assert all(value == pytest.approx(0.5, abs=0.01) for value in values)
    assert found.lines[0].band
    assert found.dots[0].text.startswith("here: 0.")
    assert found.dots[0].x == 50


def test_what_spans_decades_is_logarithmic_and_nothing_is_no_plot() -> None:
    found = plots.chart("c", [("a", [(1, 1e-4), (2, 2e-4), (3, 1.0)])], 3)
    assert found is not None
    assert found.logarithmic
    assert plots.chart("c", [("a", [])], 3) is None
    for value in (0.0, 2.0, -2.0, 1e-9):
        flat = plots.chart("c", [("a", [(1, value), (2, value)])], 2)
        assert flat is not None
        assert all(0 <= tick.at <= 100 for tick in flat.y)
        assert "0" in [tick.text for tick in flat.y]


def test_time_goes_to_the_phase_that_took_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = watch.Clock()

    def after(seconds: float, *heard: Any) -> None:
        now[0] += seconds
        clock.heard(*heard)

    after(1, 0, 0, "loading the base")
    after(5, 1, 3, "reading pictures")
    after(2, 3, 3, "reading pictures")
    after(3, 1, 9, "training")
    after(4, 8, 8, "drawing a preview")
    after(3, 2, 9, "training")
    assert clock.record.seconds == {
        "loading the base": 6, "reading pictures": 2, "training": 6, "drawing a preview": 4,
    }  # fmt: skip
    assert all(size > 1e7 for size in clock.record.memory.values())


def test_a_veil_over_a_picture_is_the_lit_picture() -> None:
    import numpy as np
    import torch

    from spf_kit.training.overlays import lit

    mask = torch.tensor([[0.0, 0.5], [0.75, 1.0]])
    picture = torch.full((1, 3, 2, 2), 0.6)
    url = records.veil(mask)
    rgba = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))), dtype=float) / 255
    shown = 0.6 * (1 - rgba[..., 3:]) + rgba[..., :3] * rgba[..., 3:]
    expected = lit(picture, mask[None, None])[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(shown, expected, atol=0.01)
