"""Incremental learning: earlier LoRAs frozen under a new one, in every path, preview, prior and evaluation.

What base + earlier must be is computed without adapters: `up @ down` of the file's own tensors added to the
weights of a second model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from spf_kit import config, families, schema
from spf_kit.adapters import earlier as earlier_loras
from spf_kit.adapters import files
from spf_kit.adapters.inject import AdapterHandle
from spf_kit.adapters.metadata import parse_json
from spf_kit.adapters.tensors import kohya_hashes
from spf_kit.config import Resolved
from spf_kit.errors import Interrupted, UserError
from spf_kit.estimate.peak import estimate
from spf_kit.families.base import Family
from spf_kit.measure import evaluate as measuring
from spf_kit.sampling import generate
from spf_kit.training import prior, session, trainer
from spf_kit.training.preview import Preview
from spf_kit.training.run_folder import RunFolder
from spf_kit.training.step import Model

SMALL = [
    "data.resolution=32", "data.buckets=false", "train.steps=3", "train.batch_size=2", "preview.every=0",
    "train.checkpoint_every=0", "train.log_tensorboard=false", "adapter.rank=2", "train.threads=1",
    'output.dtype="float32"', "preview.steps=2", "preview.count=2",
]  # fmt: skip
WEIGHT = 0.8
PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
QUICK = (
    "--set",
    "evaluate.count=2",
    "--set",
    "evaluate.steps=2",
    "--set",
    "preview.every=0",
    "--set",
    "calibrate.enabled=false",
)
torch.set_num_threads(1)


# --- what is compared with --------------------------------------------------------------------------------


def merged_by_hand(family: Family, file: Path, weights: Mapping[str, float]) -> None:
    """W + weight * alpha / r * up @ down, from the tensors of a kohya file."""
    tensors, used = load_file(file), 0
    for component, prefix in PREFIXES.items():
        for name, module in family.components()[component].named_modules():
            key = prefix + name.removeprefix("text_model.").replace(".", "_")
            if f"{key}.alpha" in tensors:
                down, up = tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"]
                update = (up.flatten(1) @ down.flatten(1)).reshape(module.weight.shape)
                module.weight.data += weights[component] * tensors[f"{key}.alpha"] / len(down) * update
                used += 3
    assert used == len(tensors)


def plain_family() -> Family:
    return families.load(schema.Base(model="embedded"))


def learnt(family: Family, path: Path, targets: list[str], seed: int, size: float = 0.15) -> Path:
    """The file of a LoRA that changes a lot."""
    handle = AdapterHandle.inject(family, schema.Adapter(rank=2, targets=targets), name="made", seed=seed)
    source = torch.Generator().manual_seed(seed)
    for name, parameter in handle.named_parameters():
        if name.endswith(".up"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=source) * size)
    lora = handle.to_lora_file({"modelspec.trigger_phrase": "wearing glasses"})
    handle.remove()
    return files.write(lora, path)


@torch.no_grad()
def predict(family: Family, texts: tuple[str, ...] = ("a woman, red hair", "")) -> Tensor:
    noise = torch.randn(
        (len(texts), family.latent_channels, 8, 8), generator=torch.Generator().manual_seed(7)
    )
    return family.predict(noise, torch.tensor([600, 100]), family.encode_text(texts))


@pytest.fixture(scope="module")
def base() -> Family:
    return plain_family()


@pytest.fixture(scope="module")
def first(base: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An earlier LoRA on both components, matrices and convolutions."""
    path = tmp_path_factory.mktemp("loras") / "first.safetensors"
    return learnt(base, path, ["cross-attention", "convolutions", "text-encoder"], seed=1)


@pytest.fixture(scope="module")
def reference(first: Path) -> Family:
    """Base + earlier LoRA, without an adapter."""
    family = plain_family()
    merged_by_hand(family, first, dict.fromkeys(PREFIXES, WEIGHT))
    return family


@pytest.fixture(scope="module")
def resolve(pictures: Path, first: Path) -> Callable[..., Resolved]:
    def load(
        *sets: str, recipe: str = "output-preservation", on: tuple[str, ...] = (f"{first}:{WEIGHT}",)
    ) -> Any:
        return config.load("glasses", data=pictures, recipe=recipe, on=on, sets=[*SMALL, *sets])

    return load


