"""The rival regularisers against slow float64 arithmetic, on random tensors and in real steps."""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from spf_kit import config, embedded, families, losses, schema
from spf_kit.adapters.inject import AdapterHandle
from spf_kit.data.captions import derive
from spf_kit.data.dataset import Dataset
from spf_kit.discovery import available
from spf_kit.errors import UserError
from spf_kit.families.base import Family
from spf_kit.families.noise import NoiseProcess
from spf_kit.losses import LayerProbe, Loss, Mask, ModelPass, Needs, Plugin, Step, Tools, per_sample, register
from spf_kit.plugin_check import check_plugin
from spf_kit.training import stages, trainer
from spf_kit.training.step import Draws, Model, Noised, Outcome, noised, run_step
from spf_kit.training.tools import update_norms

SHIPPED = available()
F64 = torch.float64
B, C, H, W = 3, 4, 8, 4
TOKENS, FEATURES, HEADS, SCALE = 5, 6, 2, 0.7
LAYERS = (("down_blocks.0.attn2", 2), ("mid_block.attn2", 4), ("up_blocks.1.attn2", 1))


@pytest.fixture(autouse=True)
def _registry_as_it_was() -> Iterator[None]:
    before = dict(losses._registry)
    yield
    losses._registry.clear()
    losses._registry.update(before)


# --- random steps and slow arithmetic ---------------------------------------------------------------------


