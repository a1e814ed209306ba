"""What the studio's pages are made of, without a browser: lists, rows, the kept base, views of runs."""

from __future__ import annotations

import contextvars
import http.cookiejar
import json
import os
import shutil
import threading
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spf_kit import embedded
from spf_kit.errors import UserError
from spf_kit.studio import found, lora_rows
from spf_kit.studio.ear import Ear
from spf_kit.studio.folders import Folders
from spf_kit.studio.kept_base import KeptBase
from spf_kit.studio.state import Studio

HOSTILE = '<img src=x onerror="alert(1)"> ${alert(2)} {{alert}} \' "'


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    (tmp_path / "given/runs").mkdir(parents=True)
    given = tmp_path / "given"
    return Studio(Folders([given, given / "runs"]), given / "runs")


def lora(path: Path) -> Path:
    """A LoRA file with one layer of the embedded base."""
    import torch
    from safetensors.torch import save_file

    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 128), f"{name}.lora_up.weight": torch.ones(48, 2)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors | {f"{name}.alpha": torch.tensor(2.0)}, path)
    return path


def a_run(studio: Studio, name: str, *, age: float = 0.0) -> Path:
    folder = studio.runs / name
    folder.mkdir()
    (folder / "config.toml").write_text('[attribute]\nname = "glasses"\ntarget = "wearing glasses"\n')
    os.utime(folder, (age, age))
    return folder


# --- what there is ----------------------------------------------------------------------------------------


def test_runs_are_listed_the_newest_first(studio: Studio, tmp_path: Path) -> None:
    for age, name in enumerate(["old", "middle", "new"]):
        a_run(studio, name, age=1000.0 + age)
    (studio.runs / "empty").mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.toml").write_text("")
    (studio.runs / "link").symlink_to(elsewhere)
    assert found.runs(studio) == ["new", "middle", "old"]


def test_loras_and_bases_are_told_apart_and_nothing_outside_is_listed(studio: Studio, tmp_path: Path) -> None:
    run = a_run(studio, "glasses")
    own = lora(run / "glasses.safetensors")
    lora(run / "checkpoints/step-000002/weights.safetensors")
    style = lora(studio.folders.roots[0] / "loras/style.safetensors")
    lora(studio.folders.roots[0] / ".hidden/secret.safetensors")
    (style.parent / "broken.safetensors").write_bytes(b"no tensors")
    outside = lora(tmp_path / "outside/lora.safetensors")
    (style.parent / "linked.safetensors").symlink_to(outside)
    (style.parent / "folder").symlink_to(outside.parent)
    shutil.copytree(embedded.base_path(), style.parent / "base")
    os.utime(own, (1, 1))
    assert found.loras(studio) == [
        ("loras/style.safetensors", str(style)),
        ("glasses/glasses.safetensors", str(own)),
    ]
    assert found.bases(studio) == [("embedded", "embedded"), ("loras/base", str(style.parent / "base"))]


def test_rows_become_the_command_lines_words(studio: Studio) -> None:
    one, two = (lora(studio.runs / f"{name}.safetensors") for name in ("one", "two"))
    paths = [str(one), None, f" {two} ", "", None, None]
    assert lora_rows.texts(studio, [*paths, 0.75, 1, -1, 1, 1, 1]) == [f"{one}:0.75", f"{two}:-1"]
    with pytest.raises(UserError, match="outside the studio's folders"):
        lora_rows.texts(studio, ["/etc/passwd", *[None] * 5, *[1] * 6])


def test_an_ear_keeps_sentences_and_hands_progress_on() -> None:
    heard: list[tuple[tuple[int, int], str]] = []
    ear = Ear(lambda done, desc: heard.append((done, desc)))
    ear.warn("careful")
    ear.show("done")
    ear.show(object())  # a table
    with ear.bar("drawing") as progress:
        progress(1, 4, "step 1")
    ear.finish({"a": 1})
    assert ear.text == "warning: careful\ndone"
    assert heard[-1] == ((1, 4), "drawing step 1")
    assert ear.result == {"a": 1}


