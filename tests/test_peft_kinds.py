"""peft's folders of LoHa and LoKr, both ways, against peft's own loader on a small UNet."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from spf_kit.adapters import files
from spf_kit.adapters.files import LoraFile
from spf_kit.adapters.layers import LohaLayer, LokrLayer, LoraLayer, OftLayer, Update
from spf_kit.adapters.parts import factorize
from spf_kit.errors import UserError

torch.set_num_threads(1)
Q = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"  # (32, 32)
K = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"  # (32, 24)
CONV = "mid_block.resnets.0.conv1"  # (32, 32, 3, 3)
POINT = "down_blocks.1.resnets.0.conv_shortcut"  # (32, 16, 1, 1)
SIZES = {Q: (32, 32), K: (32, 24), CONV: (32, 32, 3, 3), POINT: (32, 16, 1, 1)}


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        attention_head_dim=2, cross_attention_dim=24,
    ).eval()  # fmt: skip


@torch.no_grad()
def output(model: Any) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    noise, text = torch.randn(1, 4, 8, 8, generator=draw), torch.randn(1, 5, 24, generator=draw)
    return model(noise, torch.tensor([500]), encoder_hidden_states=text).sample


@torch.no_grad()
def with_updates(unet: UNet2DConditionModel, layers: Mapping[tuple[str, str], Update]) -> Tensor:
    """The output of the model with the updates in its weights."""
    changed = copy.deepcopy(unet)
    for (_, module), layer in layers.items():
        weight = changed.get_submodule(module).weight
        weight += layer.delta(weight)
    return output(changed)


def by_peft(unet: UNet2DConditionModel, folder: Path) -> Tensor:
    return output(PeftModel.from_pretrained(copy.deepcopy(unet), folder))


def close(got: Tensor, wanted: Tensor, unlike: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - unlike).abs().max() > 1e-3, "the update does nothing"


def draw(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(hash(size) % 1000)) * 0.3


def loha(module: str, rank: int, alpha: float, *, core: bool = False) -> LohaLayer:
    outputs, inputs, *kernel = SIZES[module]
    if core:
        a, b, t = draw(rank, outputs), draw(rank, inputs), draw(rank, rank, *kernel)
        return LohaLayer(a, b, a + 0.1, b - 0.1, alpha, t, t + 0.1)
    columns = inputs * 9 if kernel == [3, 3] else inputs
    a, b = draw(outputs, rank), draw(rank, columns)
    return LohaLayer(a, b, a + 0.1, b - 0.1, alpha)


def lokr(module: str, rank: int, alpha: float, factor: int = -1, *, core: bool = False) -> LokrLayer:
    """With LyCORIS' shapes; rank 0: of whole matrices."""
    outputs, inputs, *kernel = SIZES[module]
    (a, c), (b, d) = factorize(outputs, factor), factorize(inputs, factor)
    small = draw(a, b) + 0.2
    if not rank:
        return LokrLayer(alpha, lokr_w1=small, lokr_w2=draw(c, d, *kernel))
    if core:
        parts = {"lokr_w2_a": draw(rank, c), "lokr_w2_b": draw(rank, d), "lokr_t2": draw(rank, rank, *kernel)}
    else:
        columns = d * 9 if kernel == [3, 3] else d
        parts = {"lokr_w2_a": draw(c, rank), "lokr_w2_b": draw(rank, columns)}
    return LokrLayer(alpha, lokr_w1=small, **parts)


def lora_file(layers: Mapping[str, Update]) -> LoraFile:
    return LoraFile({("unet", module): layer for module, layer in layers.items()}, {"ss_seed": "1"})


BOTH = LokrLayer(3.0, lokr_w1_a=draw(4, 1), lokr_w1_b=draw(1, 4), lokr_w2_a=draw(8, 1), lokr_w2_b=draw(1, 8))
CASES: dict[str, dict[str, Update]] = {
    "loha": {Q: loha(Q, 2, 3.0), K: loha(K, 4, 2.5), CONV: loha(CONV, 2, 1.0), POINT: loha(POINT, 2, 3.0)},
    "loha with cores": {Q: loha(Q, 2, 3.0), CONV: loha(CONV, 2, 1.0, core=True), POINT: loha(POINT, 2, 3.0)},
    "lokr": {Q: lokr(Q, 2, 3.0), K: lokr(K, 3, 2.5), CONV: lokr(CONV, 2, 1.0), POINT: lokr(POINT, 2, 3.0)},
    "lokr with cores": {Q: lokr(Q, 2, 3.0), CONV: lokr(CONV, 2, 1.0, core=True)},
    "lokr of whole matrices": {Q: lokr(Q, 0, 7.0), K: lokr(K, 2, 1.0), CONV: lokr(CONV, 0, 1.0)},
    "lokr of factor 2": {Q: lokr(Q, 2, 3.0, 2), K: lokr(K, 0, 1.0, 2), CONV: lokr(CONV, 4, 1.0, 2)},
    "lokr, both decomposed": {Q: BOTH},
}


@pytest.mark.parametrize("name", CASES)
def test_peft_loads_what_is_written(name: str, unet: UNet2DConditionModel, tmp_path: Path) -> None:
    """And does with it what the same adapter does as a LyCORIS file."""
    lora = lora_file(CASES[name])
    ours = files.read(files.write(lora, tmp_path / "a.safetensors", dtype="float32"))
    wanted = with_updates(unet, ours.layers)
    files.write(lora, tmp_path / "peft", "peft", "float32")
    close(by_peft(unet, tmp_path / "peft"), wanted, output(unet))
    again = files.read(tmp_path / "peft")
    assert (again.format, again.kind) == ("peft", name.partition(" ")[0].strip(","))
    close(with_updates(unet, again.layers), wanted, output(unet))


