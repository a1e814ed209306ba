"""A quantised frozen base: layers against bitsandbytes' own and plain float64, adapters and runs on them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from spf_kit import config, families
from spf_kit.adapters import files
from spf_kit.adapters.inject import AdapterHandle
from spf_kit.errors import UserError
from spf_kit.families import quantized
from spf_kit.families.base import Family
from spf_kit.families.quantized import KINDS, QuantizedLinear
from spf_kit.schema import Adapter, Base
from spf_kit.training import trainer

ALL = list(KINDS)


def linear(outputs: int = 48, inputs: int = 80) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs).requires_grad_(False)
    layer.weight[3] = 0
    layer.weight[5] *= 1e-3
    return layer


def rounded(layer: nn.Linear, kind: str, dtype: torch.dtype = torch.float32) -> QuantizedLinear:
    found = KINDS[kind](layer, dtype)
    found.take(layer.weight, "cpu")
    return found


def layers_of(family: Family) -> dict[str, QuantizedLinear]:
    return {name: m for name, m in family.unet.named_modules() if isinstance(m, QuantizedLinear)}


def kept_bits(family: Family) -> dict[str, torch.Tensor]:
    held = {**dict(family.unet.named_parameters()), **dict(family.unet.named_buffers())}
    return {name: t.detach().clone() for name, t in held.items() if "spf_" not in name}


def inputs(family: Family) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        condition = family.encode_text(["a portrait of a woman", "a man, brown hair"])
    return torch.randn(2, 4, 16, 16, generator=generator).to(family.dtype), torch.tensor([80, 700]), condition


# --- layers -----------------------------------------------------------------------------------------------


def test_integers_are_those_of_bitsandbytes() -> None:
    import bitsandbytes as bnb

    plain = linear()
    theirs = bnb.nn.Linear8bitLt(80, 48, has_fp16_weights=False)
    theirs.load_state_dict(plain.state_dict())
    theirs = theirs.to("cpu")
    ours = rounded(plain, "8bit")
    assert torch.equal(ours.values, theirs.weight.CB)
    assert torch.equal(ours.largest[:, 0], theirs.weight.SCB)
    expected = bnb.functional.int8_vectorwise_dequant(theirs.weight.CB, theirs.weight.SCB)
    torch.testing.assert_close(ours.weight, expected, rtol=1e-6, atol=0)
    assert sum(t.nbytes for t in ours.buffers()) == theirs.weight.CB.nbytes + theirs.weight.SCB.nbytes


@pytest.mark.parametrize("shape", [(48, 80), (7, 9), (130, 300)])
def test_four_bits_are_those_of_bitsandbytes(shape: tuple[int, int]) -> None:
    import bitsandbytes as bnb

    plain = linear(*shape)
    theirs = bnb.nn.Linear4bit(shape[1], shape[0], compress_statistics=True, quant_type="nf4")
    theirs.load_state_dict(plain.state_dict())
    with torch.compiler.set_stance("force_eager"):  # a compiler gives bitsandbytes no other values
        theirs = theirs.to("cpu")
        state = theirs.weight.quant_state
        expected = bnb.functional.dequantize_4bit(theirs.weight.data, state)
    ours = rounded(plain, "nf4")
    assert torch.equal(ours.values, theirs.weight.data)
    assert torch.equal(ours.weight, expected)
    held = [theirs.weight.data, state.absmax, state.offset, state.state2.absmax, state.state2.code]
    assert [t.nbytes for t in ours.buffers()] == [t.nbytes for t in held]


def test_four_bits_are_the_nearest_of_the_published_values() -> None:
    """QLoRA, appendix E: the 16 values of NF4."""
    codes = torch.tensor([
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ], dtype=torch.float64)  # fmt: skip
    torch.manual_seed(1)
    plain = nn.Linear(64, 96)
    weight = plain.weight.detach().double()  # a row is a block
    largest = weight.abs().amax(1, keepdim=True)
    nearest = codes[(weight / largest).unsqueeze(-1).sub(codes).abs().argmin(-1)] * largest
    # the scales have 8 bits of their own
    torch.testing.assert_close(rounded(plain, "nf4").weight.double(), nearest, rtol=0.02, atol=1e-6)


def test_eight_bit_floats_lose_no_more_than_their_digits() -> None:
    plain = linear()
    weight = plain.weight.double()
    found = rounded(plain, "fp8")
    error = (found.weight.double() - weight).abs()
    # four significant bits, or the spacing of the smallest values, relative to each row's largest
    assert (error <= torch.maximum(weight.abs() / 16, weight.abs().amax(1, keepdim=True) * 2**-17)).all()
    assert torch.equal(found.weight[3], torch.zeros(80))
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(found.widened(dtype)[:3].float(), found.weight[:3]), "widening is exact"


@pytest.mark.parametrize("kind", ALL)
def test_products_are_those_of_the_widened_weight(kind: str) -> None:
    plain = linear()
    layer = rounded(plain, kind)
    x = torch.randn(2, 5, 80, requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), y), "with and without gradient it is the same product"
    gradient = torch.randn_like(y)
    y.backward(gradient)
    weight = layer.weight.double()
    torch.testing.assert_close(y.double(), x.double() @ weight.T + plain.bias.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), gradient.double() @ weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ALL)
def test_nothing_is_kept_for_the_backward_pass(kind: str) -> None:
    layer, kept = rounded(linear(), kind), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(2, 80, requires_grad=True))
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(torch.randn(2, 80, requires_grad=True))
    assert y.dtype == torch.bfloat16
    assert not kept


@pytest.mark.parametrize("kind", ALL)
def test_a_conversion_changes_no_bit_that_is_kept(kind: str) -> None:
    layer = rounded(linear(), kind)
    before = {name: t.clone() for name, t in layer.named_buffers()}
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    after = dict(layer.named_buffers())
    assert all(
        torch.equal(after[n].view(torch.uint8), t.view(torch.uint8)) for n, t in before.items() if t.dim()
    )
    assert all(after[n].dtype == t.dtype for n, t in before.items())


# --- the base ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "most"), [("8bit", 2e-3), ("fp8", 1e-2), ("nf4", 0.1)])
def test_predictions_stay_near_the_base(kind: str, most: float) -> None:
    plain, family = (families.load(Base(quantize=how)) for how in (None, kind))
    assert family.base_hash() == plain.base_hash(), "of the weights as files hold them"
    found = layers_of(family)
    assert len(found) == 100
    x, t, condition = inputs(family)
    with torch.no_grad():
        near, exact = family.predict(x, t, condition), plain.predict(x, t, condition)
        # the same weights in plain layers
        for name, layer in found.items():
            plain.unet.get_submodule(name).weight.copy_(layer.weight)
        same = plain.predict(x, t, condition)
    assert 0 < (near - exact).norm() / exact.norm() < most
    torch.testing.assert_close(near, same, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ALL)
def test_sdxl_is_quantised_but_for_its_embeddings(tiny_sdxl: Path, kind: str) -> None:
    plain, family = (families.load(Base(model=str(tiny_sdxl), quantize=how)) for how in (None, kind))
    linears = {name for name, m in plain.unet.named_modules() if isinstance(m, nn.Linear)}
    assert any(name.endswith("proj_in") for name in layers_of(family))
    kept = linears - layers_of(family).keys()
    assert kept
    assert all(
        name.startswith(("time_embedding.", "add_embedding.")) or "time_emb_proj" in name for name in kept
    )
    x, t, condition = inputs(family)
    with torch.no_grad():
        near, exact = family.predict(x, t, condition), plain.predict(x, t, condition)
    assert 0 < (near - exact).norm() < 0.2 * exact.norm()


ADAPTERS = {
    "lora": Adapter(rank=2, targets=["cross-attention", "self-attention", "feed-forward", "convolutions"]),
    "dora": Adapter(rank=2, dora=True, targets=["cross-attention", "convolutions"]),
    "loha": Adapter(kind="loha", rank=2),
    "lokr": Adapter(kind="lokr", rank=2),
    "oft": Adapter(kind="oft", rank=8, targets=["cross-attention", "self-attention"]),
}


@pytest.mark.parametrize("quantize", ALL)
@pytest.mark.parametrize("kind", list(ADAPTERS))
def test_adapters_learn_and_the_base_does_not(kind: str, quantize: str) -> None:
    family = families.load(Base(quantize=quantize))
    handle = AdapterHandle.inject(family, ADAPTERS[kind])
    before, (x, t, condition) = kept_bits(family), inputs(family)
    assert all(p.dtype == torch.float32 for p in handle.parameters())
    family.unet.enable_gradient_checkpointing()
    family.unet.train()
    optimizer = torch.optim.SGD(handle.parameters(), lr=1e-2)
    with handle.disabled(), torch.no_grad():
        off = family.predict(x, t, condition)
    for step in range(2):
        on = family.predict(x, t, condition)
        assert torch.equal(on, off) == (step == 0), "without effect it is exactly nothing"
        (on - x).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in handle.parameters())
        optimizer.step()
    with handle.disabled(), torch.no_grad():
        assert torch.equal(family.predict(x, t, condition), off)
    after = kept_bits(family)
    assert all(torch.equal(_bytes(after[_inner(n, after)]), _bytes(t)) for n, t in before.items())


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _inner(name: str, there: dict[str, torch.Tensor]) -> str:
    return name if name in there else next(n for n in there if n.replace("base_layer.", "") == name)


# --- runs -------------------------------------------------------------------------------------------------

SMALL = [
    "data.resolution=32", "data.buckets=false", "train.steps=4", "train.batch_size=1", "preview.every=0",
    "train.checkpoint_every=2", "train.log_tensorboard=false", "train.threads=1", 'output.dtype="float32"',
    "adapter.rank=2",
]  # fmt: skip
RUNS = {
    "nf4": ("spf", ["train.mixed_precision=bf16", "train.gradient_checkpointing=true", "preview.every=2",
                    "preview.steps=1", "preview.count=1"]),
    "8bit": ("naive", ["adapter.dora=true", "base.dtype=bfloat16", "train.mixed_precision=bf16"]),
    "fp8": ("naive", ["train.optimizer=adamw8bit", "train.ema=0.9"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", ALL)
def test_a_run_and_its_continuation_give_the_same_bits(pictures: Path, tmp_path: Path, kind: str) -> None:
    recipe, sets = RUNS[kind]
    resolved = config.load(
        "glasses", data=pictures, recipe=recipe, sets=[*SMALL, *sets, f"base.quantize={kind}"]
    )
    done = trainer.train(resolved, tmp_path / "run")
    assert layers_of(done.family)
    whole = load_file(done.lora)
    assert f'quantize = "{kind}"' in files.read(done.lora).metadata["spf_kit.config"]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    done.lora.unlink()
    found = load_file(trainer.train(resolved, tmp_path / "run", resume=True).lora)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[key], whole[key]) for key in whole)
    assert any(t.abs().max() > 0 for key, t in whole.items() if "lora_up" in key)


def test_an_earlier_lora_acts_under_the_new_one(pictures: Path, tmp_path: Path) -> None:
    sets = [*SMALL, "train.steps=2", "base.quantize=nf4"]
    first = trainer.train(
        config.load("glasses", data=pictures, recipe="naive", sets=sets), tmp_path / "a"
    ).lora
    sets.append(f'adapter.on=["{first}:0.7"]')
    done = trainer.train(config.load("glasses", data=pictures, recipe="naive", sets=sets), tmp_path / "b")
    (on,) = done.earlier.handles
    assert on.strength == 0.7
    # onto the weights as files hold them
    plain = families.load(Base())
    assert AdapterHandle.attach(plain, files.read(done.lora), name="new").modules["unet"]


# --- refusals ---------------------------------------------------------------------------------------------


def test_what_cannot_be_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"base.quantize.*expected 'fp8', '8bit' or 'nf4'"):
        config.load("glasses", sets=["base.quantize=int4"])
    with pytest.raises(UserError, match=r"Apple's GPUs have no 8-bit floats: set base.quantize = '8bit'"):
        quantized.prepare(nn.Module(), "fp8", dtype=torch.float32, device="mps")

    def broken() -> None:
        raise RuntimeError("no native library\nfor this machine")

    monkeypatch.setattr(quantized, "_library", broken)
    with pytest.raises(UserError, match=r"'nf4' needs bitsandbytes.*\(no native library for this machine\)"):
        families.load(Base(quantize="nf4"))
    assert layers_of(families.load(Base(quantize="fp8"))), "which needs none of it"
