"""The command line as users meet it: real processes, in an empty directory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
QUICK = ("--set", "evaluate.enabled=false", "--set", "preview.every=0", "--set", "calibrate.enabled=false")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three steps."""
    cwd = tmp_path_factory.mktemp("run")
    done = subprocess.run(
        [sys.executable, "-m", "spf_kit", "train", "glasses", "--steps", "3", "--json", *QUICK],
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["steps"] == 3
    assert Path(cwd, printed["lora"]).is_file()
    return cwd / "runs/glasses"


def refused(result, *words: str) -> None:
    """Exit code 2, one sentence with these words, no traceback, nothing on standard output."""
    assert result.code == 2, (result.code, result.out, result.err)
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err, f"{word!r} is missing in: {result.err}"


def test_help_lists_the_commands_and_imports_no_torch(spf_kit) -> None:
    shown = spf_kit("--help")
    assert shown.code == 0
    for name in (
        "train",
        "sample",
        "merge",
        "convert",
        "resize",
        "extract",
        "evaluate",
        "report",
        "inspect",
        "presets",
        "losses",
        "doctor",
    ):
        assert name in shown.out
    heavy = "('torch', 'diffusers', 'numpy')"
    code = f"import sys; import spf_kit.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version(spf_kit) -> None:
    from spf_kit import __version__

    assert spf_kit("--version").out.strip() == f"spf-kit {__version__}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--set", "train.btach_size=8"), ("train.btach_size", "batch_size")),
        (("--set", 'train.steps="banana"'), ("train.steps", "banana", "whole number")),
        (("--set", "loss.denoising.wieght=2"), ("wieght", "weight")),
        (("--set", "loss.denoising.plugin=denoisin"), ("denoisin", "denoising")),
        (("--set", "base.model=nowhere.safetensors"), ("nowhere.safetensors",)),
        (("--set", "train.optimizer=adamw9bit"), ("adamw9bit", "adamw8bit")),
        (("--data", "embedded:glases"), ("glases", "glasses")),
        (("--data", "no/such/folder"), ("no/such/folder",)),
        (("--recipe", "niave"), ("niave", "naive")),
    ],
)
def test_bad_settings_are_one_sentence(spf_kit, tmp_path: Path, arguments, words) -> None:
    refused(spf_kit("train", "glasses", *arguments), *words)
    assert not (tmp_path / "runs").exists(), "nothing may be written before everything was checked"


