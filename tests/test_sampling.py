"""Pictures: the same as diffusers' own, whatever is drawn beside; the grid, its files, their parameters."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from spf_kit import embedded, families, parallel, sampling, schema
from spf_kit.adapters import files
from spf_kit.adapters.inject import AdapterHandle
from spf_kit.errors import UserError
from spf_kit.sampling import GridSettings, SampleLora, contact_sheet, generate, png_info, sample_loras
from spf_kit.sampling.png_info import LoraUse, PictureInfo
from spf_kit.sampling.settings import file_name, strength_names

PROMPTS = ["a portrait, red hoodie, sad", "a portrait, blue background", "a portrait, red hoodie, sad"]


@pytest.fixture(scope="module")
def family() -> Any:
    return families.load(schema.Base(model="embedded"))


@pytest.fixture(scope="module")
def lora(family: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA file strong enough to change pictures."""
    handle = AdapterHandle.inject(family, schema.Adapter(rank=2), name="made")
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in handle.named_parameters():
            if name.endswith(".up"):
                parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.3)
    path = tmp_path_factory.mktemp("lora") / "my glasses.safetensors"
    files.write(handle.to_lora_file({"modelspec.title": "test"}), path, dtype="float32")
    handle.remove()
    return path


def users_picture(
    prompt: str, seed: int, scheduler: Any, lora: Path | None = None, **settings: Any
) -> Tensor:
    """What a user of diffusers gets."""
    pipeline = StableDiffusionPipeline.from_pretrained(embedded.base_path(), torch_dtype=torch.float32)
    pipeline.scheduler = type(scheduler).from_config(scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    generator = torch.Generator().manual_seed(seed)
    return pipeline(prompt, generator=generator, output_type="pt", **settings).images


# --- generate ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["ddim", "euler_a"])  # the second adds noise at each step
def test_same_picture_as_the_diffusers_pipeline(family: Any, scheduler: str) -> None:
    drawn = generate(
        family, PROMPTS, [7, 8, 9], negative="sad", steps=3, cfg=4.0, scheduler=scheduler, batch_size=3
    )
    assert drawn.shape == (3, 3, 64, 64)
    assert drawn.dtype == torch.float32
    assert 0 <= drawn.min() < drawn.max() <= 1
    expected = users_picture(
        PROMPTS[1], 8, family.pipeline(scheduler).scheduler, negative_prompt="sad", num_inference_steps=3,
        guidance_scale=4.0,
    )  # fmt: skip
    assert torch.allclose(drawn[1:2], expected, atol=1e-4)
    assert not torch.allclose(drawn[0], drawn[2], atol=0.01), "another seed must give another picture"


def test_a_picture_depends_on_nothing_drawn_beside_it(family: Any) -> None:
    state = torch.get_rng_state()
    together = generate(family, PROMPTS, [1, 2, 3], steps=2, batch_size=3)
    alone = generate(family, PROMPTS[1:2], [2], steps=2)
    one_by_one = generate(family, PROMPTS, [1, 2, 3], steps=2, batch_size=1)
    assert torch.equal(torch.get_rng_state(), state), "the global random state was used"
    assert torch.allclose(together[1:2], alone, atol=1e-4)
    assert torch.allclose(together, one_by_one, atol=1e-4)


def test_each_prompt_is_encoded_once_and_no_guidance_needs_no_negative(
    family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    encode_text = family.encode_text

    def spy(captions: list[str], **options: Any) -> Any:
        encoded.extend(captions)
        assert options == {"clip_skip": 2, "chunks": 1}
        return encode_text(captions, **options)

    monkeypatch.setattr(family, "encode_text", spy)
    first = generate(family, PROMPTS, [1, 2, 3], steps=1, negative="sad", clip_skip=2)
    assert sorted(encoded) == sorted({*PROMPTS, "sad"})
    encoded.clear()
    second = generate(family, PROMPTS, [1, 2, 3], steps=1, negative="sad", cfg=1.0, clip_skip=2)
    assert sorted(encoded) == sorted(set(PROMPTS))
    assert not torch.allclose(first, second, atol=1e-3)


def test_dropout_is_off_and_modes_come_back(family: Any) -> None:
    handle = AdapterHandle.inject(family, schema.Adapter(rank=1, dropout=0.9), name="dropping")
    try:
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.fill_(0.1)
        family.unet.train()
        family.unet.conv_in.eval()
        a, b = (generate(family, PROMPTS[:1], [1], steps=1) for _ in range(2))
        assert torch.equal(a, b)
        assert family.unet.training
        assert not family.unet.conv_in.training
    finally:
        family.unet.eval()
        handle.remove()


def test_progress_counts_pictures(family: Any) -> None:
    seen: list[tuple[int, int]] = []
    generate(
        family, PROMPTS, [1, 2, 3], steps=2, batch_size=2,
        progress=lambda done, total, text: seen.append((done, total)),
    )  # fmt: skip
    assert seen == sorted(seen)
    assert seen[-1] == (3, 3)
    assert len(seen) >= 4


def test_nan_is_told(family: Any) -> None:
    bias = family.vae.decoder.conv_out.bias
    kept = bias.data.clone()
    try:
        bias.data.fill_(float("nan"))
        with pytest.raises(UserError, match=r"NaN in float32.*base\.dtype"):
            generate(family, PROMPTS[:1], [1], steps=1)
    finally:
        bias.data.copy_(kept)


def test_wrong_settings_are_refused(family: Any) -> None:
    with pytest.raises(UserError, match="width must be a multiple of 8 pixels, not 65"):
        generate(family, ["a"], [1], width=65)
    with pytest.raises(UserError, match="dim"):
        generate(family, ["a"], [1], scheduler="dim")
    with pytest.raises(ValueError, match="2 prompts but 1 seeds"):
        generate(family, ["a", "b"], [1])
    assert generate(family, [], []).shape[0] == 0


def test_another_size(family: Any) -> None:
    assert generate(family, ["a"], [1], steps=1, width=48, height=80).shape == (1, 3, 80, 48)


# --- side by side -----------------------------------------------------------------------------------------


def test_batches_come_in_order_and_the_thread_count_comes_back() -> None:
    threads = torch.get_num_threads()
    barrier = threading.Barrier(2, timeout=10)  # passes only if two really run at once

    def work(item: int) -> tuple[int, int]:
        if item < 2:
            barrier.wait()
        return item * item, torch.get_num_threads()

    assert list(parallel.in_order(work, range(5), 2)) == [(n * n, 1) for n in range(5)]
    assert torch.get_num_threads() == threads
    assert parallel.split(5, 4, 1) == [range(4), range(4, 5)]
    assert parallel.split(6, 16, 2) == [range(3), range(3, 6)]
    assert parallel.split(0, 16, 2) == []


def test_an_error_stops_what_runs_beside() -> None:
    stop = threading.Event()

    def work(item: int) -> bool:
        if item == 0:
            raise UserError("the first is wrong")
        return stop.wait(timeout=20)

    with pytest.raises(UserError, match="the first is wrong"):
        list(parallel.in_order(work, range(4), 2, stop=stop))
    assert stop.is_set()


def test_lanes_only_for_small_models() -> None:
    assert parallel.lanes(torch.nn.Linear(2, 2)) >= 1
    assert parallel.lanes(torch.nn.Linear(6000, 6000, bias=False)) == 1
    assert parallel.lanes(torch.nn.Linear(2, 2, device="meta")) == 1


# --- the grid ---------------------------------------------------------------------------------------------


def test_the_grid(family: Any, lora: Path, tmp_path: Path) -> None:
    settings = GridSettings(PROMPTS[:2], [0.0, 0.5, 1.0], seed=5, count=2, steps=2, cfg=3.0, negative="sad")
    seen: list[tuple[int, int]] = []
    told = sample_loras(
        family, [SampleLora(lora)], settings, tmp_path / "out", progress=lambda d, t, _: seen.append((d, t))
    )
    json.dumps(told, allow_nan=False)
    assert len(told["pictures"]) == 2 * 3 * 2
    assert {Path(p["file"]).name for p in told["pictures"]} | {"grid.png"} == {
        p.name for p in (tmp_path / "out").iterdir()
    }
    assert seen[-1] == (12, 12)
    assert "my_glasses" not in str(list(family.unet.named_modules())), "the adapter is gone"

    by = {(p["prompt"], p["strength"], p["seed"]): Image.open(p["file"]) for p in told["pictures"]}
    texts = [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2  # the same batch: rounding differs between batches
    base = sampling.to_pil(generate(family, texts, [5, 6, 5, 6], steps=2, cfg=3.0, negative="sad"))[3]
    assert by[PROMPTS[1], 0.0, 6].tobytes() == base.tobytes(), "strength 0 is the base"
    assert len({by[PROMPTS[1], s, 6].tobytes() for s in (0.0, 0.5, 1.0)}) == 3

    found = a1111_parse(by[PROMPTS[1], 0.5, 6].text["parameters"])
    assert found["Prompt"] == f"{PROMPTS[1]} <lora:my glasses:0.5>"
    assert found["Negative prompt"] == "sad"
    expected = {"Steps": "2", "Sampler": "DDIM", "CFG scale": "3", "Seed": "6", "Size-1": "64"}
    assert {key: found[key] for key in expected} == expected
    assert found["Model hash"] == family.base_hash()[:10]
    assert found["Lora hashes"] == f"my glasses: {tensor_hash(lora)[:12]}"
    assert "lora" not in by[PROMPTS[1], 0.0, 6].text["parameters"].lower()

    grid = Image.open(told["grid"])
    cell = contact_sheet.enlarged(base).width
    assert grid.width > 3 * cell
    assert grid.height > 4 * cell
    with pytest.raises(UserError, match="exists"):
        sample_loras(family, [SampleLora(lora)], settings, tmp_path / "out")


def test_the_same_picture_as_diffusers_with_the_lora(family: Any, lora: Path, tmp_path: Path) -> None:
    settings = GridSettings(PROMPTS[:1], steps=3, seed=11, cfg=4.0)
    told = sample_loras(family, [SampleLora(lora)], settings, tmp_path / "out")
    expected = users_picture(
        PROMPTS[0], 11, family.pipeline("ddim").scheduler, lora, num_inference_steps=3, guidance_scale=4.0
    )
    drawn = torch.frombuffer(bytearray(Image.open(told["pictures"][0]["file"]).tobytes()), dtype=torch.uint8)
    drawn = drawn.view(64, 64, 3).permute(2, 0, 1) / 255
    assert torch.allclose(drawn, expected[0], atol=0.6 / 255)


def test_wrong_grids_write_nothing(family: Any, lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cases = [
        (GridSettings([]), "prompt is empty"),
        (GridSettings(["a", " "]), "prompt is empty"),
        (GridSettings(["a"], []), "no strength"),
        (GridSettings(["a"], count=0), "--count"),
        (GridSettings(["a"], steps=0), "--steps must be at least 1, not 0"),
        (GridSettings(["a"], steps=999), "--steps must be at most 998, not 999"),
        (GridSettings(["a"], cfg=-1), "--cfg"),
        (GridSettings(["a"], seed=-1), "--seed"),
        (GridSettings(["a"], seed=2**32), "--seed"),
        (GridSettings(["a"], scheduler="none"), "unknown scheduler"),
        (GridSettings(["a"], width=12), "multiple of 8"),
    ]
    for settings, sentence in cases:
        with pytest.raises(UserError, match=sentence):
            sample_loras(family, [SampleLora(lora)], settings, out)
    with pytest.raises(UserError, match=r"missing\.safetensors"):
        sample_loras(family, [SampleLora(tmp_path / "missing.safetensors")], GridSettings(["a"]), out)
    assert not out.exists()
    (tmp_path / "file").write_text("")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="file"):
            sample_loras(family, [], GridSettings(["a"]), tmp_path / "file", overwrite=overwrite)


def test_without_a_lora_the_base_draws(family: Any, tmp_path: Path) -> None:
    told = sample_loras(family, [], GridSettings(["x"], [0.3, 0.6], steps=1), tmp_path / "out")
    assert [Path(p["file"]).name for p in told["pictures"]] == ["001-x-seed-0.png"]


@pytest.mark.parametrize("prompt", ["", "CON", 'a/b\\c:d*e?f"g<h>i|j', "Glück 幸福", ". .", "x" * 300])
def test_file_names_are_safe_everywhere(prompt: str) -> None:
    name = file_name(0, prompt, "0.5", 3)
    assert re.fullmatch(r"001-[a-z0-9]([a-z0-9-]*[a-z0-9])?-strength-0\.5-seed-3\.png", name)
    assert len(name) < 100


@pytest.mark.parametrize(
    ("strengths", "weights", "names"),
    [
        ([0, 1], [1.0], ["0", "1"]),
        ([0, 1, 1.0000001], [0.75], ["0", "0.75", "0.750000075"]),
        ([0, 0.5], [0.6, 0.6], ["0", "0.3"]),
        ([0, -1], [0.75, -0.4], ["0", "-0.75-and-0.4"]),
        ([3], [0.1, 1.0], ["0.3-and-3"]),
        ([0, 1], [0.0], ["0", "1"]),  # two pictures, although nothing acts
    ],
)
def test_file_names_tell_how_strong_each_lora_is(
    strengths: list[float], weights: list[float], names: list[str]
) -> None:
    assert list(strength_names(strengths, weights).values()) == names


# --- what the user types ----------------------------------------------------------------------------------


def test_prompts_files(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa portrait, Glück\r\n\r\n# a comment\r\n  another # kept  \n".encode())
    assert sampling.read_prompts(file) == ["a portrait, Glück", "another # kept"]
    file.write_bytes("Glück".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        sampling.read_prompts(file)
    file.write_text("# nothing\n")
    with pytest.raises(UserError, match="holds no prompt"):
        sampling.read_prompts(file)
    with pytest.raises(UserError, match="does not exist"):
        sampling.read_prompts(tmp_path / "no.txt")
    with pytest.raises(UserError, match="cannot be read"):
        sampling.read_prompts(tmp_path)


def test_strengths_and_sizes() -> None:
    assert sampling.parse_strengths("0, 0.5,1,-1,1.0") == [0.0, 0.5, 1.0, -1.0]
    for wrong in ("", "a", "1,,2", "nan", "inf"):
        with pytest.raises(UserError, match="--strength"):
            sampling.parse_strengths(wrong)
    assert sampling.parse_size("512x768") == (512, 768)
    for wrong in ("512", "x", "-1x2", "512x768x3"):
        with pytest.raises(UserError, match="WIDTHxHEIGHT"):
            sampling.parse_size(wrong)


# --- the text chunk ---------------------------------------------------------------------------------------


def a1111_parse(text: str) -> dict[str, str]:
    """AUTOMATIC1111's `parse_generation_parameters` (modules/infotext_utils.py), in its essential lines."""
    found: dict[str, str] = {}
    prompt, negative, done_with_prompt = "", "", False
    *lines, last = text.strip().split("\n")
    if len(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)) < 3:
        lines.append(last)
        last = ""
    for line in lines:
        line = line.strip()
        if line.startswith("Negative prompt:"):
            done_with_prompt = True
            line = line[16:].strip()
        if done_with_prompt:
            negative += ("" if negative == "" else "\n") + line
        else:
            prompt += ("" if prompt == "" else "\n") + line
    for key, value in re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last):
        value = json.loads(value) if value[0] == '"' else value
        size = re.match(r"^(\d+)x(\d+)$", value)
        found |= {f"{key}-1": size[1], f"{key}-2": size[2]} if size else {key: value}
    return found | {"Prompt": prompt, "Negative prompt": negative}


def tensor_hash(path: Path) -> str:
    """kohya's `addnet_hash_safetensors`: sha256 of everything after the header."""
    data = path.read_bytes()
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


def test_parameters_survive_awkward_texts(tmp_path: Path) -> None:
    info = PictureInfo(
        "a cat,\nSteps: many, “猫”", 1, 20, 7.5, "dpm++2m_karras", 512, 768, negative="bad: very\nbad",
        clip_skip=2, model='my, "model": v1', model_hash="0123456789",
        loras=[LoraUse("a", 1.0, "a" * 12), LoraUse("b", -0.25, "b" * 12), LoraUse("off", 0.0, "c" * 12)],
    )  # fmt: skip
    sampling.save_png(Image.new("RGB", (8, 8)), tmp_path / "x.png", info)
    text = Image.open(tmp_path / "x.png").text["parameters"]
    for found in (a1111_parse(text), png_info.parse(text) | {"Size-1": "512", "Size-2": "768"}):
        assert found["Prompt"] == "a cat, Steps: many, “猫” <lora:a:1> <lora:b:-0.25>"
        assert found["Negative prompt"] == "bad: very bad"
        assert found["Model"] == 'my, "model": v1'
        assert found["Lora hashes"] == f"a: {'a' * 12}, b: {'b' * 12}"
        assert (found["Sampler"], found["Schedule type"], found["Clip skip"]) == ("DPM++ 2M", "Karras", "2")
        assert (found["CFG scale"], found["Size-1"], found["Size-2"]) == ("7.5", "512", "768")


def test_every_scheduler_has_a_name_that_users_know() -> None:
    from spf_kit.families.schedulers import SCHEDULERS

    assert set(png_info.SAMPLERS) == set(SCHEDULERS)


def test_hashes(lora: Path, tmp_path: Path) -> None:
    assert png_info.lora_hash(lora) == tensor_hash(lora)[:12]
    assert png_info.lora_hash(lora, {"sshs_model_hash": "f" * 64}) == "f" * 12
    assert files.read(lora).metadata["sshs_model_hash"] == tensor_hash(lora)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert png_info.file_hash(tmp_path / "model.safetensors") == hashlib.sha256(b"weights").hexdigest()[:10]


# --- sheets -----------------------------------------------------------------------------------------------


def test_a_sheet_shows_every_picture_and_label() -> None:
    red, blue = Image.new("RGB", (64, 64), "#ff0000"), Image.new("RGB", (64, 64), "#0000ff")
    page = contact_sheet.sheet(
        [[red, blue], [blue, None]], row_labels=["one", "two"], column_labels=["a", "b"], title="t", note="n"
    )
    colors = {color: count for count, color in page.getcolors(maxcolors=1 << 20)}
    assert colors[255, 0, 0] == 192 * 192, "enlarged by 3"
    assert colors[0, 0, 255] == 2 * 192 * 192
    plain = contact_sheet.sheet([[red]])
    assert plain.width < page.width / 2
    assert contact_sheet.enlarged(Image.new("RGB", (512, 300))).size == (512, 300)
    with pytest.raises(ValueError, match="at least one picture"):
        contact_sheet.sheet([[None]])


@pytest.mark.parametrize("text", ["a b c", "wordthatislongerthanoneline " * 3, "", "a " * 200])
def test_labels_fit_their_place(text: str) -> None:
    face = contact_sheet.font(14)
    lines = contact_sheet.wrap(text, 120, face, 3)
    assert 1 <= len(lines) <= 3
    assert all(face.getlength(line) <= 120 for line in lines)
    shown, whole = "".join(lines).replace(" ", ""), text.replace(" ", "")
    assert shown == whole or (shown.endswith("…") and whole.startswith(shown[:-1]))
