"""The shared folder: read back by the hub's own library, its pictures by the reader of PNG parameters."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from safetensors import safe_open

from spf_kit.sampling.png_info import parse
from spf_kit.sharing.card import Facts, Picture, card

SHORT = [
    "--steps", "2", "--set", "evaluate.count=2", "--set", "evaluate.steps=2", "--set", "preview.every=0",
    "--set", "data.cache=none", "--set", "calibrate.enabled=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from typer.testing import CliRunner

    from spf_kit.cli import app

    folder = tmp_path_factory.mktemp("shared") / "glasses"
    arguments = ["train", "glasses", "--recipe", "naive", "--output", str(folder), *SHORT]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return folder


def test_the_folder_is_what_the_hub_reads(spf_kit: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    told = spf_kit("share", run, "--output", "up", "--json").json
    folder = tmp_path / "up"
    assert told["files"] == ["README.md", "glasses.safetensors", "images/1.png", "images/2.png"]
    assert (folder / "glasses.safetensors").read_bytes() == (run / "glasses.safetensors").read_bytes()
    read = ModelCard.load(folder / "README.md")
    data = read.data.to_dict()
    assert data["instance_prompt"] == "wearing glasses"
    assert {"lora", "text-to-image", "template:sd-lora"} <= set(data["tags"])
    assert data["license"] == "apache-2.0"
    assert "base_model" not in data  # the embedded base is not on the hub
    evaluation = json.loads((run / "evaluation.json").read_text())
    row = next(iter(evaluation["loras"].values()))
    assert [w["text"] for w in data["widget"]] == [f"{p}, wearing glasses" for p in row["prompts"]]
    for widget, seed in zip(data["widget"], row["seeds"], strict=True):
        with Image.open(folder / widget["output"]["url"]) as picture:
            assert picture.size == (64, 64)
            said = parse(picture.text["parameters"])
        assert said["Prompt"] == f"{widget['text']} <lora:glasses:1>"
        assert (said["Seed"], said["Steps"], said["CFG scale"]) == (str(seed), "2", "5")
    line = next(line for line in read.text.splitlines() if line.startswith("| base + LoRA"))
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    keys = ("response", "preservation", "leakage", "drift_plain", "drift_target")
    assert [float(cell) for cell in cells] == pytest.approx([row[key] for key in keys], rel=5e-3)


def test_pictures_are_those_that_were_evaluated(
    spf_kit: Callable[..., Any], run: Path, tmp_path: Path
) -> None:
    """The same prompt, seed and settings drawn by `sample` give the same picture."""
    spf_kit("share", run, "--output", "up", "--count", "1")
    row = next(iter(json.loads((run / "evaluation.json").read_text())["loras"].values()))
    spf_kit(
        "sample", run / "glasses.safetensors", "-p", f"{row['prompts'][0]}, wearing glasses",
        "--seed", str(row["seeds"][0]), "--steps", "2", "--output", "drawn",
    )  # fmt: skip
    (drawn,) = [p for p in (tmp_path / "drawn").glob("*.png") if p.name != "grid.png"]
    with Image.open(drawn) as one, Image.open(tmp_path / "up/images/1.png") as other:
        assert one.tobytes() == other.tobytes()


def test_own_prompts_licence_and_base(spf_kit: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    spf_kit(
        "share", run, "-p", "a man, wearing glasses", "--licence", "cc-by-4.0", "--base-id", "me/faces",
        "--output", "up",
    )  # fmt: skip
    data = ModelCard.load(tmp_path / "up/README.md").data.to_dict()
    assert (data["license"], data["base_model"]) == ("cc-by-4.0", "me/faces")
    assert [w["text"] for w in data["widget"]] == ["a man, wearing glasses"]
    for wrong in ("faces", "C:\\bases\\a.safetensors", "https://huggingface.co/me/faces", "me/faces of mine"):
        refused = spf_kit("share", run, "--count", "0", "--output", "other", "--base-id", wrong)
        assert refused.code == 2
        assert "is no model of the hub: give OWNER/NAME" in refused.err
    again = spf_kit("share", run, "--count", "0", "--output", "up")
    assert again.code == 2
    assert "--overwrite" in again.err
    assert spf_kit("share", run, "--count", "0", "--output", "up", "--overwrite").code == 0
    assert not (tmp_path / "up/images").exists()
    with safe_open(tmp_path / "up/glasses.safetensors", "pt") as file:
        assert file.metadata()["modelspec.trigger_phrase"] == "wearing glasses"


def test_a_run_is_not_replaced_by_what_is_shared(
    spf_kit: Callable[..., Any], run: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(run, tmp_path / "run")
    before = sorted(own.rglob("*"))
    refused = spf_kit("share", own, "--count", "0", "--output", own, "--overwrite")
    assert refused.code == 2
    assert "is no folder that was shared but holds 'checkpoints', which would be lost" in refused.err
    assert sorted(own.rglob("*")) == before


HOSTILE = 'wearing <script>alert(1)</script> | "x": *y* [z](http://a) `q`\n# title\n---\n'


def test_names_and_prompts_stay_text() -> None:
    facts = Facts(
        name=HOSTILE, file="a b.safetensors", trigger=HOSTILE, family="sd15", base=HOSTILE, base_id=None,
        licence="mit", config={"loss": [{"plugin": HOSTILE}]}, pictures=[Picture("images/1.png", HOSTILE, 3)],
    )  # fmt: skip
    text = card(facts)
    read = ModelCard(text)
    assert read.data.to_dict()["instance_prompt"] == HOSTILE
    assert read.data.to_dict()["widget"][0]["text"] == HOSTILE
    before, _, after = read.text.partition("```python\n")
    body = before + after.partition("\n```\n")[2]  # code blocks and spans show what they hold
    body = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", body)
    assert "## Training" in body
    assert "<script>" not in body
    assert "](http" not in body.replace("\\]\\(", "")
    assert not [line for line in body.splitlines() if line.startswith(("# title", "---"))]
    (row,) = [line for line in body.splitlines() if line.startswith("| ![](images/1.png)")]
    assert row.replace("\\|", "").count("|") == 4


@pytest.mark.parametrize(
    ("family", "base_id", "loads"),
    [
        ("sd15", "a/b", "StableDiffusionPipeline.from_pretrained('a/b')"),
        ("sd2", "a/b", "StableDiffusionPipeline.from_pretrained('a/b')"),
        ("sdxl", None, "StableDiffusionXLPipeline.from_single_file('path/to/the/base')"),
    ],
)
def test_the_snippet_is_python_for_the_family(family: str, base_id: str | None, loads: str) -> None:
    import ast

    facts = Facts("glasses", "g.safetensors", 'it\'s "round"', family, "b", base_id, "mit", {})
    code = card(facts).split("```python\n")[1].split("```")[0]
    ast.parse(code)
    assert loads in code
    assert "weight_name='g.safetensors'" in code


def test_what_is_no_finished_run_is_refused(spf_kit: Callable[..., Any], tmp_path: Path, run: Path) -> None:
    (tmp_path / "nothing").mkdir()
    result = spf_kit("share", "nothing")
    assert result.code == 2
    assert "is not a run folder" in result.err
    (tmp_path / "half").mkdir()
    (tmp_path / "half/config.toml").write_text((run / "config.toml").read_text())
    result = spf_kit("share", "half")
    assert result.code == 2
    assert "has not ended" in result.err
    assert not (tmp_path / "half/share").exists()


@pytest.mark.parametrize("text", ["{", "{}", '{"base": {}, "loras": {}}', '{"base": {}, "loras": {"a": {}}}'])
def test_a_damaged_evaluation_is_refused(
    spf_kit: Callable[..., Any], run: Path, tmp_path: Path, text: str
) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/evaluation.json").write_text(text)
    result = spf_kit("share", "run", "--output", "up")
    assert result.code == 2
    assert "evaluation.json' is damaged: remove it" in result.err
    assert not (tmp_path / "up").exists()


@pytest.mark.parametrize("weight", ["0.5", "unet=0.5,te=0.25"])
def test_earlier_loras_act_in_the_pictures_and_are_named(
    spf_kit: Callable[..., Any], run: Path, tmp_path: Path, weight: str
) -> None:
    on = f"{run / 'glasses.safetensors'}:{weight}"
    off = ["--set", "evaluate.enabled=false", "--set", "preview.every=0", "--set", "output.format=peft"]
    options = ["--recipe", "naive", "--on", on, "--steps", "1", "--set", "train.learning_rate=1e-9", *off]
    assert spf_kit("train", "beard", "--output", "beard", *options).code == 0
    assert (tmp_path / "beard/beard-peft").is_dir()
    prompt = ["-p", "a man, wearing glasses"]
    told = spf_kit("share", "beard", *prompt, "--output", "up", "--json").json
    assert told["files"] == [
        "README.md",
        "beard.safetensors",
        "images/1.png",
    ]  # peft's folder as kohya's file
    text = (tmp_path / "up/README.md").read_text()
    assert f"trained on top of `glasses.safetensors:{weight}`" in text
    with Image.open(tmp_path / "up/images/1.png") as picture:
        shared = picture.convert("RGB").tobytes()
        assert ("<lora:glasses:0.5>" in picture.text["parameters"]) == (weight == "0.5")
    spf_kit("sample", f"{run / 'glasses.safetensors'}:0.5", *prompt, "--steps", "20", "--output", "drawn")
    spf_kit("sample", *prompt, "--base", "embedded", "--steps", "20", "--output", "base")
    (drawn,), (plain,) = (
        [p for p in (tmp_path / name).glob("*.png") if p.name != "grid.png"] for name in ("drawn", "base")
    )
    with Image.open(drawn) as one, Image.open(plain) as other:
        if weight == "0.5":
            assert one.convert("RGB").tobytes() == shared
        assert other.convert("RGB").tobytes() != shared


def test_push(
    spf_kit: Callable[..., Any], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline = spf_kit("share", run, "--count", "0", "--output", "up", "--push", "me/glasses")
    assert offline.code == 2
    assert "is ready: upload it later with `hf upload" in offline.err
    assert (tmp_path / "up/README.md").is_file()

    calls: list[tuple[str, Any]] = []

    class Made(str):
        repo_id = "me/glasses"

    def create(self: HfApi, repo: str, **options: Any) -> Made:
        calls.append((repo, options["private"]))
        return Made(f"https://huggingface.co/{repo}")

    def upload(self: HfApi, *, folder_path: Path, repo_id: str, **_: Any) -> None:
        calls.append((repo_id, sorted(p.name for p in Path(folder_path).iterdir())))

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    told = spf_kit(
        "share", run, "--count", "0", "--output", "two", "--push", "me/glasses", "--private", "--json"
    )
    assert told.json["url"] == "https://huggingface.co/me/glasses"
    assert calls == [("me/glasses", True), ("me/glasses", ["README.md", "glasses.safetensors"])]
