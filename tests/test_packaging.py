"""The package list, and the wheel installed alone, away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_package_list_is_the_tree() -> None:
    found = {"spf_kit.plugins", "spf_kit.presets"}
    found |= {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "spf_kit").rglob("__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    # from a copy of what git knows: a build leaves nothing in the checkout and takes nothing else along
    names = (
        subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        .stdout.decode()
        .split("\0")
    )
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(source)],
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl"))


def test_the_wheel_holds_presets_base_and_samples(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in (
        "spf_kit/presets/glasses.toml",
        "spf_kit/presets/recipes/naive.toml",
        "spf_kit/report/template/run.html",
        "spf_kit/report/template/page.css",
        "spf_kit/studio/studio.css",
        "spf_kit/presets/bases/embedded.toml",
        "spf_kit/plugins/denoising.py",
        "spf_kit/embedded/base/model_index.json",
        "spf_kit/embedded/base/judge/model.safetensors",
        "spf_kit/embedded/prompts/evaluate.txt",
        "spf_kit/py.typed",
    ):
        assert wanted in names
    assert sum(n.startswith("spf_kit/embedded/data/glasses/") and n.endswith(".png") for n in names) == 32
    assert not [n for n in names if n.startswith(("tests/", "bench/", "docs/"))]


def test_the_embedded_folder_is_small() -> None:
    size = sum(p.stat().st_size for p in (ROOT / "spf_kit/embedded/base").rglob("*") if p.is_file())
    assert size <= 16 * 2**20


def test_the_wheel_works_alone_and_finds_a_third_partys_plugin(wheel: Path, tmp_path: Path) -> None:
    """A virtual environment with the wheel and a second, installed package; its loss is listed and trains."""
    third = tmp_path / "third"
    (third / "their_losses").mkdir(parents=True)
    (third / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "their-losses"\nversion = "1"\n'
        '[project.entry-points."spf_kit.losses"]\ntheirs = "their_losses.loss"\n'
        '[tool.setuptools]\npackages = ["their_losses"]\n'
    )
    (third / "their_losses/__init__.py").write_text("")
    (third / "their_losses/loss.py").write_text(
        "from spf_kit.losses import Field, Loss, Step, Tensor, per_sample, register\n\n\n"
        '@register("theirs")\nclass Theirs(Loss):\n    """|target - prediction|."""\n\n'
        '    power: int = Field(1, ge=1, description="exponent")\n\n'
        "    def __call__(self, step: Step) -> Tensor:\n"
        "        return per_sample((step.target - step.response.prediction).abs() ** self.power)\n"
    )
    # the dependencies come from the environment that runs the tests: only the two packages are installed
    environment = tmp_path / "env"
    venv.create(environment, with_pip=False)
    bin_ = environment / ("Scripts" if os.name == "nt" else "bin")
    site = next((environment / "lib").glob("python*/site-packages"), environment / "Lib/site-packages")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), str(wheel), str(third)], check=True, capture_output=True)
    import torch

    (site / "dependencies.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    work = tmp_path / "empty"
    work.mkdir()

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        # -P: no path of the caller; the editable checkout is shadowed by the wheel, which stands first
        code = "from spf_kit.cli import main; main()"
        return subprocess.run(
            [str(bin_ / "python"), "-P", "-c", code, *arguments],
            cwd=work,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": ""},
        )

    where = subprocess.run(
        [str(bin_ / "python"), "-P", "-c", "import spf_kit; print(spf_kit.__file__)"],
        cwd=work,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert str(site) in where
    listed = run("losses", "--json")
    assert listed.returncode == 0, listed.stderr
    assert '"theirs"' in listed.stdout
    trained = run(
        "train",
        "glasses",
        "--steps",
        "2",
        "--set",
        "evaluate.enabled=false",
        "--set",
        "calibrate.enabled=false",
        "--set",
        "preview.every=0",
        "--set",
        "loss.theirs.plugin=theirs",
        "--set",
        "loss.theirs.power=2",
    )
    assert trained.returncode == 0, trained.stderr
    assert (work / "runs/glasses/glasses.safetensors").is_file()
    assert '"theirs"' in (work / "runs/glasses/metrics.jsonl").read_text().splitlines()[0]
