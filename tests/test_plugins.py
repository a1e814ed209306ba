"""The shipped losses against plain float64 arithmetic; the plugin check against broken plugins."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from spf_kit import losses
from spf_kit.data.captions import derive
from spf_kit.discovery import available, files_of, load_file
from spf_kit.errors import UserError
from spf_kit.families.noise import NoiseProcess
from spf_kit.losses import ModelPass, Needs, Prior, PriorBatch, Step
from spf_kit.plugin_check import check_file, check_plugin

SHIPPED = available()
F64 = torch.float64
ABAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=F64) ** 2, 0)


def make_step(
    kind: str = "epsilon", *, mask: torch.Tensor | None = None, dtype: torch.dtype = torch.float64
) -> Step:
    g = torch.Generator().manual_seed(3)

    def randn() -> torch.Tensor:
        return torch.randn(3, 4, 6, 5, generator=g, dtype=F64).to(dtype)

    process = NoiseProcess(kind, None if kind == "flow" else ABAR.float())
    t = torch.tensor([20, 400, 980]) if kind != "flow" else torch.tensor([20.0, 400.0, 980.0])
    passes = {name: ModelPass(randn().requires_grad_(on)) for name, on in
              [("reference", False), ("response", True), ("plain", True)]}  # fmt: skip
    return Step(
        randn(), randn(), randn(), t, randn(), process, [derive("a man", "glasses")] * 3, ["a", "b", "c"],
        passes=passes, prior_batch=PriorBatch(randn().requires_grad_(), randn(), t), mask=mask,
    )  # fmt: skip


def snr(kind: str, t: torch.Tensor) -> torch.Tensor:
    if kind == "flow":
        return ((1 - t / 1000) / (t / 1000)) ** 2
    return ABAR[t] / (1 - ABAR[t])


def loop_mean(values: torch.Tensor) -> list[float]:
    """Mean over everything but the first dimension, the slow way."""
    return [math.fsum(row.flatten().tolist()) / row.numel() for row in values]


def distance(kind: str, r: torch.Tensor) -> torch.Tensor:
    if kind == "huber":
        return 2 * 0.3 * (torch.sqrt(r**2 + 0.3**2) - 0.3)
    return {"l1": r.abs(), "l2": r**2}[kind]


@pytest.fixture(autouse=True)
def _registry_as_it_was() -> Iterator[None]:
    """The plugins that a test registers end with it."""
    before = dict(losses._registry)
    yield
    losses._registry.clear()
    losses._registry.update(before)


@pytest.mark.parametrize("distance_kind", ["l2", "l1", "huber"])
@pytest.mark.parametrize("masked", [False, True])
def test_denoising_distances(distance_kind: str, masked: bool) -> None:
    mask = torch.rand(3, 1, 6, 5, generator=torch.Generator().manual_seed(1), dtype=F64) if masked else None
    step = make_step(mask=mask)
    value = SHIPPED["denoising"](kind=distance_kind, huber_delta=0.3)(step)
    expected = distance(distance_kind, step.target - step.response.prediction) * (1 if mask is None else mask)
    assert torch.allclose(value, torch.tensor(loop_mean(expected), dtype=F64), rtol=1e-12)


def test_huber_is_square_near_zero_and_linear_far_away() -> None:
    huber = SHIPPED["denoising"](kind="huber", huber_delta=0.1)
    near, far = torch.tensor(1e-4, dtype=F64), torch.tensor(1e4, dtype=F64)
    assert float(huber.distance(near) / near**2) == pytest.approx(1, rel=1e-3)
    assert float(huber.distance(far) / (2 * 0.1 * far)) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("weighting", ["min_snr", "debiased", "x0", "x0 and min_snr"])
def test_weights_are_those_of_the_clean_picture(kind: str, weighting: str) -> None:
    """lambda(SNR) |x0 - x0_hat|^2, with x0_hat computed from the prediction, equals the weighted loss."""
    step = make_step(kind)
    latents, noise, t = step.latents, step.noise, step.timesteps
    noisy, target = step.process.add_noise(latents, noise, t), step.process.target(latents, noise, t)
    prediction = target + 0.1 * step.response.prediction.detach()
    fields = {
        "min_snr": {"min_snr_gamma": 5.0}, "debiased": {"debiased": True}, "x0": {"x0_weight": 1e9},
        "x0 and min_snr": {"x0_weight": 1e9, "min_snr_gamma": 2.0},
    }[weighting]  # fmt: skip
    passes = {"response": ModelPass(prediction)}
    value = SHIPPED["denoising"](**fields)(
        Step(latents, noise, noisy, t, target, step.process, [], [], passes=passes)
    )
    ratio = snr(kind, t)
    weight = {
        "min_snr": ratio.clamp(max=5.0), "debiased": ratio.sqrt(), "x0": ratio.clamp(min=1.0),
        "x0 and min_snr": ratio.clamp(min=1.0, max=2.0),
    }[weighting]  # fmt: skip
    clean_error = (latents - step.process.clean(noisy, prediction, t)).square().flatten(1).mean(1)
    assert torch.allclose(value, weight * clean_error, rtol=2e-3)  # the process computes in float32


def test_min_snr_weights_are_the_published_ones() -> None:
    denoising = SHIPPED["denoising"](min_snr_gamma=5.0)
    ratio = torch.tensor([0.0, 0.01, 1.0, 5.0, 100.0], dtype=F64)
    assert torch.allclose(
        denoising.timestep_weight(ratio, "epsilon"), torch.tensor([1, 1, 1, 1, 0.05], dtype=F64)
    )
    expected = torch.tensor([0, 0.01 / 1.01, 0.5, 5 / 6, 5 / 101], dtype=F64)
    assert torch.allclose(denoising.timestep_weight(ratio, "v_prediction"), expected)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_denoising_acts_in_its_range_of_timesteps(kind: str) -> None:
    step = make_step(kind)  # 0.02, 0.4 and 0.98 of the schedule
    everywhere = SHIPPED["denoising"]()(step)
    value = SHIPPED["denoising"](min_timestep=0.3, max_timestep=0.9)(step)
    assert value.tolist() == [0.0, everywhere[1].item(), 0.0]
    assert torch.autograd.grad(value.sum(), step.response.prediction)[0][[0, 2]].abs().sum() == 0
    with pytest.raises(ValidationError, match=r"min_timestep = 0\.5 must be less than max_timestep = 0\.5"):
        SHIPPED["denoising"](min_timestep=0.5, max_timestep=0.5)


def test_x0_weight_is_limited() -> None:
    ratio = torch.tensor([0.0, 0.01, 0.1, 0.5, 4.0], dtype=F64)
    weights = SHIPPED["denoising"](min_snr_gamma=1.0, x0_weight=20.0).timestep_weight(ratio, "epsilon")
    assert torch.allclose(weights, torch.tensor([20, 20, 10, 2, 0.25], dtype=F64))


@pytest.mark.parametrize("fields", [{"min_snr_gamma": 5.0}, {"debiased": True}, {"x0_weight": 20.0}])
@pytest.mark.parametrize("kind", ["v_prediction", "flow"])
def test_weights_stay_finite_at_both_ends(fields: dict, kind: str) -> None:
    ends = torch.tensor([0.0, math.inf])
    assert torch.isfinite(SHIPPED["denoising"](**fields).timestep_weight(ends, kind)).all()


def test_two_weightings_are_refused() -> None:
    with pytest.raises(ValidationError, match="choose one"):
        SHIPPED["denoising"](x0_weight=5.0, debiased=True)
    with pytest.raises(ValidationError, match="choose one"):
        SHIPPED["denoising"](min_snr_gamma=5.0, debiased=True)
    with pytest.raises(ValidationError, match="remove it"):
        SHIPPED["prior_preservation"](mask="m")


@pytest.mark.parametrize("masked", [False, True])
def test_output_preservation(masked: bool) -> None:
    mask = torch.rand(3, 1, 6, 5, dtype=F64) if masked else None
    step = make_step(mask=mask)
    value = SHIPPED["output_preservation"]()(step)
    expected = (step.plain.prediction - step.reference.prediction) ** 2 * (1 if mask is None else mask)
    assert torch.allclose(value, torch.tensor(loop_mean(expected), dtype=F64), rtol=1e-12)


def test_output_preservation_of_an_adapter_that_changes_nothing_is_zero() -> None:
    step = make_step()
    same = ModelPass(step.reference.prediction.clone().requires_grad_())
    passes = {"plain": same, "reference": step.reference}
    fresh = replace(step, passes=passes)
    value = SHIPPED["output_preservation"]()(fresh)
    value.sum().backward()
    assert value.tolist() == [0.0, 0.0, 0.0]
    assert not same.prediction.grad.any()


def test_prior_preservation() -> None:
    step = make_step()
    expected = loop_mean((step.prior.target - step.prior.prediction) ** 2)
    assert torch.allclose(
        SHIPPED["prior_preservation"]()(step), torch.tensor(expected, dtype=F64), rtol=1e-12
    )
    plugin = SHIPPED["prior_preservation"](count=7, steps=3, cfg=2.0)
    assert plugin.needs == Needs.of(prior=Prior(7, "", 3, 2.0))


@pytest.mark.parametrize(("name", "fields", "read"), [
    ("denoising", {}, "response"), ("denoising", {"kind": "l1"}, "response"),
    ("denoising", {"kind": "huber", "min_snr_gamma": 5.0}, "response"),
    ("output_preservation", {}, "plain"), ("prior_preservation", {}, "prior"),
])  # fmt: skip
def test_gradients_by_finite_differences(name: str, fields: dict, read: str) -> None:
    step = make_step()
    leaf = step.prior.prediction if read == "prior" else step.passes[read].prediction
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=F64)

    def value() -> float:
        with torch.no_grad():
            return float(SHIPPED[name](**fields)(step) @ weights)

    (SHIPPED[name](**fields)(step) @ weights).backward()
    for place in [(0, 0, 0, 0), (1, 3, 5, 4), (2, 1, 2, 3)]:
        original, size = leaf.data[place].item(), 1e-6
        leaf.data[place] = original + size
        up = value()
        leaf.data[place] = original - size
        down = value()
        leaf.data[place] = original
        assert float(leaf.grad[place]) == pytest.approx((up - down) / (2 * size), rel=1e-5, abs=1e-9)


REQUIRED = {"inverted_mask": {"mask": "m"}}  # what has no default


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_plugins_pass_the_check(name: str) -> None:
    assert [result for result in check_plugin(SHIPPED[name], REQUIRED.get(name)) if not result.passed] == []


# --- the check finds what is wrong ------------------------------------------------------------------------

HEAD = """
import torch
from spf_kit.losses import Field, Loss, Mask, Needs, Step, Tensor, per_sample, register
"""
BROKEN = {
    "reads only what it declares": """