@pytest.fixture
def opened(resolve: Callable[..., Resolved], tmp_path: Path) -> Iterator[Callable[..., session.Session]]:
    """A session before its first step."""

    def open_(*sets: str, **options: Any) -> session.Session:
        resolved = resolve(*sets, **options)
        processes = session.accelerator(resolved.config.train)
        return session.open_session(resolved, RunFolder(tmp_path / "run"), processes, lambda *_: None, None)

    with torch.enable_grad():
        yield open_


def assert_untouched(s: Any, first: Path) -> None:
    """The earlier LoRA's parameters are the file's, bit for bit, and none can learn."""
    (handle,) = s.earlier.handles
    found = handle.to_lora_file().layers
    expected = files.read(first).layers
    assert found.keys() == expected.keys()
    for key, layer in expected.items():
        assert torch.equal(found[key].down, layer.down)
        assert torch.equal(found[key].up, layer.up)
    assert not any(parameter.requires_grad for parameter in handle.parameters())
    assert all(parameter.grad is None for parameter in handle.parameters())
    assert handle.enabled
    assert handle.strength == WEIGHT


# --- the reference ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ['["cross-attention"]', '["self-attention", "text-encoder"]'])
def test_the_reference_path_is_base_plus_first(
    opened: Callable[..., session.Session], reference: Family, base: Family, targets: str
) -> None:
    """As the step asks it: texts from the cache or encoded anew, the new adapter off."""
    s = opened(f"adapter.targets={targets}", "adapter.dropout=0.5")
    for parameter in s.handle.parameters():  # a new adapter that changes much
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    captions = [entry.caption for entry in s.dataset.entries][:2]
    noise = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(3))
    timesteps = torch.tensor([700, 150])
    for texts in ([c.base for c in captions], [c.full for c in captions]):
        with s.model.frozen():
            found = s.model.predict(noise, timesteps, texts)
        with torch.no_grad():
            expected = reference.predict(noise, timesteps, reference.encode_text(texts))
            plain = base.predict(noise, timesteps, base.encode_text(texts))
            response = s.model.predict(noise, timesteps, texts)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert (expected - plain).abs().max() > 0.02  # or the comparison would say nothing
        assert (response - found).abs().max() > 0.02


@pytest.mark.parametrize("targets", ['["cross-attention"]', '["cross-attention", "text-encoder"]'])
@pytest.mark.parametrize("dora", ["false", "true"])
def test_a_new_adapter_without_effect_gives_exactly_the_reference(
    opened: Callable[..., session.Session], targets: str, dora: str
) -> None:
    s = opened(f"adapter.targets={targets}", f"adapter.dora={dora}")
    noise = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(3))
    texts = [s.dataset.entries[0].caption.base, s.dataset.entries[1].caption.full]
    with s.model.frozen():
        expected = s.model.predict(noise, torch.tensor([700, 150]), texts)
    with torch.no_grad():
        found = s.model.predict(noise, torch.tensor([700, 150]), texts)
    assert torch.equal(found, expected)
    assert float(s.forward(1, 0).terms["output_preservation"].abs().max()) == 0


def test_components_may_weigh_differently(base: Family, first: Path) -> None:
    expected = plain_family()
    merged_by_hand(expected, first, {"unet": 0.5, "text_encoder": -0.3})
    before = predict(base)
    with earlier_loras.attached(base, [f"{first}:unet=0.5,te=-0.3"]) as on:
        torch.testing.assert_close(predict(base), predict(expected), rtol=1e-4, atol=1e-4)
        assert on.change_text
        assert on.rows == [{"path": str(first), "weight": "unet=0.5,te=-0.3"}]
    assert torch.equal(predict(base), before)


# --- training ---------------------------------------------------------------------------------------------


