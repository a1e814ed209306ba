"""The studio in a real browser: one studio and one Chromium for each file of tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from driving import PATIENCE, WIDE, Running, go

from spf_kit.studio import processes

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

# what gradio says over the page, where nobody looked: errors stand where the user looks
OVER_THE_PAGE = """
window.overThePage = [];
new MutationObserver(() => {
  for (const one of document.querySelectorAll(".toast-body.error:not([data-seen])")) {
    one.dataset.seen = "";
    window.overThePage.push(one.innerText);
  }
}).observe(document, {subtree: true, childList: true});
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The distribution's Chromium."""
    pytest.importorskip("playwright", reason="playwright is not installed: pip install -e '.[dev]'")
    pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[dev]'")
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("there is no Chromium: install the distribution's package, as apt-get install chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one folder that the studio may touch. A file of tests that needs something in it adds that."""
    made = tmp_path_factory.mktemp("studio")
    (made / "runs").mkdir()
    return made


@pytest.fixture(scope="module")
def studio(browser: Browser, folder: Path) -> Iterator[Running]:
    running = Running(folder).start()
    yield running
    running.stop()
    for run in processes.running():  # they outlive the studio, and what a failed test left is not wanted
        if run.parent == running.runs and (left := processes.find(run)):
            left.kill()


@pytest.fixture
def open_page(browser: Browser, studio: Running) -> Iterator[Callable[..., Page]]:
    """Opens pages of the studio, each as a person of its own would; errors of their scripts fail the test,
    and so do those that gradio lays over a page."""
    contexts, errors = [], []

    def open_(tab: str | None = None, size: tuple[int, int] = WIDE) -> Page:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, reduced_motion="reduce")
        contexts.append(context)
        context.set_default_timeout(1000 * PATIENCE)
        context.add_init_script(OVER_THE_PAGE)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(studio.url)
        page.get_by_role("tab", name="Data").wait_for()
        if tab:
            go(page, tab)
        return page

    yield open_
    for context in contexts:
        for page in context.pages:
            errors += page.evaluate("window.overThePage ?? []")
        context.close()
    assert not errors


@pytest.fixture
def page(open_page: Callable[..., Page]) -> Page:
    return open_page()