@register("t_undeclared")
class A(Loss):
    def __call__(self, step):
        return per_sample((step.response.prediction - step.reference.prediction).square())
""",
    "returns the right shape, finite, a mask in [0, 1]": """
@register("t_mask")
class B(Mask):
    def __call__(self, step):
        return step.response.prediction.detach().mean(1, keepdim=True)
""",
    "has the right gradient": """
@register("t_gradient")
class C(Loss):
    def __call__(self, step):
        return per_sample((step.response.prediction.detach() - step.target).square())
""",
    "is deterministic": """
@register("t_random")
class D(Loss):
    def __call__(self, step):
        r = step.response.prediction
        return per_sample((r + torch.rand_like(r)).square())
""",
    "works in bfloat16 and float16": """
@register("t_dtype")
class E(Loss):
    def __call__(self, step):
        r = step.response.prediction
        return per_sample(torch.nn.functional.conv2d(r, torch.ones(4, 4, 1, 1, dtype=torch.float32).to(
            torch.float64 if r.dtype == torch.float64 else torch.float32)))
""",
    "leaves the step as it was": """
@register("t_inplace")
class F(Loss):
    def __call__(self, step):
        return per_sample((step.response.prediction - step.target.mul_(0.5)).square())
""",
    "judges each sample alone": """
