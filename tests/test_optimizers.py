"""Optimizers by name, really stepped; schedules against their formulas; EMA, clipping and fp16 scaling."""

from __future__ import annotations

import copy
import io
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from spf_kit.errors import UserError
from spf_kit.schema import Train
from spf_kit.training import optimizers
from spf_kit.training.optimizers import OPTIMIZERS, Schedule, build, find, multiplier
from spf_kit.training.update import MAX_SKIPPED, Ema, Updater

EIGHT_BIT = [name for name in OPTIMIZERS if name.endswith("8bit")]
RATE = {"prodigy": 1.0, "sgd_schedulefree": 0.1, "sgd8bit": 0.01, "lars8bit": 0.01}


def settings(name: str, **more: Any) -> Train:
    return Train(optimizer=name, learning_rate=RATE.get(name, 1e-2), **more)


def tensors() -> list[nn.Parameter]:
    """One under, one of exactly and one over the 4,096 elements from which bitsandbytes uses 8 bits."""
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=g)) for shape in [(8, 8), (64, 64), (3, 40, 41)]]


def train_on(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int) -> float:
    """Minimise sum of (p - 3)^2; the loss at the end."""
    getattr(optimizer, "train", lambda: None)()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.stack([(p - 3).square().mean() for p in parameters]).sum()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(torch.stack([(p - 3).square().mean() for p in parameters]).sum())


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_and_goes_on_from_its_state(name: str) -> None:
    first = tensors()
    optimizer = build(settings(name), {"unet": first})
    start = train_on(optimizer, first, 0)
    assert train_on(optimizer, first, 20) < start

    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    second = [nn.Parameter(p.detach().clone()) for p in first]
    other = build(settings(name), {"unet": second})
    other.load_state_dict(torch.load(buffer, weights_only=True))
    train_on(optimizer, first, 3)
    train_on(other, second, 3)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", EIGHT_BIT)
def test_eight_bit_states_are_eight_bits(name: str) -> None:
    parameters = tensors()
    optimizer = build(settings(name), {"unet": parameters})
    train_on(optimizer, parameters, 1)
    for parameter in parameters:
        states = {key: value for key, value in optimizer.state[parameter].items() if key.startswith("state")}
        expected = torch.uint8 if parameter.numel() >= 4096 else torch.float32
        assert states
        assert {value.dtype for value in states.values()} == {expected}


def test_all_of_bitsandbytes_eight_bit_optimizers_are_there() -> None:
    import bitsandbytes

    assert {n.lower() for n in dir(bitsandbytes.optim) if n.endswith("8bit")} == set(EIGHT_BIT)


def test_adamw_is_torchs_own() -> None:
    ours, theirs = tensors(), tensors()
    train_on(build(settings("adamw", optimizer_args={"betas": [0.8, 0.95]}), {"unet": ours}), ours, 5)
    train_on(torch.optim.AdamW(theirs, lr=1e-2, betas=(0.8, 0.95), fused=True), theirs, 5)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("choice", ["fused", "foreach"])
def test_one_kernel_is_the_same_adamw_up_to_rounding(choice: str) -> None:
    ours, theirs = tensors(), tensors()
    train_on(build(settings("adamw", optimizer_args={choice: True}), {"unet": ours}), ours, 20)
    train_on(torch.optim.AdamW(theirs, lr=1e-2, fused=False, foreach=False), theirs, 20)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("spelling", ["AdamW8bit", "adamw-8bit", "ADAMW_8BIT", "AdamWScheduleFree"])
def test_spelling_does_not_matter(spelling: str) -> None:
    assert find(spelling).name.replace("_", "") == spelling.lower().replace("-", "").replace("_", "")


