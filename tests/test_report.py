"""report.html: of a real short run whose captions and file names are hostile, read back by an HTML parser."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from spf_kit.report import build, page, watch
from spf_kit.report.reader import gather
from spf_kit.training import keeping, overlays, records

TEMPLATES = Path(build.__file__).parent / "template"
CAPTIONS = [
    "<script>alert(1)</script>, a portrait, wearing glasses",
    "\"><img src=x onerror=alert(2)>, ' onfocus=alert(3) autofocus=', a portrait, wearing glasses",
    "</title></textarea></style></script><svg/onload=alert(4)> & {{ 7*7 }} {% raw %} --> ]]> sad",
]
NAMES = ["<img src=x onerror=alert(5)>.png", '"><b onclick="alert(6)">.png', "x</script><script>alert(7).png"]
SHORT = [
    "--steps", "4", "--recipe", "naive", "--set", "preview.every=2", "--set", "preview.steps=2",
    "--set", "preview.count=3", "--set", "evaluate.count=5", "--set", "evaluate.steps=2",
    "--set", "train.drift_every=2", "--set", "train.drift_budget=9", "--set", "train.log_tensorboard=false",
    "--set", 'loss.control_map.plugin="control_map"',
]  # fmt: skip


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three pictures that want to be code."""
    from spf_kit import embedded

    folder = tmp_path_factory.mktemp("hostile")
    for name, caption, picture in zip(NAMES, CAPTIONS, sorted(embedded.data_path("glasses").glob("*.png"))):
        place = folder / name
        place.parent.mkdir(exist_ok=True)
        shutil.copy(picture, place)
        place.with_suffix(".txt").write_text(caption)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, hostile: Path) -> Path:
    """A finished run of four steps."""
    from typer.testing import CliRunner

    from spf_kit.cli import app

    folder = tmp_path_factory.mktemp("runs") / "glasses"
    done = CliRunner().invoke(
        app, ["train", "glasses", "--data", str(hostile), "--output", str(folder), "--json", *SHORT]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["report"] == str(folder / "report.html")
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The run, to be changed."""
    return Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))


class Parsed(HTMLParser):
    """Elements with their attributes, the text, and the JSON of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script":
            self.scripts[-1] += data
        else:
            self.text.append(data)

    def handle_endtag(self, tag: str) -> None:
        self.lasttag = ""

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    @property
    def json(self) -> list[Any]:
        kinds = [attrs for tag, attrs in self.elements if tag == "script"]
        return [
            json.loads(text)
            for text, kind in zip(self.scripts, kinds)
            if kind == {"type": "application/json"}
        ]


def parsed(file: Path) -> Parsed:
    return Parsed(file.read_text(encoding="utf-8"))


def allowed() -> tuple[set[str], set[str]]:
    """Elements and attributes that the templates have."""
    text = "".join(file.read_text(encoding="utf-8") for file in TEMPLATES.glob("*.html"))
    text = re.sub(r"{%.*?%}|{{.*?}}|{#.*?#}", " ", text, flags=re.DOTALL)
    elements = Parsed(text).elements
    return {tag for tag, _ in elements}, {name for _, attrs in elements for name in attrs}


def check_harmless(found: Parsed, more: tuple[set[str], set[str]] = (set(), set())) -> None:
    tags, names = allowed()
    for tag, attrs in found.elements:
        assert tag in tags | more[0], tag
        assert set(attrs) <= names | more[1], (tag, attrs)
        for name, value in attrs.items():
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert value is None or value.startswith(("data:image/", "#")) or value == "", (tag, value)


# --- a page -----------------------------------------------------------------------------------------------


def test_a_run_writes_its_page_with_everything_on_it(run: Path) -> None:
    found = parsed(run / "report.html")
    for words in (
        "finished: 4 steps", "response", "preservation", "leakage", "drift", "base model",
        "naive LoRA (shipped figures)", "Where it acts", "in the LoRA", "learning rate", "gradient norm",
        "term denoising", "spf-kit train", "config.toml --output", "--set preview.every=2", "torch",
        "naive LoRA, measured otherwise", "evaluating", "together", "weights of unet (counted)",
        "the 3 pictures", "64×64", "0.25", "1.5",
    ):  # fmt: skip
        assert words in found.words, words
    cases, explorer, *charts = found.json
    ids = {attrs["id"]: attrs for _, attrs in found.elements if "id" in attrs}
    assert len([i for i in ids if i.startswith("p")]) == sum(len(case["pictures"]) for case in cases)
    assert all(
        ids[i]["src"].startswith("data:image/webp") for case in cases for i in case["pictures"].values()
    )
    assert [step["step"] for step in explorer] == [0, 2, 4]
    labels = [entry["label"] for entry in explorer[2]["cases"][0]["maps"]]
    assert labels[:4] == [
        "control_map",
        "attention to the target",
        "changed when asked",
        "changed when not asked",
    ]
    assert "a portrait" in labels
    assert charts[0]["lines"][0]["label"] == "learnt"
    assert [step for step, _ in charts[0]["lines"][0]["values"]] == [2, 4]
    strips = [
        attrs["alt"] for _, attrs in found.elements if (attrs.get("alt") or "").startswith("strength 1.5")
    ]
    assert len(strips) == 2  # asked and not


def test_captions_and_file_names_are_text(run: Path) -> None:
    found = parsed(run / "report.html")
    check_harmless(found)
    for caption in CAPTIONS:
        assert caption.split(", a portrait")[0].split(", wearing")[0] in found.words
    for name in NAMES:
        assert name in found.words
    assert any(case["label"].startswith("a portrait") for case in found.json[0])
    assert sum(1 for tag, attrs in found.elements if tag == "script" and not attrs) == 1


def test_every_text_of_a_strangers_run_is_text(copy: Path) -> None:
    """Names, targets, losses, warnings, versions: all of it written by somebody else."""
    bad = '"><img src=x onerror=alert(8)></script><script>alert(9)</script>'
    replaced = json.dumps(bad)[1:-1]
    config = (copy / "config.toml").read_text()
    config = config.replace("wearing glasses", replaced).replace('id = "denoising"', f'id = "{replaced}"')
    (copy / "config.toml").write_text(config)
    for file in [*copy.rglob("*.json"), copy / "metrics.jsonl"]:
        text = file.read_text(encoding="utf-8")
        for word in (
            "wearing glasses",
            "denoising",
            "default",
            "a portrait",
            "attribute classifier",
            "embedded",
        ):
            text = text.replace(word, replaced)
        file.write_text(text, encoding="utf-8")
    data = json.loads((copy / "report/data.json").read_text())
    data["warnings"] = {bad: [bad] * 30}
    (copy / "report/data.json").write_text(json.dumps(data))
    found = parsed(build.rebuild(copy))
    check_harmless(found)
    assert found.words.count(bad) > 40
    assert "and 10 more" in found.words
    assert gather(copy).damaged == []
    other = shutil.copytree(copy, copy.parent / bad.replace("/", ""))
    check_harmless(parsed(build.compare([copy, other], copy.parent / "both.html")))


def test_only_pictures_are_taken_for_pictures(copy: Path) -> None:
    file = copy / "report/previews/step-000004.json"
    preview = json.loads(file.read_text())
    preview["cases"][0]["asked"] = "javascript:alert(1)"
    file.write_text(json.dumps(preview))
    found = parsed(build.rebuild(copy))
    check_harmless(found)
    assert "Damaged and left out: previews/step-000004.json" in found.words
    preview["cases"][0]["asked"] = "data:image/webp;base64,AAAA"  # no picture at all: the browser shows none
    file.write_text(json.dumps(preview))
    check_harmless(parsed(build.rebuild(copy)))


def test_the_policy_allows_this_style_and_this_script_alone(run: Path) -> None:
    html = (run / "report.html").read_text(encoding="utf-8")
    policy = next(a["content"] for t, a in Parsed(html).elements if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert "unsafe" not in policy
    import hashlib

    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert " style=" not in html.split("</style>")[1]


def test_a_page_that_is_watched_reloads_itself(copy: Path) -> None:
    found = parsed(build.rebuild(copy, watching=True))
    assert "Reload every 20 seconds" in found.words
    assert any(attrs.get("id") == "follow" for _, attrs in found.elements)
    assert not any(attrs.get("http-equiv") == "refresh" for _, attrs in found.elements)


def test_pictures_have_words_and_controls_have_names(run: Path) -> None:
    found = parsed(run / "report.html")
    images = [attrs for tag, attrs in found.elements if tag == "img"]
    assert all("alt" in attrs for attrs in images)
    assert all(attrs["alt"] for attrs in images if attrs.get("src"))
    plots_ = [attrs for tag, attrs in found.elements if tag == "svg" and attrs.get("role") == "img"]
    assert plots_
    assert all(": " in attrs["aria-label"] for attrs in plots_)


# --- rebuilt, interrupted, damaged ------------------------------------------------------------------------


def test_the_command_builds_the_same_page(spf_kit: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    before = (run / "report.html").read_text(encoding="utf-8")
    told = spf_kit("report", run, "--output", "again.html", "--json").json
    assert told["bytes"] == (tmp_path / "again.html").stat().st_size < 6_000_000
    stamp = re.compile(r"at \d{4}-\d\d-\d\d [\d:]{8}")
    again = (tmp_path / "again.html").read_text(encoding="utf-8")
    assert stamp.sub("", again) == stamp.sub("", before)
    assert spf_kit("report", run, "--output", "again.html").code == 2
    assert spf_kit("report", run).code == 0


def test_an_interrupted_run_has_a_page(
    spf_kit: Callable[..., Any], hostile: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from spf_kit.training import trainer

    line = trainer._line

    def interrupt(number: int, *rest: Any) -> dict[str, Any]:
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return line(number, *rest)

    monkeypatch.setattr(trainer, "_line", interrupt)
    ended = spf_kit("train", "glasses", "--data", hostile, "--output", "r", *SHORT, "--steps", "5")
    assert ended.code == 130
    assert "report: r/report.html" in ended.err
    found = parsed(tmp_path / "r/report.html")
    for words in (
        "step 4 of 5: not finished", "Not measured yet", "--output r --resume", "base, asked", "best so far",
        "the LoRA would now hold step",
    ):  # fmt: skip
        assert words in found.words, words
    assert "the LoRA holds" not in found.words
    assert "Reload" not in found.words
    monkeypatch.setattr(trainer, "_line", line)
    ahead = records.preview_file(tmp_path / "r", 5)  # as of a run that was killed after its checkpoint
    shutil.copy(records.preview_file(tmp_path / "r", 2), ahead)
    resumed = spf_kit("train", "r/config.toml", "--output", "r", "--resume")
    assert resumed.code == 0, resumed.err
    assert not ahead.exists()
    read = gather(tmp_path / "r")
    assert [kept.step for kept in read.previews] == [0, 2]  # none is drawn in the step that stops
    assert read.finished
    assert not read.stale
    assert read.run is not None
    assert read.run.preset == "glasses.toml"  # and so the naive figures
    origins = {setting.key: setting.origin for setting in read.run.settings}
    assert origins["preview.every"] == "--set preview.every=2"
    assert "naive LoRA" in parsed(tmp_path / "r/report.html").words


def test_whatever_is_missing_or_cut_is_left_out(copy: Path) -> None:
    metrics = copy / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([*lines[:3], lines[3][:40]]))
    (copy / "glasses.safetensors").unlink()
    (copy / "evaluation.json").write_text('{"base": {}}')
    shutil.rmtree(copy / "report")
    read = gather(copy)
    assert (read.done, read.total, read.finished) == (3, 4, False)
    words = parsed(build.rebuild(copy)).words
    assert "step 3 of 4: not finished" in words
    assert "Damaged and left out" in words
    assert "Newest preview" in words
    for name in ("metrics.jsonl", "evaluation.json"):
        (copy / name).write_bytes(b"\xff\x00[[[[")
    shutil.rmtree(copy / "samples")
    assert "step 0 of 4: not finished" in parsed(build.rebuild(copy)).words


def test_a_run_that_goes_on_does_not_keep_its_old_verdict(copy: Path) -> None:
    stale = "These figures are of an earlier end of the run"
    assert stale not in parsed(build.rebuild(copy)).words
    last = json.loads((copy / "metrics.jsonl").read_text().splitlines()[-1])
    kept = records.load(records.RunRecord, copy / "report/run.json")
    records.save(kept.model_copy(update={"steps": 8}), copy / "report/run.json")
    with (copy / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(last | {"step": 5}) + "\n")
    words = parsed(build.rebuild(copy)).words
    assert "step 5 of 8: not finished" in words
    assert stale in words


def test_a_name_that_leads_out_of_the_folder_is_not_followed(copy: Path) -> None:
    shutil.copy(copy / "glasses.safetensors", copy.parent / "other.safetensors")
    config = copy / "config.toml"
    config.write_text(config.read_text().replace('name = "glasses"', 'name = "../other"'))
    assert gather(copy).lora is None


@pytest.mark.parametrize(
    "line", ['{"step": "x"}', "[]", "7", '{"step": -1}', '{"step": 5, "loss": 1e999}', "{"]
)
def test_strange_lines_of_metrics(copy: Path, line: str) -> None:
    metrics = copy / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + line)
    found = gather(copy).series("loss")
    assert [step for step, _ in found] == [1, 2, 3, 4]


@pytest.mark.parametrize("value", ["NaN", "1e999", "9" * 400, "-" + "9" * 400, "1e308"])
def test_strange_numbers_stop_no_page(copy: Path, value: str) -> None:
    """In every file at once, then in the configuration alone: what is damaged is left out, and hides less."""
    number = re.compile(r"(?<=[ :=\[,])-?\d+(\.\d+)?(e-?\d+)?(?=[,\]}\n])")
    for files in (
        ("report/run.json", "report/seconds.json", "evaluation.json", "metrics.jsonl"),
        ("config.toml",),
    ):
        for name in files:
            text = (copy / name).read_text(encoding="utf-8")
            word = value.replace("NaN", "nan").replace("1e999", "inf") if name == "config.toml" else value
            assert number.search(text)
            (copy / name).write_text(number.sub(word, text), encoding="utf-8")
        words = parsed(build.rebuild(copy)).words
        assert "Verdict" in words
    assert not re.search(r"\b(nan|inf)\b", words.partition("Settings")[0].partition("Where it acts")[0])


def test_a_long_run_stays_small_in_memory(copy: Path) -> None:
    import tracemalloc

    line = json.loads((copy / "metrics.jsonl").read_text().splitlines()[-1])
    with (copy / "metrics.jsonl").open("w") as file:
        for step in range(1, 20_001):
            file.write(json.dumps(line | {"step": step}) + "\n")
    kept = records.load(records.PreviewRecord, records.preview_file(copy, 4))
    for step in range(5, 105):
        records.save(kept.model_copy(update={"step": step}), records.preview_file(copy, step))
    tracemalloc.start()
    read = gather(copy)
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert (read.done, len(read.series("loss")), len(read.terms)) == (20_000, 20_000, 1)
    steps = [preview.step for preview in read.previews]
    assert (steps[0], steps[-1], len(steps)) == (0, 104, 48)
    previews = sum(len(preview.model_dump_json()) for preview in read.previews)
    assert used - 2 * previews < 20_000 * 16 * 12  # bytes: two numbers of 8 for each of a dozen columns


def test_colours_are_for_what_was_measured_alike(copy: Path) -> None:
    from spf_kit.measure.table import identity
    from spf_kit.report import verdict

    read = gather(copy)
    assert read.evaluation is not None
    own = next(iter(read.evaluation["loras"].values()))
    own |= {"response": 0.75, "preservation": 0.99, "leakage": 0.02, "drift_plain": 0.01}
    for row in (own, read.evaluation["base"]):
        row["prompts"] = [f"prompt {n}" for n in range(64)]
    alike = identity(own, read.evaluation["base"])
    alike |= {"response": 0.95, "preservation": 0.995, "leakage": 0.3, "drift_plain": 0.0095}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verdict, "shipped_figures", lambda *_: {verdict.NAIVE: alike})
        found = {tile.key: (tile.verdict, tile.beside[-1][0]) for tile in verdict.tiles(read)}
        assert found == {
            "response": ("worse", "naive LoRA"), "preservation": ("same", "naive LoRA"),
            "leakage": ("better", "naive LoRA"), "drift_plain": ("same", "naive LoRA"),
        }  # fmt: skip
        # 2 sqrt((0.75 x 0.25 + 0.85 x 0.15) / 64) = 0.14 is more than 0.1
        alike |= {"response": 0.85, "leakage": 0.05, "drift_plain": 0.02}
        assert [tile.verdict for tile in verdict.tiles(read)] == ["same", "same", "same", "better"]
        alike["count"] += 1
        assert {(tile.verdict, tile.beside[-1][0]) for tile in verdict.tiles(read)} == {
            ("", "naive LoRA, measured otherwise")
        }
        alike["target"] = "smiling"
        assert {tile.beside[-1][0] for tile in verdict.tiles(read)} == {"base model"}
    assert read.run is not None
    read.run.family = "sd15"  # the figures are of the embedded base alone
    assert verdict.naive(read) == {}
    assert {(tile.verdict, tile.beside[-1][0]) for tile in verdict.tiles(read)} == {("", "base model")}


def test_commands_can_be_pasted(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shlex

    monkeypatch.chdir(copy)
    read = gather(Path("."))
    again = ["spf-kit", "train", "config.toml", "--output", str(copy.resolve().parent / "run-again")]
    assert shlex.split(page.repeat(read)) == again
    assert read.run is not None
    read.run.plugins.append("my own.py")
    assert shlex.split(page.repeat(read)) == [*again, "--plugin", "my own.py"]


def test_a_page_that_cannot_be_written_stops_no_run(
    spf_kit: Callable[..., Any], hostile: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*arguments: Any, **more: Any) -> None:
        raise OSError("no room")

    monkeypatch.setattr(watch, "rebuild", broken)
    monkeypatch.setattr(overlays, "of_change", broken)
    monkeypatch.setattr(keeping, "_data", broken)
    quick = [
        "--steps", "2", "--recipe", "naive", "--set", "evaluate.enabled=false", "--set", "preview.every=1",
        "--set", "preview.count=1", "--set", "preview.steps=2",
    ]  # fmt: skip
    ended = spf_kit("train", "glasses", "--data", hostile, "--output", "r", *quick)
    assert ended.code == 0
    assert (tmp_path / "r/glasses.safetensors").is_file()
    for what in (
        "the report could not be written", "attention and changes could not be mapped",
        "the report's records could not be written",
    ):  # fmt: skip
        assert ended.err.count(f"{what}: no room") == 1
    kept = records.load(records.PreviewRecord, records.preview_file(tmp_path / "r", 2))
    assert [shown.label for shown in kept.cases[0].maps] == []
    assert gather(tmp_path / "r").finished


def test_ctrl_c_after_the_evaluation_leaves_its_figures(
    spf_kit: Callable[..., Any], hostile: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from spf_kit.report import proof

    def interrupted(*arguments: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(proof, "strengths", interrupted)
    ended = spf_kit(
        "train",
        "glasses",
        "--data",
        hostile,
        "--output",
        "r",
        *SHORT,
        "--steps",
        "1",
        "--set",
        "preview.every=0",
    )
    assert ended.code == 130
    assert "and measured; only pictures of its report are missing" in ended.err
    read = gather(tmp_path / "r")
    assert read.proof is not None
    assert read.strengths is None
    assert not read.stale
    assert "response" in parsed(tmp_path / "r/report.html").words


def test_a_record_that_cannot_be_made_leaves_none_of_an_earlier_end(copy: Path) -> None:
    told: list[str] = []
    seen = watch.Watch(copy, told.append)
    broken = lambda: 1 / 0  # noqa: E731
    seen.keep(records.PROOF, broken)  # type: ignore[arg-type]
    assert gather(copy).proof is not None  # another process's
    seen.over(lambda *values: None)(0, 0, {"phase": "keeping records", "kept": True})
    seen.keep(records.PROOF, broken)  # type: ignore[arg-type]
    assert gather(copy).proof is None
    assert told == ["proof.json of the report could not be made: division by zero; the run goes on without"]


# --- several runs -----------------------------------------------------------------------------------------


def test_two_runs_side_by_side(spf_kit: Callable[..., Any], run: Path, copy: Path, tmp_path: Path) -> None:
    config = copy / "config.toml"
    config.write_text(config.read_text().replace("rank = 8", "rank = 4"))
    told = spf_kit("report", run, copy, "--json")
    assert told.code == 0, told.err
    assert told.json["report"] == "comparison.html"
    found = parsed(tmp_path / "comparison.html")
    check_harmless(found)
    for words in ("2 runs side by side", "adapter.rank", "base model", "naive LoRA (shipped figures)"):
        assert words in found.words, words
    cases, *charts = found.json
    names = {
        "base, not asked",
        "base, asked",
        "glasses, asked",
        "glasses, not asked",
        "run, asked",
        "run, not asked",
    }
    assert all(set(case["pictures"]) == names for case in cases)
    ids = [attrs["id"] for _, attrs in found.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {i for case in cases for i in case["pictures"].values()} <= set(ids)
    assert [line["label"] for line in charts[0]["lines"]] == ["glasses", "run"]
    again = spf_kit("report", run, copy)
    assert again.code == 2
    assert "--overwrite" in again.err
    assert spf_kit("report", run, copy, "--overwrite").code == 0


# --- the budget -------------------------------------------------------------------------------------------


def noise(side: int, seed: int) -> str:
    """The worst there is for a codec."""
    pixels = random.Random(seed).randbytes(side * side * 3)
    buffer = io.BytesIO()
    Image.frombytes("RGB", (side, side), pixels).save(buffer, "WEBP", quality=85, method=0)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_a_page_keeps_to_its_size_whatever_was_drawn(copy: Path) -> None:
    large, small = noise(320, 0), noise(160, 1)
    previews = copy / "report/previews"
    newest = records.load(records.PreviewRecord, previews / "step-000004.json")
    for case in newest.cases:
        case.asked = case.plain = large
    for step in range(0, 24, 2):
        records.save(newest.model_copy(update={"step": step}), records.preview_file(copy, step))
    data = records.load(records.DataRecord, copy / "report/data.json")
    entry = data.entries[0].model_copy(
        update={"thumbnail": small, "base": "word " * 5000, "file": "f" * 9000}
    )
    data.entries = [entry] * 300
    records.save(data, copy / "report/data.json")
    proof = records.load(records.ProofRecord, copy / "report/proof.json")
    for shown in proof.cases:
        shown.base_plain = shown.base_asked = shown.asked = shown.plain = large
    records.save(proof, copy / "report/proof.json")
    written = sum(file.stat().st_size for file in (copy / "report").rglob("*"))
    assert written > 7_000_000
    file = build.rebuild(copy)
    assert 1_000_000 < file.stat().st_size < build.LIMIT
    found = parsed(file)
    check_harmless(found)
    steps = [step["step"] for step in found.json[1]]
    assert (steps[0], steps[-1]) == (0, 22)
    assert len(steps) >= 3


# --- stages -----------------------------------------------------------------------------------------------


def test_stages_are_where_losses_begin_and_end(copy: Path) -> None:
    config = {"attribute": {}, "loss": [
        {"plugin": "denoising", "weight": 1.0, "start": 0.0, "end": 0.5},
        {"id": "hold", "plugin": "x", "weight": 1.0, "start": 0.25, "end": 1.0},
        {"plugin": "control_map", "start": 0.1, "end": 1.0},
    ]}  # fmt: skip
    from dataclasses import replace

    read = replace(gather(copy), config=config, run=None)
    found = [(stage.first, stage.last, stage.losses) for stage in read.stages]
    assert found == [
        (0, 1, ("denoising",)), (1, 2, ("denoising", "hold")), (2, 4, ("hold",)),
    ]  # fmt: skip
    assert [stage.begins for stage in read.stages] == [1, 2, 3]  # the steps that run at 0, 1/4 and 1/2 of it


# --- the browser -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("needs Chromium")
    return found


def test_a_browser_runs_the_page_and_nothing_else(browser: str, run: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (run / "report.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = Parsed(done.stdout)
    check_harmless(found, ({"option", "tbody"}, {"value", "selected", "checked", "name"}))
    assert "Content Security Policy" not in done.stderr
    assert "Uncaught" not in done.stderr
    classes = [attrs.get("class") for _, attrs in found.elements if "hidden" not in attrs]
    assert "comparer" in classes  # the script shows what needs it
    assert "card explorer" in classes
    assert classes.count("chip") >= 5
    options = [attrs for tag, attrs in found.elements if tag == "option"]
    assert len(options) >= 4 + 3
    assert page.ABOUT["mask"] in found.words
