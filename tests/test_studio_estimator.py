"""The estimate in a process of its own says what the command line says, and ends with the studio."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from spf_kit import config
from spf_kit.errors import UserError
from spf_kit.estimate.peak import GIB, estimate
from spf_kit.studio.estimator import Estimator


@pytest.fixture(scope="module")
def estimator() -> Iterator[Estimator]:
    made = Estimator()
    yield made
    made.close()


def test_it_says_what_the_estimate_says(estimator: Estimator) -> None:
    told = estimator.ask({"preset": "glasses", "recipe": "naive"}, "1gb")
    found = estimate(config.load("glasses", recipe="naive"), only_largest=True)
    assert told["needed_bytes"] == found.needed
    assert told["bytes"] == found.as_dict()["bytes"]
    assert told["vram_bytes"] == GIB
    assert told["fits"]
    assert told["verdict"].startswith("fits 1 GB: ")


def test_it_refuses_as_the_command_line_and_goes_on(estimator: Estimator) -> None:
    with pytest.raises(UserError, match=r"--vram huge: expected a card's memory"):
        estimator.ask({"preset": "glasses"}, "huge")
    with pytest.raises(UserError, match=r"train\.steps = 0: must be at least 1"):
        estimator.ask({"preset": "glasses", "sets": ["train.steps=0"]}, "8gb")
    assert estimator.ask({"preset": "glasses", "recipe": "naive"}, "100mb")["fits"] is False


def test_a_process_that_was_killed_is_started_again(estimator: Estimator) -> None:
    estimator.start()
    assert estimator._process is not None
    before = estimator._process
    before.kill()
    before.wait()
    assert estimator.ask({"preset": "glasses", "recipe": "naive"}, "8gb")["fits"]


def test_it_ends_with_a_studio_that_was_killed() -> None:
    code = (
        "from spf_kit.studio.estimator import Estimator; import time; e = Estimator(); e.start(); "
        "print(e._process.pid, flush=True); time.sleep(600)"
    )
    studio = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert studio.stdout is not None
    worker = psutil.Process(int(studio.stdout.readline()))
    studio.kill()
    studio.wait()
    gone, _ = psutil.wait_procs([worker], timeout=300)
    assert gone