@pytest.mark.parametrize(("train", "sentence"), [
    (Train(optimizer="adafacter"), "did you mean 'adafactor'"),
    (Train(optimizer="lion8bits"), "did you mean 'lion8bit'"),
    (Train(optimizer_args={"weight_decy": 0.1}), "did you mean 'weight_decay'"),
    (Train(optimizer_args={"lr": 0.1}), "set train.learning_rate"),
    (Train(optimizer_args={"betas": [0.9, 1.5]}), "Invalid beta"),
    (Train(optimizer_args={"betas": 3}), "refuses"),
    (Train(optimizer_args={"eps": "small"}), "refuses"),
    (Train(optimizer="adam8bit", optimizer_args={"amsgrad": True}), "amsgrad"),
    (Train(optimizer="prodigy", text_encoder_learning_rate=0.5), "must be 0 or equal"),
    (Train(optimizer="adamw_schedulefree", ema=0.99), "remove train.ema"),
])  # fmt: skip
def test_what_is_wrong_is_said(train: Train, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        optimizers.check(train)


def test_what_is_hardly_meant_is_told() -> None:
    assert optimizers.advice(Train()) == []
    assert "1 is usual" in optimizers.advice(Train(optimizer="prodigy", schedule="constant"))[0]
    assert "taken as 'constant'" in optimizers.advice(Train(optimizer="adamw_schedulefree"))[0]


def test_prodigy_keeps_standard_output_clean(capsys: pytest.CaptureFixture[str]) -> None:
    build(settings("prodigy", optimizer_args={"weight_decay": 0.1}), {"unet": tensors()})
    assert capsys.readouterr().out == ""


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = optimizers.Spec("x", "no_such_package.optim", "X", "no-such-package")
    with pytest.raises(UserError, match="needs the package 'no-such-package'"):
        spec.load()


def test_components_have_their_own_rate() -> None:
    train = Train(learning_rate=1e-3, schedule="constant")
    optimizer = build(train, {"unet": tensors(), "text_encoder": tensors()})
    schedule = Schedule.of(train, 10, ["unet", "text_encoder"])
    assert schedule.apply(optimizer, 1) == {"unet": 1e-3, "text_encoder": 5e-4}
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 5e-4]
    assert optimizers.base_rates(Train(optimizer="prodigy", learning_rate=1.0), ["unet", "text_encoder"]) == {
        "unet": 1.0, "text_encoder": 1.0,
    }  # fmt: skip


def test_adafactor_may_find_its_own_rate() -> None:
    parameters = tensors()
    train = settings("adafactor", optimizer_args={"relative_step": True, "scale_parameter": True})
    assert train_on(build(train, {"unet": parameters}), parameters, 3) < 40


# --- schedules ----------------------------------------------------------------------------------------------


def test_schedules() -> None:
    assert [multiplier("constant", s, 4, 0) for s in (1, 2, 3, 4)] == [1, 1, 1, 1]
    assert [multiplier("linear", s, 4, 0) for s in (1, 2, 3, 4)] == [1, 0.75, 0.5, 0.25]
    cosine = [0.5 * (1 + math.cos(math.pi * x)) for x in (0, 0.25, 0.5, 0.75)]
    assert [multiplier("cosine", s, 4, 0) for s in (1, 2, 3, 4)] == pytest.approx(cosine)


def test_warm_up_rises_to_the_schedule_and_wastes_no_step() -> None:
    values = [multiplier("linear", s, 7, 3) for s in range(1, 8)]
    assert values == pytest.approx([0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25])
    assert multiplier("cosine", 5, 5, 10) > 0  # a warm-up longer than the run


def test_a_schedule_free_optimizer_takes_no_schedule() -> None:
    assert (
        Schedule.of(Train(optimizer="adamw_schedulefree", schedule="cosine"), 10, ["unet"]).kind == "constant"
    )


# --- the update ---------------------------------------------------------------------------------------------


def updater(parameters: list[nn.Parameter], train: Train, scaler: Any = None, **more: Any) -> Updater:
    one_process = SimpleNamespace(scaler=scaler, num_processes=1)
    optimizer = build(train, {"unet": parameters})
    return Updater(optimizer, Schedule.of(train, 100, ["unet"]), one_process, **more)


def test_micro_batches_are_averaged_and_the_norm_is_clipped() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    plain = {"momentum": 0}
    train = Train(optimizer="sgd", learning_rate=1.0, schedule="constant", optimizer_args=plain)
    update = updater([parameter], train, max_grad_norm=0.5, accumulation=2)
    update.backward((parameter * torch.tensor([2.0, 0, 0, 0])).sum())
    update.backward((parameter * torch.tensor([4.0, 8.0, 0, 0])).sum())
    assert float(update.gradients()) == pytest.approx(5)  # |(3, 4, 0, 0)|
    update.apply(1)
    assert parameter.tolist() == pytest.approx([-0.3, -0.4, 0, 0])
    assert parameter.grad is None


