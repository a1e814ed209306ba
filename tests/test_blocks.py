"""Ranks, alphas and learning rates of some of an adapter's layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spf_kit import families
from spf_kit.adapters import files
from spf_kit.adapters.blocks import assign, means, names
from spf_kit.adapters.chosen import chosen
from spf_kit.adapters.inject import inject
from spf_kit.adapters.inspect import inspect
from spf_kit.errors import UserError
from spf_kit.families.base import Family
from spf_kit.schema import Adapter, Base, Train
from spf_kit.training.optimizers import Schedule, build, check

torch.set_num_threads(1)
TO_K = ("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k")
Q = ("text_encoder", "text_model.encoder.layers.3.self_attn.q_proj")
MID = ("unet", "mid_block.resnets.0.conv1")


@pytest.fixture(scope="module")
def family() -> Family:
    return families.load(Base(model="embedded"))


def adapter(**changes: object) -> Adapter:
    targets = ["cross-attention", "convolutions", "text-encoder"]
    return Adapter.model_validate({"rank": 4, "targets": targets} | changes)


def test_what_a_layer_is_called() -> None:
    assert names(TO_K) == ["unet", "down", "down.1", "cross-attention"]
    assert names(MID) == ["unet", "mid", "convolutions"]
    assert names(Q) == ["text_encoder", "layers.3", "text-encoder"]
    assert names(("unet", "conv_in")) == ["unet", "other"]
    for pattern in ("*.to_k", "down_blocks.1.*", "unet.*.attn2.to_?"):
        assert means(pattern, TO_K)
    assert not means("to_k", TO_K)
    assert not means("down_blocks.*", Q)


def test_the_last_pattern_counts_and_each_must_mean_something() -> None:
    found = assign({"unet": 1, "down.1": 2, "*.to_k": 3}, [TO_K, Q, MID], "adapter.ranks")
    assert found == {TO_K: ("*.to_k", 3), MID: ("unet", 1)}
    with pytest.raises(UserError, match=r"adapter\.ranks names 'donw\.1'.* did you mean 'down\.1'\?"):
        assign({"donw.1": 2}, [TO_K, Q, MID], "adapter.ranks")
    with pytest.raises(UserError, match=r"'up',.*there are convolutions, .*, mid, .* as '\*\.to_k'"):
        assign({"up": 2}, [TO_K, Q, MID], "adapter.ranks")


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_ranks_and_alphas_reach_layers_and_file(family: Family, tmp_path: Path, kind: str) -> None:
    ranks, alphas = {"mid": 2, "convolutions": 1, "*.to_k": 3, "*.q_proj": 0}, {"convolutions": 0.5}
    cfg = adapter(kind=kind, ranks=ranks, alphas=alphas, decompose_both=False)
    shapes = [
        shape
        for (component, name), spec in chosen(family, cfg).items()
        for shape in spec.parts(
            tuple(family.components()[component].get_submodule(name).weight.shape)
        ).values()
    ]
    handle = inject(family, cfg)
    assert shapes == [tuple(p.shape) for p in handle.parameters()]
    path = files.write(handle.to_lora_file(), tmp_path / "a.safetensors")
    handle.remove()
    found = files.read(path)
    assert not any(module.endswith("q_proj") for _, module in found.layers)
    for (component, module), layer in found.layers.items():
        wide = "convolutions" in names((component, module))
        wanted = 1 if wide else 2 if module.startswith("mid") else 4
        wanted = 3 if module.endswith(".to_k") else wanted
        assert layer.alpha == (0.5 if wide else wanted)
        assert layer.rank in (wanted, 0)
        assert layer.rank == wanted or kind == "lokr"  # small layers' factors are whole
    if kind != "lokr":
        assert set(inspect(path)["rank"]) == {"1", "2", "3", "4"} & set(inspect(path)["rank"])


def test_wrong_patterns_are_sentences(family: Family) -> None:
    for key in ("ranks", "alphas"):
        with pytest.raises(UserError, match=rf"adapter\.{key} names 'nowhere', which means none"):
            inject(family, adapter(**{key: {"nowhere": 2}}))
    with pytest.raises(UserError, match="leaves no layer to train"):
        inject(family, adapter(ranks={"unet": 0, "text_encoder": 0}))
    handle = inject(family, adapter())
    with pytest.raises(UserError, match=r"train\.learning_rates names 'nowhere'"):
        handle.groups({"nowhere": 1e-4})
    handle.remove()


def test_learning_rates_make_parameter_groups(family: Family) -> None:
    handle = inject(family, adapter())
    rates = {"up": 2e-4, "convolutions": 0.0, "text_encoder": 3e-5}
    train = Train(learning_rate=1e-4, learning_rates=rates, schedule="constant")
    groups = handle.groups(train.learning_rates)
    assert set(groups) == {"unet", "unet up", "unet convolutions", "text_encoder text_encoder"}
    together = [id(p) for own in groups.values() for p in own]
    assert sorted(together) == sorted(map(id, handle.parameters()))
    optimizer = build(train, groups)
    found = Schedule.of(train, 10, list(groups)).apply(optimizer, 5)
    assert found == {
        "unet": 1e-4, "unet up": 2e-4, "unet convolutions": 0.0, "text_encoder text_encoder": 3e-5,
    }  # fmt: skip
    for parameter in handle.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = handle.state_dict()
    optimizer.step()
    moved = {name for name, value in handle.state_dict().items() if not torch.equal(value, before[name])}
    still = before.keys() - moved
    assert still
    assert all("convolutions" in names(tuple(n.rpartition(".")[0].split(".", 1))) for n in still)  # type: ignore[arg-type]
    handle.remove()
    check(train)
    with pytest.raises(UserError, match=r"train\.learning_rates must be 0 or equal"):
        check(Train(optimizer="prodigy", learning_rate=1.0, learning_rates={"up": 0.5}))
