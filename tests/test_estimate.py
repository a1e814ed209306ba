"""The estimate: live memory against plain sums, steps without values against the same steps on real ones."""

from __future__ import annotations

import pytest
import torch

from spf_kit import config, families
from spf_kit.adapters.inject import AdapterHandle
from spf_kit.estimate.opened import autocast, opened
from spf_kit.estimate.rehearsal import Rehearsal
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


# --- with and without values ------------------------------------------------------------------------------

CASES: dict[str, list[str]] = {
    "naive": ["--recipe naive"],
    "spf": [],
    "spf, all layers": ['loss.text_consistency.layers=["all"]', "train.batch_size=3"],
    "spf-paper": ["--recipe spf-paper"],
    "paper with the VAE": [
        "--recipe spf-paper",
        "loss.response_enhancement.decoder=vae",
        "train.batch_size=1",
    ],
    "prior-preservation": ["--recipe prior-preservation"],
    "output-preservation": ["--recipe output-preservation"],
    "inverted-mask": ["--recipe inverted-mask"],
    "checkpointing": ["train.gradient_checkpointing=true"],
    "text encoder": ['adapter.targets=["cross-attention","text-encoder"]', "--recipe naive"],
    "bf16": ["train.mixed_precision=bf16", "train.gradient_checkpointing=true"],
    "half": ["base.dtype=bfloat16", "--recipe naive"],
    "sliced": ["base.attention=sliced", "--recipe naive"],
    "accumulation, EMA, SGD": [
        "train.gradient_accumulation=2",
        "train.ema=0.9",
        "train.optimizer=sgd",
        "--recipe naive",
    ],
    "walk": ["loss.output_preservation.walk=10"],
    "dora": ["adapter.dora=true", "--recipe naive"],
    "loha": ["adapter.kind=loha", "--recipe naive"],
    "lokr": ["adapter.kind=lokr", "adapter.factor=4", "--recipe naive"],
    "oft": ["adapter.kind=oft", 'adapter.targets=["cross-attention"]', "--recipe naive"],
}


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
