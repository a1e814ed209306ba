"""The page "Runs": two short runs, their curves, previews and maps, side by side, and their reports."""

from __future__ import annotations

import json
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from driving import NARROW, Running, choose, go, nameless, region, shoot, train

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

MAPS = ["control_map", "attention to the target", "changed when asked", "changed when not asked"]


@pytest.fixture(scope="module")
def folder(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("studio")
    train(made / "runs/first", "--recipe", "naive")
    shutil.copytree(made / "runs/first", made / "runs/second")
    (made / "runs/second/report.html").unlink()
    (made / "runs/broken").mkdir()
    (made / "runs/broken/config.toml").write_text("[attribute")
    return made


def test_a_run_shows_its_figures_curves_previews_and_maps(page: Page) -> None:
    go(page, "Runs")
    choose(page, "Run", "first")
    progress = region(page, "Progress")
    progress.get_by_text("finished: 4 steps").wait_for()
    assert "first" in progress.inner_text()
    assert "loss" in progress.inner_text()
    assert region(page, "What was measured").get_by_role("row").count() == 4  # head, base, naive, this one
    assert region(page, "Curves").get_by_role("heading", name="term denoising").is_visible()
    asked = region(page, "Previews").get_by_role("figure", name="asked, step 4", exact=True)
    assert asked.get_by_role("img").count() == 2  # the picture and the map over it
    shoot(page, "runs")


def test_the_map_and_the_step_change_the_pictures(page: Page, studio: Running) -> None:
    go(page, "Runs")
    choose(page, "Run", "first")
    shown = region(page, "Previews")
    record = json.loads((studio.runs / "first/report/previews/step-000004.json").read_text())
    labels = {one["label"]: one["picture"] for one in record["cases"][0]["maps"]}
    assert set(MAPS) <= set(labels)
    for name in MAPS:
        page.get_by_role("radio", name=name, exact=True).check()
        veil = shown.get_by_alt_text(f"{name} over it")
        veil.wait_for()
        assert veil.get_attribute("src") == labels[name]
    page.get_by_role("radio", name="no map").check()
    shown.locator(".veil").first.wait_for(state="detached")
    assert page.get_by_role("group", name="Map over the picture").is_visible()
    slider = page.get_by_role("slider", name="Step of the preview")
    assert slider.input_value() == "4"
    slider.press("ArrowLeft")
    shown.get_by_role("figure", name="not asked, step 2", exact=True).wait_for()
    slider.press("ArrowLeft")
    shown.get_by_role("figure", name="asked, base model", exact=True).wait_for()
    base = json.loads((studio.runs / "first/report/previews/step-000000.json").read_text())
    drawn = shown.get_by_alt_text(re.compile("^asked, base model")).get_attribute("src")
    assert drawn == base["cases"][0]["asked"]


def test_another_prompt_brings_its_own_pictures_and_maps(page: Page, studio: Running) -> None:
    go(page, "Runs")
    choose(page, "Run", "first")
    cases = json.loads((studio.runs / "first/report/previews/step-000004.json").read_text())["cases"]
    choose(page, "Prompt and seed", f"{cases[1]['prompt']} (seed {cases[1]['seed']})")
    picture = region(page, "Previews").get_by_alt_text(f"asked, step 4: {cases[1]['prompt']}", exact=True)
    picture.wait_for()
    assert picture.get_attribute("src") == cases[1]["asked"]
    phrases = [one["label"] for one in cases[1]["maps"] if one["kind"] == "phrase"]
    page.get_by_role("radio", name=phrases[-1], exact=True).wait_for()
    radios = page.get_by_role("radio").evaluate_all("all => all.map(one => one.value)")
    assert set(radios) == {one["label"] for one in cases[1]["maps"]} | {"no map"}


def test_two_runs_stand_side_by_side(page: Page) -> None:
    go(page, "Runs")
    choose(page, "Run", "first")
    region(page, "Progress").get_by_text("finished").wait_for()
    choose(page, "Compare with", "second")
    shown = region(page, "Previews")
    shown.get_by_role("figure", name="second, asked, step 4", exact=True).wait_for()
    assert shown.get_by_role("figure", name="first, asked, step 4", exact=True).is_visible()
    assert region(page, "What was measured").get_by_role("rowheader", name="second").is_visible()
    figure = region(page, "Curves").get_by_role("figure").filter(has_text="term denoising")
    assert re.search(
        r"first from \S+ at step 1 to .* second from",
        figure.get_by_role("img").first.get_attribute("aria-label") or "",
    )
    assert nameless(page) == []
    with page.context.expect_page() as opened:
        page.get_by_role("link", name="Open the report of these runs side by side").click()
    opened.value.get_by_role("heading", name="2 runs side by side").wait_for()
    shoot(page, "runs-compared")


def test_the_report_opens_and_is_built_when_there_is_none(page: Page, studio: Running) -> None:
    go(page, "Runs")
    for name in ("first", "second"):
        choose(page, "Run", name)
        link = page.get_by_role("link", name="Open the report")
        page.locator(f'a[href$="run={name}"]').wait_for()
        with page.context.expect_page() as opened:
            link.click()
        report = opened.value
        report.get_by_role("heading", name="Verdict").wait_for()
        assert report.evaluate("window.origin") == "null"  # whatever its script does, it is not the studio's
        report.close()
    assert (studio.runs / "second/report.html").is_file()


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("run=../..", "outside the studio's folders"),
        ("run=absent", "is not a run folder"),
        ("run=broken", "is not a run folder"),
        ("", "no run is named"),
    ],
)
def test_other_addresses_are_refused(studio: Running, query: str, sentence: str) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404") as refused:
        urllib.request.urlopen(f"{studio.url}/report?{query}")
    assert sentence in refused.value.read().decode()


