"""Two pages open at once, and the studio killed and started again in mid-run."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from driving import PATIENCE, Running, few_steps, go, open_folder, region, samples, start_run

from spf_kit.studio import processes
from spf_kit.studio.run_state import last_step

if TYPE_CHECKING:
    from playwright.sync_api import Page


@pytest.fixture(scope="module")
def folder(folder: Path) -> Path:
    samples(folder / "samples", 4)
    return folder


def test_two_pages_edit_one_folder_and_draw_at_once(open_page: Callable[..., Page], studio: Running) -> None:
    one, two = open_page("Data"), open_page("Data")
    for page in (one, two):
        open_folder(page, str(studio.folder / "samples"))
        page.locator("[data-id]").nth(3).wait_for()
    for page, name in ((one, "first"), (two, "second")):
        page.get_by_role("textbox", name=re.compile("^Tag")).fill(f"by the {name}")
        page.get_by_role("button", name="Add to all").click()
        page.get_by_text("4 of 4 captions changed").wait_for()
    for caption in (studio.folder / "samples").glob("*.txt"):
        assert {"by the first", "by the second"} <= set(caption.read_text().strip().split(", "))

    for page, prompt in ((one, "a portrait, sad"), (two, "a portrait, smiling")):
        go(page, "Try")
        page.get_by_role("textbox", name=re.compile("^Prompts")).fill(prompt)
        few_steps(page)
    for page in (one, two):
        page.get_by_role("button", name="Draw", exact=True).click()
    for page, prompt in ((one, "a portrait, sad"), (two, "a portrait, smiling")):
        region(page, "Base beside LoRA").get_by_alt_text(f"base model: {prompt}, seed 0").wait_for()


def test_a_run_outlives_the_studio_and_is_found_again(
    open_page: Callable[..., Page], studio: Running
) -> None:
    run = studio.runs / "long"
    page = open_page("Train")
    start_run(page, studio, "long", pictures=str(studio.folder / "samples"), steps=5000, preview_every=0)
    wait_until(lambda: last_step(run) >= 2)
    process = processes.find(run)
    assert process is not None
    studio.kill()
    reached = last_step(run)
    wait_until(lambda: last_step(run) > reached)  # it does not miss the studio
    studio.start()

    again = open_page("Runs")
    region(again, "Progress").get_by_text(re.compile("step [0-9]+ of 5000, going on")).wait_for()
    go(again, "Train")
    again.get_by_role("status", name="State of the run").get_by_text("training, step").wait_for()
    again.get_by_role("button", name="Stop and save").click()
    process.wait(PATIENCE)
    again.get_by_role("status", name="State of the run").get_by_text("stopped at step").wait_for()
    assert list((run / "checkpoints").iterdir())
    go(again, "Runs")
    region(again, "Progress").get_by_text(re.compile("step [0-9]+ of 5000: not finished")).wait_for()


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.2)