def test_progress_of_threads_reaches_the_page_that_asked() -> None:
    """gradio finds the page in a context variable, which a thread does not have by itself."""
    page = contextvars.ContextVar("page", default="none")
    page.set("mine")
    heard: list[str] = []
    ear = Ear(lambda done, desc: heard.append(page.get()))
    with ear.bar("drawing") as progress:
        thread = threading.Thread(target=progress, args=(1, 2))
        thread.start()
        thread.join()
    assert heard == ["mine", "mine"]


def test_whatever_goes_wrong_is_said_as_the_command_line_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    from spf_kit.studio.answers import answering, wrong

    def fail(error: Exception) -> tuple[str, str]:
        raise error

    answer = answering(fail, 2)
    assert answer(UserError("no <run>"))[-1] == wrong("no <run>")
    assert "out of memory: lower [train] batch_size" in answer(MemoryError())[-1]
    assert "KeyError: &#x27;x&#x27; (a defect of spf-kit" in answer(KeyError("x"))[-1]
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "no <run>" not in said


# --- the base that is kept --------------------------------------------------------------------------------


def test_a_base_is_opened_once_and_again_after_something_went_wrong(studio: Studio) -> None:
    kept = KeptBase(studio.folders)
    with kept.lent() as load:
        first = load(None)
    with kept.lent() as load:
        assert load("embedded", metadata={}) is first

    def fail() -> None:
        with kept.lent() as load:
            load(None)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with kept.lent() as load:
        assert load(None) is not first


def test_a_stopped_drawing_ends_at_its_next_step_and_leaves_the_base_as_it_was(
    studio: Studio, tmp_path: Path
) -> None:
    from spf_kit import workflow
    from spf_kit.errors import Interrupted

    kept, stop = KeptBase(studio.folders), threading.Event()
    calls: list[str] = []

    def hear(done: tuple[int, int], desc: str) -> None:
        calls.append(desc)
        if "step 2 of" in desc:
            stop.set()

    def draw(name: str, ear: Ear, loras: list[str], steps: int) -> bytes:
        with kept.lent() as load:
            workflow.sample(
                loras, base=None, prompts=["a portrait"], prompts_file=None, strengths="1", size=None,
                dtype=None, quantize=None, output=tmp_path / name, overwrite=False, console=ear, load=load,
                steps=steps,
            )  # fmt: skip
        assert ear.result is not None
        return Path(ear.result["pictures"][0]["file"]).read_bytes()

    before = draw("before", Ear(), [], 2)
    with kept.lent() as load:
        base = load(None)
    style = lora(studio.folders.roots[0] / "style.safetensors")
    with pytest.raises(Interrupted, match="stopped: nothing was kept"):
        draw("stopped", Ear(hear, stop), [str(style)], 900)
    assert not list(tmp_path.glob("stopped/*.png"))
    assert "step 2 of" in calls[-1]
    with kept.lent() as load:
        assert load(None) is base
    assert draw("after", Ear(), [], 2) == before


def test_each_page_stops_its_own_work() -> None:
    from spf_kit.studio.stopping import Stops

    one, two = (SimpleNamespace(session_hash=name) for name in ("one", "two"))
    stops: Any = Stops()
    stops.stop(one)  # of which there is none
    first, other = stops.begin(one), stops.begin(two)
    assert stops.of(one) is first
    stops.stop(one)
    assert (first.is_set(), other.is_set()) == (True, False)
    stops.end(one)
    assert not stops.of(one).is_set()


def test_a_base_is_lent_to_one_at_a_time(studio: Studio) -> None:
    kept = KeptBase(studio.folders)
    order: list[str] = []
    started = threading.Event()

    def second() -> None:
        started.set()
        with kept.lent():
            order.append("second")

    with kept.lent():
        thread = threading.Thread(target=second)
        thread.start()
        started.wait()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_base_outside_is_refused_also_when_a_lora_names_it(studio: Studio, tmp_path: Path) -> None:
    outside = Path(shutil.copytree(embedded.base_path(), tmp_path / "outside"))
    kept = KeptBase(studio.folders)
    metadata = {"spf_kit.config": f'[base]\nmodel = "{outside.as_posix()}"\n'}
    with kept.lent() as load, pytest.raises(UserError, match="outside the studio's folders"):
        load(str(outside))
    with kept.lent() as load, pytest.raises(UserError, match="outside the studio's folders"):
        load(None, metadata=metadata)


# --- runs -------------------------------------------------------------------------------------------------