def test_errors_are_json_with_json(spf_kit) -> None:
    result = spf_kit("train", "glases", "--json")
    assert result.code == 2
    assert "glasses" in result.json["error"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "x.safetensors", "--count", "abc"], "--count"),
        (["evaluat"], "evaluate"),
        (["train"], "preset"),
        (["train", "glasses", "--bogus"], "--bogus"),
        (["losses", "check", "missing.py"], "missing.py"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    """As the console script calls it; with --json it is an object too."""
    from spf_kit.cli import main

    for asked in (arguments, [arguments[0], "--json", *arguments[1:]]):
        monkeypatch.setattr(sys, "argv", ["spf-kit", *asked])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert ended.value.code == 2
        assert len(printed.err.strip().splitlines()) == 1
        assert words in printed.err
        if "--json" in asked:
            assert words in json.loads(printed.out)["error"]
        else:
            assert printed.out == ""


def test_an_empty_folder_and_a_corrupt_picture(spf_kit, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    refused(spf_kit("train", "glasses", "--data", pictures), "pictures")
    source = ROOT / "spf_kit/embedded/data/glasses"
    for path in sorted(source.iterdir())[:4]:
        shutil.copy(path, pictures)
    broken = sorted(pictures.glob("*.png"))[0]
    broken.write_bytes(broken.read_bytes()[:200])
    empty = sorted(pictures.glob("*.txt"))[-1]
    empty.unlink()
    refused(spf_kit("train", "glasses", "--data", pictures), broken.name)
    assert not (tmp_path / "runs").exists()


def test_dry_run_shows_every_value_with_its_origin(spf_kit, tmp_path: Path) -> None:
    shown = spf_kit("train", "glasses", "--dry-run", "--set", "train.steps=7")
    assert shown.code == 0, shown.err
    assert "train.steps" in shown.out
    assert "--set" in shown.out
    assert "glasses.toml" in shown.out
    assert not (tmp_path / "runs").exists()


def test_a_path_to_a_preset_equals_its_name(spf_kit) -> None:
    by_name = spf_kit("train", "glasses", "--dry-run", "--json").json
    by_path = spf_kit("train", ROOT / "presets/glasses.toml", "--dry-run", "--json").json
    assert by_name["config"] == by_path["config"]


def test_a_run_folder_that_exists_is_refused(spf_kit, run: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    refused(spf_kit("train", "glasses", *QUICK, "--output", run), str(run), "--resume")
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_a_finished_run_grows_and_is_measured_again(spf_kit, tmp_path: Path) -> None:
    quick = (
        "--set",
        "calibrate.enabled=false",
        "--set",
        "preview.every=0",
        "--set",
        "evaluate.count=1",
        "--set",
        "evaluate.steps=1",
        "--json",
    )
    first = spf_kit("train", "glasses", "--steps", "1", *quick)
    assert first.code == 0, first.err
    sheet = tmp_path / "runs/glasses/contact-sheet.png"
    before = sheet.stat().st_mtime_ns
    second = spf_kit("train", "glasses", "--steps", "2", *quick, "--resume")
    assert second.code == 0, second.err
    assert second.json["steps"] == 2
    assert "evaluation" in second.json
    assert sheet.stat().st_mtime_ns > before


def test_sample_draws_a_grid_with_parameters(spf_kit, run: Path, tmp_path: Path) -> None:
    from PIL import Image

    lora = run / "glasses.safetensors"
    drawn = spf_kit(
        "sample", lora, "--prompt", "a portrait, pale skin", "--strength", "0,1", "--steps", "2", "--json"
    )
    assert drawn.code == 0, drawn.err
    pictures = sorted((tmp_path / "samples").glob("*.png"))
    assert len(pictures) == 3  # two strengths and the grid
    texts = [Image.open(p).text.get("parameters", "") for p in pictures]
    assert sum("<lora:glasses:1>" in t and "Steps: 2" in t for t in texts) >= 1
    refused(spf_kit("sample", lora, "--prompt", "x", "--steps", "2"), "samples", "--overwrite")


def test_sample_wants_a_prompt_and_sane_strengths(spf_kit, run: Path) -> None:
    lora = run / "glasses.safetensors"
    refused(spf_kit("sample", lora), "--prompt")
    refused(spf_kit("sample", lora, "--prompt", "x", "--strength", "a,b"), "--strength", "a")
    refused(spf_kit("sample", lora, "--prompt", "x", "--scheduler", "dimm"), "dimm", "ddim")
    refused(spf_kit("sample", run / "nothing.safetensors", "--prompt", "x"), "nothing.safetensors")


def test_evaluate_wants_sane_settings(spf_kit, run: Path) -> None:
    lora = run / "glasses.safetensors"
    refused(spf_kit("evaluate", lora, "--steps", "1000"), "--steps 1000: must be at most 998")
    refused(spf_kit("evaluate", lora, "--seed", "-1"), "--seed -1: must be at least 0")


def test_merge_into_the_embedded_base_in_both_layouts(spf_kit, run: Path, tmp_path: Path) -> None:
    lora = run / "glasses.safetensors"
    folder = spf_kit("merge", f"{lora}:0.5", "--into", "embedded", "--output", "merged", "--check", "--json")
    assert folder.code == 0, folder.err
    assert (tmp_path / "merged/model_index.json").is_file()
    one = spf_kit("merge", lora, "--into", "embedded", "--output", "merged.safetensors", "--check", "--json")
    assert one.code == 0, one.err
    assert (tmp_path / "merged.safetensors").is_file()
    drawn = spf_kit("sample", "--base", "merged.safetensors", "--prompt", "a portrait", "--steps", "2")
    assert drawn.code == 0, drawn.err
    refused(spf_kit("merge", lora, "--into", "embedded", "--output", "merged"), "merged", "--overwrite")


def test_inspect_tells_family_rank_and_trigger(spf_kit, run: Path) -> None:
    told = spf_kit("inspect", run / "glasses.safetensors", "--json").json
    assert told["trigger"] == "wearing glasses"
    text = spf_kit("inspect", run / "glasses.safetensors").out
    assert "wearing glasses" in text
    broken = run.parent / "broken.safetensors"
    broken.write_bytes((run / "glasses.safetensors").read_bytes()[:500])
    refused(spf_kit("inspect", broken), "broken.safetensors")


def test_a_lora_of_another_family_is_refused(spf_kit, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {
        f"{key}.lora_down.weight": torch.randn(4, 768),
        f"{key}.lora_up.weight": torch.randn(320, 4),
        f"{key}.alpha": torch.tensor(4.0),
    }
    save_file(tensors, tmp_path / "big.safetensors")
    refused(
        spf_kit("sample", tmp_path / "big.safetensors", "--prompt", "x", "--steps", "1"), "big.safetensors"
    )
    refused(
        spf_kit("merge", tmp_path / "big.safetensors", "--into", "embedded", "--output", "m"),
        "big.safetensors",
    )
    assert not (tmp_path / "m").exists()


def test_a_full_disk_is_a_sentence_and_leaves_nothing(spf_kit, tmp_path: Path, run: Path) -> None:
    """A file size limit stands for the full disk where a small file system cannot be mounted."""
    if shutil.which("prlimit") is None:
        pytest.skip("needs prlimit (util-linux)")
    command = [
        "prlimit",
        "--fsize=100000",
        sys.executable,
        "-m",
        "spf_kit",
        "merge",
        str(run / "glasses.safetensors"),
    ]
    done = subprocess.run(
        [*command, "--into", "embedded", "--output", "merged.safetensors"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "merged.safetensors" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("merged*"))
    assert not list(tmp_path.glob("*.tmp"))


def test_evaluate_prints_the_contract(spf_kit, run: Path) -> None:
    lora = str(run / "glasses.safetensors")
    result = spf_kit("evaluate", lora, "--count", "2", "--steps", "2", "--json")
    assert result.code == 0, result.err
    assert set(result.json) >= {"base", "loras"}
    measured = result.json["loras"][lora]
    for key in ("response", "preservation", "leakage"):
        assert 0 <= measured[key] <= 1
    for key in ("drift_plain", "drift_target", "prompts", "seeds", "per_prompt"):
        assert key in measured
    assert result.json["base"]["drift_plain"] == 0


def test_presets_losses_and_doctor_answer(spf_kit) -> None:
    listed = spf_kit("presets", "--json").json
    assert "glasses" in json.dumps(listed)
    text = spf_kit("losses").out
    for name in ("denoising", "output_preservation", "prior_preservation"):
        assert name in text
    assert "torch" in json.dumps(spf_kit("doctor", "--json").json)


def test_losses_check_passes_a_good_plugin_and_fails_a_bad_one(spf_kit, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    head = "from spf_kit.losses import Loss, Step, Tensor, per_sample, register\n\n\n"
    good.write_text(
        head + '@register("good")\nclass Good(Loss):\n    def __call__(self, step: Step) -> Tensor:\n'
        "        return per_sample((step.target - step.response.prediction) ** 2)\n"
    )
    bad.write_text(
        head + '@register("bad")\nclass Bad(Loss):\n    def __call__(self, step: Step) -> Tensor:\n'
        "        return per_sample((step.target - step.reference.prediction) ** 2)\n"
    )
    assert spf_kit("losses", "check", good).code == 0
    refused(spf_kit("losses", "check", bad), "reference")


def test_the_options_are_the_ones_we_agreed_on() -> None:
    """A new option is a decision: change the snapshot on purpose, or prefer a preset key and `--set`."""
    from typer.main import get_command

    from spf_kit.cli import app

    def options(command, name: str) -> dict[str, list[str]]:
        found = {name: sorted(o for p in command.params for o in p.opts if o not in ("-h", "--help"))}
        for sub, inner in getattr(command, "commands", {}).items():
            found |= options(inner, f"{name} {sub}")
        return found

    snapshot = json.loads((Path(__file__).parent / "snapshots/cli.json").read_text())
    assert options(get_command(app), "spf-kit") == snapshot