def make_step(mask: Tensor | None = None, given: Tensor | None = None) -> Step:
    g = torch.Generator().manual_seed(5)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape or (B, C, H, W), generator=g, dtype=F64)

    def attention() -> dict[str, LayerProbe]:
        return {
            name: LayerProbe(
                name, f, (H // f, W // f), randn(B, H * W // f**2, FEATURES), randn(B, TOKENS, FEATURES),
                HEADS, SCALE,
            )
            for name, f in LAYERS
        }  # fmt: skip

    names = ("reference", "reference_full", "reference_blank", "response", "plain", "blank")
    passes = {name: ModelPass(randn(), attention()) for name in names}
    process = NoiseProcess("epsilon", torch.linspace(0.99, 0.01, 1000))
    return Step(
        randn(), randn(), randn(), torch.tensor([20, 400, 980]), randn(), process,
        [derive("a man", "glasses")] * B, ["a", "b", "c"], passes=passes, mask=mask, given_masks=given,
    )  # fmt: skip


def random_mask() -> Tensor:
    return torch.rand(B, 1, H, W, generator=torch.Generator().manual_seed(2), dtype=F64)


def slow(step: Step, value: Any, *, channels: int = C) -> list[float]:
    """Mean over channels and pixels of value(sample, channel, row, column), one number at a time."""
    places = list(itertools.product(range(channels), range(H), range(W)))
    return [math.fsum(value(b, *place) for place in places) / len(places) for b in range(B)]


def at(step: Step, name: Any) -> Any:
    return step.passes[name].prediction.tolist()


def close(value: Tensor, expected: Sequence[float], rel: float = 1e-12) -> None:
    assert value.tolist() == pytest.approx(list(expected), rel=rel)
    assert len(set(expected)) == len(expected), "samples that are alike would hide a mix-up"


# --- formulas ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("caption", "base"), [("full", "reference_full"), ("base", "reference")])
def test_inverted_mask(caption: str, base: str) -> None:
    step = make_step(random_mask())
    m, on, off = step.mask.tolist(), at(step, "response"), at(step, base)
    expected = slow(step, lambda b, c, y, x: ((1 - m[b][0][y][x]) * (on[b][c][y][x] - off[b][c][y][x])) ** 2)
    plugin = SHIPPED["inverted_mask"](caption=caption, mask="m")
    close(plugin(step), expected)
    assert plugin.needs == Needs(frozenset({"response", base}))


def test_inverted_mask_needs_a_mask() -> None:
    with pytest.raises(ValidationError, match="has none: set mask to the id of a mask that stands before"):
        SHIPPED["inverted_mask"]()


@pytest.mark.parametrize("masked", [False, True])
def test_blank_preservation(masked: bool) -> None:
    step = make_step(random_mask() if masked else None)
    m, on, off = random_mask().tolist(), at(step, "blank"), at(step, "reference_blank")

    def value(b: int, c: int, y: int, x: int) -> float:
        return (on[b][c][y][x] - off[b][c][y][x]) ** 2 * (m[b][0][y][x] if masked else 1)

    close(SHIPPED["blank_preservation"]()(step), slow(step, value))
    assert SHIPPED["blank_preservation"]().needs.passes == {"blank", "reference_blank"}


@pytest.mark.parametrize("masked", [False, True])
def test_relative_output_preservation(masked: bool) -> None:
    step = make_step(random_mask() if masked else None)
    m, on, off = random_mask().tolist(), at(step, "plain"), at(step, "reference")

    def value(b: int, c: int, y: int, x: int) -> float:
        return (on[b][c][y][x] - off[b][c][y][x]) ** 2 * (m[b][0][y][x] if masked else 1)

    size = slow(step, lambda b, c, y, x: off[b][c][y][x] ** 2)
    expected = [a / s for a, s in zip(slow(step, value), size)]
    plugin = SHIPPED["output_preservation"](kind="relative")
    close(plugin(step), expected)
    tenfold = {
        name: ModelPass(10 * run.prediction) if name in ("plain", "reference") else run
        for name, run in step.passes.items()
    }
    close(plugin(replace(step, passes=tenfold)), expected)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_x0_weight_makes_differences_those_of_the_clean_pictures(kind: Any) -> None:
    """Beside the clean pictures that the noise process itself derives from two predictions, in float64."""
    schedule = None if kind == "flow" else torch.linspace(0.9999, 0.005, 1000, dtype=torch.float64)
    step = replace(make_step(random_mask()), process=NoiseProcess(kind, schedule))
    step = replace(
        step, timesteps=torch.linspace(50, 950, B).to(torch.float32 if kind == "flow" else torch.int64)
    )
    process, t = step.process, step.timesteps
    for name, base, plugin in (
        ("response", "reference_full", SHIPPED["inverted_mask"](mask="m", x0_weight=1e6)),
        ("plain", "reference", SHIPPED["output_preservation"](x0_weight=1e6)),
    ):
        on, off = (process.clean(step.noisy_latents, step.passes[n].prediction, t) for n in (name, base))
        weights = (on - off).square().flatten(1).mean(1) * process.snr(t).clamp(min=1)
        unmasked = replace(step, mask=torch.zeros_like(step.mask) if name == "response" else None)
        torch.testing.assert_close(plugin(unmasked), weights.to(plugin(unmasked).dtype), rtol=1e-3, atol=1e-6)
        capped = plugin.model_copy(update={"x0_weight": 1e-3})(unmasked)
        plain = plugin.model_copy(update={"x0_weight": None})(unmasked)
        torch.testing.assert_close(capped, 1e-3 * plain)


def test_what_output_preservation_needs() -> None:
    make = SHIPPED["output_preservation"]
    assert make().needs == Needs(frozenset({"plain", "reference"}))
    assert make(share=0.25).needs == Needs(frozenset({"reference"}), plain_share=0.25)
    assert make(share=0.25).needs.path == "plain"
    for share in (0.0, 1.0, -0.1):
        with pytest.raises(ValidationError, match="share"):
            make(share=share)
    assert make(share=0.25, blank=0.5).needs.blank_share == 0.5
    assert make(share=0.25, walk=12).needs.plain_walk == 12
    with pytest.raises(ValidationError, match=r"walk = 12 is of the samples of share, which is not set"):
        make(walk=12)
    with pytest.raises(ValidationError, match=r"blank = 0\.5 is a part of share, which is not set"):
        make(blank=0.5)
    with pytest.raises(ValidationError, match=r"walk = 12 holds .* of which mask = 'm' knows nothing"):
        make(share=0.25, walk=12, mask="m")
    with pytest.raises(ValidationError, match=r"inside = 0\.5 is a share .* and there is none: set mask"):
        make(inside=0.5)


@pytest.mark.parametrize("inside", [0.0, 0.3, 1.0])
def test_a_share_of_the_weight_stands_inside_the_mask(inside: float) -> None:
    mask = random_mask() * torch.tensor([1.0, 0.2, 0.0])[:, None, None, None]  # small ones weigh alike
    step = make_step(mask)
    on, off, sizes = at(step, "plain"), at(step, "reference"), mask.flatten(1).mean(1).tolist()

    def value(b: int, c: int, y: int, x: int) -> float:
        weight = mask[b, 0, y, x].item() / sizes[b] if sizes[b] else 1.0
        return (1 - inside + inside * weight) * (on[b][c][y][x] - off[b][c][y][x]) ** 2

    made = SHIPPED["output_preservation"](mask="m", inside=inside)
    close(made(step), slow(step, value))
    whole = SHIPPED["output_preservation"]()(replace(step, mask=None))
    close(made(step)[2:], whole[2:].tolist())
    assert (inside == 0) == torch.allclose(made(step)[0], whole[0])


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("unmasked", [0.0, 0.3])
def test_masked(invert: bool, unmasked: float) -> None:
    given = random_mask()
    value = SHIPPED["masked"](path="masks", invert=invert, unmasked=unmasked)(make_step(given=given))
    expected = [max(1 - g if invert else g, unmasked) for g in given.flatten().tolist()]
    assert value.shape == (B, 1, H, W)
    assert value.flatten().tolist() == expected
    assert (min(expected) == unmasked) == (unmasked > 0)


def slow_maps(layer: LayerProbe) -> list[list[list[float]]]:
    """softmax over the tokens of scale q k, mean over heads, as nested lists (B, Q, L)."""
    q, k, d = layer.queries.tolist(), layer.keys.tolist(), FEATURES // HEADS
    out = []
    for b in range(B):
        rows = []
        for query in q[b]:
            mean = [0.0] * TOKENS
            for head in range(HEADS):
                part = range(head * d, (head + 1) * d)
                powers = [math.exp(SCALE * sum(query[i] * key[i] for i in part)) for key in k[b]]
                mean = [m + p / math.fsum(powers) / HEADS for m, p in zip(mean, powers)]
            rows.append(mean)
        out.append(rows)
    return out


def slow_drift(step: Step, layers: Sequence[tuple[str, int]], mask: list | None) -> list[float]:
    total = [0.0] * B
    for name, f in layers:
        on, off = (slow_maps(step.passes[p].attention[name]) for p in ("response", "reference_full"))
        for b in range(B):
            values = []
            for pixel, (ours, theirs) in enumerate(zip(on[b], off[b])):
                y, x = divmod(pixel, W // f)
                block = itertools.product(range(y * f, y * f + f), range(x * f, x * f + f))
                weight = 1.0 if mask is None else math.fsum(mask[b][0][v][u] for v, u in block) / f**2
                values += [weight * (a - r) ** 2 for a, r in zip(ours, theirs)]
            total[b] += math.fsum(values) / len(values) / len(layers)
    return total


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("layers", "meant"), [(["all"], LAYERS), (["mid", "1/1"], LAYERS[1:]), (["down_*"], LAYERS[:1])]
)
def test_attention_drift(layers: list[str], meant: Sequence[tuple[str, int]], masked: bool) -> None:
    step = make_step(random_mask() if masked else None)
    plugin = SHIPPED["attention_drift"](layers=layers)
    expected = slow_drift(step, meant, random_mask().tolist() if masked else None)
    close(plugin(step), expected, rel=1e-9)
    assert plugin.needs == Needs.of("response", "reference_full", layers=layers)


def test_weight_norm_of_given_norms() -> None:
    norms = torch.tensor([0.5, 2.0, 0.25], dtype=F64)
    step = replace(make_step(), tools=Tools(update_norms=lambda: norms))
    assert SHIPPED["weight_norm"]()(step).tolist() == [2.75] * B
    assert SHIPPED["weight_norm"](reduce="mean")(step).tolist() == pytest.approx([2.75 / 3] * B)
    assert SHIPPED["weight_norm"]().needs == Needs(frozenset(), weights=True)
    with pytest.raises(ValidationError, match="weights have none: remove it"):
        SHIPPED["weight_norm"](mask="m")


# --- masks of ones and zeros ------------------------------------------------------------------------------


def value_at(name: str, level: float | None, **fields: Any) -> Tensor:
    mask = None if level is None else torch.full((B, 1, H, W), level, dtype=F64)
    return SHIPPED[name](mask="m", **fields)(make_step(mask))


def test_masks_of_ones_and_zeros() -> None:
    step = make_step()
    full = (step.passes["response"].prediction - step.passes["reference_full"].prediction).square()
    assert torch.allclose(value_at("inverted_mask", 0.0), full.mean(dim=(1, 2, 3)), rtol=1e-12)
    assert value_at("inverted_mask", 1.0).tolist() == [0.0] * B
    assert torch.allclose(value_at("inverted_mask", 0.5), full.mean(dim=(1, 2, 3)) / 4, rtol=1e-12)
    for name in ("blank_preservation", "attention_drift", "output_preservation"):
        assert torch.allclose(value_at(name, 1.0), value_at(name, None), rtol=1e-12)
        assert float(value_at(name, None).min()) > 0
        assert value_at(name, 0.0).tolist() == [0.0] * B
        assert torch.allclose(value_at(name, 0.5), value_at(name, None) / 2, rtol=1e-12)


def test_inside_the_inverted_mask_nothing_is_taught() -> None:
    mask = torch.zeros(B, 1, H, W, dtype=F64)
    mask[..., :2] = 1
    step = make_step(mask)
    leaf = step.passes["response"].prediction.requires_grad_()
    SHIPPED["inverted_mask"](mask="m")(step).sum().backward()
    assert not leaf.grad[..., :2].any()
    assert bool((leaf.grad[..., 2:] != 0).all())


@pytest.mark.parametrize(("name", "fields"), [
    ("inverted_mask", {"mask": "m"}), ("inverted_mask", {"mask": "m", "caption": "base"}),
    ("blank_preservation", {}), ("blank_preservation", {"mask": "m"}),
    ("output_preservation", {}), ("output_preservation", {"kind": "relative", "mask": "m"}),
    ("output_preservation", {"share": 0.5}), ("output_preservation", {"share": 0.2, "kind": "relative"}),
    ("masked", {}), ("masked", {"path": "masks", "invert": True, "unmasked": 0.2}),
    ("attention_drift", {}), ("attention_drift", {"layers": ["mid", "1/1"]}),
    ("attention_drift", {"mask": "m"}), ("weight_norm", {}), ("weight_norm", {"reduce": "mean"}),
])  # fmt: skip
def test_plugins_keep_their_promises(name: str, fields: dict[str, Any]) -> None:
    assert [result for result in check_plugin(SHIPPED[name], fields) if not result.passed] == []


# --- real steps -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family() -> Family:
    torch.set_num_threads(1)
    return families.load(schema.Base(model="embedded"))


@pytest.fixture(scope="module")
def batch(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Four embedded pictures, 8 x 8 latents."""
    folder = tmp_path_factory.mktemp("pictures")
    for picture in sorted(embedded.data_path("glasses").glob("*.png"))[:4]:
        shutil.copy(picture, folder)
        shutil.copy(picture.with_suffix(".txt"), folder)
    data = schema.Data(path=str(folder), resolution=32, buckets=False)
    return Dataset.prepare(data, "wearing glasses", family).batch(0, 0, 4)


def adapter(family: Family, name: str) -> AdapterHandle:
    return AdapterHandle.inject(
        family,
        schema.Adapter(rank=3, alpha=2, targets=["cross-attention", "convolutions"]),
        name=name,
        seed=1,
    )


@pytest.fixture
def fresh(family: Family) -> Iterator[AdapterHandle]:
    """An adapter without effect."""
    handle = adapter(family, "fresh")
    yield handle
    handle.remove()


@pytest.fixture
def learnt(family: Family) -> Iterator[AdapterHandle]:
    """An adapter that changes something."""
    handle = adapter(family, "learnt")
    g = torch.Generator().manual_seed(0)
    for name, parameter in handle.named_parameters():
        if name.endswith(".up"):
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=g))
    yield handle
    handle.remove()


@pytest.fixture
def half() -> Plugin:
    """A mask of the left half."""

    @register("t_half")
    class Half(Mask):
        def __call__(self, step: Step) -> Tensor:
            mask = torch.zeros_like(step.noisy_latents[:, :1])
            mask[..., : mask.shape[-1] // 2] = 1
            return mask

    return Half()


def at_t(family: Family, batch: Any, path: Sequence[float] | None = None) -> Noised:
    draws = Draws.keyed(batch.mean.shape, 0, "noise", batch.indices)
    found = noised(family.noise, batch, draws, 0.0, torch.device("cpu"))
    return found if path is None else replace(found, path=torch.tensor(path))


@dataclass
class Seen:
    """One run of the UNet."""

    on: bool  # the adapter
    texts: list[str]


@contextlib.contextmanager
def watched(family: Family, handle: AdapterHandle) -> Iterator[tuple[Model, list[Seen]]]:
    """A model, and every run of the UNet with what the text encoder was given for it."""
    runs: list[Seen] = []
    texts: list[list[str]] = []

    def encode(asked: Sequence[str]) -> Any:
        texts.append(list(asked))
        return family.encode_text(asked)

    hook = family.unet.register_forward_pre_hook(lambda *_: runs.append(Seen(handle.enabled, texts[-1])))
    yield Model(family, handle, encode, tools=Tools(update_norms=lambda: update_norms(handle))), runs
    hook.remove()


def run(family: Family, handle: AdapterHandle, batch: Any, *plugins: Plugin, path: Any = None) -> Outcome:
    return traced(family, handle, batch, *plugins, path=path)[0]


def traced(
    family: Family, handle: AdapterHandle, batch: Any, *plugins: Plugin, path: Any = None
) -> tuple[Outcome, list[Seen]]:
    with watched(family, handle) as (model, runs):
        rows = at_t(family, batch, path)
        outcome = run_step(model, rows, batch.captions, batch.sample_ids, plugins, number=1, progress=0.0)
    return outcome, runs


MIXED = [0.1, 0.9, 0.3, 0.7]  # below a share of 0.5: samples 0 and 2


def rivals() -> list[Plugin]:
    """Each that must be silent for an adapter without effect."""
    return [
        SHIPPED["inverted_mask"](mask="t_half"), SHIPPED["blank_preservation"](),
        SHIPPED["output_preservation"](share=0.5),
        SHIPPED["attention_drift"](), SHIPPED["attention_drift"](id="masked_drift", mask="t_half"),
        SHIPPED["weight_norm"](),
    ]  # fmt: skip


def test_an_adapter_without_effect_costs_nothing(
    family: Family, fresh: AdapterHandle, batch: Any, half: Plugin
) -> None:
    """Exactly, bit for bit; and an adapter with an effect does cost."""
    whole = [SHIPPED["output_preservation"](), SHIPPED["output_preservation"](id="r", kind="relative")]
    for plugins, path in ((rivals(), MIXED), (whole, None)):
        terms = run(family, fresh, batch, half, *plugins, path=path).terms
        assert set(terms) == {plugin.id for plugin in plugins}
        assert {name: float(term.abs().max()) for name, term in terms.items()} == dict.fromkeys(terms, 0.0)


def test_an_adapter_with_effect_costs(
    family: Family, learnt: AdapterHandle, batch: Any, half: Plugin
) -> None:
    whole = [SHIPPED["output_preservation"](), SHIPPED["output_preservation"](id="r", kind="relative")]
    for plugins, path in ((rivals(), MIXED), (whole, None)):
        terms = run(family, learnt, batch, half, *plugins, path=path).terms
        assert all(float(term.min()) > 0 for term in terms.values()), terms


def test_held_to_c_base_the_target_words_cost(
    family: Family, fresh: AdapterHandle, batch: Any, half: Plugin
) -> None:
    term = run(family, fresh, batch, half, SHIPPED["inverted_mask"](mask="t_half", caption="base")).terms
    assert float(term["inverted_mask"].min()) > 0


def test_passes_of_a_real_step(family: Family, learnt: AdapterHandle, batch: Any, half: Plugin) -> None:
    full, base = ([getattr(c, kind) for c in batch.captions] for kind in ("full", "base"))
    for plugin, expected in [
        (SHIPPED["inverted_mask"](mask="t_half"), [Seen(False, full), Seen(True, full)]),
        (SHIPPED["inverted_mask"](mask="t_half", caption="base"), [Seen(False, base), Seen(True, full)]),
        (SHIPPED["blank_preservation"](), [Seen(False, [""] * 4), Seen(True, full), Seen(True, [""] * 4)]),
        (SHIPPED["attention_drift"](), [Seen(False, full), Seen(True, full)]),
        (SHIPPED["weight_norm"](), [Seen(True, full)]),
    ]:
        assert traced(family, learnt, batch, SHIPPED["denoising"](), half, plugin)[1] == expected


# --- a share of the samples -------------------------------------------------------------------------------


def test_shared_samples_see_c_base_and_no_pass_is_added(
    family: Family, learnt: AdapterHandle, batch: Any
) -> None:
    captions, denoising, make = batch.captions, SHIPPED["denoising"](), SHIPPED["output_preservation"]
    assert all(caption.base != caption.full for caption in captions)

    @register("t_reader")
    class Reader(Loss):
        """Reads the reference, so that the pass without gradient is there."""

        @property
        def needs(self) -> Needs:
            return Needs.of("reference", "response")

        def __call__(self, step: Step) -> Tensor:
            return per_sample((step.response.prediction - step.reference.prediction).square())

    shared = traced(family, learnt, batch, denoising, make(share=0.5), path=MIXED)[1]
    assert shared == [
        Seen(False, [caption.base for caption in captions]),
        Seen(True, [captions[0].base, captions[1].full, captions[2].base, captions[3].full]),
    ]
    without = traced(family, learnt, batch, denoising, Reader())[1]
    assert len(shared) == len(without) == 2
    assert len(traced(family, learnt, batch, denoising, make())[1]) == 3
    late = traced(family, learnt, batch, denoising, make(share=0.5, start=0.5), path=MIXED)[1]
    assert late == [Seen(True, [caption.full for caption in captions])]


def test_a_part_of_the_shared_samples_has_no_caption(
    family: Family, learnt: AdapterHandle, batch: Any
) -> None:
    """Both passes of such a sample take "", and the loss is that of the plugin blank_preservation there."""
    captions, denoising, make = batch.captions, SHIPPED["denoising"](), SHIPPED["output_preservation"]
    plugin = make(share=0.5, blank=0.4)  # paths below 0.2: sample 0 of MIXED
    seen = traced(family, learnt, batch, denoising, plugin, path=MIXED)[1]
    assert seen == [
        Seen(False, ["", *(caption.base for caption in captions[1:])]),
        Seen(True, ["", captions[1].full, captions[2].base, captions[3].full]),
    ]
    term = run(family, learnt, batch, denoising, plugin, path=MIXED).terms[plugin.id]
    blank = run(family, learnt, batch, SHIPPED["blank_preservation"]()).terms["blank_preservation"]
    plain = run(family, learnt, batch, make()).terms["output_preservation"]
    assert torch.allclose(term, torch.stack([blank[0], plain[2]]), rtol=1e-3)
    assert abs(float(blank[0] / plain[0]) - 1) > 0.01


@pytest.mark.parametrize(
    ("path", "shared"),
    [(MIXED, [0, 2]), ([0.1, 0.2, 0.3, 0.7], [0, 1, 2]), ([0.9] * 4, []), ([0.0] * 4, [0, 1, 2, 3])],
)
def test_each_sample_counts_alike(
    family: Family, learnt: AdapterHandle, batch: Any, path: list[float], shared: list[int]
) -> None:
    make = SHIPPED["output_preservation"]
    plugins = [SHIPPED["denoising"](weight=0.7), SHIPPED["weight_norm"](weight=0.1)]
    whole = run(family, learnt, batch, *plugins, make()).terms
    parts = run(family, learnt, batch, *plugins, make(share=0.5, weight=3.0), path=path)
    asked = [i for i in range(4) if i not in shared]
    for name, rows in (("denoising", asked), ("output_preservation", shared), ("weight_norm", range(4))):
        assert list(parts.rows[name]) == list(rows)
        assert torch.allclose(parts.terms[name], whole[name][list(rows)], rtol=1e-3)
    expected = sum(0.7 * float(whole["denoising"][i]) for i in asked) / 4
    expected += sum(3.0 * float(whole["output_preservation"][i]) for i in shared) / 4
    expected += 0.1 * float(whole["weight_norm"][0])
    assert float(parts.loss.detach()) == pytest.approx(expected, rel=1e-4)


def test_mask_pictures_stay_with_their_samples(family: Family, learnt: AdapterHandle, batch: Any) -> None:
    """A mask of given pictures and its readers see the samples that are asked for the target, no others."""
    given = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(8))
    painted = replace(batch, masks=given)
    plugins = [
        SHIPPED["masked"](path="masks"), SHIPPED["inverted_mask"](mask="masked"),
        SHIPPED["denoising"](mask="masked"),
    ]  # fmt: skip
    whole = run(family, learnt, painted, *plugins)
    parts = run(family, learnt, painted, *plugins, SHIPPED["output_preservation"](share=0.5), path=MIXED)
    assert torch.equal(whole.masks["masked"], given)
    assert torch.equal(parts.masks["masked"], given[[1, 3]])
    for name in ("inverted_mask", "denoising"):
        assert torch.allclose(parts.terms[name], whole.terms[name][[1, 3]], rtol=1e-3)
        assert float((whole.terms[name][1] / whole.terms[name][3] - 1).abs()) > 0.01


def test_plain_samples_have_what_the_mask_knows_of_them(
    family: Family, learnt: AdapterHandle, batch: Any, half: Plugin
) -> None:
    """Drawn masks are there for every sample; one that knows nothing of plain samples leaves them whole."""
    given = torch.rand(4, 1, *batch.mean.shape[2:], generator=torch.Generator().manual_seed(8))
    painted, make = replace(batch, masks=given), SHIPPED["output_preservation"]
    drawn, denoising = SHIPPED["masked"](path="masks"), SHIPPED["denoising"]()
    whole = run(family, learnt, painted, drawn, make(mask="masked", inside=0.9)).terms["output_preservation"]
    unmasked = run(family, learnt, painted, make()).terms["output_preservation"]
    for mask, reference in ((drawn, whole), (half, unmasked)):
        plugins = [denoising, mask, make(share=0.5, mask=mask.id, inside=0.9)]
        found = run(family, learnt, painted, *plugins, path=MIXED).terms["output_preservation"]
        assert torch.allclose(found, reference[[0, 2]], rtol=1e-3)
        none = run(family, learnt, painted, *plugins, path=[0.9] * 4).terms["output_preservation"]
        assert none.shape == (0,)
    assert float((whole / unmasked - 1).abs().min()) > 0.01


def test_two_shares_are_refused() -> None:
    plugins = [SHIPPED["output_preservation"](id=f"o{share}", share=share) for share in (0.2, 0.3)]
    with pytest.raises(UserError, match=r"different shares of plain samples \(0\.2 and 0\.3\)"):
        stages.check(plugins)


# --- weights ----------------------------------------------------------------------------------------------


def products(handle: AdapterHandle) -> list[Tensor]:
    """alpha / r * up @ down of each layer as a file has it, in float64."""
    layers = handle.to_lora_file().layers.values()
    return [
        layer.alpha / layer.down.shape[0] * layer.up.flatten(1).double() @ layer.down.flatten(1).double()
        for layer in layers
    ]


def test_weight_norm_is_that_of_the_real_products(family: Family, learnt: AdapterHandle, batch: Any) -> None:
    squares = [float(torch.linalg.matrix_norm(product) ** 2) for product in products(learnt)]
    assert len(squares) > 10
    assert min(squares) > 0
    outcome = run(family, learnt, batch, SHIPPED["weight_norm"](weight=2.0))
    assert outcome.terms["weight_norm"].tolist() == pytest.approx([math.fsum(squares)] * 4, rel=1e-5)
    assert float(outcome.loss.detach()) == pytest.approx(2 * math.fsum(squares), rel=1e-5)
    mean = run(family, learnt, batch, SHIPPED["weight_norm"](reduce="mean")).terms["weight_norm"]
    assert mean.tolist() == pytest.approx([math.fsum(squares) / len(squares)] * 4, rel=1e-5)


def test_the_gradient_of_the_weight_norm(family: Family, learnt: AdapterHandle, batch: Any) -> None:
    """d |s U D|^2 / dU = 2 s^2 U D D^T, by the product."""
    run(family, learnt, batch, SHIPPED["weight_norm"]()).loss.backward()
    for (down, up, scale), product in zip(learnt.factors(), products(learnt)):
        expected = 2 * scale * product @ down.detach().double().T
        parameter = next(p for p in learnt.parameters() if p.data_ptr() == up.data_ptr())
        assert torch.allclose(parameter.grad.flatten(1).double(), expected, rtol=1e-3, atol=1e-6)
    for parameter in learnt.parameters():
        parameter.grad = None


# --- the recipe -------------------------------------------------------------------------------------------


def test_the_inverted_mask_recipe_trains(tmp_path: Path) -> None:
    """Also with mask pictures in place of the control map."""
    small = [
        "train.steps=2", "train.batch_size=2", "preview.every=0", "train.log_tensorboard=false",
        "train.threads=1", "data.resolution=32", "data.buckets=false",
    ]  # fmt: skip
    resolved = config.load("glasses", recipe="inverted-mask", sets=small)
    ids = [plugin.id for plugin in resolved.plugins]
    assert ids.index("control_map") < ids.index("inverted_mask")
    result = trainer.train(resolved, tmp_path / "run")
    assert result.steps == 2
    assert any(bool(p.any()) for name, p in result.handle.named_parameters() if name.endswith(".up"))
