"""The step against its equations, and runs on the embedded base: what they write, refuse and put back."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spf_kit import config, families, losses, schema
from spf_kit.adapters.inject import AdapterHandle
from spf_kit.config import Resolved
from spf_kit.data.dataset import Dataset
from spf_kit.discovery import available
from spf_kit.errors import Interrupted, TrainingDiverged, UserError
from spf_kit.families.base import Family
from spf_kit.losses import Loss, Mask, Needs, Step, per_sample, register
from spf_kit.training import checkpoint, stages, trainer
from spf_kit.training.machine import Stop, choose_threads
from spf_kit.training.step import Draws, Model, Noised, noised, run_step
from spf_kit.training.text import TextCache

SHIPPED = available()
# small enough for many runs: 32-pixel pictures (8 x 8 latents), one at a time
SMALL = [
    "data.resolution=32", "data.buckets=false", "train.steps=4", "train.batch_size=1", "preview.every=0",
    "train.checkpoint_every=0", "train.log_tensorboard=false", "adapter.rank=2", "train.threads=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def picture_count() -> int:
    return 4


@pytest.fixture(scope="module")
def resolve(pictures: Path) -> Callable[..., Resolved]:
    def load(*sets: str, recipe: str = "naive") -> Resolved:
        return config.load("glasses", data=pictures, recipe=recipe, sets=[*SMALL, *sets])

    return load


@pytest.fixture(scope="module")
def family() -> Family:
    torch.set_num_threads(1)
    return families.load(schema.Base(model="embedded"))


@pytest.fixture
def handle(family: Family) -> Iterator[AdapterHandle]:
    """An adapter that changes something."""
    adapter = schema.Adapter(rank=2, targets=["cross-attention", "text-encoder"])
    handle = AdapterHandle.inject(family, adapter, seed=1)
    g = torch.Generator().manual_seed(0)
    for name, parameter in handle.named_parameters():
        if name.endswith(".up"):
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=g))
    yield handle
    handle.remove()


@pytest.fixture(scope="module")
def batch(family: Family, pictures: Path) -> Any:
    data = schema.Data(path=str(pictures), resolution=32, buckets=False)
    return Dataset.prepare(data, "wearing glasses", family).batch(0, 0, 4)


@pytest.fixture(autouse=True)
def _registry_as_it_was() -> Iterator[None]:
    before = dict(losses._registry)
    yield
    losses._registry.clear()
    losses._registry.update(before)


def at_t(family: Family, batch: Any, offset: float = 0.0) -> Noised:
    draws = Draws.keyed(batch.mean.shape, 0, "noise", batch.indices)
    return noised(family.noise, batch, draws, offset, torch.device("cpu"))


def run(family: Family, handle: AdapterHandle, batch: Any, *plugins: losses.Plugin, **more: Any) -> Any:
    model = Model(family, handle, family.encode_text)
    arguments = {"number": 1, "progress": 0.0, **more}
    return run_step(model, at_t(family, batch), batch.captions, batch.sample_ids, plugins, **arguments)


@contextlib.contextmanager
def forwards(family: Family, handle: AdapterHandle) -> Iterator[list[tuple[bool, bool]]]:
    """Of each call of the UNet: was the adapter on, was a gradient kept."""
    calls: list[tuple[bool, bool]] = []
    hook = family.unet.register_forward_pre_hook(
        lambda *_: calls.append((handle.enabled, torch.is_grad_enabled()))
    )
    yield calls
    hook.remove()


# --- the step ---------------------------------------------------------------------------------------------


def test_the_naive_step_is_the_textbooks(family: Family, handle: AdapterHandle, batch: Any) -> None:
    """One forward, and diffusers' own loss of the same noise and timesteps."""
    with forwards(family, handle) as calls:
        outcome = run(family, handle, batch, SHIPPED["denoising"]())
    assert calls == [(True, True)]

    draws = Draws.keyed(batch.mean.shape, 0, "noise", batch.indices)
    t = (draws.uniform * 1000).long()
    abar = family.noise.alphas_cumprod[t].view(-1, 1, 1, 1)
    z = abar.sqrt() * (batch.mean + batch.std * draws.latents) + (1 - abar).sqrt() * draws.noise
    tokens = family.tokenizer(
        [caption.full for caption in batch.captions], padding="max_length", max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        text = family.text_encoder(tokens.input_ids).last_hidden_state
        expected = (family.unet(z, t, text).sample - draws.noise).square().mean()
    assert float(outcome.loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    assert outcome.timesteps.tolist() == t.tolist()


def test_the_gradient_of_an_adapter_weight(family: Family, handle: AdapterHandle, batch: Any) -> None:
    plugins = [SHIPPED["denoising"](), SHIPPED["output_preservation"](weight=3.0)]
    run(family, handle, batch, *plugins).loss.backward()
    for component in ("unet", "text_encoder"):
        parameter = max(handle.parameters(component), key=lambda p: float(p.grad.abs().max()))
        place = parameter.grad.abs().argmax()
        values = []
        for sign in (1, -1):
            parameter.data.flatten()[place] += sign * 0.01
            with torch.no_grad():
                values.append(float(run(family, handle, batch, *plugins).loss))
            parameter.data.flatten()[place] -= sign * 0.01
        measured = (values[0] - values[1]) / 0.02
        assert float(parameter.grad.flatten()[place]) == pytest.approx(measured, rel=0.05)
    for parameter in handle.parameters():
        parameter.grad = None


def test_the_reference_comes_first_and_without_gradient(
    family: Family, handle: AdapterHandle, batch: Any
) -> None:
    family.unet.train()
    with forwards(family, handle) as calls:
        outcome = run(family, handle, batch, SHIPPED["denoising"](), SHIPPED["output_preservation"]())
    assert calls == [(False, False), (True, True), (True, True)]
    assert family.unet.training
    assert handle.enabled
    assert set(outcome.terms) == {"denoising", "output_preservation"}
    assert float(outcome.terms["output_preservation"].min()) > 0
    family.unet.eval()


def test_output_preservation_of_a_new_adapter_is_exactly_zero(family: Family, batch: Any) -> None:
    fresh = AdapterHandle.inject(family, schema.Adapter(rank=2), name="fresh", seed=0)
    outcome = run(family, fresh, batch, SHIPPED["output_preservation"]())
    assert outcome.terms["output_preservation"].tolist() == [0, 0, 0, 0]
    fresh.remove()


def test_the_batch_can_be_split(family: Family, handle: AdapterHandle, batch: Any) -> None:
    """Random numbers belong to the sample, so halves give what the whole gives."""
    whole = run(family, handle, batch, SHIPPED["denoising"]())
    draws = Draws.keyed(batch.mean.shape, 0, "noise", batch.indices)
    half = Draws.keyed((2, *batch.mean.shape[1:]), 0, "noise", batch.indices[2:])
    for part in ("latents", "noise", "offset", "uniform"):
        assert torch.equal(getattr(draws, part)[2:], getattr(half, part))
    fields = ("captions", "mean", "std", "sample_ids", "indices", "flipped")
    data = replace(batch, **{name: getattr(batch, name)[2:] for name in fields})
    second = run(family, handle, data, SHIPPED["denoising"]())
    assert torch.allclose(whole.terms["denoising"][2:], second.terms["denoising"], rtol=1e-4)


def test_draws_differ_between_samples_steps_and_seeds() -> None:
    shape = (1, 4, 8, 8)
    one = Draws.keyed(shape, 0, "noise", [5]).noise
    others = [
        Draws.keyed(shape, *key).noise for key in [(0, "noise", [6]), (1, "noise", [5]), (0, "prior", [5])]
    ]
    assert all(abs(float((one * other).mean())) < 0.2 for other in others)
    many = Draws.keyed((2000, 1, 2, 2), 0, "noise", range(2000))
    assert float(many.uniform.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(many.noise.std()) == pytest.approx(1, abs=0.03)


def test_noise_offset_shifts_whole_channels(family: Family, batch: Any) -> None:
    shift = at_t(family, batch, 0.5).noise - at_t(family, batch).noise
    draws = Draws.keyed(batch.mean.shape, 0, "noise", batch.indices)
    assert torch.allclose(shift, 0.5 * draws.offset.expand_as(shift), atol=1e-6)
    assert torch.equal(at_t(family, batch, 0.5).target, at_t(family, batch, 0.5).noise)


def test_gradient_checkpointing_changes_no_gradient(
    family: Family, handle: AdapterHandle, batch: Any
) -> None:
    gradients = []
    for on in (False, True):
        family.unet.train()
        family.text_encoder.train()
        if on:
            family.unet.enable_gradient_checkpointing()
            family.text_encoder.gradient_checkpointing_enable({"use_reentrant": False})
        with forwards(family, handle) as calls:
            loss = run(family, handle, batch, SHIPPED["denoising"](), SHIPPED["output_preservation"]()).loss
        loss.backward()
        assert len(calls) == 3
        gradients.append([p.grad.clone() for p in handle.parameters()])
        for parameter in handle.parameters():
            parameter.grad = None
    family.unet.disable_gradient_checkpointing()
    family.text_encoder.gradient_checkpointing_disable()
    family.freeze()
    for parameter in handle.parameters():
        parameter.requires_grad_(True)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*gradients))
    assert all(bool(g.any()) for g in gradients[1])


# --- masks and stages -------------------------------------------------------------------------------------


@pytest.fixture
def half_mask() -> type[Mask]:
    @register("t_half")
    class Half(Mask):
        calls: int = 0

        @property
        def needs(self) -> Needs:
            return Needs.of("reference")

        def __call__(self, step: Step) -> torch.Tensor:
            self.calls += 1
            mask = torch.zeros_like(step.reference.prediction[:, :1])
            mask[..., : mask.shape[-1] // 2] = 1
            return mask

    return Half


def test_a_loss_reads_its_mask(
    family: Family, handle: AdapterHandle, batch: Any, half_mask: type[Mask]
) -> None:
    mask, masked = half_mask(), SHIPPED["denoising"](id="masked", mask="t_half")
    outcome = run(family, handle, batch, mask, masked, SHIPPED["denoising"]())
    assert outcome.masks["t_half"].mean() == 0.5
    model = Model(family, handle, family.encode_text)
    z = at_t(family, batch)
    with torch.no_grad():
        error = (
            model.predict(z.noisy_latents, z.timesteps, [c.full for c in batch.captions]) - z.target
        ) ** 2
    assert torch.allclose(
        outcome.terms["masked"], error[..., :4].flatten(1).sum(1) / error[0].numel(), rtol=1e-4
    )
    assert torch.allclose(outcome.terms["denoising"], error.flatten(1).mean(1), rtol=1e-4)


def test_nothing_runs_for_nobody(
    family: Family, handle: AdapterHandle, batch: Any, half_mask: type[Mask]
) -> None:
    """Stage one costs a naive step; a mask rests while its readers do."""
    mask = half_mask()
    plugins = [mask, SHIPPED["denoising"](), SHIPPED["denoising"](id="later", mask="t_half", start=0.5)]
    with forwards(family, handle) as early:
        run(family, handle, batch, *plugins, progress=0.49)
    with forwards(family, handle) as late:
        outcome = run(family, handle, batch, *plugins, progress=0.5)
    assert (len(early), len(late), mask.calls) == (1, 2, 1)
    assert list(outcome.terms) == ["denoising", "later"]


def test_contradictions_between_plugins(half_mask: type[Mask]) -> None:
    denoising = SHIPPED["denoising"]
    for plugins, sentence in [
        ([denoising(mask="m")], "no mask of that id stands before it"),
        ([denoising(mask="t_half"), half_mask()], "no mask of that id stands before it"),
        ([half_mask(start=0.5), denoising(mask="t_half")], "widen the mask's start and end"),
        ([half_mask()], "has no loss"),
        ([denoising(start=0.1)], "no loss acts from 0.0"),
        ([denoising(end=0.4), denoising(id="b", start=0.5)], "no loss acts from 0.4"),
        ([SHIPPED["prior_preservation"](count=i) for i in (1, 2)], "different prior pictures"),
    ]:
        with pytest.raises(UserError, match=sentence):
            stages.check(plugins)
    stages.check([denoising(end=0.5), denoising(id="b", start=0.5)])


def test_a_plugin_with_a_wrong_shape_is_named(family: Family, handle: AdapterHandle, batch: Any) -> None:
    @register("t_scalar")
    class Scalar(Loss):
        def __call__(self, step: Step) -> torch.Tensor:
            return step.response.prediction.mean()

    with pytest.raises(
        UserError, match=r"'t_scalar' returned shape \(\), expected one value for each sample"
    ):
        run(family, handle, batch, Scalar())


def test_text_cache_is_the_encoder(family: Family) -> None:
    texts = [f"a man, {i}" for i in range(40)] + [""]
    cache = TextCache(family.encode_text, texts, torch.device("cpu"))
    with torch.no_grad():
        expected = family.encode_text(["", "a man, 7"])["encoder_hidden_states"]
    found = cache(["", "a man, 7"])["encoder_hidden_states"]
    assert torch.allclose(found, expected, atol=1e-5)
    assert not found.requires_grad
    with pytest.raises(KeyError):
        cache(["a woman"])


# --- runs -------------------------------------------------------------------------------------------------


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "glasses.safetensors")


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_leaves_what_it_promises(resolve: Callable[..., Resolved], tmp_path: Path) -> None:
    resolved = resolve(
        "train.checkpoint_every=1", "train.keep_checkpoints=2", "preview.every=2", "preview.steps=2",
        "preview.count=2", "train.log_tensorboard=true",
    )  # fmt: skip
    place, seen = tmp_path / "run", []
    torch.manual_seed(5)
    before = torch.get_rng_state(), signal.getsignal(signal.SIGINT)
    torch.set_num_threads(2)
    result = trainer.train(resolved, place, report=lambda *a: seen.append(a))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert signal.getsignal(signal.SIGINT) is before[1]

    assert sorted(p.name for p in place.iterdir()) == [
        "checkpoints", "config.toml", "glasses.safetensors", "metrics.jsonl", "report", "samples",
        "tensorboard",
    ]  # fmt: skip
    assert checkpoint.steps(place / "checkpoints") == [3, 4]
    assert sorted(p.name for p in (place / "samples").iterdir()) == ["step-000002.png", "step-000004.png"]
    assert config.load(str(place / "config.toml")).config == resolved.config

    rows = lines(place)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["loss"] == row["terms"]["denoising"] > 0
        assert row["seconds"] > 0
        assert row["grad_norm"] > 0
    assert rows[0]["learning_rate"] == resolved.config.train.learning_rate > rows[3]["learning_rate"] > 0
    training = [values for _, _, values in seen if values["phase"] == "training"]
    assert training[-1].keys() >= {"loss", "terms", "steps_per_second", "seconds_left", "peak_memory"}
    assert training[-1]["seconds_left"] == 0
    assert training[-1]["peak_memory"] > 1e8
    _check_events(place / "tensorboard", rows)
    _check_result(result, place)


def _check_events(folder: Path, rows: list[dict[str, Any]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("terms/denoising")] == [1, 2, 3, 4]
    assert events.Scalars("loss")[2].value == pytest.approx(rows[2]["loss"])
    assert [event.step for event in events.Images("samples")] == [2, 4]


def _check_result(result: trainer.TrainResult, place: Path) -> None:
    from spf_kit.adapters import files

    written = files.read(result.lora)
    assert result.lora == place / "glasses.safetensors"
    live = result.handle.to_lora_file({})
    for key, layer in live.layers.items():
        assert torch.equal(written.layers[key].up, layer.up.half())
    assert any(bool(layer.up.any()) for layer in live.layers.values())
    assert written.metadata["ss_steps"] == "4"
    assert written.metadata["spf_kit.config"] == (place / "config.toml").read_text()
    assert result.steps == 4
    assert not any("glasses" in caption for caption in result.captions)
    assert not result.family.unet.training
    assert not result.family.unet.is_gradient_checkpointing


def test_the_same_seed_gives_the_same_lora(resolve: Callable[..., Resolved], tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(hash(name) % 1000)
        trainer.train(resolve(f"train.seed={seed}", "adapter.dropout=0.2", "data.flip=true"), tmp_path / name)
    assert same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    assert not same(tensors(tmp_path / "a"), tensors(tmp_path / "c"))


def test_epochs_and_accumulation_set_the_steps(resolve: Callable[..., Resolved], tmp_path: Path) -> None:
    resolved = resolve("train.batch_size=2", "train.gradient_accumulation=2")
    resolved.config.train.epochs = 3
    result = trainer.train(resolved, tmp_path / "run")
    assert result.steps == 3  # 4 pictures, 4 samples a step
    assert len(lines(tmp_path / "run")) == 3
    assert trainer.check(resolved).info["steps"] == 3


def test_everything_at_once(resolve: Callable[..., Resolved], tmp_path: Path) -> None:
    """The text encoder with an own rate, bf16, checkpointing, an 8-bit optimizer, prior pictures, EMA."""
    resolved = resolve(
        'adapter.targets=["cross-attention","text-encoder"]', "train.text_encoder_learning_rate=0.0002",
        'train.optimizer="adamw8bit"', "train.gradient_checkpointing=true", 'train.mixed_precision="bf16"',
        "train.ema=0.9", "train.noise_offset=0.1", "loss.prior_preservation.count=3",
        "loss.prior_preservation.steps=2", "train.steps=2", 'output.dtype="float32"',
        recipe="prior-preservation",
    )  # fmt: skip
    place = tmp_path / "run"
    result = trainer.train(resolved, place)
    rows = lines(place)
    assert set(rows[0]["terms"]) == {"denoising", "prior_preservation"}
    assert rows[0]["loss"] == pytest.approx(sum(rows[0]["terms"].values()), rel=1e-5)
    assert rows[0]["text_encoder_learning_rate"] == 0.0002
    assert len(list((place / "prior").glob("*.png"))) == 3
    for prefix in ("lora_unet_", "lora_te_"):
        ups = [t for key, t in tensors(place).items() if key.startswith(prefix) and "lora_up" in key]
        assert any(bool(up.any()) for up in ups)
    # the file has the average, not the weights of the last step
    saved = checkpoint.load(place / "checkpoints" / "step-000002")
    live = result.handle.state_dict()
    assert any(not torch.equal(saved.adapter[name], value) for name, value in live.items())
    assert all(torch.equal(value, ema) for value, ema in zip(live.values(), saved.updater["ema"]["values"]))
    # ready prior pictures instead of drawing: the same numbers
    again = resolve(*_prior_sets(place / "prior"), recipe="prior-preservation")
    trainer.train(again, tmp_path / "again")
    assert not (tmp_path / "again" / "prior").exists()


def _prior_sets(folder: Path) -> list[str]:
    return [f"loss.prior_preservation.path={json.dumps(str(folder))}", "train.steps=1"]


def test_texts_are_cached_and_encoders_freed_unless_needed(
    resolve: Callable[..., Resolved], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spf_kit.families.sd15 import SD15Family

    calls: list[int] = []
    encode = SD15Family.encode_text
    monkeypatch.setattr(
        SD15Family,
        "encode_text",
        lambda self, texts, **k: calls.append(len(texts)) or encode(self, texts, **k),
    )
    kept = trainer.train(resolve(), tmp_path / "cached")
    assert len(calls) == 1
    assert kept.family.text_encoder is None
    assert kept.family.vae is None
    calls.clear()
    free = trainer.train(
        resolve("data.shuffle_tags=true", 'data.cache="none"', 'data.crop="random"'), tmp_path / "b"
    )
    assert calls == [1, 1, 1, 1]
    assert free.family.text_encoder is not None
    assert free.family.vae is not None


# --- refusals and ends ------------------------------------------------------------------------------------


def test_folders_are_respected(resolve: Callable[..., Resolved], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match=r"there' exists: choose another with --output"):
        trainer.train(resolve(), tmp_path / "there")
    with pytest.raises(UserError, match="there is no run to resume"):
        trainer.train(resolve(), tmp_path / "there", resume=True)
    with pytest.raises(UserError, match="there is no run to resume"):
        trainer.train(resolve(), tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()


def test_fp16_without_a_gpu_is_refused(resolve: Callable[..., Resolved], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="needs a GPU"):
        trainer.train(resolve('train.mixed_precision="fp16"'), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_pictures_stop_before_anything_is_written(
    resolve: Callable[..., Resolved], tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"\x89PNG broken")
    (folder / "a.txt").write_text("a man")
    resolved = resolve()
    resolved.config.data.path = str(folder)
    for run in (lambda: trainer.train(resolved, tmp_path / "run"), lambda: trainer.check(resolved)):
        with pytest.raises(UserError, match=r"a\.png"):
            run()
    assert not (tmp_path / "run").exists()


def test_a_loss_that_diverges_stops_the_run(resolve: Callable[..., Resolved], tmp_path: Path) -> None:
    @register("t_nan")
    class Nan(Loss):
        def __call__(self, step: Step) -> torch.Tensor:
            value = per_sample((step.response.prediction - step.target).square())
            return value / 0 if step.number == 3 else value

    resolved = resolve("train.checkpoint_every=1", "train.batch_size=2")
    resolved.plugins.append(Nan())
    with pytest.raises(TrainingDiverged) as caught:
        trainer.train(resolved, tmp_path / "run")
    message = str(caught.value)
    assert "the loss term 't_nan' became infinite at step 3 (timesteps " in message
    assert message.count(".png") == 2
    assert "step-000002" in message
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [1, 2]
    assert [row["step"] for row in lines(tmp_path / "run")] == [1, 2]
    assert not (tmp_path / "run" / "glasses.safetensors").exists()


def test_the_message_names_the_bad_sample_alone(resolve: Callable[..., Resolved], tmp_path: Path) -> None:
    @register("t_one_nan")
    class OneNan(Loss):
        def __call__(self, step: Step) -> torch.Tensor:
            value = per_sample((step.response.prediction - step.target).square())
            return torch.where(torch.arange(len(value)) == 1, torch.nan, value)

    resolved = resolve("train.batch_size=4")
    resolved.plugins.append(OneNan())
    with pytest.raises(
        TrainingDiverged, match=r"became NaN at step 1 .*there is no checkpoint yet"
    ) as caught:
        trainer.train(resolved, tmp_path / "run")
    assert str(caught.value).count(".png") == 1


def test_a_gradient_that_diverges_stops_the_run(resolve: Callable[..., Resolved], tmp_path: Path) -> None:
    @register("t_root")
    class Root(Loss):
        def __call__(self, step: Step) -> torch.Tensor:
            zero = step.response.prediction - step.response.prediction.detach()
            return per_sample(zero.square()).sqrt()  # 0, with the slope 0 / 0

    resolved = resolve()
    resolved.plugins.append(Root())
    with pytest.raises(TrainingDiverged, match="the gradient became NaN at step 1"):
        trainer.train(resolved, tmp_path / "run")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
    name: str, resolve: Callable[..., Resolved], tmp_path: Path
) -> None:
    @register("t_state")
    class Fading(Loss):
        """A weight that falls with every call: state that must survive."""

        _calls: int = 0

        def __call__(self, step: Step) -> torch.Tensor:
            self._calls += 1
            return per_sample((step.response.prediction - step.target).square()) / self._calls

        def state_dict(self) -> dict[str, Any]:
            return {"calls": self._calls}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self._calls = state.get("calls", 0)

    resolved, place = resolve("train.ema=0.9"), tmp_path / "my run"
    resolved.plugins.append(Fading())

    def interrupt(done: int, total: int, values: Any) -> None:
        if values["phase"] == "training" and done == 2:
            os.kill(os.getpid(), getattr(signal, name))

    with pytest.raises(Interrupted) as caught:
        trainer.train(resolved, place, report=interrupt)
    config_file = place / "config.toml"
    assert f'spf-kit train "{config_file}" --output "{place}" --resume' in str(caught.value)
    assert checkpoint.steps(place / "checkpoints") == [3]  # asked after step 2, seen in the next one
    assert not (place / "glasses.safetensors").exists()
    assert config.load(str(config_file)).config == resolved.config
    trainer.train(resolved, place, resume=True)
    trainer.train(resolved, tmp_path / "straight")
    assert same(tensors(place), tensors(tmp_path / "straight"))
    terms = [row["terms"]["t_state"] / row["terms"]["denoising"] for row in lines(place)]
    assert terms == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])


def test_what_fails_before_the_first_step_leaves_no_folder(
    resolve: Callable[..., Resolved], tmp_path: Path
) -> None:
    """The corrected command, or the same one again, must find the way free."""
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    large = {f"{key}.lora_down.weight": torch.zeros(4, 768), f"{key}.lora_up.weight": torch.zeros(320, 4)}
    save_file(large, tmp_path / "large.safetensors")
    start_from = f"adapter.start_from={json.dumps(str(tmp_path / 'large.safetensors'))}"
    with pytest.raises(UserError, match="does not fit the base"):
        trainer.train(resolve(start_from), tmp_path / "run")
    assert not (tmp_path / "run").exists()

    def interrupt(phase: str, at: int) -> Callable[..., None]:
        def report(done: int, total: int, values: Any) -> None:
            if values["phase"] == phase and done >= at:
                raise KeyboardInterrupt

        return report

    prior = resolve("loss.prior_preservation.count=2", "loss.prior_preservation.steps=1",
                    "train.steps=1", recipe="prior-preservation")  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        trainer.train(prior, tmp_path / "run", report=interrupt("drawing prior pictures", 1))
    assert not (tmp_path / "run").exists()
    with pytest.raises(Interrupted, match="stopped before any training; go on with: spf-kit train"):
        trainer.train(prior, tmp_path / "run", report=interrupt("encoding captions", 1))
    drawn = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "prior").iterdir()}
    assert len(drawn) == 4
    trainer.train(prior, tmp_path / "run", resume=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "prior").iterdir()} == drawn