@register("t_batch")
class G(Loss):
    def __call__(self, step):
        value = per_sample((step.response.prediction - step.target).square())
        return value / value.detach().mean()
""",
    "goes on from its state_dict": """
@register("t_state")
class H(Loss):
    _mean = 1.0
    def __call__(self, step):
        value = per_sample((step.response.prediction - step.target).square())
        object.__setattr__(self, "_seen", getattr(self, "_seen", 0) + 1)
        return value / self._seen
""",
}


@pytest.mark.parametrize("promise", BROKEN)
def test_the_check_names_the_broken_promise(promise: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(HEAD + BROKEN[promise], encoding="utf-8")
    failed = {result.check for result in check_file(file) if not result.passed}
    assert promise in failed


def test_the_check_says_which_field_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        HEAD + '@register("t_field")\nclass A(Loss):\n    size: int\n    def __call__(self, step):\n'
        "        return self.size * per_sample(step.response.prediction)\n",
        encoding="utf-8",
    )  # fmt: skip
    assert [(r.passed, r.detail) for r in check_file(file)] == [(False, "size: Field required")]
    assert all(r.passed for r in check_file(file, {"size": 2}))


def test_a_file_knows_where_it_came_from(tmp_path: Path) -> None:
    file = tmp_path / "my.plugin.py"
    file.write_text(HEAD + '@register("t_origin")\nclass A(Loss):\n    pass\n', encoding="utf-8")
    (cls,) = load_file(file)
    assert files_of([cls(), SHIPPED["denoising"]()]) == [file]
    with pytest.raises(UserError, match="registers no plugin"):
        load_file(_write(tmp_path / "empty.py", "x = 1\n"))
    with pytest.raises(UserError, match="two loss plugins are called 'denoising'"):
        load_file(_write(tmp_path / "twice.py", HEAD + '@register("denoising")\nclass A(Loss):\n    pass\n'))


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
