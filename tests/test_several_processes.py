"""Several processes make one run: real ones, over gloo on the CPU.

Most are forks of a server that has torch loaded, with the environment of a launcher; one run is launched by
`accelerate launch` itself.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import TCPStore

from spf_kit import config, doctor, launch
from spf_kit.config import Resolved
from spf_kit.errors import UserError
from spf_kit.losses import Remembered
from spf_kit.training import checkpoint

STEPS = 6
SMALL = [
    "data.resolution=32", "data.buckets=false", f"train.steps={STEPS}", "preview.every=0",
    "train.checkpoint_every=3", "train.log_tensorboard=false", "adapter.rank=2", "train.threads=1",
    'output.dtype="float32"', "evaluate.enabled=false",
    # Adam divides by the gradient's own size, so that a rounding error of a gradient near 0 becomes a whole
    # step of the learning rate; a large eps keeps the update proportional
    "train.optimizer_args.eps=0.01", "train.learning_rate=0.2",
]  # fmt: skip
# recipe, samples of a batch, and what else differs. Three pictures: an epoch of batches of two ends with one
# sample, of which the second process has none.
RECIPES: dict[str, tuple[str, int, list[str]]] = {
    "naive": ("naive", 2, ["train.gradient_accumulation=2", "train.ema=0.5", 'data.cache="disk"']),
    # the pictures' maps and their averages, at every second visit another process's
    "spf": ("spf", 2, ["data.flip=true"]),
    # walks from a pool of two, and an own batch of prior pictures whose epoch ends elsewhere
    "walks": (
        "prior-preservation",
        4,
        ["loss.prior_preservation.count=5", "loss.prior_preservation.steps=1", "data.repeats=2",
         'loss.keep.plugin="output_preservation"', "loss.keep.share=0.6", "loss.keep.walk=3",
         "loss.keep.weight=3.0"],
    ),
}  # fmt: skip
RESUMED = {"naive": (1, 2), "spf": (2, 1), "walks": (2, 3)}

WORKER = """
import json, os
from pathlib import Path
os.environ |= environment
from spf_kit.data import cache
from spf_kit.training import trainer, walks
walks.POOL = 2
encode, encoded = cache.encode, []
cache.encode = lambda view, family: encoded.append(str(view.picture.path)) or encode(view, family)
trainer.train(resolved, run, resume=resume)
(run / f"encoded-{environment.get('RANK', 'alone')}.json").write_text(json.dumps(encoded))
"""
COMMAND = """
import os, sys
os.environ |= environment
out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(out, 1)
os.dup2(out, 2)
sys.argv = ["spf-kit", *arguments]
from spf_kit.cli import main
main()
"""

Start = Callable[..., BaseProcess]


STORES: list[TCPStore] = []  # for as long as processes meet there


def environments(count: int) -> list[dict[str, str]]:
    """What a launcher tells each of its processes. As torchrun it keeps the store where they meet, which
    finds a free port."""
    if count == 1:
        return [{}]
    STORES.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    common = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(STORES[-1].port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    return [common | {"RANK": str(n), "LOCAL_RANK": str(n)} for n in range(count)]


def train(
    start: Start, count: int, resolved: Resolved, run: Path, *, resume: bool = False
) -> list[BaseProcess]:
    """Start a run in so many processes."""
    given = {"resolved": resolved, "run": run, "resume": resume}
    more = {"SPF_KIT_CACHE": str(run.with_name(f"{run.name}-cache"))}
    return [start(exec, WORKER, given | {"environment": own | more}) for own in environments(count)]


def finish(*processes: BaseProcess) -> None:
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(one: Path, other: Path) -> None:
    """The same loss curve, gradients and LoRA, up to what sums in another order differ by."""
    first, second = lines(one), lines(other)
    assert [row["step"] for row in first] == [row["step"] for row in second] == list(range(1, STEPS + 1))
    for a, b in zip(first, second):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["terms"] == pytest.approx(b["terms"], rel=1e-3, abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["learning_rate"] == b["learning_rate"]
    weights, others = (load_file(run / "glasses.safetensors") for run in (one, other))
    assert weights.keys() == others.keys()
    assert max(float(value.abs().max()) for key, value in weights.items() if "lora_up" in key) > 0.02
    assert all(torch.allclose(weights[key], others[key], atol=5e-5) for key in weights)


@dataclass(frozen=True)
class Runs:
    one: Path  # in one process
    two: Path  # in two, each with half of the batch
    resolved: dict[int, Resolved]  # by the number of processes
    resumed: tuple[int, int]  # from so many processes to so many


@pytest.fixture(scope="module", params=RECIPES)
def runs(
    request: pytest.FixtureRequest, pictures: Path, start: Start, tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    recipe, batch, sets = RECIPES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    resolved = {
        count: config.load(
            "glasses",
            data=pictures,
            recipe=recipe,
            sets=[*SMALL, f"train.batch_size={batch // count}", *sets],
        )
        for count in (1, 2)
    }
    made = Runs(folder / "one", folder / "two", resolved, RESUMED[request.param])
    started = [*train(start, 1, resolved[1], made.one), *train(start, 2, resolved[2], made.two)]
    finish(*started)
    return made


def test_two_processes_have_the_loss_curve_of_one(runs: Runs) -> None:
    assert_same_run(runs.one, runs.two)
    assert not [path for path in runs.two.rglob("*") if ".tmp" in path.name]


def test_the_encoding_is_shared_out(runs: Runs) -> None:
    alone = json.loads((runs.one / "encoded-alone.json").read_text())
    parts = [json.loads((runs.two / f"encoded-{rank}.json").read_text()) for rank in (0, 1)]

    def names(paths: list[str]) -> list[str]:  # prior pictures lie in their run's folder
        return sorted(Path(path).name for path in paths)

    assert names(parts[0] + parts[1]) == names(alone)
    assert abs(len(parts[0]) - len(parts[1])) <= 2  # one for the data, one for prior pictures


def test_another_number_of_processes_goes_on_with_the_same_batches(
    runs: Runs, start: Start, tmp_path: Path
) -> None:
    """From the middle: the curve is that of the run that was never stopped."""
    before, after = runs.resumed
    straight, run = runs.one if before == 1 else runs.two, tmp_path / "run"
    shutil.copytree(straight, run)
    (run / "glasses.safetensors").unlink()
    shutil.rmtree(checkpoint.path_of(run / "checkpoints", STEPS))
    assert checkpoint.steps(run / "checkpoints") == [3]
    finish(*train(start, after, runs.resolved[before], run, resume=True))
    assert_same_run(straight, run)
    states = [
        checkpoint.load(checkpoint.path_of(folder / "checkpoints", STEPS)) for folder in (straight, run)
    ]
    assert [state.processes for state in states] == [before] * 2
    for name in states[0].plugins:
        kept, other = (state.plugins[name] for state in states)
        assert kept.keys() == other.keys()
        for key, maps in kept.items():
            assert maps.keys() == other[key].keys()
            assert all(torch.allclose(maps[picture], other[key][picture], atol=1e-3) for picture in maps)
    walked, other_walks = (state.walks["walks"] for state in states)
    assert [w["text"] for w in walked] == [w["text"] for w in other_walks]
    assert [int(w["timestep"]) for w in walked] == [int(w["timestep"]) for w in other_walks]


# --- how it ends ------------------------------------------------------------------------------------------

ONLY_ONE = '''
import os

from spf_kit.errors import UserError
from spf_kit.losses import Loss, Step, Tensor, per_sample, register


@register("only_one")
class OnlyOne(Loss):
    """Fails in the second process."""

    def __call__(self, step: Step) -> Tensor:
        if os.environ["RANK"] == "1" and step.number == 2:
            raise {error}
        return per_sample((step.target - step.response.prediction).square())
'''
FAILURES = {
    "the preset": (["--set", "train.stepz=3"], 2, "train.stepz"),
    "the folder": (["--output", "."], 2, "the run folder '.' exists"),
    "one process in a step": ([], 2, "the disk of this machine is full"),
    "a defect of one process": ([], 1, "ZeroDivisionError"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_an_error_ends_all_with_one_sentence(name: str, start: Start, pictures: Path, tmp_path: Path) -> None:
    more, code, sentence = FAILURES[name]
    error = 'UserError("the disk of this machine is full")' if code == 2 else "ZeroDivisionError"
    plugin = tmp_path / "only_one.py"
    plugin.write_text(ONLY_ONE.format(error=error), encoding="utf-8")
    arguments = ["train", "glasses", "--data", str(pictures), "--recipe", "naive", "--json",
                 "--output", str(tmp_path / "run"), "--plugin", str(plugin),
                 "--set", "loss.denoising.plugin=only_one", *more]  # fmt: skip
    for setting in SMALL:
        arguments += ["--set", setting]
    output = tmp_path / "output"
    workers = [
        start(exec, COMMAND, {"environment": own, "arguments": arguments, "output": str(output)})
        for own in environments(2)
    ]
    for worker in workers:
        worker.join(120)
    printed = output.read_text()
    assert [worker.exitcode for worker in workers] == [code, code], printed
    objects = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert len(objects) == 1, printed
    assert sentence in objects[0].get("error", objects[0].get("defect"))
    assert printed.count("Traceback") == (1 if code == 1 else 0)
    if "step" not in name and "defect" not in name:
        assert not (tmp_path / "run").exists()
    assert not (tmp_path / "run" / "glasses.safetensors").exists()


def test_processes_that_see_other_files_are_refused(start: Start, pictures: Path, tmp_path: Path) -> None:
    """As on two machines, one of which has another picture in another place."""
    run, output = tmp_path / "run", tmp_path / "output"
    workers = []
    for environment in environments(2):
        machine = tmp_path / f"machine-{environment['RANK']}"
        shutil.copytree(pictures, machine / "pictures")
        if environment["RANK"] == "1":
            one, other, *_ = sorted((machine / "pictures").glob("*.png"))
            shutil.copy(one, other)
        arguments = ["train", "glasses", "--data", "pictures", "--recipe", "naive", "--output", str(run)]
        arguments += [word for setting in SMALL for word in ("--set", setting)]
        given = {"environment": environment, "arguments": arguments, "output": str(output)}
        workers.append(start(exec, f"import os\nos.chdir({str(machine)!r})\n{COMMAND}", given))
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [2, 2], output.read_text()
    told = "the processes of this run do not see the same: the configuration and the pictures;"
    assert output.read_text().count(told) == 1
    assert not run.exists()


def test_a_signal_to_one_stops_all_and_the_state_is_saved(
    start: Start, pictures: Path, tmp_path: Path
) -> None:
    run, output = tmp_path / "run", tmp_path / "output"
    arguments = ["train", "glasses", "--data", str(pictures), "--recipe", "naive", "--output", str(run)]
    for setting in [*SMALL, "train.steps=5000"]:
        arguments += ["--set", setting]
    workers = [
        start(exec, COMMAND, {"environment": own, "arguments": arguments, "output": str(output)})
        for own in environments(2)
    ]
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() or len(lines(run)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(workers[1].pid or 0, signal.SIGTERM)
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [130, 130]
    (saved,) = checkpoint.steps(run / "checkpoints")[-1:]
    assert saved == lines(run)[-1]["step"]
    assert output.read_text().count(f"stopped after step {saved} of 5000") == 1
    assert "accelerate launch --multi_gpu --num_processes 2 -m spf_kit train" in output.read_text()


# --- accelerate launch ------------------------------------------------------------------------------------


def launched(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
                "--main_process_port", "0"]  # fmt: skip
    return subprocess.run([*launcher, *map(str, arguments)], cwd=folder, capture_output=True, text=True)


def test_accelerate_launches_the_console_script(pictures: Path, tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("spf-kit")
    small = [word for setting in SMALL for word in ("--set", setting)]
    more = ["train.steps=2", "train.checkpoint_every=0", "preview.every=2", "preview.steps=1",
            "preview.count=1", "evaluate.enabled=true", "evaluate.count=2", "evaluate.steps=1"]  # fmt: skip
    small += [word for setting in more for word in ("--set", setting)]
    done = launched(
        script, "train", "glasses", "--data", pictures, "--recipe", "naive", "--json", *small, folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # one object, though two processes ran
    assert result["steps"] == 2
    assert set(result["evaluation"]["loras"]) == {result["lora"]}
    run = tmp_path / result["run"]
    assert [row["step"] for row in lines(run)] == [1, 2]
    assert checkpoint.load(run / "checkpoints/step-000002").processes == 2
    found = {path.name for path in run.iterdir()}
    assert found == {"config.toml", "metrics.jsonl", "samples", "checkpoints", "report", "report.html",
                     "glasses.safetensors", "contact-sheet.png", "evaluation.json"}  # fmt: skip
    assert done.stderr.count("\nLoRA: ") == done.stderr.count("\nreport: ") == 1


def test_accelerate_launches_the_module_and_tells_an_error_once(tmp_path: Path) -> None:
    done = launched("-m", "spf_kit", "train", "glases", folder=tmp_path)
    assert done.stderr.count("the preset 'glases' does not exist") == 1
    assert done.stderr.count("exitcode  : 2 ") == 2  # the launcher's own report, of both processes
    assert not list(tmp_path.iterdir())


# --- the parts --------------------------------------------------------------------------------------------


def test_what_several_processes_are_is_read_from_their_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*launch.INDEX, *launch.COUNT, "LOCAL_WORLD_SIZE", "MASTER_PORT", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    assert (launch.index(), launch.count(), launch.is_main()) == (0, 1, True)
    assert launch.command() == ["spf-kit"]
    assert launch.ends_first(2) is None
    launch.check(gpus=1)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    assert (launch.index(), launch.count(), launch.is_main()) == (1, 3, False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match="3 processes were started on a machine with 2 GPUs"):
        launch.check(gpus=2)
    launch.check(gpus=0)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    launch.check(gpus=2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert launch.command()[:3] == ["accelerate", "launch", "..."]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="start accelerate launch without FSDP"):
        launch.check(gpus=0)


def test_one_process_where_several_were_asked_for_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch --num_processes 2` starts one on a machine without two GPUs."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")
    monkeypatch.setenv("MASTER_PORT", "29500")
    (sentence,) = launch.advice()
    assert "add --multi_gpu" in sentence
    problems: list[str] = []
    assert doctor._processes(problems).startswith("1 ")
    assert problems == [sentence]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not launch.advice()


def test_what_is_remembered_is_told_once() -> None:
    here, there = Remembered({"a": torch.zeros(1)}), Remembered()
    assert not here.take_new(), "what it began with, all know"
    here["a"], here["b"] = torch.ones(1), torch.ones(2)
    there.learn(here.take_new())
    assert set(there) == {"a", "b"}
    assert torch.equal(there["a"], torch.ones(1))
    assert not here.take_new()
    assert not there.take_new(), "it is not passed on"
