"""Shared by all tests: one thread (tiny models are slower with more), no network, the command line."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@dataclass(frozen=True)
class Result:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


@pytest.fixture
def spf_kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command in an empty directory: `spf_kit("train", "glasses", "--steps", "2")`.

    In this process, for torch and diffusers take seconds to import; whole processes are tested beside it.
    """
    from typer.testing import CliRunner

    from spf_kit.cli import app

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> Result:
        before = signal.getsignal(signal.SIGTERM)
        try:
            done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        finally:
            signal.signal(signal.SIGTERM, before)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return Result(done.exit_code, done.stdout, done.stderr)

    return run
