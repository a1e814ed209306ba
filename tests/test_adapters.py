"""Adapters on the live embedded base: beside each other, switched, weighed, removed, reproduced."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spf_kit.adapters import files
from spf_kit.adapters.inject import AdapterHandle, attach, inject
from spf_kit.errors import UserError
from spf_kit.families.base import Family
from spf_kit.schema import Adapter

GROUPS = ["cross-attention", "self-attention", "feed-forward", "convolutions", "text-encoder"]
SOME = ["cross-attention", "convolutions", "text-encoder"]  # matrices and convolutions of both components
torch.set_num_threads(1)


@torch.no_grad()
def output(family: Family, prompts: tuple[str, ...] = ("a woman, red hair", "")) -> Tensor:
    """What the model predicts, text encoder included, on fixed noise."""
    noise = torch.randn((2, family.latent_channels, 8, 8), generator=torch.Generator().manual_seed(7))
    return family.predict(noise, torch.tensor([600, 100]), family.encode_text(prompts))


def settings(**changes: object) -> Adapter:
    return Adapter.model_validate({"rank": 4, "targets": SOME} | changes)


def learn(handle: AdapterHandle, seed: int = 0, size: float = 0.05) -> AdapterHandle:
    """As after a training: every parameter has moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return handle


KINDS = [{}, {"dora": True}, {"rank_stabilized": True, "alpha": 3.0}, {"dropout": 0.5}]


# --- fresh adapters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_fresh_adapter_changes_nothing(family: Family, kind: dict[str, object]) -> None:
    plain = output(family)
    handle = inject(family, settings(targets=GROUPS, **kind))
    assert torch.equal(output(family), plain)
    handle.remove()


def test_its_parameters_are_trainable_float32_and_named_as_in_files(family: Family) -> None:
    handle = inject(family, settings(targets=GROUPS))
    found = dict(handle.named_parameters())
    assert len(found) == 2 * sum(map(len, family.adapter_modules(GROUPS).values()))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in found.values())
    assert {name.rpartition(".")[2] for name in found} == {"down", "up"}
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.down" in found
    assert not any(
        p.requires_grad for p in family.unet.parameters() if all(p is not q for q in found.values())
    )
    assert len(handle.parameters("text_encoder")) + len(handle.parameters("unet")) == len(found)
    handle.remove()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", [{}, {"dora": True}], ids=str)
def test_parameters_stay_float32_over_half_precision_weights(
    base: Family, dtype: str, kind: dict[str, object]
) -> None:
    full = inject(base, settings(**kind))
    expected = full.state_dict()
    full.remove()
    try:
        weights = {name: m.state_dict() for name, m in base.components().items()}
        weights = {name: {k: v.clone() for k, v in state.items()} for name, state in weights.items()}
        base.to(dtype=getattr(torch, dtype))
        plain = output(base)
        handle = inject(base, settings(**kind))
        assert all(p.dtype == torch.float32 for p in handle.parameters())
        assert torch.equal(output(base), plain)
        for name, parameter in handle.named_parameters():
            if not name.endswith(".magnitude"):  # which is the norm of the rounded weight
                assert torch.equal(parameter, expected[name])
        learn(handle)
        assert not torch.equal(output(base), plain)
        handle.remove()
        assert torch.equal(output(base), plain)
    finally:
        base.to(dtype=torch.float32)
        for name, module in base.components().items():
            module.load_state_dict(weights[name])


def test_initial_weights_depend_on_seed_and_name_alone(family: Family) -> None:
    torch.manual_seed(1)
    whole = inject(family, settings(targets=GROUPS), seed=5)
    first = whole.state_dict()
    whole.remove()
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    part = inject(family, settings(targets=["self-attention", "cross-attention"]), seed=5)
    assert torch.equal(
        torch.random.get_rng_state(), before
    )  # the caller's random numbers go on as if nothing was
    for name, value in part.state_dict().items():
        assert torch.equal(value, first[name])
    part.remove()
    other = inject(family, settings(), seed=6)
    assert not any(torch.equal(v, first[n]) for n, v in other.state_dict().items() if n.endswith(".down"))
    other.remove()
    downs = [value for name, value in first.items() if name.endswith(".down")]
    for down in downs:  # uniform in +-1/sqrt(fan in)
        bound = 1 / math.sqrt(down[0].numel())
        assert down.abs().max() <= bound
        assert down.std() == pytest.approx(bound / math.sqrt(3), rel=0.25)


def test_gradients_reach_the_new_adapter_and_nothing_else(family: Family) -> None:
    handle = learn(inject(family, settings(dora=True)))
    noise = torch.randn(1, family.latent_channels, 8, 8)
    prediction = family.predict(noise, torch.tensor([500]), family.encode_text(["a man"]))
    prediction.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in handle.parameters())
    assert all(
        p.grad is None for m in family.components().values() for p in m.parameters() if not p.requires_grad
    )
    handle.remove()


