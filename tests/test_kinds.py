"""LoHa, LoKr and OFT on the live embedded base: everything that holds for LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from spf_kit.adapters import files
from spf_kit.adapters.chosen import chosen
from spf_kit.adapters.inject import AdapterHandle, attach, inject
from spf_kit.adapters.layers import LohaLayer, LokrLayer, LoraLayer, OftLayer, Update
from spf_kit.adapters.tuners import LIVE
from spf_kit.errors import UserError
from spf_kit.families.base import Family
from spf_kit.schema import Adapter

MATRICES = ["cross-attention", "text-encoder"]
WITH_KERNELS = ["cross-attention", "convolutions", "text-encoder"]
KINDS: dict[str, dict[str, object]] = {
    "lora": {},
    "loha": {"kind": "loha", "alpha": 2.0},
    "lokr": {"kind": "lokr", "rank": 2},
    "lokr both": {"kind": "lokr", "rank": 1, "decompose_both": True, "alpha": 3.0},
    "lokr whole": {"kind": "lokr", "rank": 64, "factor": 4},
    "oft": {"kind": "oft", "rank": 8, "targets": MATRICES},
    "oft no pixels": {"kind": "oft", "rank": 8, "targets": ["cross-attention", "feed-forward"]},
    "oft held": {"kind": "oft", "rank": 8, "targets": MATRICES, "constraint": 0.3},
}
kinds = pytest.mark.parametrize("kind", list(KINDS))
torch.set_num_threads(1)


@torch.no_grad()
def output(family: Family) -> Tensor:
    """What the model predicts, text encoder included, on fixed noise."""
    noise = torch.randn((2, family.latent_channels, 8, 8), generator=torch.Generator().manual_seed(7))
    condition = family.encode_text(("a woman, red hair", ""))
    return family.predict(noise, torch.tensor([600, 100]), condition)


def settings(kind: str, **changes: object) -> Adapter:
    return Adapter.model_validate({"rank": 4, "targets": WITH_KERNELS} | KINDS[kind] | changes)


def learn(handle: AdapterHandle, seed: int = 0, size: float = 0.05) -> AdapterHandle:
    """As after a training: every parameter has moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return handle


def apply(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """torch's own operator with another weight and no bias."""
    if weight.dim() == 4:
        return nn.functional.conv2d(x, weight, None, layer.stride, layer.padding)  # type: ignore[arg-type]
    return nn.functional.linear(x, weight)


def inputs(weight: Tensor, seed: int = 3) -> Tensor:
    size = (2, weight.shape[1], 6, 6) if weight.dim() == 4 else (2, 5, weight.shape[1])
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


# --- fresh adapters ---------------------------------------------------------------------------------------


@kinds
def test_a_fresh_adapter_changes_nothing_and_goes_without_a_trace(family: Family, kind: str) -> None:
    plain, state = output(family), torch.random.get_rng_state()
    handle = inject(family, settings(kind))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(output(family), plain)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in handle.parameters())
    found = dict(handle.named_parameters())
    expected = {
        f"{component}.{family.file_module_name(component, module)}.{part}": shape
        for (component, module), spec in chosen(family, settings(kind)).items()
        for part, shape in spec.parts(weight_shape(family, component, module)).items()
    }
    assert {name: tuple(p.shape) for name, p in found.items()} == expected
    learn(handle)
    assert not torch.equal(output(family), plain)
    handle.remove()


def weight_shape(family: Family, component: str, module: str) -> tuple[int, ...]:
    layer = family.components()[component].get_submodule(module)
    return tuple((layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer).weight.shape)


@kinds
def test_first_weights_depend_on_seed_and_name_alone(family: Family, kind: str) -> None:
    whole = inject(family, settings(kind), seed=5)
    first = whole.state_dict()
    whole.remove()
    torch.manual_seed(2)
    part = inject(family, settings(kind, targets=["self-attention", "cross-attention"]), seed=5)
    shared = part.state_dict().keys() & first.keys()
    assert shared
    assert all(torch.equal(part.state_dict()[name], first[name]) for name in shared)
    part.remove()
    handle = inject(family, settings(kind), seed=6)
    other = handle.state_dict()
    handle.remove()
    drawn = [name for name in first if first[name].any()]
    assert bool(drawn) == (not kind.startswith("oft"))  # a rotation begins at none
    assert not any(torch.equal(other[name], first[name]) for name in drawn)


