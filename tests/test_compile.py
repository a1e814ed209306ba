"""`train.compile`: the same training from compiled code, and refused where nothing can compile it.

The compiler behind is torch's own tracer without code generation: what it has traced is run as it is, so that
numbers keep their bits. Guards, hooks and what an adapter does are the tracer's business.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from spf_kit import config
from spf_kit.adapters.inject import AdapterHandle
from spf_kit.errors import UserError
from spf_kit.families import taps
from spf_kit.families.base import Family
from spf_kit.losses import Needs
from spf_kit.schema import Adapter
from spf_kit.training import compiled, trainer

SMALL = [
    "data.resolution=32", "data.buckets=false", "train.steps=3", "train.batch_size=1", "preview.every=0",
    "train.log_tensorboard=false", "train.threads=1", "evaluate.enabled=false", "adapter.rank=2",
]  # fmt: skip


class Graphs:
    """A compiler that runs what was traced, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.count += 1
        forward: Callable[..., Any] = graph.forward
        return forward


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    found = Graphs()
    monkeypatch.setattr(compiled, "BACKEND", found)
    # torch's traces for its own tools, which pytest would collect
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    torch._dynamo.reset()
    return found


def lines(run: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read]


def test_the_same_steps(graphs: Graphs, pictures: Path, tmp_path: Path) -> None:
    """With probes, the path with the adapter off, and blocks that are run again in the backward pass."""
    counts = []

    def report(done: int, total: int, values: Any) -> None:
        if "loss" in values:
            counts.append(graphs.count)

    def run(name: str, *more: str) -> trainer.TrainResult:
        sets = [*SMALL, "train.gradient_checkpointing=true", "adapter.dropout=0.1", "train.drift_every=2"]
        resolved = config.load("glasses", data=pictures, recipe="spf", sets=[*sets, *more])
        return trainer.train(resolved, tmp_path / name, report=report)

    plain = run("plain")
    assert graphs.count == 0
    found = run("compiled", "train.compile=regional")
    assert lines(found.run) == lines(plain.run)
    assert counts[3] > 0
    assert counts[4] == counts[5], "each step compiles anew"
    unet = found.family.unet
    assert all(module._compiled_call_impl is None for module in unet.modules()), "left compiled"
    assert all("forward" not in vars(unet.get_submodule(name)) for name in found.family.attention_layers())


def test_with_other_settings(graphs: Graphs, pictures: Path, tmp_path: Path) -> None:
    sets = [
        *SMALL, "train.steps=2", "train.gradient_accumulation=2", "train.mixed_precision=bf16",
        "adapter.dora=true", "base.dtype=bfloat16", "base.attention=sliced", "data.cache=none",
        'adapter.targets=["cross-attention", "text-encoder"]', "train.optimizer=adamw8bit",
    ]  # fmt: skip
    runs = [
        trainer.train(
            config.load("glasses", data=pictures, recipe="naive", sets=[*sets, f"train.compile={how}"]),
            tmp_path / how,
        ).run
        for how in ("no", "regional")
    ]
    assert graphs.count > 0
    plain, found = (lines(run) for run in runs)
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in plain], rel=1e-3)


def test_code_is_chosen_by_what_the_adapter_does(graphs: Graphs, family: Family) -> None:
    """On, off and at half strength, in one grad mode: nothing but peft's attributes tells them apart."""
    handle = AdapterHandle.inject(family, Adapter(rank=2))
    for parameter in handle.parameters():
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    family.unet.train()
    place = family.unet.mid_block.attentions[0]  # with one block
    x, states = (
        torch.randn(1, place.in_channels, 2, 2),
        torch.randn(1, 77, family.unet.config.cross_attention_dim),
    )

    def all_three() -> list[torch.Tensor]:
        found = []
        for strength in (1.0, 0.0, 0.5):
            handle.set_strength(strength)
            found.append(place(x, encoder_hidden_states=states).sample)
        return found

    with torch.no_grad():
        plain = all_three()
        assert not torch.equal(plain[0], plain[1])
        compiled.put_on("regional", family, [])
        try:
            for before, after in zip(plain, all_three(), strict=True):
                assert torch.equal(after, before)
            count = graphs.count
            assert count > 0
            family.unet.eval()
            place(x[..., :1], encoder_hidden_states=states)
            assert graphs.count == count, "pictures of another size outside of training"
        finally:
            compiled.take_off(family)
            handle.remove()


def test_the_whole_unet_stops_at_the_layers_that_losses_look_into(graphs: Graphs) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4, block_out_channels=(8,), layers_per_block=1, norm_num_groups=2, cross_attention_dim=8,
        attention_head_dim=2, down_block_types=["CrossAttnDownBlock2D"], mid_block_type=None,
        up_block_types=["UpBlock2D"],
    )  # fmt: skip
    family: Any = SimpleNamespace(unet=unet.train(), attention_layers=lambda: taps.attention_layers(unet))
    (name,) = family.attention_layers()
    reader: Any = SimpleNamespace(needs=Needs.of("response", layers=["all"]))
    inputs = torch.randn(1, 4, 4, 4), torch.tensor([5]), torch.randn(1, 3, 8)

    @torch.no_grad()
    def seen() -> tuple[torch.Tensor, torch.Tensor]:
        with taps.recording(unet, [name]) as found:
            return unet(*inputs).sample, found[name]["to_q"]

    plain = seen()
    compiled.put_on("whole", family, [reader])
    counts = []
    for _ in range(2):  # compiled, and from what was compiled
        assert all(torch.equal(a, b) for a, b in zip(seen(), plain, strict=True))
        counts.append(graphs.count)
    assert counts[0] == counts[1] > 1, "before and behind"
    compiled.take_off(family)
    assert all(torch.equal(a, b) for a, b in zip(seen(), plain, strict=True))


def test_without_a_compiler_nothing_begins(pictures: Path, tmp_path: Path) -> None:
    from torch._inductor import config as inductor

    with (
        inductor.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(UserError, match=r"train.compile = 'regional' finds no compiler .*install g\+\+"),
    ):
        trainer.train(
            config.load("glasses", data=pictures, sets=[*SMALL, "train.compile=regional"]), tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def test_a_compiler_that_fails_is_one_sentence(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise OSError("no room left")

    monkeypatch.setattr(compiled, "BACKEND", broken)
    torch._dynamo.reset()
    resolved = config.load("glasses", data=pictures, sets=[*SMALL, "train.compile=regional"])
    with pytest.raises(UserError, match=re.escape("cannot compile this model here")):
        trainer.train(resolved, tmp_path / "run")