# --- strengths and switches -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{}, {"dora": True}], ids=str)
def test_strength_and_switch(family: Family, kind: dict[str, object]) -> None:
    plain = output(family)
    handle = learn(inject(family, settings(**kind)))
    full = output(family)
    assert (full - plain).abs().max() > 1e-3
    handle.set_strength(0)
    assert torch.equal(output(family), plain)
    handle.set_strength(-1)
    assert not torch.equal(output(family), plain)
    handle.set_strength(1)
    assert torch.equal(output(family), full)
    with handle.disabled():
        assert torch.equal(output(family), plain)
        assert not handle.enabled
    assert torch.equal(output(family), full)
    handle.off()
    with handle.disabled():
        pass
    assert torch.equal(output(family), plain)  # off before the block, off after it
    handle.on()
    assert torch.equal(output(family), full)
    with pytest.raises(ZeroDivisionError), handle.disabled():
        raise ZeroDivisionError
    assert handle.enabled
    with pytest.raises(ValueError, match="finite"):
        handle.set_strength(math.nan)
    assert all(p.requires_grad for p in handle.parameters())
    handle.remove()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("strength", [1.0, 0.3, -0.8])
def test_a_layer_adds_strength_times_its_difference_of_weights(
    family: Family, dora: bool, strength: float
) -> None:
    """Against the formula of W', applied by torch's own operators."""
    handle = learn(inject(family, settings(dora=dora, alpha=2.0)))
    lora = handle.to_lora_file()
    handle.set_strength(strength)
    inputs = torch.Generator().manual_seed(3)
    for component, names in handle.modules.items():
        for name in names[::7]:
            layer = family.components()[component].get_submodule(name)
            plain = layer.get_base_layer()
            update = lora.layers[component, family.file_module_name(component, name)]
            weight = plain.weight + strength * update.delta(plain.weight)
            size = (2, plain.weight.shape[1], *([6, 6] if plain.weight.dim() == 4 else []))
            x = torch.randn(size, generator=inputs)
            if plain.weight.dim() == 4:
                expected = torch.nn.functional.conv2d(x, weight, plain.bias, plain.stride, plain.padding)
            else:
                expected = torch.nn.functional.linear(x, weight, plain.bias)
            with torch.no_grad():
                torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    handle.remove()


def test_magnitudes_of_inputs_are_applied_too(family: Family) -> None:
    """LyCORIS' DoRA of older files: one magnitude for each input of a layer."""
    handle = learn(inject(family, settings(dora=True)))
    lora = handle.to_lora_file()
    handle.remove()
    for layer in lora.layers.values():
        shape = [1, layer.shape[1], *[1] * (len(layer.shape) - 2)]
        layer.dora_scale = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5
    handle = attach(family, lora, name="inputs", strength=0.6)
    for component, names in handle.modules.items():
        for name in names[::9]:
            layer = family.components()[component].get_submodule(name)
            weight = layer.get_base_layer().weight
            update = lora.layers[component, family.file_module_name(component, name)]
            x = torch.randn(2, weight.shape[1], *([5, 5] if weight.dim() == 4 else []))
            with torch.no_grad():
                got = layer(x) - layer.get_base_layer()(x)
                plain = layer.get_base_layer()
                delta = 0.6 * update.delta(weight)
                expected = (
                    torch.nn.functional.conv2d(x, delta, None, plain.stride, plain.padding)
                    if weight.dim() == 4
                    else torch.nn.functional.linear(x, delta)
                )
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    again = handle.to_lora_file()
    assert all(
        torch.equal(again.layers[key].dora_scale, layer.dora_scale) for key, layer in lora.layers.items()
    )
    handle.remove()


def test_dropout_acts_in_training_alone(family: Family) -> None:
    for dora in (False, True):
        handle = learn(inject(family, settings(dropout=0.5, dora=dora)))
        assert torch.equal(output(family), output(family))
        family.unet.train()
        assert not torch.equal(output(family), output(family))
        family.unet.eval()
        handle.remove()


# --- several at once --------------------------------------------------------------------------------------


def test_an_earlier_adapter_stays_on_frozen_and_untouched(family: Family) -> None:
    """Incremental learning: base + first adapter is the reference of the second."""
    plain = output(family)
    first = learn(inject(family, settings(targets=["cross-attention", "convolutions"]), name="first"), 1)
    lora = first.to_lora_file()
    first.remove()
    first = attach(family, lora, name="first", strength=0.7)
    reference = output(family)
    assert not torch.equal(reference, plain)
    second = inject(family, settings(targets=["cross-attention", "self-attention"]), name="second")
    assert torch.equal(output(family), reference)
    assert not any(p.requires_grad for p in first.parameters())
    assert all(p.requires_grad for p in second.parameters())
    learn(second, 2)
    both = output(family)
    with second.disabled():
        assert torch.equal(output(family), reference)
        assert not any(p.requires_grad for p in first.parameters())
    assert torch.equal(output(family), both)
    first.off()
    alone = output(family)
    second.off()
    assert torch.equal(output(family), plain)
    first.on()
    assert torch.equal(output(family), reference)
    second.on()
    first.remove()
    assert torch.equal(output(family), alone)
    assert all(p.requires_grad for p in second.parameters())
    second.set_strength(0)
    assert torch.equal(output(family), plain)
    second.remove()