@kinds
def test_gradients_are_those_of_the_formula(family: Family, kind: str) -> None:
    """d/dp of sum(g * y) through the live layer, against autograd through the plain formula in float64."""
    handle = learn(inject(family, settings(kind)))
    for live in list(handle._layers.values())[::9]:
        layer, weight = live.tuner, live.weight.detach()
        x = inputs(weight)
        y = layer(x)
        probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        handle_parts = live.parts()
        found = torch.autograd.grad((y * probe).sum(), list(handle_parts.values()))
        copies = {part: p.detach().double().requires_grad_() for part, p in handle_parts.items()}
        difference = formula(kind, live, copies, weight.double())
        wanted = torch.autograd.grad(
            (apply(live.tuner.get_base_layer(), difference, x.double()) * probe.double()).sum(),
            list(copies.values()),
        )
        for one, other in zip(found, wanted):
            torch.testing.assert_close(one.double(), other, rtol=2e-3, atol=2e-3)
    handle.remove()


def formula(kind: str, live: object, parts: dict[str, Tensor], weight: Tensor) -> Tensor:
    """W' - W by the plainest means, in the type of the parts."""
    spec = live.spec  # type: ignore[attr-defined]
    if "down" in parts:
        product = parts["up"].flatten(1) @ parts["down"].flatten(1)
        return (spec.alpha / spec.rank * product).reshape(weight.shape)
    if "hada_w1_a" in parts:
        first = parts["hada_w1_a"] @ parts["hada_w1_b"]
        second = parts["hada_w2_a"] @ parts["hada_w2_b"]
        return (spec.alpha / spec.rank * first * second).reshape(weight.shape)
    if "oft_R" in parts:
        size = spec.parts(tuple(weight.shape))["oft_R"]
        side = next(n for n in range(1, weight.shape[0] + 1) if n * (n - 1) // 2 == size[1])
        blocks = []
        for vector in parts["oft_R"]:
            rows, columns = torch.triu_indices(side, side, 1)
            upper = torch.zeros(side, side, dtype=vector.dtype).index_put((rows, columns), -vector)
            skew, one = upper - upper.T, torch.eye(side, dtype=vector.dtype)
            blocks.append(((one + skew) @ torch.linalg.inv(one - skew)).T)
        return torch.block_diag(*blocks) @ weight - weight
    small = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    whole = "lokr_w2" in parts
    large = parts["lokr_w2"].flatten(1) if whole else parts["lokr_w2_a"] @ parts["lokr_w2_b"]
    scale = 1.0 if {"lokr_w1", "lokr_w2"} <= parts.keys() else spec.alpha / spec.rank
    return scale * torch.kron(small, large).reshape(weight.shape)


# --- strengths and switches -------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("strength", [1.0, 0.3, -0.8])
def test_a_layer_adds_strength_times_its_difference_of_weights(
    family: Family, kind: str, strength: float
) -> None:
    """Against the formula, and the file layer's own `delta`."""
    handle = learn(inject(family, settings(kind)))
    output(family)  # a constraint is kept from the first pass on
    lora = handle.to_lora_file()
    handle.set_strength(strength)
    for (component, module), live in list(handle._layers.items())[::7]:
        weight = live.weight.detach()
        difference = formula(kind, live, {p: v.detach() for p, v in live.parts().items()}, weight)
        update = lora.layers[component, family.file_module_name(component, module)]
        torch.testing.assert_close(update.delta(weight), difference, rtol=1e-4, atol=1e-5)
        x = inputs(weight)
        with torch.no_grad():
            found = live.tuner(x) - live.tuner.get_base_layer()(x)
        wanted = strength * apply(live.tuner.get_base_layer(), difference, x)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
        norm = float(live.square_norm().detach())
        assert norm == pytest.approx(float(difference.double().square().sum()), rel=1e-3)
    handle.remove()


@kinds
def test_strength_and_switch(family: Family, kind: str) -> None:
    plain = output(family)
    handle = learn(inject(family, settings(kind)))
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
    assert torch.equal(output(family), full)
    assert all(p.requires_grad for p in handle.parameters())
    handle.remove()


@kinds
def test_dropout_acts_in_training_alone(family: Family, kind: str) -> None:
    handle = learn(inject(family, settings(kind, dropout=0.5)))
    assert torch.equal(output(family), output(family))
    family.unet.train()
    assert not torch.equal(output(family), output(family))
    family.unet.eval()
    handle.remove()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@kinds
def test_over_half_precision_weights(base: Family, dtype: str, kind: str) -> None:
    try:
        weights = {name: m.state_dict() for name, m in base.components().items()}
        weights = {name: {k: v.clone() for k, v in state.items()} for name, state in weights.items()}
        base.to(dtype=getattr(torch, dtype))
        plain = output(base)
        handle = inject(base, settings(kind))
        assert all(p.dtype == torch.float32 for p in handle.parameters())
        assert torch.equal(output(base), plain)
        learn(handle)
        assert not torch.equal(output(base), plain)
        handle.remove()
        assert torch.equal(output(base), plain)
    finally:
        base.to(dtype=torch.float32)
        for name, module in base.components().items():
            module.load_state_dict(weights[name])


@kinds
def test_gradient_checkpointing_gives_the_same_gradients(family: Family, kind: str) -> None:
    handle = learn(inject(family, settings(kind)))
    noise = torch.randn((1, family.latent_channels, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        condition = family.encode_text(["a man"])
    found = []
    for checkpointing in (False, True):
        family.unet.train()
        if checkpointing:
            family.unet.enable_gradient_checkpointing()
        family.predict(noise, torch.tensor([500]), condition).square().mean().backward()
        found.append([p.grad.clone() for p in handle.parameters("unet")])  # type: ignore[union-attr]
        for parameter in handle.parameters():
            parameter.grad = None
    family.unet.disable_gradient_checkpointing()
    family.unet.eval()
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    handle.remove()


# --- several at once --------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", ["lora", "loha", "lokr", "oft"])
@pytest.mark.parametrize("first", ["lora", "loha", "lokr both", "oft"])
def test_earlier_adapters_of_any_kind(family: Family, first: str, second: str) -> None:
    plain = output(family)
    earlier = learn(inject(family, settings(first), name="first"), 1)
    lora = earlier.to_lora_file()
    earlier.remove()
    earlier = attach(family, lora, name="first", strength=0.7)
    reference = output(family)
    assert not torch.equal(reference, plain)
    new = inject(family, settings(second), name="second")
    assert torch.equal(output(family), reference)
    assert not any(p.requires_grad for p in earlier.parameters())
    assert all(p.requires_grad for p in new.parameters())
    learn(new, 2)
    both = output(family)
    with new.disabled():
        assert torch.equal(output(family), reference)
    assert torch.equal(output(family), both)
    earlier.off()
    alone = output(family)
    assert not torch.equal(alone, both)
    earlier.on()
    earlier.remove()  # the lower one first
    torch.testing.assert_close(output(family), alone, rtol=1e-5, atol=1e-6)
    new.set_strength(0)
    assert torch.equal(output(family), plain)
    new.remove()


def test_names_are_taken_once_across_kinds(family: Family) -> None:
    handle = inject(family, settings("loha"), name="one")
    for kind in KINDS:
        with pytest.raises(ValueError, match="attached already"):
            inject(family, settings(kind), name="one")
    handle.remove()


@pytest.mark.parametrize("dora", [False, True])
def test_the_order_of_kinds_does_not_matter(family: Family, dora: bool) -> None:
    loras = []
    for number, kind in enumerate(("lora", "loha", "lokr", "oft")):
        changes = {"dora": dora} if kind == "lora" else {}
        handle = learn(inject(family, settings(kind, **changes)), number)
        loras.append(handle.to_lora_file())
        handle.remove()
    results = []
    for order in (loras, loras[::-1], [loras[i] for i in (2, 0, 3, 1)]):
        handles = [attach(family, lora, name=f"no. {n}") for n, lora in enumerate(order)]
        results.append(output(family))
        for handle in (handles[i] for i in (1, 3, 0, 2)):
            handle.remove()
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-4, atol=1e-4)


# --- states and files -------------------------------------------------------------------------------------


@kinds
def test_state_is_restored_bit_for_bit(family: Family, kind: str) -> None:
    handle = learn(inject(family, settings(kind)))
    state, result = handle.state_dict(), output(family)
    learn(handle, 9)
    handle.load_state_dict(state)
    assert torch.equal(output(family), result)
    with pytest.raises(UserError, match="other layers or another rank"):
        handle.load_state_dict({name: value[..., :1] for name, value in state.items()})
    handle.remove()


@kinds
def test_a_file_brings_back_the_very_adapter(family: Family, tmp_path: Path, kind: str) -> None:
    handle = learn(inject(family, settings(kind)))
    result, lora = output(family), handle.to_lora_file()
    files.write(lora, tmp_path / "a.safetensors", "kohya", "float32")
    handle.remove()
    again = files.read(tmp_path / "a.safetensors")
    assert again.kind == {"lora": "locon"}.get(kind, kind.split()[0])
    handle = attach(family, again, name="again")
    assert not any(p.requires_grad for p in handle.parameters())
    torch.testing.assert_close(output(family), result, rtol=1e-5, atol=1e-6)
    for key, layer in handle.to_lora_file().layers.items():
        assert layer.alpha == lora.layers[key].alpha
        for part, tensor in layer.tensors().items():
            assert torch.equal(tensor, lora.layers[key].tensors()[part])
    handle.remove()


@kinds
def test_going_on_from_a_file(family: Family, tmp_path: Path, kind: str) -> None:
    handle = learn(inject(family, settings(kind)))
    result = output(family)
    path = files.write(handle.to_lora_file(), tmp_path / "a.safetensors", dtype="float32")
    handle.remove()
    more = {"targets": [*settings(kind).targets, "self-attention"], "start_from": str(path)}
    handle = inject(family, settings(kind, **more))
    torch.testing.assert_close(output(family), result, rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad for p in handle.parameters())
    handle.remove()
    other = "loha" if settings(kind).kind != "loha" else "lokr"
    with pytest.raises(UserError, match=rf"set adapter\.kind = '{settings(kind).kind}'"):
        inject(family, settings(other, start_from=str(path)))
    with pytest.raises(UserError, match=r"set adapter\.rank|other factors than these settings give"):
        inject(family, settings(kind, start_from=str(path), rank=3))


def test_another_alpha_keeps_the_effect(family: Family, tmp_path: Path) -> None:
    for kind in ("loha", "lokr", "lokr both"):
        handle = learn(inject(family, settings(kind, alpha=2.0)))
        result = output(family)
        path = files.write(handle.to_lora_file(), tmp_path / f"{kind}.safetensors", dtype="float32")
        handle.remove()
        handle = inject(family, settings(kind, alpha=5.0, start_from=str(path)))
        torch.testing.assert_close(output(family), result, rtol=1e-4, atol=1e-5)
        assert {layer.alpha for layer in handle.to_lora_file().layers.values()} == {5.0}
        handle.remove()


def test_what_no_layer_of_peft_holds_acts_as_its_difference(family: Family) -> None:
    """DoRA's magnitudes on LoHa and LoKr, OFT on convolutions and with a rescaling or a limit."""
    handle = inject(family, settings("lora"))
    shapes = {key: tuple(live.weight.shape) for key, live in handle._layers.items()}
    handle.remove()
    random = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=random) * 0.1

    def make(number: int, weight: tuple[int, ...]) -> Update:
        outputs, columns = weight[0], torch.Size(weight[1:]).numel()
        magnitude = draw(outputs, *[1] * (len(weight) - 1)).abs() + 0.5
        if number % 4 == 0:
            pairs = (draw(outputs, 2), draw(2, columns), draw(outputs, 2), draw(2, columns))
            return LohaLayer(*pairs, alpha=1.0, dora_scale=magnitude)
        if number % 4 == 1:
            small, large = draw(2, 1), draw(outputs // 2, *weight[1:])
            return LokrLayer(1.0, lokr_w1=small, lokr_w2=large, dora_scale=magnitude)
        blocks = draw(outputs // 4, 4, 4)
        return OftLayer(blocks, 0.001 if number % 4 == 2 else 0.0, magnitude if number % 4 == 3 else None)

    layers = {
        (component, family.file_module_name(component, module)): make(number, shapes[component, module])
        for number, (component, module) in enumerate(shapes)
    }
    handle = attach(family, files.LoraFile(layers), name="odd", strength=0.6)
    for (component, module), live in list(handle._layers.items())[:24]:
        weight = live.weight.detach()
        delta = layers[component, family.file_module_name(component, module)].delta(weight)
        x = inputs(weight)
        with torch.no_grad():
            found = live.tuner(x) - live.tuner.get_base_layer()(x)
        torch.testing.assert_close(
            found, 0.6 * apply(live.tuner.get_base_layer(), delta, x), rtol=1e-3, atol=1e-4
        )
    handle.remove()


def test_tucker_cores_have_autograds_gradients(family: Family) -> None:
    """peft's own backward pass for them mixes up the two factors."""
    key = ("unet", "down_blocks.0.resnets.0.conv1")
    shape = weight_shape(family, *key)
    random = torch.Generator().manual_seed(0)
    sizes = {"w1_a": (3, shape[0]), "w1_b": (3, shape[1]), "t1": (3, 3, *shape[2:])}
    sizes |= {name.replace("1", "2"): size for name, size in sizes.items()}
    parts = {f"hada_{name}": torch.randn(size, generator=random) for name, size in sizes.items()}
    layer = LohaLayer.from_parts(parts, 2.0, shape)
    handle = attach(family, files.LoraFile({key: layer}), name="tucker", trainable=True)
    live = handle._layers[key]
    x = inputs(live.weight)
    found = torch.autograd.grad(live.tuner(x).square().sum(), list(live.parts().values()))
    copies = {name: value.detach().double().requires_grad_() for name, value in live.parts().items()}
    plain = live.tuner.get_base_layer()
    delta = LohaLayer.from_parts(copies, 2.0, shape).update(torch.float64)
    y = apply(plain, plain.weight.double() + delta, x.double()) + plain.bias.double()[:, None, None]
    for one, other in zip(found, torch.autograd.grad(y.square().sum(), list(copies.values()))):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-2)
    handle.remove()


@kinds
def test_pefts_own_merge_agrees(family: Family, kind: str) -> None:
    """`get_delta_weight` for products; for OFT peft's rotation module as it merges."""
    handle = learn(inject(family, settings(kind)))
    output(family)  # a constraint is kept from the first pass on
    for live in list(handle._layers.values())[::11]:
        difference = live.update().delta(live.weight.detach())
        with torch.no_grad():
            if settings(kind).kind == "oft":
                rotation = live.tuner.oft_R[live.key].get_weight()
                found = rotation.T @ live.weight - live.weight
            else:
                found = live.tuner.get_delta_weight(live.key)
        torch.testing.assert_close(found, difference, rtol=1e-4, atol=1e-5)
    handle.remove()


def test_a_constraint_holds_every_block(family: Family) -> None:
    handle = learn(inject(family, settings("oft held")), size=1.0)
    output(family)
    for live in handle._layers.values():
        vectors = live.parts()["oft_R"].detach()
        assert (vectors.square().sum(1) * 2).sqrt().max() <= 0.3 / len(vectors) ** 0.5 * (1 + 1e-5)
    learn(handle, 1, size=1.0)  # an optimizer's last step
    for (_, _), layer in list(handle.to_lora_file().layers.items())[::5]:
        assert isinstance(layer, OftLayer)
        skew = layer.oft_blocks - layer.oft_blocks.mT
        assert skew.flatten(1).norm(dim=1).max() <= 0.3 / len(skew) ** 0.5 * (1 + 1e-5)
    handle.remove()


def test_every_kind_of_file_has_its_live_layer() -> None:
    from spf_kit.adapters.layers import LAYERS
    from spf_kit.adapters.parts import NAMES, PARTS

    assert LIVE.keys() == LAYERS.keys() == NAMES.keys() == PARTS.keys()
    assert LAYERS["lora"] is LoraLayer
