"""Runs that the studio starts: they end by themselves, are found, stopped, resumed, and refused twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from spf_kit.errors import UserError
from spf_kit.studio import processes

QUICK = ("--set", "evaluate.enabled=false", "--set", "preview.every=0", "--set", "calibrate.enabled=false")
PATIENCE = 400  # seconds; a run yields to whatever else the machine does


def until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.05)


def lines(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def test_a_run_is_found_stopped_with_its_state_saved_and_resumed(tmp_path: Path) -> None:
    run = tmp_path / "runs/long"
    started = processes.start(run, ["glasses", "--steps", "5000", *QUICK, "--output", str(run)])
    assert os.getsid(started.pid) == started.pid  # a Ctrl-C in the studio's terminal does not reach it
    assert started.nice() == processes.NICENESS
    assert processes.find(run) == started
    with pytest.raises(UserError, match=f"a process \\({started.pid}\\) trains into"):
        processes.start(run, ["glasses", "--output", str(run)])
    until(lambda: lines(run) > 1)
    processes.stop(run)
    until(lambda: processes.find(run) is None)
    assert processes.last_words(run).startswith("interrupted: ")
    saved = lines(run)
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert int(checkpoint.name.removeprefix("step-")) == saved < 5000

    with pytest.raises(UserError, match="nothing to stop"):
        processes.stop(run)
    processes.resume(run)
    until(lambda: lines(run) > saved)
    processes.stop(run)
    until(lambda: processes.find(run) is None)


def test_what_a_run_refuses_is_its_last_words(tmp_path: Path) -> None:
    run = tmp_path / "runs/wrong"
    processes.start(run, ["glasses", "--set", "train.steps=0", "--output", str(run)])
    until(lambda: processes.find(run) is None)
    assert processes.last_words(run) == "error: --set train.steps=0: train.steps = 0: must be at least 1"
    assert not run.exists()
    with pytest.raises(UserError, match="no run to resume"):
        processes.resume(run)


@pytest.mark.parametrize("options", [["-o", "mine"], ["--output=mine"], []])
def test_a_run_of_a_terminal_is_found(tmp_path: Path, options: list[str]) -> None:
    """A stand-in with the command line of a run, which it finds in a relative --output or by the file that
    it holds open; it is not found in another folder."""
    (tmp_path / "mine").mkdir()
    code = (
        "import sys, time; f = open('mine/metrics.jsonl', 'a'); print('ready', flush=True); time.sleep(600)"
    )
    (tmp_path / "spf-kit").write_text(code)
    process = subprocess.Popen(
        [sys.executable, "spf-kit", "train", "glasses", *options],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        found = processes.find(tmp_path / "mine")
        assert found is not None
        assert found.pid == process.pid
        assert processes.running()[tmp_path / "mine"].pid == process.pid
        assert processes.find(tmp_path / "other") is None
    finally:
        process.send_signal(signal.SIGKILL)
    # ended, yet in the table until it is waited for: no run
    until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
    assert processes.find(tmp_path / "mine") is None
    process.wait()