def test_no_gradient_reaches_the_first_after_any_toggle(
    opened: Callable[..., session.Session], first: Path
) -> None:
    s = opened('adapter.targets=["cross-attention", "convolutions", "text-encoder"]')
    assert_untouched(s, first)
    for toggle in (
        s.handle.off,
        s.handle.on,
        lambda: s.handle.set_strength(0),
        lambda: s.handle.set_strength(1),
    ):
        toggle()
        assert_untouched(s, first)
    with s.model.frozen():
        assert_untouched(s, first)
    for number in (1, 2):
        s.updater.backward(s.forward(number, 0).loss)
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in s.handle.parameters())
        assert_untouched(s, first)
        s.updater.gradients()
        s.updater.apply(number)
    assert_untouched(s, first)


def test_a_run_leaves_the_first_untouched_and_both_act_together(
    resolve: Callable[..., Resolved], first: Path, tmp_path: Path
) -> None:
    before = first.read_bytes()
    sets = (
        'adapter.targets=["cross-attention", "text-encoder"]',
        "train.learning_rate=0.05",
        "train.ema=0.5",
    )
    result = trainer.train(resolve(*sets), tmp_path / "run")
    assert first.read_bytes() == before
    assert_untouched(result, first)
    expected = plain_family()
    merged_by_hand(expected, first, dict.fromkeys(PREFIXES, WEIGHT))
    alone = predict(expected)
    merged_by_hand(expected, result.lora, dict.fromkeys(PREFIXES, 1.0))
    torch.testing.assert_close(predict(result.family), predict(expected), rtol=1e-4, atol=1e-4)
    assert (predict(expected) - alone).abs().max() > 0.02
    result.handle.remove()
    torch.testing.assert_close(predict(result.family), alone, rtol=1e-4, atol=1e-4)
    result.earlier.remove()
    assert torch.equal(predict(result.family), predict(plain_family()))


def test_a_run_does_not_go_on_over_another_first(
    resolve: Callable[..., Resolved], base: Family, tmp_path: Path
) -> None:
    """The same path, with another LoRA in it."""
    path = learnt(base, tmp_path / "first.safetensors", ["cross-attention"], seed=1)
    on, run = (str(path),), tmp_path / "run"
    trainer.train(resolve("train.steps=1", recipe="naive", on=on), run)
    learnt(base, path, ["cross-attention"], seed=2)
    with pytest.raises(UserError, match=r"the earlier LoRA '.*first\.safetensors' changed since the run"):
        trainer.train(resolve("train.steps=2", recipe="naive", on=on), run, resume=True)
    path.unlink()
    learnt(base, path, ["cross-attention"], seed=1)
    assert trainer.train(resolve("train.steps=2", recipe="naive", on=on), run, resume=True).steps == 2


def test_the_file_names_what_it_was_trained_on(
    resolve: Callable[..., Resolved], first: Path, tmp_path: Path
) -> None:
    metadata = files.read(trainer.train(resolve(recipe="naive"), tmp_path / "on").lora).metadata
    hashed = kohya_hashes(load_file(first), {})["sshs_model_hash"]
    assert parse_json(metadata, "spf_kit.on") == [
        {"file": "first.safetensors", "sha256": hashed, "weight": WEIGHT}
    ]
    plain = files.read(trainer.train(resolve(recipe="naive", on=()), tmp_path / "plain").lora)
    assert "spf_kit.on" not in plain.metadata


@pytest.mark.parametrize("stop", [1, 2])
def test_a_run_resumes_with_the_same_bits(
    resolve: Callable[..., Resolved], tmp_path: Path, stop: int
) -> None:
    sets = ("train.checkpoint_every=1", 'adapter.targets=["cross-attention", "text-encoder"]')
    straight = trainer.train(resolve(*sets), tmp_path / "straight").lora
    run = tmp_path / "run"

    def interrupt(done: int, total: int, values: Any) -> None:
        if values.get("phase") == "training" and done == stop + 1:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        trainer.train(resolve(*sets), run, report=interrupt)
    with pytest.raises(UserError, match=r"adapter\.on was \['.*first.safetensors:0.8'\] and is now \[\]"):
        trainer.train(resolve(*sets, on=()), run, resume=True)
    again = trainer.train(config.load(run / "config.toml"), run, resume=True).lora
    left, right = load_file(straight), load_file(again)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


# --- pictures during the run ------------------------------------------------------------------------------


