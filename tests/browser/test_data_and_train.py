"""The pages Data and Train in a browser: edits and undo, errors beside their field, a run and its resume."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from driving import NARROW, PATIENCE, Running, go, nameless, open_folder, samples, shoot, write

from spf_kit.studio.run_state import last_step

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page, Route

CAPTION = "a <b>bold</b> man {{value}} ${1+1}, wearing glasses"  # text, whatever a template makes of it


@pytest.fixture(scope="module")
def folder(folder: Path) -> Path:
    samples(folder / "mine", 3)
    return folder


def field(page: Page, name: str) -> Locator:
    return page.get_by_role("textbox", name=re.compile(f"^{name}"))


def command(page: Page, *parts: str) -> str:
    """The command line on the page, once it holds these parts."""
    text = field(page, "Command line")
    page.wait_for_function(
        "([box, parts]) => parts.every((part) => box.value.includes(part))",
        arg=[text.element_handle(), list(parts)],
    )
    return text.input_value()


def test_captions_are_edited_by_keyboard_and_taken_back(page: Page, studio: Running) -> None:
    mine = studio.folder / "mine"
    before = {path.name: path.read_bytes() for path in mine.glob("*.txt")}
    go(page, "Data")
    open_folder(page, "mine")
    card = page.locator("[data-id='01.png']")
    card.focus()
    page.keyboard.press("Enter")
    page.get_by_text("of 01.png", exact=True).wait_for()
    assert field(page, "Caption").input_value() == before["01.txt"].decode().strip()
    field(page, "Caption").fill(CAPTION)
    page.get_by_role("button", name="Save the caption").click()
    page.get_by_text("the caption of 01.png is written").wait_for()
    assert card.get_attribute("aria-pressed") == "true"
    assert page.locator("[data-id][aria-pressed='true']").count() == 1
    assert nameless(page) == []
    assert (mine / "01.txt").read_text() == CAPTION + "\n"
    assert card.locator("mark").inner_text() == "wearing glasses"
    assert CAPTION in card.inner_text()

    told = page.get_by_role("status", name="About the edits")
    field(page, "Tag").fill("wearing glasses")
    field(page, "Replace by").fill("with glasses")
    page.get_by_role("button", name="Replace in all").click()
    told.get_by_text("replacing 'wearing glasses' by 'with glasses': 3 of 3 captions changed").wait_for()
    assert all("with glasses" in path.read_text() for path in mine.glob("*.txt"))
    for what in ("replacing 'wearing glasses' by 'with glasses'", "the caption of 01.png"):
        page.get_by_role("button", name="Undo the last edit").click()
        told.get_by_text(f"undone: {what}", exact=True).wait_for()
    assert {path.name: path.read_bytes() for path in mine.glob("*.txt")} == before
    page.get_by_role("button", name="Undo the last edit").click()
    told.get_by_role("alert").get_by_text("there is no edit to undo").wait_for()


def test_settings_are_checked_beside_their_field_while_they_are_typed(page: Page) -> None:
    go(page, "Train")
    command(page, "spf-kit train glasses")
    steps = page.get_by_role("spinbutton", name="train.steps", exact=True)
    steps.press("Control+a")
    page.keyboard.type("0")
    beside = page.locator(".setting.wrong")
    beside.get_by_text("train.steps = 0: must be at least 1").wait_for()
    assert beside.count() == 1
    assert steps.evaluate("element => element === document.activeElement")  # typing goes on
    page.keyboard.press("Control+a")
    page.keyboard.type("25")
    assert command(page, "--set train.steps=25")
    assert beside.count() == 0
    assert re.search(r"^steps = 25$", field(page, "Preset").input_value(), re.MULTILINE)

    page.get_by_role("button", name="[[loss]]").click()
    page.locator("[data-listens]").wait_for()
    start = page.get_by_role("spinbutton", name="loss.target.start", exact=True)
    start.fill("2")
    page.locator(".losses .wrong").get_by_text("loss.target.start = 2: must be at most 1").wait_for()
    assert start.get_attribute("aria-invalid") == "true"
    start.fill("0.2")
    assert command(page, "--set loss.target.start=0.2", "--set train.steps=25")

    # until the recipe's values have come, what is typed would be lost: nothing can be
    held: list[Route] = []
    page.route("**/queue/join*", lambda route: held.append(route))
    page.get_by_role("combobox", name="Recipe", exact=True).click()
    page.get_by_role("option", name="naive", exact=True).click()
    page.locator("#settings[inert]").wait_for()
    steps.focus()
    page.keyboard.type("7")
    page.route("**/queue/join*", lambda route: route.continue_())  # from now on
    for request in held:
        request.continue_()
    page.locator("#settings:not([inert])").wait_for()
    steps.press("End")
    page.keyboard.type("0")
    shown = command(page, "--recipe naive", "--set train.steps=250")
    assert "loss.target" not in shown  # that recipe has no such loss
    assert steps.input_value() == "250"


def test_opening_every_section_changes_nothing_and_all_is_named(open_page: Callable[..., Page]) -> None:
    page = open_page("Train", NARROW)
    assert page.get_by_role("tab").count() == 5  # none is behind a menu
    before = command(page, "spf-kit train glasses")
    for section in page.get_by_role("button", name=re.compile(r"^\[")).all():
        section.click()
    page.get_by_role("checkbox", name="convolutions").wait_for()
    page.get_by_role("spinbutton", name="loss.target.start", exact=True).wait_for()
    assert nameless(page) == []
    assert page.get_by_role("group", name="adapter.targets").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= NARROW[0]
    assert command(page, "spf-kit train glasses") == before
    assert page.locator(".setting.wrong").count() == 0
    shoot(page, "train-phone")
    write(page, "Preset", "nowhere")  # told where it was typed
    page.get_by_role("status", name="About the choices").get_by_text("nowhere").wait_for()


def test_memory_is_a_bar_against_the_card(page: Page) -> None:
    go(page, "Train")
    bar = page.get_by_role("meter", name="Memory")
    bar.wait_for(timeout=1000 * PATIENCE)
    assert "fits 8 GB" in str(bar.get_attribute("aria-valuetext"))
    card = page.get_by_role("combobox", name="Card", exact=True)
    card.fill("256mb")
    card.press("Enter")
    page.get_by_text(re.compile("does not fit 0.25 GB, by")).wait_for()


def test_a_run_is_started_stopped_and_resumed_and_refused_twice(page: Page, studio: Running) -> None:
    go(page, "Train")
    page.get_by_role("spinbutton", name="train.steps", exact=True).fill("3000")
    command(page, "--set train.steps=3000")
    start, state = (
        page.get_by_role("button", name="Start", exact=True),
        page.get_by_role("status", name="State of the run"),
    )
    start.click()
    state.get_by_text(re.compile("glasses: training, step [0-9]+ of 3000")).wait_for()
    start.click()
    told = page.get_by_role("status", name="About the settings").get_by_role("alert")
    told.get_by_text(re.compile(r"a process \([0-9]+\) trains into '.*glasses'")).wait_for()
    page.get_by_role("button", name="Stop and save").click()
    state.get_by_text(re.compile("glasses: stopped at step [0-9]+ of 3000. interrupted: ")).wait_for()
    start.click()
    told.get_by_text(re.compile("the run folder '.*glasses' exists")).wait_for()
    run = studio.runs / "glasses"
    reached = last_step(run)
    assert list((run / "checkpoints").iterdir())
    page.get_by_role("button", name="Resume").click()
    state.get_by_text(re.compile("glasses: training, step [0-9]+ of 3000")).wait_for()
    page.get_by_role("button", name="Stop and save").click()
    state.get_by_text("glasses: stopped at step").wait_for()
    assert last_step(run) >= reached


def test_nothing_is_asked_of_other_machines(open_page: Callable[..., Page], studio: Running) -> None:
    page = open_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    for tab in ("Data", "Train", "Runs", "Try", "Merge and share"):
        go(page, tab)
    elsewhere = [url for url in asked if not url.startswith((studio.url, "data:", "blob:"))]
    assert len(asked) > 5
    assert elsewhere == []
