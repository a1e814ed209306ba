"""The whole story in a browser: sample pictures, a caption, twenty steps, their report, a try, a merge."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from driving import Running, choose, few_steps, go, open_folder, region, set_number, shoot, start_run
from PIL import Image

from spf_kit import embedded

if TYPE_CHECKING:
    from playwright.sync_api import Page

CAPTION = "a portrait, of nobody, wearing glasses"


def test_from_sample_pictures_to_a_merged_checkpoint(page: Page, studio: Running) -> None:
    go(page, "Data")
    choose(page, "Folder of pictures", "embedded:glasses")
    page.get_by_role("button", name="Copy the sample pictures").click()
    samples = studio.folder / "samples"
    card = page.locator("[data-id]").first
    page.get_by_role("button", name="Copy the sample pictures").wait_for(state="hidden")
    assert len(list(samples.glob("*.png"))) == len(list(embedded.data_path("glasses").glob("*.png")))
    name = card.get_attribute("data-id")
    card.click()
    page.get_by_text(f"of {name}", exact=True).wait_for()
    page.get_by_role("textbox", name=re.compile("^Caption")).fill(CAPTION)
    page.get_by_role("button", name="Save the caption").click()
    page.get_by_text(f"the caption of {name} is written").wait_for()
    assert (samples / str(name)).with_suffix(".txt").read_text().strip() == CAPTION
    shoot(page, "data")

    go(page, "Train")
    start_run(page, studio, "story", pictures=str(samples), steps=20, preview_every=10)
    shoot(page, "train")

    go(page, "Runs")
    progress = region(page, "Progress")
    progress.get_by_text(re.compile("story for.*: finished: 20 steps; loss [0-9.]+$")).wait_for()
    assert CAPTION.removesuffix(", wearing glasses") in (studio.runs / "story/report/data.json").read_text()
    region(page, "Previews").get_by_role("figure", name="asked, step 20", exact=True).wait_for()
    region(page, "What was measured").get_by_role("rowheader", name="glasses.safetensors").wait_for()
    with page.context.expect_page() as opened:
        page.get_by_role("link", name="Open the report").click()
    opened.value.get_by_text("finished: 20 steps").wait_for()
    opened.value.close()

    go(page, "Try")
    page.get_by_role("textbox", name=re.compile("^Prompts")).fill(CAPTION)
    choose(page, "LoRA 1", "story/glasses.safetensors")
    few_steps(page)
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_text("2 pictures are drawn").wait_for()

    go(page, "Merge and share")
    choose(page, "LoRA 1", "story/glasses.safetensors")
    page.get_by_role("button", name="Merge", exact=True).click()
    page.get_by_text("tensors changed by glasses.safetensors (1)").wait_for()
    assert (studio.folder / "merged.safetensors").stat().st_size > 10 * 2**20


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [("train.steps", 0, "train.steps"), ("adapter.rank", 5000, "adapter.rank")],
)
def test_a_bad_setting_is_told_and_starts_nothing(
    page: Page, studio: Running, key: str, value: int, sentence: str
) -> None:
    go(page, "Train")
    page.get_by_role("textbox", name=re.compile("^Name of the run")).fill("bad")
    set_number(page, key, value)
    told = page.get_by_role("status", name="About the settings").get_by_role("alert")
    told.get_by_text(re.compile(rf"{re.escape(sentence)}.*{value}")).wait_for()
    page.get_by_role("button", name="Start", exact=True).click()
    told.get_by_text(sentence).wait_for()
    assert not (studio.runs / "bad").exists()


def test_a_folder_outside_is_refused(page: Page, tmp_path: Path) -> None:
    go(page, "Data")
    told = page.get_by_role("status", name="About the pictures").get_by_role("alert")
    for folder in (str(tmp_path), "/etc", "../../.."):
        open_folder(page, folder)
        told.get_by_text(f"'{folder}' is outside the studio's folders").wait_for()
    assert page.locator("[data-id]").count() == 0


def test_a_broken_picture_is_named(page: Page, studio: Running) -> None:
    folder = studio.folder / "damaged"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "whole.png")
    (folder / "whole.txt").write_text(CAPTION)
    (folder / "half.png").write_bytes((folder / "whole.png").read_bytes()[:60])
    (folder / "half.txt").write_text(CAPTION)
    go(page, "Data")
    open_folder(page, str(folder))
    page.get_by_role("status", name="About the pictures").get_by_text("half.png").first.wait_for()
    assert page.locator("[data-id]").count() == 2
    assert page.locator("[data-id='half.png']").get_by_role("img", name=re.compile("^broken")).is_visible()
