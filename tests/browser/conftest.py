"""The studio in a real browser: one studio and one Chromium for each file of tests."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).parents[2]
SHOTS = ROOT / "screenshots"  # ignored by git; what CI keeps
PATIENCE = 120.0  # seconds: for conditions that hold after a few, on machines that are busy
WIDE, NARROW = (1280, 900), (390, 844)


class Running:
    """A studio in a process of its own, over one folder with its runs in `runs/`."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.options = folder, options
        self.runs = folder / "runs"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[str] | None = None
        self.said: list[str] = []

    def start(self) -> Running:
        """Start it and wait until it says its address."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "spf_kit", "studio", str(self.folder), "--runs", str(self.runs)]
            + ["--port", str(self.port), *self.options],
            cwd=self.folder,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"},
        )
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, args=(self.process, lines), daemon=True).start()
        while True:
            line = lines.get(timeout=PATIENCE)
            assert line, f"the studio ended: {self.said}"
            if line.startswith("studio: "):
                return self

    def _listen(self, process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            self.said.append(line)
            lines.put(line)
        lines.put("")

    def kill(self) -> None:
        """As a crash would end it: nothing can be tidied up."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(PATIENCE)

    def stop(self) -> int:
        """As Ctrl-C ends it. Returns the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(PATIENCE)


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


@pytest.fixture
def open_page(browser: Browser, studio: Running) -> Iterator[Callable[..., Page]]:
    """Opens pages of the studio, each as a person of its own would; errors of their scripts fail the test."""
    contexts, errors = [], []

    def open_(tab: str | None = None, size: tuple[int, int] = WIDE) -> Page:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, reduced_motion="reduce")
        contexts.append(context)
        context.set_default_timeout(1000 * PATIENCE)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(studio.url)
        page.get_by_role("tab", name="Data").wait_for()
        if tab:
            go(page, tab)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not errors


@pytest.fixture
def page(open_page: Callable[..., Page]) -> Page:
    return open_page()


def go(page: Page, tab: str) -> None:
    """Turn to a tab."""
    page.get_by_role("tab", name=tab, exact=True).click()
    page.get_by_role("heading", name=tab, exact=True).wait_for()


def shoot(page: Page, name: str) -> Path:
    """Keep what the page shows, from top to bottom."""
    SHOTS.mkdir(exist_ok=True)
    file = SHOTS / f"{name}.png"
    page.screenshot(path=file, full_page=True)
    return file
