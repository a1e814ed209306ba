"""Runs that are killed go on bit by bit: real processes, SIGKILL, and what a continuation refuses.

The processes are forks of one server that has torch and diffusers loaded, so that each starts at once.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spf_kit import config, embedded
from spf_kit.config import Resolved
from spf_kit.errors import UserError
from spf_kit.training import checkpoint, trainer
from spf_kit.training.logs import Metrics, cut_back

STEPS = 4
SMALL = [
    "data.resolution=32", "data.buckets=false", f"train.steps={STEPS}", "train.batch_size=1",
    "preview.every=0", "train.checkpoint_every=2", "train.log_tensorboard=false", "adapter.rank=2",
    "train.threads=1", 'output.dtype="float32"',
]  # fmt: skip
# each with other kinds of state: 8-bit moments, EMA, dropout, accumulation, both components, walks; the
# optimizer's own average, pictures drawn before and between the steps
VARIANTS = {
    "8-bit": [
        'train.optimizer="ademamix8bit"', "adapter.rank=48", "train.ema=0.9", "adapter.dropout=0.3",
        'adapter.targets=["cross-attention","text-encoder"]', "train.gradient_checkpointing=true",
        "train.gradient_accumulation=2", "data.flip=true", "data.caption_dropout=0.3",
        "data.shuffle_tags=true", "loss.output_preservation.share=0.7", "loss.output_preservation.walk=4",
    ],
    "schedule-free": [
        'train.optimizer="adamw_schedulefree"', "loss.prior_preservation.count=2",
        "loss.prior_preservation.steps=1", "preview.every=1", "preview.steps=1", "preview.count=1",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def resolve(pictures: Path) -> Callable[..., Resolved]:
    def load(*sets: str, recipe: str = "naive") -> Resolved:
        return config.load("glasses", data=pictures, recipe=recipe, sets=[*SMALL, *sets])

    return load


def finish(process: BaseProcess) -> None:
    process.join(120)
    assert process.exitcode == 0


def kill_after(process: BaseProcess, metrics: Path, line: int) -> None:
    """SIGKILL as soon as the metrics have that line."""
    deadline = time.monotonic() + 120
    while not metrics.is_file() or metrics.read_bytes().count(b"\n") < line:
        assert process.is_alive(), f"the run ended before step {line}"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def same_tensors(a: Path, b: Path) -> bool:
    left, right = load_file(a), load_file(b)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def lines(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_run_ends_with_the_same_bits(
    variant: str, resolve: Callable[..., Resolved], start: Callable[..., BaseProcess], tmp_path: Path
) -> None:
    recipe = {"8-bit": "output-preservation", "schedule-free": "prior-preservation"}[variant]
    resolved = resolve(*VARIANTS[variant], recipe=recipe)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    whole = start(trainer.train, resolved, straight)
    for attempt, line in enumerate((1, 3)):  # before any checkpoint, and after one
        process = start(trainer.train, resolved, killed, resume=attempt > 0)
        kill_after(process, killed / "metrics.jsonl", line)
        assert not (killed / "glasses.safetensors").exists()
    finish(start(trainer.train, resolved, killed, resume=True))
    finish(whole)

    assert same_tensors(straight / "glasses.safetensors", killed / "glasses.safetensors")
    assert lines(straight) == lines(killed)
    assert [row["step"] for row in lines(killed)] == list(range(1, STEPS + 1))
    assert checkpoint.steps(killed / "checkpoints") == checkpoint.steps(straight / "checkpoints") == [2, 4]
    assert not [path for path in (killed / "checkpoints").iterdir() if path.name.startswith(".")]
    for step in (2, 4):  # the state too, not only what became of it
        name = f"checkpoints/step-{step:06d}/adapter.safetensors"
        assert same_tensors(straight / name, killed / name)


# --- what a continuation may change -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(resolve: Callable[..., Resolved], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    trainer.train(resolve("train.steps=2"), run)
    return run


def test_a_finished_run_may_grow(finished: Path, resolve: Callable[..., Resolved], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    trainer.train(resolve("train.steps=2"), run, resume=True)  # nothing left to do
    assert same_tensors(run / "glasses.safetensors", finished / "glasses.safetensors")
    result = trainer.train(resolve("train.steps=3", "preview.seed=3"), run, resume=True)
    assert result.steps == 3
    assert [row["step"] for row in lines(run)] == [1, 2, 3]
    assert lines(run)[:2] == lines(finished)
    assert config.load(str(run / "config.toml")).config.train.steps == 3
    with pytest.raises(UserError, match=r"to have 2 steps but has done 3 already: raise train\.steps"):
        trainer.train(resolve("train.steps=2"), run, resume=True)
    assert config.load(str(run / "config.toml")).config.train.steps == 3


def test_another_configuration_is_refused_with_every_difference(
    finished: Path, resolve: Callable[..., Resolved]
) -> None:
    changed = resolve("train.steps=2", "train.seed=7", "adapter.rank=4", "loss.denoising.weight=2")
    with pytest.raises(UserError) as caught:
        trainer.train(changed, finished, resume=True)
    for part in ("train.seed was 0 and is now 7", "adapter.rank was 2 and is now 4",
                 "loss.denoising.weight was 1.0 and is now 2.0"):  # fmt: skip
        assert part in str(caught.value)
    with pytest.raises(UserError, match=r"train\.ema was unset and is now 0\.9"):
        trainer.train(resolve("train.steps=2", "train.ema=0.9"), finished, resume=True)
    with pytest.raises(UserError, match=r"loss was \['denoising'\] and is now"):
        trainer.train(resolve("train.steps=2", recipe="output-preservation"), finished, resume=True)


def test_another_base_under_the_same_name_is_refused(pictures: Path, tmp_path: Path) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(embedded.base_path(), base)

    def resolved(steps: int) -> Resolved:
        sets = [*SMALL, f"train.steps={steps}"]
        return config.load("glasses", data=pictures, base=str(base), recipe="naive", sets=sets)

    trainer.train(resolved(1), run)
    file = base / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    save_file({key: value * 1.01 for key, value in weights.items()}, file)
    with pytest.raises(UserError, match=r"the base model '.*base' changed since the run in '.*run' began"):
        trainer.train(resolved(2), run, resume=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_damaged_checkpoint_is_named(
    finished: Path, resolve: Callable[..., Resolved], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    state = run / "checkpoints" / "step-000002" / "state.pt"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(UserError, match=r"step-000002' cannot be read .* delete this folder"):
        trainer.train(resolve("train.steps=3"), run, resume=True)


def test_a_checkpoint_runs_no_code(finished: Path, tmp_path: Path) -> None:
    """A pickle that calls something is refused, not called."""
    folder = tmp_path / "step-000002"
    shutil.copytree(finished / "checkpoints" / "step-000002", folder)

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"updater": Evil(), "plugins": []}, folder / "state.pt")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(folder)
    assert not (tmp_path / "evil").exists()


def test_threads_come_from_the_checkpoint(
    finished: Path, resolve: Callable[..., Resolved], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    facts = run / "checkpoints" / "step-000002" / "checkpoint.json"
    assert json.loads(facts.read_text())["threads"] == 1
    facts.write_text(facts.read_text().replace('"threads": 1', '"threads": 2'))
    seen = []
    trainer.train(
        resolve("train.steps=3", "train.threads=0"), run, resume=True,
        report=lambda done, total, values: seen.append(torch.get_num_threads()),
    )  # fmt: skip
    assert seen[-1] == 2
    assert torch.get_num_threads() == 1


def test_metrics_are_cut_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    cut_back(path, 3)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    cut_back(path, 1)
    assert path.read_text() == '{"step": 1}\n'
    cut_back(tmp_path / "none.jsonl", 1)


def test_a_full_disk_is_told_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    if not path.exists():
        pytest.skip("this system has no /dev/full")
    metrics = Metrics(path, 0, None)
    with pytest.raises(UserError, match=r"metrics\.jsonl': No space left .* with --resume"):
        metrics.write({"step": 1, "loss": float("nan"), "terms": {}})
    metrics.close()
