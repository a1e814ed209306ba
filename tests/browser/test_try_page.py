"""The pages "Try" and "Merge and share" with the LoRA of a short run, beside what the commands write."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from driving import NARROW, Running, choose, few_steps, go, nameless, region, shoot, train, unfold
from PIL import Image

from spf_kit.sampling.png_info import parse

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PROMPTS = "a portrait, red hair, wearing glasses\na portrait, blue hoodie"
LORA = "glasses/glasses.safetensors"


@pytest.fixture(scope="module")
def folder(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("studio")
    train(made / "runs/glasses", "--recipe", "naive")
    return made


def draw(page: Page, *, prompts: str = PROMPTS, **numbers: str) -> None:
    page.get_by_label("Prompts", exact=False).first.fill(prompts)
    for label, value in numbers.items():
        page.get_by_role("spinbutton", name=label.replace("_", " "), exact=True).fill(value)
    page.get_by_role("button", name="Draw", exact=True).click()


def test_base_and_lora_are_drawn_under_the_handle_and_saved_as_the_command_line_would(
    page: Page, studio: Running, spf_kit: Callable[..., object]
) -> None:
    go(page, "Try")
    choose(page, "LoRA 1", LORA)
    page.get_by_role("spinbutton", name="number input for Strength of LoRA 1").fill("0.75")
    few_steps(page)
    draw(page, Seed_of_the_first_picture="7")
    page.get_by_text("4 pictures are drawn").wait_for()
    shown = region(page, "Base beside LoRA")
    base = shown.get_by_alt_text("base model: a portrait, red hair, wearing glasses, seed 7")
    lora = shown.get_by_alt_text("with LoRA: a portrait, red hair, wearing glasses, seed 7")
    assert base.get_attribute("src") != lora.get_attribute("src")

    handle = shown.get_by_role("slider", name="How much of the left picture shows")
    middle = lora.evaluate("one => getComputedStyle(one).clipPath")
    handle.press("End")
    assert lora.evaluate("one => getComputedStyle(one).clipPath") != middle
    choose(page, "Picture", "seed 7: a portrait, blue hoodie")
    shown.get_by_alt_text("with LoRA: a portrait, blue hoodie, seed 7").wait_for()
    shoot(page, "try")
    assert nameless(page) == []

    page.get_by_role("button", name="Save all pictures with their parameters").click()
    page.get_by_text("4 pictures are saved in").wait_for()
    options = ("--prompt", PROMPTS.splitlines()[0], "--prompt", PROMPTS.splitlines()[1], "--seed", "7")
    weighted = f"{studio.runs / LORA}:0.75"
    spf_kit("sample", weighted, *options, "--steps", "2", "--strength", "0,1", "--output", "same")
    saved = {file.name: Image.open(file) for file in (studio.folder / "samples").glob("*.png")}
    assert len(saved) == 4
    for name, picture in saved.items():
        same = Image.open(Path("same") / name)
        assert picture.text == same.text  # type: ignore[attr-defined]
        assert picture.tobytes() == same.tobytes()
    told = parse(saved["001-a-portrait-red-hair-wearing-glasses-strength-0.75-seed-7.png"].text["parameters"])  # type: ignore[attr-defined]
    assert told["Prompt"].endswith("<lora:glasses:0.75>")

    page.get_by_role("button", name="Save all pictures with their parameters").click()
    page.get_by_role("alert").get_by_text("exists").wait_for()
    page.get_by_label("Replace files of the same names").check()
    page.get_by_role("button", name="Save all pictures with their parameters").click()
    page.get_by_text("4 pictures are saved in").wait_for()


def test_several_loras_act_together(page: Page) -> None:
    go(page, "Try")
    choose(page, "LoRA 1", LORA)
    page.get_by_role("button", name="Add another LoRA").locator("visible=true").click()
    choose(page, "LoRA 2", LORA)
    page.get_by_role("spinbutton", name="number input for Strength of LoRA 2").fill("-1")
    few_steps(page)
    draw(page, prompts="a portrait")
    page.get_by_text("2 pictures are drawn").wait_for()
    shown = region(page, "Base beside LoRA")
    # a LoRA and its opposite are nothing, up to rounding, which lossless pictures may show
    pixels = """async (one) => {
      await one.decode();
      const canvas = new OffscreenCanvas(one.naturalWidth, one.naturalHeight);
      const brush = canvas.getContext("2d");
      brush.drawImage(one, 0, 0);
      return Array.from(brush.getImageData(0, 0, canvas.width, canvas.height).data);
    }"""
    base = shown.get_by_alt_text("base model").evaluate(pixels)
    both = shown.get_by_alt_text("with LoRA").evaluate(pixels)
    assert len(base) == 64 * 64 * 4
    assert max(abs(a - b) for a, b in zip(base, both)) <= 2


def test_a_drawing_is_stopped_and_another_begun(page: Page) -> None:
    go(page, "Try")
    stop = page.get_by_role("button", name="Stop drawing")
    steps = page.get_by_role("spinbutton", name="Sampler steps")
    unfold(page, "Base model and sampler", steps)
    assert stop.is_disabled()
    steps.fill("900")
    draw(page, prompts="a portrait", Pictures_of_each_prompt="60")
    page.get_by_text(re.compile("drawing step [0-9]+ of 900")).wait_for()
    stop.click()
    page.get_by_text("stopped: nothing was kept").wait_for()
    button = page.get_by_role("button", name="Draw", exact=True)
    page.wait_for_function(
        "button => !button.disabled && document.activeElement === button", arg=button.element_handle()
    )
    assert stop.is_disabled()
    steps.fill("2")
    draw(page, prompts="a portrait", Pictures_of_each_prompt="1")
    page.get_by_text("1 pictures are drawn").wait_for()


def test_what_cannot_be_drawn_is_refused_where_it_was_asked(page: Page) -> None:
    go(page, "Try")
    few_steps(page)
    told = page.get_by_role("status", name="Drawing").get_by_role("alert")
    draw(page, prompts="")
    told.get_by_text("a prompt is empty or missing").wait_for()
    for label, value, good, sentence in (
        ("Pictures_of_each_prompt", "0", "1", "--count must be at least 1, not 0"),
        ("Seed_of_the_first_picture", "-1", "0", "--seed must be between 0 and 4294967295, not -1"),
        ("Sampler_steps", "0", "2", "--steps must be at least 1, not 0"),
    ):
        draw(page, **{label: value})
        told.get_by_text(sentence).wait_for()
        page.get_by_role("spinbutton", name=label.replace("_", " "), exact=True).fill(good)
    assert region(page, "Base beside LoRA").inner_text() == ""


def test_a_lora_outside_the_folders_and_one_that_is_none_are_refused(
    page: Page, studio: Running, tmp_path: Path
) -> None:
    go(page, "Try")
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes((studio.runs / LORA).read_bytes())
    linked, broken = studio.folder / "linked.safetensors", studio.folder / "broken.safetensors"
    linked.symlink_to(outside)
    broken.write_bytes(b"no tensors")
    for path, sentence in (
        (outside, f"'{outside}' is outside the studio's folders"),
        (linked, f"'{linked}' is outside the studio's folders"),
        (broken, str(broken)),
    ):
        field = page.get_by_role("combobox", name="LoRA 1", exact=True)
        field.fill(str(path))
        field.press("Enter")
        draw(page)
        page.get_by_role("alert").get_by_text(sentence).wait_for()
    assert region(page, "Base beside LoRA").inner_text() == ""


def test_a_merge_is_checked_and_written(page: Page, studio: Running) -> None:
    go(page, "Merge and share")
    page.get_by_role("button", name="Merge", exact=True).click()
    page.get_by_role("alert").get_by_text("there is nothing to merge").wait_for()
    choose(page, "LoRA 1", LORA)
    page.get_by_role("button", name="Merge", exact=True).click()
    told = page.get_by_role("status", name="Merging")
    told.get_by_text("tensors changed by glasses.safetensors (1)").wait_for()
    assert "base + LoRA at run time and merged differ by" in told.inner_text()
    assert (studio.folder / "merged.safetensors").is_file()
    page.get_by_role("button", name="Merge", exact=True).click()
    told.get_by_role("alert").get_by_text("exists").wait_for()
    page.get_by_label("File to write").fill("/tmp/elsewhere.safetensors")
    page.get_by_role("button", name="Merge", exact=True).click()
    told.get_by_role("alert").get_by_text("outside the studio's folders").wait_for()


def test_several_loras_become_one_of_the_rank_that_is_asked(page: Page, studio: Running) -> None:
    from spf_kit.adapters.index import index

    go(page, "Merge and share")
    rank = page.get_by_role("spinbutton", name="Rank of the result")
    assert not rank.is_visible()
    choose(page, "Into", "no checkpoint: several LoRAs become one")
    rank.fill("3")
    choose(page, "LoRA 1", LORA)
    page.get_by_role("button", name="Add another LoRA").locator("visible=true").click()
    choose(page, "LoRA 2", LORA)
    page.get_by_label("File to write").fill(str(studio.folder / "one.safetensors"))
    page.get_by_role("button", name="Merge", exact=True).click()
    page.get_by_role("status", name="Merging").get_by_text("one.safetensors").wait_for()
    assert {layer.rank for layer in index(studio.folder / "one.safetensors").layers.values()} == {3}


def test_the_folder_to_share_is_written_and_shown(page: Page, studio: Running) -> None:
    go(page, "Merge and share")
    page.get_by_role("button", name="Write the folder").click()
    page.get_by_role("alert").get_by_text("no run is chosen").wait_for()
    choose(page, "Run to share", "glasses")
    page.get_by_role("spinbutton", name="Pictures").fill("2")
    page.get_by_role("button", name="Write the folder").click()
    page.get_by_text(f"ready to upload: {studio.runs / 'glasses/share'}").wait_for()
    pictures = region(page, "Pictures of the card").get_by_role("img")
    assert pictures.count() == 2
    page.get_by_role("heading", name="Measured").wait_for()
    assert page.get_by_role("cell", name="images/1.png").is_visible()
    shoot(page, "merge-and-share")
    assert nameless(page) == []
    there = {file.name for file in (studio.runs / "glasses/share").rglob("*") if file.is_file()}
    assert there == {"README.md", "glasses.safetensors", "1.png", "2.png"}


def test_it_fits_on_a_phone(open_page: Callable[..., Page]) -> None:
    page = open_page(None, NARROW)
    for name in ("Try", "Merge and share"):
        go(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") <= NARROW[0]
        shoot(page, f"{name.split()[0].lower()}-phone")


def test_nothing_is_left_between_the_models_and_the_next_drawing(page: Page) -> None:
    """The base that is kept open is the base again after a LoRA was on it: its picture is the same."""
    go(page, "Try")
    few_steps(page)
    shown = region(page, "Base beside LoRA")
    sources = []
    for lora in (True, False):
        if lora:
            choose(page, "LoRA 1", LORA)
        else:
            page.get_by_role("combobox", name="LoRA 1", exact=True).fill("")
            page.get_by_role("combobox", name="LoRA 1", exact=True).press("Tab")
        draw(page, prompts="a portrait, sad")
        page.get_by_text("2 pictures are drawn" if lora else "1 pictures are drawn").wait_for()
        sources.append(shown.get_by_alt_text("base model: a portrait, sad, seed 0").get_attribute("src"))
    assert sources[0] == sources[1]
