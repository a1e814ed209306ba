"""Batches on which no loss acts, and losses that cannot teach."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spf_kit import config
from spf_kit.errors import UserError
from spf_kit.training import trainer

QUIET = ["preview.every=0", "train.log_tensorboard=false", "evaluate.enabled=false", "train.threads=1"]
SMALL = ["data.resolution=32", "data.buckets=false", "train.batch_size=1", "adapter.rank=2"]


def test_a_batch_that_no_loss_sees_is_passed_over(tmp_path: Path) -> None:
    """One picture a step, most of them asked, and a loss of plain ones alone; the map looks at both."""
    sets = [
        *QUIET, *SMALL, "train.steps=12", "loss.denoising.enabled=false", "loss.target.enabled=false",
        "loss.text_consistency.enabled=false", "loss.fine_grained.enabled=false",
        "loss.inverted_mask.enabled=false", "loss.output_preservation.start=0.0",
        "loss.output_preservation.share=0.4",
    ]  # fmt: skip
    run = trainer.train(
        config.load("glasses", recipe="spf", base="embedded", sets=sets), tmp_path / "run"
    ).run
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seen = ["output_preservation" in line["terms"] for line in lines]
    assert len(lines) == 12
    assert True in seen
    assert False in seen
    assert all(line["loss"] == 0 for line, acts in zip(lines, seen) if not acts)


DETACHED = '''
from spf_kit.losses import Loss, Needs, Step, Tensor, per_sample, register


@register("detached")
class Detached(Loss):
    """|eps_res|^2, (B,), without a gradient, as an author may write by mistake."""

    @property
    def needs(self) -> Needs:
        return Needs.of("response")

    def __call__(self, step: Step) -> Tensor:
        return per_sample(step.response.prediction.square()).detach()
'''


def test_losses_without_a_gradient_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "detached.py"
    file.write_text(DETACHED)
    sets = [*QUIET, *SMALL, "train.steps=2", "loss.denoising.enabled=false", "loss.detached.plugin=detached"]
    resolved = config.load("glasses", recipe="naive", base="embedded", sets=sets, plugin_files=[file])
    with pytest.raises(UserError, match=r"none of the losses \(detached\) has a gradient: .*losses check"):
        trainer.train(resolved, tmp_path / "run")