def test_previews_are_drawn_with_the_first(
    resolve: Callable[..., Resolved], reference: Family, base: Family, tmp_path: Path
) -> None:
    """The new adapter learns nothing, so that the picture is that of base + first; captions are cached."""
    resolved = resolve("preview.every=1", "train.steps=1", "train.learning_rate=1e-30", recipe="naive")
    result = trainer.train(resolved, tmp_path / "run")
    found = np.asarray(Image.open(tmp_path / "run/samples/step-000001.png").convert("RGB")).astype(int)
    models = {
        "reference": Model(reference, result.handle, reference.encode_text),
        "base": Model(base, result.handle, base.encode_text),
    }
    drawn = [
        Preview(resolved.config, model, result.captions).draw(tmp_path / name, 1, lambda *_: None)[1]
        for name, model in models.items()
    ]
    assert np.abs(found - drawn[0]).max() <= 2
    assert np.abs(found - drawn[1]).max() > 30


def test_prior_pictures_are_drawn_with_the_first(
    opened: Callable[..., session.Session], reference: Family, base: Family, tmp_path: Path
) -> None:
    sets = ("loss.prior_preservation.count=2", "loss.prior_preservation.steps=2")
    s = opened(*sets, recipe="prior-preservation")
    texts = session.base_prompts(s.dataset)[:2]
    found = np.stack(
        [np.asarray(Image.open(file)) for file in sorted((tmp_path / "run/prior").glob("*.png"))]
    )
    drawn = []
    for family in (reference, base):
        pictures = generate(
            family, texts, [prior.SEED, prior.SEED + 1], steps=2, width=32, height=32,
            cfg=s.plugins[-1].cfg if hasattr(s.plugins[-1], "cfg") else 5.0,
        )  # fmt: skip
        drawn.append((pictures.permute(0, 2, 3, 1) * 255).round().numpy())
    assert np.abs(found - drawn[0]).max() <= 2
    assert np.abs(found - drawn[1]).max() > 30


def test_only_an_encoder_that_the_first_changes_is_kept(
    opened: Callable[..., session.Session], base: Family, tmp_path: Path
) -> None:
    assert opened().family.text_encoder is not None
    unet_only = learnt(base, tmp_path / "unet.safetensors", ["cross-attention"], seed=3)
    assert opened(on=(str(unet_only),)).family.text_encoder is None


def test_the_estimate_counts_the_first(resolve: Callable[..., Resolved], base: Family, first: Path) -> None:
    def weights(*on: Path) -> int:
        return estimate(resolve(on=tuple(map(str, on))), on_gpu=False).step.parts["weights"]

    count = sum(value.numel() for key, value in load_file(first).items() if not key.endswith(".alpha"))
    base.reload_encoders()
    tensors = [*base.text_encoder.parameters(), *base.text_encoder.buffers()]
    text_encoder = sum(t.numel() * t.element_size() for t in tensors)  # freed, where no LoRA changes it
    assert weights(first) - weights() == 4 * count + text_encoder


# --- evaluation -------------------------------------------------------------------------------------------


def test_the_evaluation_compares_with_base_plus_first(
    base: Family, reference: Family, first: Path, tmp_path: Path
) -> None:
    settings = schema.Evaluate(count=2, steps=2, batch_size=4)
    attribute = schema.Attribute(name="hat", target="wearing a winter hat")
    second = learnt(base, tmp_path / "second.safetensors", ["cross-attention"], seed=2)
    zero = learnt(base, tmp_path / "zero.safetensors", ["cross-attention"], seed=2, size=0)
    before = predict(base)
    loras = {"second": second, "zero": zero}
    found = measuring.measure(base, loras, settings, attribute, on=[f"{first}:{WEIGHT}"])
    assert torch.equal(predict(base), before)
    expected = measuring.measure(reference, loras, settings, attribute)
    plain = measuring.measure(base, loras, settings, attribute)
    assert found.data["base"]["on"] == [{"path": str(first), "weight": WEIGHT}]
    assert plain.data["base"]["on"] == []
    torch.testing.assert_close(found.base.plain, expected.base.plain, rtol=0, atol=0.01)
    torch.testing.assert_close(
        found.pictures["second"].asked, expected.pictures["second"].asked, rtol=0, atol=0.01
    )
    assert (found.base.plain - plain.base.plain).abs().max() > 0.1
    drifts = [e.data["loras"]["second"]["drift_target"] for e in (found, expected, plain)]
    assert abs(drifts[0] - drifts[1]) < abs(drifts[0] - drifts[2]) / 10
    nothing = found.data["loras"]["zero"]
    assert (nothing["drift_plain"], nothing["drift_target"], nothing["leakage"]) == (0, 0, 0)
    assert torch.equal(found.pictures["zero"].asked, found.base.asked)


