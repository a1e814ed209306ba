"""The estimate: live memory against plain sums, steps without values against the same steps on real ones."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from spf_kit import config, families
from spf_kit.adapters.inject import AdapterHandle
from spf_kit.errors import UserError
from spf_kit.estimate import gpu
from spf_kit.estimate.advice import Change, apply, candidates, cheapest, settings
from spf_kit.estimate.bare import BareTracker
from spf_kit.estimate.opened import autocast, opened
from spf_kit.estimate.peak import CONTEXT, FRAGMENTATION, Estimate, estimate, parse_size, reserve
from spf_kit.estimate.rehearsal import Rehearsal
from spf_kit.measure.memory import optimizer_bytes
from spf_kit.measure.tracker import Peak, Tracker
from spf_kit.training import stages, tools

MIB = 2**20

# --- the tracker ------------------------------------------------------------------------------------------


def test_the_tracker_counts_what_lives() -> None:
    x = torch.zeros(MIB // 4)
    with Tracker() as tracker:
        with tracker.part("first"):
            a = x + 1
            b = a[:100].view(10, 10)  # a view is no memory
            a.add_(1)
        assert tracker.total == MIB
        c = torch.cat([a, a])
        del a
        assert tracker.total == 3 * MIB, "a view keeps the whole storage"
        del b
        assert tracker.total == 2 * MIB
        del c
    assert tracker.total == 0
    assert tracker.peak == Peak(3 * MIB, {"first": MIB, "activations": 2 * MIB})
    assert x.untyped_storage().nbytes() == MIB, "what was there before is not counted"


def test_the_tracker_sees_what_autograd_keeps() -> None:
    w = torch.zeros(MIB // 4, requires_grad=True)
    with Tracker() as tracker:
        y = (w.exp().exp() * 2).sum()  # both exponentials are kept, the product is not
        assert tracker.total == 2 * MIB + 4
        y.backward()
        del y
        assert tracker.total == MIB, "the gradient"
    assert tracker.peak.total >= 4 * MIB, "two kept, and the gradient on its way"


def test_parts_nest_and_tensors_change_them() -> None:
    with Tracker(granule=512) as tracker:
        with tracker.part("outer"):
            with tracker.part("inner"):
                a = torch.zeros(1)
            b = torch.zeros(129)
        assert tracker.parts == {"inner": 512, "outer": 1024}
        tracker.hold([a, b], "kept")
        assert tracker.parts == {"inner": 0, "outer": 0, "kept": 1536}
        tracker.reset_peak()
        assert tracker.peak.total == tracker.total == 1536


OPERATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "a view": lambda x, n: x.transpose(0, 1)[1:, 1:].unsqueeze(0),
    "a view of a view": lambda x, n: x[1:].t()[2:],
    "an expanded one": lambda x, n: x[:1].expand(5, 4),
    "a view that says it is none": lambda x, n: torch.ops.aten._unsafe_view(x, [2, 6]),
    "a product": lambda x, n: x @ x.t(),
    "several": lambda x, n: torch.native_layer_norm(x, [4], None, None, 1e-5),
    "another type": lambda x, n: (x.to(torch.bfloat16), x.half()),
    "strides that are kept": lambda x, n: x.t() * 2,
    "with an integer": lambda x, n: n + 1,
    "with the same number, broken": lambda x, n: n + 1.0,
    "with the same number, a truth": lambda x, n: n + True,
    "in parts": lambda x, n: (*x.split(2), *x.unbind()),
    "new": lambda x, n: (x.new_zeros(2), torch.ones(3, dtype=torch.int32), torch.empty_like(x.t())),
    "in place": lambda x, n: x.clone().mul_(2),
}


@pytest.mark.parametrize("case", OPERATIONS)
def test_what_operations_return_is_remembered_rightly(case: str) -> None:
    def described(result: Any, given: tuple[torch.Tensor, ...]) -> list[Any]:
        return [
            (
                t.shape,
                t.stride(),
                t.storage_offset(),
                t.dtype,
                t.device,
                t.untyped_storage().nbytes(),
                [t.untyped_storage()._cdata == g.untyped_storage()._cdata for g in given],
            )
            for t in (result if isinstance(result, tuple) else (result,))
        ]

    call, real = OPERATIONS[case], (torch.randn(3, 4), torch.arange(6))
    mode = FakeTensorMode()
    with mode:
        given = (torch.empty(3, 4), torch.empty(6, dtype=torch.int64))
        with BareTracker(mode):
            for other in OPERATIONS.values():
                other(*given)  # so that whatever can be mistaken for it is known
            found = described(call(*given), given)
    assert found == described(call(*real), real)


# --- with and without values ------------------------------------------------------------------------------

CASES: dict[str, list[str]] = {  # several settings each, where none hides what another needs
    "spf": [],
    "spf, all layers": ['loss.text_consistency.layers=["all"]', "train.batch_size=3"],
    "spf-paper": ["--recipe spf-paper"],
    "paper with the VAE": [
        "--recipe spf-paper", "loss.response_enhancement.decoder=vae", "train.batch_size=1",
    ],
    "prior-preservation, lokr": ["--recipe prior-preservation", "adapter.kind=lokr", "adapter.factor=4"],
    "output-preservation": ["--recipe output-preservation"],
    "inverted-mask, checkpointing": ["--recipe inverted-mask", "train.gradient_checkpointing=true"],
    "text encoder, loha": [
        "--recipe naive", 'adapter.targets=["cross-attention","text-encoder"]', "adapter.kind=loha",
    ],
    "bf16, checkpointing": ["train.mixed_precision=bf16", "train.gradient_checkpointing=true"],
    "half, sliced": ["--recipe naive", "base.dtype=bfloat16", "base.attention=sliced"],
    "fp8, accumulation, EMA, SGD": [
        "--recipe naive", "base.quantize=fp8", "train.gradient_accumulation=2", "train.ema=0.9",
        "train.optimizer=sgd",
    ],
    "walk": [
        "loss.output_preservation.walk=10", 'loss.output_preservation.mask=""',
        "loss.output_preservation.inside=0.0",
    ],
    "oft": ["--recipe naive", "adapter.kind=oft", 'adapter.targets=["cross-attention"]'],
    "8bit, dora": ["--recipe naive", "base.quantize=8bit", "adapter.dora=true"],
    "nf4": [
        "base.quantize=nf4", "base.dtype=bfloat16", "train.mixed_precision=bf16",
        "train.gradient_checkpointing=true",
    ],
}  # fmt: skip


def resolve(*texts: str, base: str = "embedded") -> config.Resolved:
    recipe = next((text.removeprefix("--recipe ") for text in texts if text.startswith("--recipe ")), None)
    sets = [text for text in texts if not text.startswith("--recipe ")]
    return config.load("glasses", base=base, recipe=recipe, sets=sets)


def real_peaks(resolved: config.Resolved, size: tuple[int, int]) -> list[Peak]:
    """The same steps on real tensors: the base's own weights, torch's own kernels."""
    family = families.load(resolved.config.base)
    plugins, _ = tools.split_by_clip(resolved.plugins, resolved.config, family)
    clip = tools.clip_pair(stages.union(plugins), resolved.config, family)
    handle = AdapterHandle.inject(family, resolved.config.adapter)
    rehearsal = Rehearsal(
        resolved.config, plugins, family, handle, Tracker(),
        clip=clip, autocast=autocast(resolved.config.train),
    )  # fmt: skip
    return [rehearsal.step(size, moment) for moment in rehearsal.moments()]


@pytest.mark.parametrize("case", CASES)
def test_steps_without_values_are_those_with_values(case: str) -> None:
    """To the byte, in every part."""
    resolved, size = resolve(*CASES[case]), (16, 12)
    with opened(resolved, size, on_gpu=False) as run:
        bare = [run.rehearsal.step(size, moment) for moment in run.rehearsal.moments()]
    assert bare == real_peaks(resolved, size)


# --- as on a GPU ------------------------------------------------------------------------------------------


def test_attention_keeps_no_matrix_of_all_pairs() -> None:
    """Output and a logarithm for each query forward; their gradients and the sums of each query backward."""
    q, k, v = (torch.zeros(2, 4, n, 8, dtype=torch.float16, requires_grad=True) for n in (1024, 77, 77))
    forward, sums = q.numel() * 2, 2 * 4 * 1024 * 4
    with gpu.as_on_a_gpu(), Tracker() as tracker:
        output = F.scaled_dot_product_attention(q, k, v)
        assert tracker.peak.total == tracker.total == forward + sums
        tracker.reset_peak()
        output.backward(torch.zeros_like(output))
    gradients = sum(2 * x.numel() for x in (q, k, v))
    wide = 4 * q.numel()
    assert tracker.peak.total == forward + sums + forward + sums + wide + gradients
    matrix = 2 * 4 * 1024 * 1024 * 2
    with Tracker() as tracker:
        scores = q @ q.transpose(-1, -2)
    assert tracker.peak.total == scores.numel() * 2 == matrix, "what it would be"


def test_autocast_widens_what_it_widens_on_cuda() -> None:
    x = torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16)
    for wide in (False, True):
        with gpu.as_on_a_gpu() if wide else contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16):
            kind = torch.float32 if wide else torch.bfloat16
            assert F.group_norm(x, 2).dtype == kind
            assert x.softmax(dim=-1).dtype == kind
            assert F.silu(x).dtype == torch.bfloat16
            assert F.conv2d(x.float(), torch.zeros(3, 4, 1, 1)).dtype == torch.bfloat16
    with gpu.as_on_a_gpu():
        assert F.group_norm(x, 2).dtype == torch.bfloat16, "outside autocast nothing is widened"


def test_eight_bit_states_are_counted_and_others_are_real() -> None:
    def state(optimizer: str) -> int:
        return estimate(resolve("--recipe naive", f"train.optimizer={optimizer}")).step.parts["optimizer"]

    family = families.load(resolve().config.base)
    handle = AdapterHandle.inject(family, resolve().config.adapter)
    shapes = [tuple(p.shape) for p in handle.parameters()]
    count = sum(p.numel() for p in handle.parameters())
    assert state("adamw8bit") == pytest.approx(optimizer_bytes("adamw8bit", shapes), abs=gpu.GRANULE)
    assert state("adamw") == pytest.approx(8 * count, rel=0.05)  # each tensor rounded up to 512 bytes
    assert state("prodigy") == pytest.approx(16 * count, rel=0.05)


# --- presets ----------------------------------------------------------------------------------------------


def test_an_architecture_needs_no_weights() -> None:
    found = estimate(resolve("train.gradient_checkpointing=true", base="sd15"))
    unet = 859_520_964  # parameters of Stable Diffusion 1.5's UNet, as published
    assert found.step.parts["weights"] == pytest.approx(2 * unet, rel=1e-3)
    assert list(found.buckets) == ["512x512"]
    encoders = 123_060_480 + 83_653_863  # of the text encoder and the VAE, as published
    assert found.reading.parts["weights"] == pytest.approx(2 * encoders, rel=1e-3), "the UNet comes later"
    without = estimate(resolve("train.gradient_checkpointing=false", base="sd15"))
    assert without.step.parts["activations"] > 3 * found.step.parts["activations"]
    with pytest.raises(UserError, match=r"'sd15' names an architecture and has no weights"):
        families.load(resolve(base="sd15").config.base)


def test_the_reserve_is_what_the_docs_say() -> None:
    """docs/memory.md: 600 MiB, and 8% of what comes and goes."""
    peak = Peak(
        1000 * MIB, {"weights": 700 * MIB, "adapter": 50 * MIB, "optimizer": 50 * MIB, "taps": 200 * MIB}
    )
    assert reserve(peak) == 600 * MIB + 16 * MIB
    text = (Path(__file__).parents[1] / "docs/memory.md").read_text(encoding="utf-8")
    assert f"| CUDA context, cuBLAS and cuDNN | {CONTEXT // MIB} MiB |" in text
    assert f"| fragmentation | {FRAGMENTATION:.0%} of what comes and goes |" in text


def profiles() -> list[tuple[str, str, float]]:
    """(base, profile, GiB in its comment) of the shipped settings."""
    found = []
    for base in ("sd15", "sdxl"):
        text = config.shipped_files()[f"bases/{base}"].read_text(encoding="utf-8")
        found += [
            (base, name, float(gib))
            for name, gib in re.findall(r"^\[profile\.(\w+)\.\w+\]\s+# ([\d.]+) GiB$", text, re.MULTILINE)
        ]
    return found


def test_profiles_are_there() -> None:
    assert [profile[:2] for profile in profiles()] == [
        *(("sd15", card) for card in ("6gb", "8gb", "12gb", "24gb")),
        *(("sdxl", card) for card in ("6gb", "8gb", "12gb", "24gb")),
    ]


@pytest.mark.parametrize(("base", "profile", "said"), profiles())
def test_profiles_fit_their_cards(base: str, profile: str, said: float) -> None:
    resolved = config.load("glasses", base=base, profile=profile)
    needed = estimate(resolved).needed
    assert needed <= parse_size(profile)
    assert f"{needed / 2**30:.1f}" == f"{said:.1f}", "as its comment says"


def test_a_profile_lies_between_base_and_preset(tmp_path: Path) -> None:
    preset = tmp_path / "mine.toml"
    preset.write_text(
        'extends = "glasses"\n[base]\nmodel = "sd15"\nprofile = "8gb"\n[train]\nbatch_size = 3\n', "utf-8"
    )
    found = config.load(preset)
    assert found.config.train.batch_size == 3, "the preset's own"
    assert found.config.train.gradient_checkpointing is False, "the profile's"
    assert re.fullmatch(r"presets/bases/sd15\.toml:\d+", str(found.origins["train.gradient_checkpointing"]))
    assert config.load(preset, profile="24gb").config.base.profile == "24gb"
    again = tmp_path / "again.toml"
    again.write_text(found.to_toml(), "utf-8")
    assert config.load(again).config == found.config
    for wrong, words in (("8g", "there are: 6gb, 8gb, 12gb, 24gb"), ("6", "--profile 6")):
        with pytest.raises(UserError, match=re.escape(words)):
            config.load(preset, profile=wrong)
    preset.write_text('extends = "glasses"\n[profile.8gb.train]\nbatch_size = 3\n', "utf-8")
    with pytest.raises(UserError, match="only the settings of a base have profiles"):
        config.load(preset)


# --- advice -----------------------------------------------------------------------------------------------


def measured(needs: Callable[[config.Resolved], int]) -> Callable[[config.Resolved], Estimate]:
    return lambda resolved: Estimate({"64x64": Peak(needs(resolved))}, Peak(), on_gpu=False)


def test_the_cheapest_change_that_fits() -> None:
    resolved = resolve("train.batch_size=8", "--recipe naive")

    def needs(changed: config.Resolved) -> int:
        train = changed.config.train
        return (10 if train.gradient_checkpointing else 30) * train.batch_size + 50

    def advice(vram: int) -> dict[str, Any] | None:
        found = cheapest(resolved, vram, measure=measured(needs))
        return found and dict(settings(found[0]))

    assert advice(130) == {"train.gradient_checkpointing": True}, "what does not help is not asked for"
    assert advice(90) == {
        "train.gradient_checkpointing": True, "train.batch_size": 4, "train.gradient_accumulation": 2,
    }  # fmt: skip
    assert advice(10) is None


def test_advice_is_applied_and_pasted() -> None:
    resolved = resolve(base="sd15")
    changes = [Change((("loss.text_consistency.layers", ["1/2"]),)), Change((("data.resolution", 448),))]
    changed = apply(resolved, changes)
    assert next(p for p in changed.plugins if p.id == "text_consistency").layers == ["1/2"]  # type: ignore[attr-defined]
    assert (changed.config.data.resolution, resolved.config.data.resolution) == (448, 512)
    assert str(changes[0]) == """--set loss.text_consistency.layers='["1/2"]'"""
    keys = [key for change in candidates(resolved) for key, _ in change.settings]
    assert keys.index("base.quantize") < keys.index("data.resolution")
    for change in candidates(resolved):  # each is a setting that the format takes
        sets = [part.strip() for part in str(change).split("--set ") if part]
        config.load("glasses", base="sd15", sets=[text.replace("'", "") for text in sets])


@pytest.mark.parametrize(
    ("text", "size"), [("8gb", 8 * 2**30), ("8", 8 * 2**30), ("7.5 GiB", 7.5 * 2**30), ("8192mb", 2**33)]
)
def test_cards(text: str, size: float) -> None:
    assert parse_size(text) == size
    for wrong in ("", "gb", "-8", "0", "8tb", "eight"):
        with pytest.raises(UserError, match="expected a card's memory"):
            parse_size(wrong)


def test_the_command(spf_kit: Any) -> None:
    found = spf_kit("estimate", "glasses", "--recipe", "naive", "--vram", "650mb", "--json").json
    assert found["fits"] is False
    assert found["needed_bytes"] > found["vram_bytes"]
    assert found["advice"]["needed_bytes"] <= found["vram_bytes"]
    step = sum(found["buckets"]["64x64"]["bytes"].values())
    assert found["total_bytes"] == max(step, found["drawing"]["total_bytes"])
    shown = spf_kit("estimate", "glasses", "--recipe", "naive", "--vram", "8gb")
    assert "fits 8 GB" in shown.out
    refused = spf_kit("estimate", "glasses", "--vram", "lots")
    assert refused.code == 2
    assert "--vram lots" in refused.err