CONFIGS: dict[str, Any] = {
    "loha": LoHaConfig(r=2, alpha=3, rank_pattern={"to_k": 3}, alpha_pattern={"to_k": 5, "^" + Q: 7}),
    "loha with cores": LoHaConfig(r=2, alpha=3, use_effective_conv2d=True),
    "lokr": LoKrConfig(r=2, alpha=3, alpha_pattern={"conv1": 5}, rank_pattern={"to_q": 4}),
    "lokr with cores": LoKrConfig(r=2, alpha=3, use_effective_conv2d=True),
    "lokr of whole matrices": LoKrConfig(r=32, alpha=8, rank_pattern={"to_k": 16}),
    "lokr, both decomposed": LoKrConfig(r=1, alpha=3, decompose_both=True, decompose_factor=4),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_saves_is_read(name: str, unet: UNet2DConditionModel, tmp_path: Path) -> None:
    config = copy.deepcopy(CONFIGS[name])
    config.init_weights, config.target_modules = False, {Q, K, CONV, POINT}
    torch.manual_seed(1)
    theirs = get_peft_model(copy.deepcopy(unet), config).eval()
    theirs.save_pretrained(tmp_path / "peft")
    lora = files.read(tmp_path / "peft")
    assert {module for _, module in lora.layers} == {Q, K, CONV, POINT}
    close(with_updates(unet, lora.layers), output(theirs), output(unet))
    # and goes on to LyCORIS' format, where nothing tells peft's scale of whole matrices
    kohya = files.write(lora, tmp_path / "a.safetensors", dtype="float32")
    close(with_updates(unet, files.read(kohya).layers), output(theirs), output(unet))


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ({Q: OftLayer(torch.zeros(4, 8, 8), 0.0)}, "this is a OFT: write it with format kohya"),
        ({Q: LokrLayer(1.0, lokr_w1=draw(4, 4), lokr_w2=draw(8, 8), dora_scale=torch.ones(32, 1))},
         "no LoKr with DoRA's magnitudes"),
        ({Q: loha(Q, 2, 1.0), K: lokr(K, 2, 1.0)}, "the unet has layers of LoHa and LoKr"),
        ({Q: loha(Q, 2, 1.0), K: LoraLayer(draw(2, 24), draw(32, 2), 1.0)}, "has layers of LoHa and LoRA"),
        ({CONV: loha(CONV, 2, 1.0, core=True), "mid_block.resnets.0.conv2": loha(CONV, 2, 1.0)},
         "'mid_block.resnets.0.conv2' cannot be written in the format peft: it has no Tucker core"),
        ({POINT: loha(POINT, 2, 1.0, core=True)}, "has a Tucker core of one pixel"),
        ({Q: LokrLayer(1.0, lokr_w1=draw(4, 4), lokr_w2_a=draw(8, 6), lokr_w2_b=draw(6, 8))},
         "at rank 6 peft decomposes other parts of it"),
        ({Q: LokrLayer(1.0, lokr_w1=draw(2, 8), lokr_w2=draw(16, 4))}, "no decompose_factor of peft's"),
        ({Q: LokrLayer(1.0, lokr_w1_a=draw(4, 1), lokr_w1_b=draw(1, 4), lokr_w2_a=draw(8, 2),
                       lokr_w2_b=draw(2, 8))}, "it has two ranks, 1 and 2"),
    ],
)  # fmt: skip
def test_what_peft_cannot_hold_is_refused(layers: dict[str, Update], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        files.write(lora_file(layers), tmp_path / "peft", "peft", "float32")
    assert "write it with format kohya" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_scales_that_a_configuration_lacks_are_asked_for(tmp_path: Path) -> None:
    files.write(lora_file({Q: lokr(Q, 0, 1.0)}), tmp_path / "peft", "peft", "float32")
    file = tmp_path / "peft" / "adapter_config.json"
    config = json.loads(file.read_text())
    for change, reason in (
        ({"r": 0}, "has r = 0, a rank is at least 1"), ({"r": "8"}, "r = '8', which is no number"),
        ({"rank_pattern": {"to_q": None}}, "r = None, which is no number"),
        ({"peft_type": "LOHA"}, "is a LoKr, but .* says peft_type = 'LOHA'"),
    ):  # fmt: skip
        file.write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=reason):
            files.read(tmp_path / "peft")
    del config["alpha"]
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="has no alpha, by which peft scales the update"):
        files.read(tmp_path / "peft")


def test_half_precision_keeps_the_scale_of_whole_matrices(tmp_path: Path) -> None:
    files.write(lora_file({Q: lokr(Q, 0, 1.0)}), tmp_path / "peft", "peft", "float16")
    file = tmp_path / "peft" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"alpha": config["r"] / 2}))
    weights = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    (layer,) = files.read(tmp_path / "peft").layers.values()
    small = weights[f"base_model.model.{Q}.lokr_w1"]
    assert small.dtype == layer.tensors()["lokr_w1"].dtype == torch.float16
    assert torch.equal(layer.tensors()["lokr_w1"], small / 2)
    save_file(weights, tmp_path / "b.safetensors")
    assert files.read(tmp_path / "b.safetensors").layers[("unet", Q)].update().equal(layer.update() * 2)
