"""Short trainings of LoHa, LoKr and OFT: all layers learn, and a resumed run is bit-identical."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spf_kit import config
from spf_kit.adapters import files
from spf_kit.config import Resolved
from spf_kit.errors import UserError
from spf_kit.training import trainer

SMALL = [
    "data.resolution=32", "data.buckets=false", "train.steps=4", "train.batch_size=1", "preview.every=0",
    "train.checkpoint_every=2", "train.log_tensorboard=false", "train.threads=1", 'output.dtype="float32"',
    'adapter.targets=["cross-attention","text-encoder"]', "train.learning_rate=1e-3",
]  # fmt: skip
KINDS = {
    "loha": ["adapter.rank=2", "adapter.dropout=0.2", "train.gradient_checkpointing=true"],
    "lokr": ["adapter.rank=2", "adapter.decompose_both=true", "train.ema=0.9"],
    "oft": ["adapter.rank=8", "adapter.constraint=0.01"],
}


def resolve(pictures: Path, *sets: str) -> Resolved:
    return config.load("glasses", data=pictures, recipe="naive", sets=[*SMALL, *sets])


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_run_and_its_continuation_give_the_same_bits(pictures: Path, tmp_path: Path, kind: str) -> None:
    norm = ["loss.weight_norm.plugin=weight_norm", "loss.weight_norm.weight=1e-3"]
    blocks = ["adapter.ranks.mid=1", "train.learning_rates.up=2e-3"] if kind != "oft" else []
    sets = [f"adapter.kind={kind}", *KINDS[kind], *norm, *blocks]
    done = trainer.train(resolve(pictures, *sets), tmp_path / "run")
    whole = load_file(done.lora)
    lora = files.read(done.lora)
    assert lora.kind == kind
    assert lora.metadata["ss_network_module"] == "lycoris.kohya"
    # every layer has learnt something
    for (component, module), live in done.handle._layers.items():
        layer = lora.layers[component, done.family.file_module_name(component, module)]
        assert layer.delta(live.weight.detach()).abs().max() > 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["terms"]["weight_norm"] == 0
    assert rows[-1]["terms"]["weight_norm"] > 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    done.lora.unlink()
    again = trainer.train(resolve(pictures, *sets), tmp_path / "run", resume=True)
    found = load_file(again.lora)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[key], whole[key]) for key in whole)


def test_a_loha_trains_on_an_oft(pictures: Path, tmp_path: Path) -> None:
    first = trainer.train(resolve(pictures, "adapter.kind=oft", "train.steps=2"), tmp_path / "first").lora
    sets = ["adapter.kind=loha", "adapter.rank=2", "train.steps=2", f'adapter.on=["{first}:0.7"]']
    done = trainer.train(resolve(pictures, *sets), tmp_path / "second")
    assert files.read(done.lora).kind == "loha"
    (on,) = done.earlier.handles
    assert on.strength == 0.7
    assert not any(p.requires_grad for p in on.parameters())


@pytest.mark.parametrize(
    ("sets", "reason"),
    [
        (
            ["adapter.kind=oft", 'adapter.targets=["convolutions"]'],
            "OFT is trained on linear layers alone: leave them out, or choose adapter.kind",
        ),
        (["adapter.kind=loha", "adapter.dora=true"], "magnitudes are trained with LoRA alone"),
        (["adapter.kind=lokr", "output.format=peft"], "LoKr is written in kohya's format alone"),
        (["adapter.kind=lokr", "adapter.factor=0"], "give a size such as 8, or -1"),
        (["adapter.kind=lorka"], "expected 'lora', 'loha', 'lokr' or 'oft'"),
        (["adapter.ranks.mid=-1"], "must be at least 0"),
        (["train.learning_rates.mid=fast"], "expected a number, not text"),
    ],
)
def test_settings_that_cannot_be_are_sentences(pictures: Path, sets: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        resolve(pictures, *sets)


def test_settings_without_effect_are_told(pictures: Path) -> None:
    told = resolve(pictures, "adapter.kind=oft", "adapter.alpha=2", "adapter.factor=4").warnings
    assert any("adapter.alpha has no effect with adapter.kind = 'oft'" in line for line in told)
    assert any("adapter.factor has no effect" in line for line in told)