def test_a_broken_run_is_told_and_the_others_stay(page: Page) -> None:
    go(page, "Runs")
    choose(page, "Run", "broken")
    page.get_by_role("alert").get_by_text("broken' is not a run folder").wait_for()
    choose(page, "Run", "first")
    region(page, "Progress").get_by_text("finished: 4 steps").wait_for()
    assert page.get_by_role("alert").count() == 0


def test_what_is_new_on_the_disk_appears_by_itself(page: Page, studio: Running) -> None:
    """A run that goes on: a step more, another preview; the page follows without a touch."""
    grown = studio.runs / "grown"
    shutil.copytree(studio.runs / "first", grown)
    lora = next(grown.glob("*.safetensors"))
    kept = lora.read_bytes()
    lora.unlink()
    lines = (grown / "metrics.jsonl").read_text().splitlines(keepends=True)
    (grown / "metrics.jsonl").write_text("".join(lines[:3]))
    newest = grown / "report/previews/step-000004.json"
    preview = newest.read_bytes()
    newest.unlink()
    try:
        go(page, "Runs")
        choose(page, "Run", "grown")
        region(page, "Progress").get_by_text("step 3 of 4: not finished").wait_for()
        shown = region(page, "Previews")
        shown.get_by_role("figure", name="asked, step 2", exact=True).wait_for()
        bar = region(page, "Progress").get_by_role("progressbar")
        assert bar.get_attribute("value") == "3"
        newest.write_bytes(preview)
        (grown / "metrics.jsonl").write_text("".join(lines))
        lora.write_bytes(kept)
        region(page, "Progress").get_by_text("finished: 4 steps").wait_for()
        shown.get_by_role("figure", name="asked, step 4", exact=True).wait_for()
    finally:
        shutil.rmtree(grown)


def test_a_strangers_texts_stay_texts(page: Page, studio: Running) -> None:
    hostile = '<img src=x onerror="window.hit=1"> ${window.hit=1} {{hit}} `'
    folder = studio.runs / "hostile"
    shutil.copytree(studio.runs / "first", folder)
    try:
        config = (folder / "config.toml").read_text()
        assert '"wearing glasses"' in config
        (folder / "config.toml").write_text(config.replace('"wearing glasses"', f"'''{hostile}'''"))
        for file in (folder / "report/previews").glob("*.json"):
            record = json.loads(file.read_text())
            for case in record["cases"]:
                case["prompt"] = hostile
            file.write_text(json.dumps(record))
        go(page, "Runs")
        choose(page, "Run", "hostile")
        region(page, "Progress").get_by_text(hostile).wait_for()
        region(page, "Previews").get_by_alt_text(f"asked, step 4: {hostile}").first.wait_for()
        assert page.evaluate("window.hit") is None
    finally:
        shutil.rmtree(folder)


def test_it_fits_on_a_phone(open_page: Callable[..., Page]) -> None:
    page = open_page("Runs", NARROW)
    choose(page, "Run", "first")
    region(page, "Progress").get_by_text("finished: 4 steps").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= NARROW[0]
    shoot(page, "runs-phone")