def test_the_table_says_what_the_base_is(base: Family, first: Path, tmp_path: Path) -> None:
    from spf_kit.measure import table

    row = {"on": [{"path": str(first), "weight": 0.8}, {"path": "b.safetensors", "weight": 1.0}]}
    assert table.base_name(row) == "base model + first at 0.8 + b"
    assert table.base_name({}) == "base model"
    settings = schema.Evaluate(count=1, steps=1)
    attribute = schema.Attribute(name="glasses", target="wearing glasses")
    data = measuring.evaluate(base, {}, settings, attribute, on=[str(first)])
    plain = measuring.evaluate(base, {}, settings, attribute)
    elsewhere = {"naive": {**plain["base"], **table.identity(plain["base"])}}
    assert [line.note for line in table.lines(plain, elsewhere)] == ["", ""]
    assert table.lines(data, elsewhere)[1].note == "other earlier LoRAs"


# --- presets and the command line -------------------------------------------------------------------------


@pytest.fixture
def preset(tmp_path: Path, first: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """A preset in a folder of its own, with the LoRA beside it; the working directory is above."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sets").mkdir()
    shutil.copy(first, tmp_path / "sets/first.safetensors")

    def write(adapter: str) -> str:
        head = 'extends = "recipes/naive"\n[attribute]\nname = "hat"\ntarget = "a hat"\n'
        data = '[data]\npath = "embedded:winter-hat"\n'
        (tmp_path / "sets/mine.toml").write_text(f"{head}{data}[adapter]\n{adapter}\n", encoding="utf-8")
        return "sets/mine.toml"

    return write


def test_paths_are_relative_and_the_effective_preset_repeats_them(
    preset: Callable[[str], str], tmp_path: Path
) -> None:
    name = preset('on = ["first.safetensors:0.8", "../sets/other.safetensors:unet=0.5,te=0"]')
    shutil.copy(tmp_path / "sets/first.safetensors", tmp_path / "sets/other.safetensors")
    resolved = config.load(name)
    wanted = [
        f"{tmp_path}/sets/first.safetensors:0.8",
        f"{tmp_path}/sets/other.safetensors:unet=0.5,te=0",
    ]
    assert resolved.config.adapter.on == wanted
    (tmp_path / "elsewhere").mkdir()
    again = tmp_path / "elsewhere/config.toml"
    again.write_text(resolved.to_toml(), encoding="utf-8")
    assert config.load(again).config == resolved.config
    told = config.load(name, on=["sets/other.safetensors"])  # the option takes the list's place
    assert told.config.adapter.on == [f"{tmp_path}/sets/other.safetensors"]
    assert str(told.origins["adapter.on"]) == "--on sets/other.safetensors"
    assert config.load(name, sets=['adapter.on=["sets/first.safetensors"]']).config.adapter.on == [
        f"{tmp_path}/sets/first.safetensors"
    ]


@pytest.mark.parametrize(
    ("on", "words"),
    [
        ('["frist.safetensors:0.8"]', ("sets/mine.toml:8: adapter.on", "frist.safetensors", "no file")),
        ('["first.safetensors:0,8"]', ("sets/mine.toml:8: adapter.on", "'0,8' is no weight", "FILE:0.8")),
        ('["first.safetensors:vae=1"]', ("adapter.on", "'vae'", "unet, te")),
        ('["first.safetensors", "../sets/first.safetensors:0.5"]', ("adapter.on", "twice", "each once")),
        ('[""]', ("adapter.on", "empty", "FILE:0.8")),
        ('"first.safetensors"', ("adapter.on", "expected a list", 'write ["')),
        ('["first.safetensors"]\nstart_from = "first.safetensors"', ("start_from", "act twice", ":9")),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_list(preset: Callable[[str], str], on: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        config.load(preset(f"on = {on}"))
    assert "\n" not in str(caught.value), "one sentence"
    for word in words:
        assert word in str(caught.value)


def other_family(path: Path) -> Path:
    key = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {"lora_down.weight": torch.ones(2, 2048), "lora_up.weight": torch.ones(640, 2)}
    tensors["alpha"] = torch.tensor(2.0)
    save_file({f"{key}.{name}": value for name, value in tensors.items()}, path)
    return path


def test_a_lora_of_another_family_is_refused_before_anything_is_written(
    spf_kit: Callable[..., Any], tmp_path: Path, first: Path
) -> None:
    other_family(tmp_path / "sdxl.safetensors")
    for more in ((), ("--dry-run",)):
        result = spf_kit("train", "glasses", "--on", first, "--on", "sdxl.safetensors:0.5", *more)
        assert result.code == 2, result.err
        for word in ("sdxl.safetensors", "Stable Diffusion XL", "embedded"):
            assert word in result.err
        assert not (tmp_path / "runs").exists()


def test_a_refused_list_leaves_nothing_on_the_base(base: Family, first: Path, tmp_path: Path) -> None:
    before = predict(base)
    with pytest.raises(UserError, match="Stable Diffusion XL"):
        earlier_loras.Earlier.attach(base, [str(first), str(other_family(tmp_path / "sdxl.safetensors"))])
    assert torch.equal(predict(base), before)
    assert not hasattr(base.unet, "peft_config")


def test_the_commands_take_it(
    spf_kit: Callable[..., Any], tmp_path: Path, first: Path, pictures: Path
) -> None:
    small = [word for text in SMALL for word in ("--set", text)]
    arguments = ("--on", f"{first}:{WEIGHT}", "--data", pictures, "--steps", "1", *small, *QUICK)
    result = spf_kit("train", "winter-hat", *arguments, "--json")
    assert result.code == 0, result.err
    lora, wanted = result.json["lora"], [{"path": str(first), "weight": WEIGHT}]
    assert result.json["evaluation"]["base"]["on"] == wanted
    assert json.loads((tmp_path / "runs/winter-hat/evaluation.json").read_text())["base"]["on"] == wanted
    assert parse_json(files.read(lora).metadata, "spf_kit.on")[0]["file"] == "first.safetensors"
    assert spf_kit("inspect", lora, "--json").json["trained_on"][0]["weight"] == WEIGHT

    settings = ("--count", "2", "--steps", "2", "--json")
    again = spf_kit("evaluate", lora, "--on", f"{first}:{WEIGHT}", *settings)
    assert again.code == 0, again.err
    assert "warning" not in again.err
    measured = [told["loras"][lora]["drift_target"] for told in (again.json, result.json["evaluation"])]
    assert measured[0] == measured[1] > 0
    warned = spf_kit("evaluate", lora, *settings)
    assert warned.json["base"]["on"] == []
    assert "--on first.safetensors:0.8" in warned.err

    both = spf_kit("sample", lora, f"{first}:{WEIGHT}", "--prompt", "a man", "--steps", "1", "--json")
    assert both.code == 0, both.err


@pytest.mark.parametrize(
    ("on", "words"),
    [
        (("none.safetensors",), ("--on", "none.safetensors", "there is no file")),
        (("FIRST", "FIRST:0.5"), ("--on", "twice")),
        (("FIRST:x",), ("--on", "'x' is no weight")),
        (("SECOND",), ("--on", "is measured too", "act twice")),
    ],
)
def test_evaluate_refuses_a_wrong_list(
    spf_kit: Callable[..., Any], tmp_path: Path, first: Path, on: tuple[str, ...], words: tuple[str, ...]
) -> None:
    second = tmp_path / "second.safetensors"
    shutil.copy(first, second)
    texts = [text.replace("FIRST", str(first)).replace("SECOND", str(second)) for text in on]
    result = spf_kit("evaluate", second, *(word for text in texts for word in ("--on", text)))
    assert result.code == 2
    assert len(result.err.strip().splitlines()) >= 1
    for word in words:
        assert word in " ".join(result.err.split())