def test_an_overflow_in_fp16_skips_the_step_and_lowers_the_scale() -> None:
    parameter = nn.Parameter(torch.ones(4))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    update = updater([parameter], Train(learning_rate=0.1), scaler, ema_decay=0.9)
    update.backward((parameter * 1e36).sum())  # finite, but not times 2^16
    assert not math.isfinite(float(update.gradients()))
    update.apply(1)
    assert parameter.tolist() == [1, 1, 1, 1]
    assert update.ema.updates == 0
    assert scaler.get_scale() == 2.0**15
    update.backward(parameter.sum())
    assert float(update.gradients()) == pytest.approx(2)  # the scale is taken out again
    update.apply(2)
    assert parameter[0] < 1
    assert update.ema.updates == 1
    assert update.skipped == 0


def test_endless_overflow_ends_the_run() -> None:
    parameter = nn.Parameter(torch.ones(1))
    update = updater([parameter], Train(), torch.amp.GradScaler("cpu"))

    def overflow(step: int) -> None:
        update.backward((parameter * math.inf).sum())
        update.gradients()
        update.apply(step)

    for step in range(1, MAX_SKIPPED):
        overflow(step)
    with pytest.raises(UserError, match="overflowed in 50 steps in a row"):
        overflow(MAX_SKIPPED)


@pytest.mark.parametrize("scaled", [False, True], ids=["float32", "fp16"])
@pytest.mark.parametrize("name", ["adamw", "adamw_schedulefree", "prodigy"])
def test_a_step_without_a_gradient_changes_nothing(name: str, scaled: bool) -> None:
    """At first, before a scaler has seen any loss, and later, where it has a state."""
    parameter = nn.Parameter(torch.ones(4))
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    update = updater([parameter], Train(optimizer=name, learning_rate=0.1, schedule="constant"), scaler)

    def idle(step: int) -> None:
        before = copy.deepcopy((update.state_dict(), parameter.data))
        assert float(update.gradients()) == 0
        assert update.apply(step)
        after = update.state_dict(), parameter.data
        assert str(after) == str(before)

    idle(1)
    update.backward(parameter.square().sum())
    assert float(update.gradients()) == pytest.approx(4)
    update.apply(2)
    assert (parameter != 1).all()
    idle(3)
    update.backward(parameter.sum())
    assert float(update.gradients()) == pytest.approx(2)
    update.apply(4)
    assert update.skipped == 0


def test_ema_is_its_formula() -> None:
    parameter = torch.zeros(1, dtype=torch.float64)
    ema, expected = Ema([parameter], 0.5), 0.0
    for n in range(1, 30):
        parameter += 1
        ema.update([parameter])
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    assert float(ema.values[0]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("train", [
    Train(), Train(ema=0.9),
    settings("adamw_schedulefree"), settings("sgd_schedulefree"), settings("radam_schedulefree"),
], ids=lambda t: f"{t.optimizer}-{t.ema}")  # fmt: skip
def test_the_average_comes_and_goes_without_a_trace(train: Train) -> None:
    """A preview must not change a bit of the training that follows it."""
    looked, alone = tensors(), tensors()
    runs = [updater(parameters, train, ema_decay=train.ema) for parameters in (looked, alone)]
    for step in range(1, 9):
        for update, parameters in zip(runs, (looked, alone)):
            torch.stack([(p - 3).square().mean() for p in parameters]).sum().backward()
            update.apply(step)
        before = [p.detach().clone() for p in looked]
        with runs[0].averaged():
            moved = any(not torch.equal(a, b) for a, b in zip(before, looked))
    assert moved == (train != Train())  # at the first step the average is still what was trained
    assert all(torch.equal(a, b) for a, b in zip(looked, alone))
    runs[1].load_state_dict(runs[0].state_dict())
    for update in runs:
        update.use_average()
    assert all(torch.equal(a, b) for a, b in zip(looked, alone))
    assert any(not torch.equal(a, b) for a, b in zip(before, looked)) == (train != Train())
