"""Driving the studio: its process, its pages by the names that a screen reader says, short runs to show."""

from __future__ import annotations

import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from spf_kit import embedded

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

ROOT = Path(__file__).parents[2]
SHOTS = ROOT / "screenshots"  # ignored by git; what CI keeps
PATIENCE = 300.0  # seconds: for conditions that hold after a few, on machines that are busy
WIDE, NARROW = (1280, 900), (390, 844)
SHORT = [
    "--steps", "4", "--set", "preview.every=2", "--set", "preview.steps=2", "--set", "preview.count=2",
    "--set", "evaluate.count=3", "--set", "evaluate.steps=2", "--set", "train.log_tensorboard=false",
    "--set", 'loss.control_map.plugin="control_map"', "--set", "calibrate.enabled=false",
]  # fmt: skip


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
            [
                *(sys.executable, "-m", "spf_kit", "studio", str(self.folder), "--runs", str(self.runs)),
                *("--port", str(self.port), *self.options),
            ],
            cwd=self.folder,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "NO_PROXY": "127.0.0.1"},
            # a shell's background jobs ignore Ctrl-C, and so would what they start
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
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


def samples(folder: Path, count: int) -> Path:
    """A new folder with the first sample pictures of glasses and their captions."""
    folder.mkdir()
    for picture in sorted(embedded.data_path("glasses").glob("*.png"))[:count]:
        for file in (picture, picture.with_suffix(".txt")):
            shutil.copy(file, folder)
    return folder


def go(page: Page, tab: str) -> None:
    """Turn to a tab."""
    page.get_by_role("tab", name=tab, exact=True).click()
    page.get_by_role("heading", name=tab, exact=True).wait_for()
    _settle(page)


def unfold(page: Page, part: str | re.Pattern[str], first: Locator) -> None:
    """Open a part of a page that is folded away, which shows the control `first`."""
    page.get_by_role("button", name=part).click()
    first.wait_for()
    _settle(page)


def few_steps(page: Page) -> None:
    """Draw with two steps of the sampler, on the page "Try"."""
    steps = page.get_by_role("spinbutton", name="Sampler steps")
    unfold(page, "Base model and sampler", steps)
    steps.fill("2")


def _settle(page: Page) -> None:
    """Wait two frames. One frame after a tab or a folded part was opened, gradio writes the values that the
    page began with into it once more, which would undo what a quick hand has filled in by then."""
    frame = "new Promise(requestAnimationFrame)"
    page.evaluate(f"async () => {{ await {frame}; await {frame}; }}")


def shoot(page: Page, name: str) -> Path:
    """Keep what the page shows, from top to bottom."""
    SHOTS.mkdir(exist_ok=True)
    file = SHOTS / f"{name}.png"
    page.screenshot(path=file, full_page=True)
    return file


CONTROLS = {
    "button", "checkbox", "combobox", "group", "image", "link", "listbox", "meter", "progressbar", "radio",
    "radiogroup", "searchbox", "slider", "spinbutton", "tab", "textbox",
}  # fmt: skip


def nameless(page: Page) -> list[str]:
    """Roles of the controls and pictures that a screen reader comes to and cannot name, by the browser's own
    reckoning of names. Raises AssertionError where it comes to none at all."""
    client = page.context.new_cdp_session(page)
    nodes = client.send("Accessibility.getFullAXTree")["nodes"]
    client.detach()
    told = [node for node in nodes if not node["ignored"] and node["role"]["value"] in CONTROLS]
    assert told
    return [node["role"]["value"] for node in told if not node.get("name", {}).get("value", "").strip()]


def choose(page: Page, label: str, name: str) -> None:
    """An entry of a list."""
    page.get_by_role("combobox", name=label, exact=True).click()
    page.get_by_role("option", name=name, exact=True).click()


def write(page: Page, label: str, text: str) -> None:
    """An entry that no list has."""
    field = page.get_by_role("combobox", name=label, exact=True)
    field.fill(text)
    field.press("Enter")


def set_number(page: Page, label: str, value: float) -> None:
    field = page.get_by_role("spinbutton", name=label, exact=True)
    field.fill(str(value))
    field.press("Tab")


def open_folder(page: Page, folder: str) -> None:
    """Look at a folder of pictures on the page "Data"."""
    write(page, "Folder of pictures", folder)
    page.get_by_role("button", name="Open", exact=True).click()


SHORTLY = """
extends = "glasses"
[preview]
every = {preview_every}
count = 1
steps = 2
[calibrate]
count = 1
steps = 1
[evaluate]
count = 2
steps = 2
"""


def start_run(
    page: Page, studio: Running, name: str, *, pictures: str, steps: int, preview_every: int
) -> None:
    """Fill the form of the page "Train" and start, with a preset of one's own that draws little."""
    preset = studio.folder / "shortly.toml"
    preset.write_text(SHORTLY.format(preview_every=preview_every), encoding="utf-8")
    write(page, "Preset", str(preset))
    write(page, "Pictures", pictures)
    page.get_by_role("textbox", name=re.compile("^Name of the run")).fill(name)
    set_number(page, "train.steps", steps)
    page.wait_for_function(
        "text => [...document.querySelectorAll('textarea')].some((one) => new RegExp(text).test(one.value))",
        arg=rf"shortly.toml .*train.steps={steps}( |$)",
    )
    page.get_by_role("button", name="Start", exact=True).click()
    page.get_by_text(f"{name} was started").wait_for()


def region(page: Page, name: str) -> Locator:
    """A part of a page that shows something."""
    return page.get_by_role("region", name=name, exact=True)


def train(run: Path, *options: str) -> Path:
    """A finished run of four steps, of the sample pictures of glasses."""
    from typer.testing import CliRunner

    from spf_kit.cli import app

    done = CliRunner().invoke(app, ["train", "glasses", "--output", str(run), *SHORT, *options])
    assert done.exit_code == 0, done.output
    return run
