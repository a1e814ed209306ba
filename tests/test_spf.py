"""The method's own losses against slow formulas in float64, and what they do in a real step."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from spf_kit import families, schema
from spf_kit.adapters.inject import AdapterHandle
from spf_kit.data.captions import derive
from spf_kit.data.dataset import Dataset
from spf_kit.discovery import available
from spf_kit.families.base import Family
from spf_kit.losses import Plugin, Step, Tools
from spf_kit.plugin_check import check_plugin
from spf_kit.plugins.control_map import otsu
from spf_kit.probes import LayerProbe
from spf_kit.random_step import random_step
from spf_kit.training.step import Draws, Model, noised, run_step
from spf_kit.training.text import Phrases

SHIPPED = available()
TARGET = "wearing glasses"
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("control_map", {}),
    ("control_map", {"source": "both", "blur": 1.0, "ema": 0.5, "quantile": 0.9, "threshold": 0.1}),
    ("control_map", {"source": "attention", "distances": "raw", "combine": "sum", "layers": ["1/2"]}),
    ("text_consistency", {}),
    ("text_consistency", {"mask": "m", "relative": True, "layers": ["up", "mid"]}),
    ("fine_grained", {}),
    ("fine_grained", {"mask": "m", "relative": True, "layer_weights": {"1/2": 0.25}}),
]


def plugin(name: str, **fields: Any) -> Any:
    return SHIPPED[name].model_validate(fields)


def step_for(made: Plugin, seed: int = 0) -> Step:
    return random_step(made, seed=seed, dtype=torch.float64)


@pytest.mark.parametrize(("name", "fields"), SETTINGS)
def test_the_promises_of_the_plugin_api(name: str, fields: dict[str, Any]) -> None:
    """Gradients by finite differences among them."""
    assert [result for result in check_plugin(SHIPPED[name], fields) if not result.passed] == []


# --- formulas, pixel by pixel -----------------------------------------------------------------------------


def slow_maps(layer: LayerProbe, sample: int) -> list[list[float]]:
    """A[q][i] of one sample: the mean over heads of a softmax over tokens."""
    d = layer.queries.shape[2] // layer.heads
    rows = []
    for q in range(layer.queries.shape[1]):
        mean = [0.0] * layer.keys.shape[1]
        for head in range(layer.heads):
            part = slice(head * d, (head + 1) * d)
            query = layer.queries[sample, q, part].tolist()
            scores = [
                sum(a * b for a, b in zip(query, key)) * layer.scale
                for key in layer.keys[sample, :, part].tolist()
            ]
            total = math.fsum(math.exp(score) for score in scores)
            mean = [m + math.exp(score) / total / layer.heads for m, score in zip(mean, scores)]
        rows.append(mean)
    return rows


def slow_area(mask: Tensor, size: tuple[int, int]) -> list[float]:
    """A mask (h, w) averaged over the blocks of a smaller size that divides it."""
    rows, columns = mask.shape[0] // size[0], mask.shape[1] // size[1]
    return [
        float(mask[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].mean())
        for i, j in itertools.product(range(size[0]), range(size[1]))
    ]


@pytest.mark.parametrize("fields", [{}, {"mask": "m"}, {"relative": True}, {"layer_weights": {"mid": 0.5}}])
def test_text_consistency_is_its_formula(fields: dict[str, Any]) -> None:
    made = plugin("text_consistency", **fields)
    step = step_for(made)
    found = made(step)
    for sample in range(len(step.captions)):
        tokens = step.spans[sample].base
        terms = []
        for name, response in step.response.attention.items():
            reference = step.reference.attention[name]
            ours, base = slow_maps(response, sample), slow_maps(reference, sample)
            hold = [1.0] * len(ours)
            if step.mask is not None:
                hold = [1 - m for m in slow_area(step.mask[sample, 0], response.size)]
            pairs = list(itertools.product(range(len(ours)), tokens))
            count = max(1, len(pairs))
            term = math.fsum((hold[q] * (ours[q][i] - base[q][i])) ** 2 for q, i in pairs) / count
            if "relative" in fields and tokens:
                term /= math.fsum(base[q][i] ** 2 for q, i in pairs) / count
            terms.append(term * (0.5 if "layer_weights" in fields and name.startswith("mid") else 1))
        assert float(found[sample].detach()) == pytest.approx(sum(terms) / len(terms), rel=1e-9, abs=1e-15)
    assert float(found.detach().max()) > 0


@pytest.mark.parametrize("fields", [{}, {"mask": "m"}, {"relative": True}, {"layers": ["1/1"]}])
def test_fine_grained_is_its_formula(fields: dict[str, Any]) -> None:
    made = plugin("fine_grained", **fields)
    step = step_for(made)
    found = made(step)
    for sample in range(len(step.captions)):
        terms = []
        for name, response in step.response.attention.items():
            q_res = response.queries[sample].tolist()
            q_ref = step.reference.attention[name].queries[sample].tolist()
            hold = [1.0] * len(q_res)
            if step.mask is not None:
                hold = [1 - m for m in slow_area(step.mask[sample, 0], response.size)]
            values = [(h * (a - b)) ** 2 for h, x, y in zip(hold, q_res, q_ref) for a, b in zip(x, y)]
            term = math.fsum(values) / len(values)
            if "relative" in fields:
                squares = [b * b for y in q_ref for b in y]
                term /= math.fsum(squares) / len(squares)
            terms.append(term)
        assert len(terms) == (2 if "layers" in fields else 3)
        assert float(found[sample].detach()) == pytest.approx(sum(terms) / len(terms), rel=1e-9)


def slow_rescale(values: list[float]) -> list[float]:
    low, high = min(values), max(values)
    return [0.0 if high == low else (v - low) / (high - low) for v in values]


@pytest.mark.parametrize("combine", ["max", "sum"])
@pytest.mark.parametrize("distances", ["rescaled", "raw"])
def test_the_control_map_is_its_formula(combine: str, distances: str) -> None:
    made = plugin("control_map", combine=combine, distances=distances, layers=["1/1"])
    step = step_for(made)
    found = made(step)
    _, _, h, w = step.noisy_latents.shape
    assert found.shape == (len(step.captions), 1, h, w)
    for sample, (caption, spans) in enumerate(zip(step.captions, step.spans)):
        difference = (step.response.prediction - step.reference.prediction)[sample].abs()
        n = slow_rescale([float(difference[:, i, j].mean().detach()) for i in range(h) for j in range(w)])
        d = []
        for phrase in caption.phrases:
            a, b = (row.tolist() for row in step.embed([caption.target, phrase]))
            d.append(
                1
                - sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
            )
        if distances == "rescaled" and len(d) > 1:
            d = slow_rescale(d)
        layers = [slow_maps(layer, sample) for layer in step.reference.attention.values()]
        assert len(layers) == 2
        claims = []
        for weight, run in zip(d, spans.phrases):
            mean = [
                sum(maps[q][i] for maps in layers for i in run) / len(run) / len(layers) for q in range(h * w)
            ]
            claims.append([max(weight, 0) * value for value in slow_rescale(mean)])
        joined = [(sum if combine == "sum" else max)(column) for column in zip(*claims)] or [0.0] * (h * w)
        expected = [min(1.0, max(0.0, value - claim)) for value, claim in zip(n, joined)]
        assert found[sample].flatten().tolist() == pytest.approx(
            expected, abs=1e-6
        )  # maps are float32 or more


def test_a_lone_phrase_keeps_its_distance() -> None:
    made = plugin("control_map")
    step = replace(step_for(made), captions=[derive("a woman", TARGET)] * 4)
    step = replace(step, token_spans=[replace(s, phrases=((1, 2),)) for s in step.spans])
    a, b = step.embed([TARGET, "a woman"])
    assert made.distance(step, 1).flatten().tolist() == pytest.approx(
        [max(0.0, float(1 - a @ b))] * 4, rel=1e-6
    )


def test_without_a_change_there_is_no_map() -> None:
    """A constant N gives M = 0: an adapter that changes nothing, or everything alike."""
    made = plugin("control_map")
    step = step_for(made)
    for shift in (0.0, 0.3):
        same = replace(step.response, prediction=step.reference.prediction + shift)
        assert float(made(replace(step, passes={**step.passes, "response": same})).max()) == pytest.approx(
            0, abs=1e-6
        )


def test_the_average_of_a_pictures_visits() -> None:
    made = plugin("control_map", ema=0.75, subtract=0)
    alone = plugin("control_map", subtract=0)
    first, second = step_for(made, seed=0), step_for(made, seed=1)
    made(first)
    expected = 0.75 * alone(first) + 0.25 * alone(second)
    torch.testing.assert_close(made(second), expected)
    third = replace(second, sample_ids=[f"new {i}" for i in range(4)])
    torch.testing.assert_close(made(third), alone(third))


def test_outside_its_range_of_timesteps_a_map_is_what_was_remembered() -> None:
    made = plugin("control_map", ema=0.75, subtract=0, min_timestep=0.4, max_timestep=0.8)
    alone = plugin("control_map", subtract=0)
    first, second = step_for(made, seed=0), step_for(made, seed=1)
    most = first.process.num_train_timesteps

    def at(step: Step, *shares: float) -> Step:
        return replace(step, timesteps=torch.tensor([share * most for share in shares]))

    first, second = at(first, 0.4, 0.8, 0.3, 0.9), at(second, 0.5, 0.9, 0.6, 0.2)
    torch.testing.assert_close(made(first), alone(first))  # nothing is known yet: each its own
    found = made(second)
    both = 0.75 * alone(first) + 0.25 * alone(second)
    expected = torch.stack([both[0], alone(first)[1], alone(second)[2], alone(second)[3]])
    torch.testing.assert_close(found, expected)


def test_a_range_of_timesteps_needs_a_memory() -> None:
    with pytest.raises(ValidationError, match=r"ema = 0 remembers none: set ema"):
        plugin("control_map", min_timestep=0.5)
    with pytest.raises(ValidationError, match=r"min_timestep = 0\.5 must be less than max_timestep = 0\.5"):
        plugin("control_map", ema=0.5, min_timestep=0.5, max_timestep=0.5)


def test_plain_samples_have_the_map_of_their_pictures_last_visit() -> None:
    made = plugin("control_map", quantile=0.9)
    first, second = step_for(made, seed=0), step_for(made, seed=1)
    assert torch.equal(made.of_plain(first), torch.ones(4, 1, *first.noisy_latents.shape[2:]).to(made(first)))
    made(first)
    last = made(replace(second, sample_ids=["new", *second.sample_ids[1:]]))
    resumed = plugin("control_map", quantile=0.9)
    resumed.load_state_dict(made.state_dict())
    order = [2, 0, 3]
    asked = second.rows(order)
    for one in (made, resumed):
        torch.testing.assert_close(one.of_plain(asked)[[0, 2]], last[[2, 3]])
        torch.testing.assert_close(one.of_plain(asked)[1], plugin("control_map", quantile=0.9)(first)[0])
    stranger = replace(asked, sample_ids=["a", "b", "c"])
    assert float(made.of_plain(stranger).min()) == 1


def test_quantile_and_threshold_give_the_map_its_scale() -> None:
    plain, scaled = plugin("control_map"), plugin("control_map", quantile=0.9, threshold=0.2)
    step = step_for(plain)
    m = plain(step)
    for row, found in zip(m, scaled(step)):
        values = sorted(row.flatten().tolist())
        place = 0.9 * (len(values) - 1)
        low = values[int(place)]
        q = low + (place - int(place)) * (values[int(place) + 1] - low)
        expected = [min(1.0, max(0.0, (v / q - 0.2) / 0.8)) for v in row.flatten().tolist()]
        assert found.flatten().tolist() == pytest.approx(expected, abs=1e-5)


def test_otsu_gives_each_map_the_size_of_its_upper_class() -> None:
    """Beside a search over every threshold for the largest variance between the classes."""
    plain, scaled = plugin("control_map"), plugin("control_map", otsu=True)
    step = step_for(plain)
    for row, found in zip(plain(step), scaled(step)):
        values = row.flatten().tolist()
        between = {}
        for threshold in sorted(set(values))[1:]:
            lower, upper = ([v for v in values if (v >= threshold) is side] for side in (False, True))
            between[threshold] = len(lower) * len(upper) * (fmean(upper) - fmean(lower)) ** 2
        best = max(between, key=lambda threshold: between[threshold])
        assert found.flatten().tolist() == pytest.approx([min(1.0, v / best) for v in values], abs=1e-5)
        assert 0 < int((found == 1).sum()) < found.numel()
    assert otsu(torch.full((2, 4, 4), 0.25)).tolist() == [0.25, 0.25]
    with pytest.raises(ValidationError, match=r"otsu and quantile = 0\.9 both give the map its size"):
        plugin("control_map", otsu=True, quantile=0.9)


@pytest.mark.parametrize("name", ["text_consistency", "fine_grained"])
def test_masks_of_ones_and_zeros(name: str) -> None:
    made = plugin(name, mask="m")
    step = step_for(made)
    free, held = (replace(step, mask=torch.full_like(step.mask, value)) for value in (1.0, 0.0))
    assert made(free).abs().max() == 0
    torch.testing.assert_close(made(held), plugin(name)(replace(step, mask=None)))
    assert made(held).min() >= 0


# --- in a real step ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family() -> Family:
    torch.set_num_threads(1)
    return families.load(schema.Base(model="embedded"))


@pytest.fixture(scope="module")
def batch(family: Family) -> Any:
    data = schema.Data(path="embedded:glasses", resolution=32, buckets=False)
    return Dataset.prepare(data, TARGET, family).batch(0, 0, 4)


@pytest.fixture
def handle(family: Family) -> Iterator[AdapterHandle]:
    made = AdapterHandle.inject(family, schema.Adapter(rank=2), name="fresh", seed=0)
    yield made
    made.remove()


SPF = [
    {"plugin": "denoising"},
    {"plugin": "control_map"},
    {"plugin": "text_consistency", "mask": "control_map", "start": 0.5},
    {"plugin": "fine_grained", "mask": "control_map", "start": 0.5},
]


def losses_of(entries: list[dict[str, Any]]) -> list[Any]:
    return [plugin(e["plugin"], **{k: v for k, v in e.items() if k != "plugin"}) for e in entries]


def run(family: Family, handle: AdapterHandle, batch: Any, plugins: list[Any], progress: float = 0.9) -> Any:
    phrases = Phrases(family, batch.captions, 1)
    model = Model(family, handle, family.encode_text, spans=phrases.spans, tools=Tools(phrases.embed))
    draws = Draws.keyed(batch.mean.shape, 0, "noise", batch.indices)
    at_t = noised(family.noise, batch, draws, 0.0, torch.device("cpu"))
    return run_step(model, at_t, batch.captions, batch.sample_ids, plugins, number=1, progress=progress)


@contextlib.contextmanager
def forwards(family: Family, handle: AdapterHandle) -> Iterator[list[tuple[bool, bool]]]:
    calls: list[tuple[bool, bool]] = []
    hook = family.unet.register_forward_pre_hook(
        lambda *_: calls.append((handle.enabled, torch.is_grad_enabled()))
    )
    yield calls
    hook.remove()


def test_stage_one_costs_a_naive_step_and_stage_two_one_pass_more(
    family: Family, handle: AdapterHandle, batch: Any
) -> None:
    plugins = losses_of(SPF)
    with forwards(family, handle) as calls:
        first = run(family, handle, batch, plugins, progress=0.0)
    assert calls == [(True, True)]
    assert set(first.terms) == {"denoising"}
    with forwards(family, handle) as calls:
        second = run(family, handle, batch, plugins, progress=0.5)
    assert calls == [(False, False), (True, True)]
    assert set(second.terms) == {"denoising", "text_consistency", "fine_grained"}


def test_a_zero_adapter_on_the_same_caption_has_no_alignment_loss(
    family: Family, handle: AdapterHandle, batch: Any
) -> None:
    """Exactly none; with the target's words the paths differ even without an adapter."""
    same = replace(batch, captions=[replace(caption, full=caption.base) for caption in batch.captions])
    terms = run(family, handle, same, losses_of(SPF)).terms
    assert terms["text_consistency"].tolist() == terms["fine_grained"].tolist() == [0.0] * 4
    asked = run(family, handle, batch, losses_of(SPF)).terms
    assert min(asked["text_consistency"].tolist() + asked["fine_grained"].tolist()) > 0