def test_ctrl_c_leaves_a_preview_at_once(resolve: Callable[..., Resolved], tmp_path: Path) -> None:
    resolved, drawn = resolve("preview.every=2", "preview.steps=50", "preview.count=1"), []

    def interrupt(done: int, total: int, values: Any) -> None:
        if values["phase"] == "drawing a preview":
            drawn.append(done)
            os.kill(os.getpid(), signal.SIGINT) if len(drawn) == 1 else None

    with pytest.raises(Interrupted, match="go on with"):
        trainer.train(resolved, tmp_path / "run", report=interrupt)
    assert len(drawn) <= 2
    assert not (tmp_path / "run" / "samples").exists()


def test_a_second_ctrl_c_does_not_wait(resolve: Callable[..., Resolved], tmp_path: Path) -> None:
    def interrupt(done: int, total: int, values: Any) -> None:
        if values["phase"] == "training" and done == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="stopped at once; go on from the checkpoint of step 1 with"):
        trainer.train(resolve("train.checkpoint_every=1"), tmp_path / "run", report=interrupt)


def test_signals_in_a_thread_are_left_alone() -> None:
    found = []

    def work() -> None:
        with Stop().listening() as stop:
            found.append((stop.requested, signal.getsignal(signal.SIGINT)))

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert found == [(False, signal.getsignal(signal.SIGINT))]


def test_small_models_take_one_thread() -> None:
    assert choose_threads(4_000_000) == 1
    assert choose_threads(860_000_000) == torch.get_num_threads()