@pytest.mark.parametrize("dora", [(False, True), (True, True)])
def test_the_order_of_adapters_does_not_matter(family: Family, dora: tuple[bool, bool]) -> None:
    loras = []
    for number, with_dora in enumerate(dora):
        handle = learn(inject(family, settings(dora=with_dora)), number)
        loras.append(handle.to_lora_file())
        handle.remove()
    results = []
    for order in (loras, loras[::-1]):
        handles = [attach(family, lora, name=f"no. {n}") for n, lora in enumerate(order)]
        results.append(output(family))
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_names_are_free_but_taken_once(family: Family) -> None:
    handles = [
        inject(family, settings(targets=["cross-attention"]), name=name)
        for name in ("values", "type", "a/b.safetensors", "a_b_safetensors", "a b safetensors")
    ]
    with pytest.raises(ValueError, match="attached already"):
        inject(family, settings(targets=["cross-attention"]), name="type")
    for handle in handles:
        handle.remove()


# --- states and files -------------------------------------------------------------------------------------


def test_state_is_copied_restored_and_checked(family: Family) -> None:
    handle = learn(inject(family, settings(dora=True)))
    state, result = handle.state_dict(), output(family)
    learn(handle, 9)
    assert not torch.equal(output(family), result)
    handle.load_state_dict(state)
    assert torch.equal(output(family), result)
    with pytest.raises(UserError, match="other layers or another rank"):
        handle.load_state_dict(dict(list(state.items())[1:]))
    with pytest.raises(UserError, match="other layers or another rank"):
        handle.load_state_dict({name: value[..., :1] for name, value in state.items()})
    handle.remove()


@pytest.mark.parametrize("kind", [{}, {"dora": True}, {"rank_stabilized": True, "alpha": 3.0}], ids=str)
@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft"])
def test_a_file_brings_back_the_very_adapter(
    family: Family, tmp_path: Path, kind: dict[str, object], format: str
) -> None:
    handle = learn(inject(family, settings(**kind)))
    result = output(family)
    path = tmp_path / ("folder" if format == "peft" else "file.safetensors")
    files.write(handle.to_lora_file({"ss_seed": "1"}), path, format, "float32")  # type: ignore[arg-type]
    handle.remove()
    again = attach(family, files.read(path), name="again")
    torch.testing.assert_close(output(family), result, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in again.parameters())
    again.remove()


def test_layers_of_one_file_may_differ_in_rank_alpha_and_kind(family: Family) -> None:
    mixed: files.LoraFile | None = None
    for number, change in enumerate(({"rank": 2, "alpha": 5.0}, {"rank": 3}, {"rank": 4, "dora": True})):
        handle = learn(inject(family, settings(**change)), number)
        lora = handle.to_lora_file()
        handle.remove()
        mixed = mixed or lora
        mixed.layers |= {key: layer for n, (key, layer) in enumerate(lora.layers.items()) if n % 3 == number}
    assert mixed is not None
    assert mixed.ranks == {2, 3, 4}
    handle = attach(family, mixed, name="mixed")
    again = handle.to_lora_file()
    for key, layer in mixed.layers.items():
        assert (again.layers[key].alpha, again.layers[key].rank) == (layer.alpha, layer.rank)
        for part, tensor in layer.tensors().items():
            assert torch.equal(again.layers[key].tensors()[part], tensor)
    for component, names in handle.modules.items():
        for name in names[:6]:
            tuner = family.components()[component].get_submodule(name)
            plain = tuner.get_base_layer()
            layer = mixed.layers[component, family.file_module_name(component, name)]
            x = torch.randn(2, plain.weight.shape[1], *([5, 5] if plain.weight.dim() == 4 else []))
            with torch.no_grad():
                got, delta = tuner(x) - plain(x), layer.delta(plain.weight)
                if plain.weight.dim() == 4:
                    wanted = torch.nn.functional.conv2d(x, delta, None, plain.stride, plain.padding)
                else:
                    wanted = torch.nn.functional.linear(x, delta)
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    handle.remove()


def test_going_on_from_a_file(family: Family, tmp_path: Path) -> None:
    handle = learn(inject(family, settings(alpha=2.0, targets=["cross-attention"])))
    result = output(family)
    path = files.write(handle.to_lora_file(), tmp_path / "a.safetensors", dtype="float32")
    handle.remove()
    # another alpha and more targets: the same effect, new layers at zero
    wider = settings(start_from=str(path), targets=["cross-attention", "convolutions"])
    handle = inject(family, wider)
    torch.testing.assert_close(output(family), result, rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad for p in handle.parameters())
    handle.remove()
    for change, reason in (
        ({"rank": 8}, r"has rank 4, not 8: set adapter\.rank = 4"),
        ({"dora": True}, r"without DoRA: set adapter\.dora = false"),
        ({"targets": ["self-attention"]}, r"also changes \d+ layers that adapter\.targets does not name"),
        ({"start_from": str(tmp_path / "none.safetensors")}, r"none\.safetensors' does not exist"),
    ):
        with pytest.raises(UserError, match=reason):
            inject(family, wider.model_copy(update=change))