def test_no_gradient_comes_through_map_or_reference(
    family: Family, handle: AdapterHandle, batch: Any
) -> None:
    """The gradient is that of the same loss with map and reference given as numbers."""
    for name, parameter in handle.named_parameters():
        if name.endswith(".up"):
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    plugins = losses_of(SPF)[1:3]
    phrases = Phrases(family, batch.captions, 1)
    outcome = run(family, handle, batch, plugins)
    found = torch.autograd.grad(outcome.loss, handle.parameters(), allow_unused=True)
    mask = outcome.masks["control_map"]
    assert not mask.requires_grad
    assert 0 < float(mask.mean()) < 1

    draws = Draws.keyed(batch.mean.shape, 0, "noise", batch.indices)
    at_t = noised(family.noise, batch, draws, 0.0, torch.device("cpu"))
    names = list(family.attention_layers())
    full, base = (family.encode_text([getattr(c, kind) for c in batch.captions]) for kind in ("full", "base"))
    with torch.no_grad(), handle.disabled():
        _, frozen = family.probe(at_t.noisy_latents, at_t.timesteps, base, names)
    _, live = family.probe(at_t.noisy_latents, at_t.timesteps, full, names)
    total = torch.zeros(())
    for row, caption in enumerate(batch.captions):
        tokens = list(phrases.spans(caption).base)
        for name in names:
            size = live[name].size
            hold = 1 - torch.nn.functional.adaptive_avg_pool2d(mask[row], size).flatten()
            difference = live[name].maps[row][:, tokens] - frozen[name].maps[row][:, tokens]
            total = total + (hold[:, None] * difference).square().mean() / len(names) / 4
    torch.testing.assert_close(outcome.loss, total, rtol=1e-4, atol=1e-9)
    expected = torch.autograd.grad(total, handle.parameters(), allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-8)
    assert any(one is not None and float(one.abs().max()) > 0 for one in found)