def preview(folder: Path, step: int, prompts: list[str]) -> None:
    from PIL import Image

    from spf_kit.training import records

    url = records.data_url(Image.new("RGB", (8, 8), (step, 0, 0)))
    maps = [records.Map(label=HOSTILE, kind="phrase", picture=records.veil([[0.5]]))]
    cases = [records.Case(prompt=text, seed=1, asked=url, plain=url, maps=maps) for text in prompts]
    record = records.PreviewRecord(step=step, target="t", steps=2, cfg=1.0, cases=cases)
    records.save(record, records.preview_file(folder, step))


def test_previews_are_found_by_step(studio: Studio) -> None:
    from spf_kit.studio.runs_view import NO_MAP, Previews

    folder = a_run(studio, "glasses")
    assert Previews.of(folder).prompts == []
    for step in (0, 100, 250):
        preview(folder, step, ["a portrait"])
    (folder / "report/previews/step-x.json").write_text("{}")
    own = Previews.of(folder)
    assert own.steps == [0, 100, 250]
    assert own.stride == 50
    assert [own.at(step).step for step in (0, 49, 51, 240, 999)] == [0, 0, 100, 250, 250]  # type: ignore[union-attr]
    assert own.maps("1 a portrait") == [HOSTILE, NO_MAP]
    (folder / "report/previews/step-000250.json").write_text("{damaged")
    assert Previews.of(folder).at(250) is None


def test_nobodys_text_becomes_markup(studio: Studio) -> None:
    from spf_kit.report.reader import gather
    from spf_kit.studio import runs_view

    folder = a_run(studio, "glasses")
    (folder / "config.toml").write_text(
        f"[attribute]\nname = 'glasses'\ntarget = '''{HOSTILE}'''\n[train]\nsteps = 4\n"
        f"[[loss]]\nid = '''{HOSTILE}'''\nplugin = 'denoising'\nweight = 1.0\n"
    )
    line = {"step": 1, "loss": 0.5, "terms": {HOSTILE: 0.5}, "seconds": 0.5, "learning_rate": 0.1}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    preview(folder, 0, [HOSTILE])
    preview(folder, 2, [HOSTILE])
    run = gather(folder, pictures=False)
    own = runs_view.Previews.of(folder)
    shown = [
        runs_view.heads([run], [True]),
        runs_view.heads([run, run], [False, False]),
        runs_view.plots([run]),
        runs_view.plots([run, run]),
        runs_view.pictures([own], ["glasses"], None, HOSTILE, 2),
        runs_view.pictures([own, own], [HOSTILE, "other"], None, HOSTILE, 2),
    ]
    for html in shown:
        assert "onerror" in html
        assert "<img src=x" not in html
        assert 'onerror="' not in html
        assert "<script" not in html
    assert "step 1 of 4, going on; loss 0.5000, 2.00 steps/s" in shown[0]
    assert shown[4].count('class="veil"') == 1


def test_the_report_is_for_those_who_have_signed_in(tmp_path: Path) -> None:
    from driving import Running

    pytest.importorskip("gradio")
    (tmp_path / "runs/glasses").mkdir(parents=True)
    (tmp_path / "runs/glasses/config.toml").write_text('[attribute]\nname = "glasses"\ntarget = "glasses"\n')
    studio = Running(tmp_path, "--password", "open sesame").start()
    try:
        address = f"{studio.url}/report?run=glasses"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(address)
        jar = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
        person = urllib.request.build_opener(jar)
        form = urllib.parse.urlencode({"username": "me", "password": "open sesame"}).encode()
        person.open(f"{studio.url}/login", form).read()
        answer = person.open(address)
        assert "Verdict" in answer.read().decode()
        assert answer.headers["Content-Security-Policy"] == "sandbox allow-scripts"
    finally:
        studio.stop()


def test_a_run_on_a_lora_outside_is_not_shared(studio: Studio, tmp_path: Path) -> None:
    from spf_kit.studio.share_part import _share

    outside = lora(tmp_path / "outside.safetensors")
    run = a_run(studio, "glasses")
    with (run / "config.toml").open("a") as config:
        config.write(f'[adapter]\non = ["{outside.as_posix()}:0.5"]\n')
    values = ("glasses", "", 1, "", "", "", False, "", False)
    with pytest.raises(UserError, match="outside the studio's folders"):
        _share(studio, values, None)
