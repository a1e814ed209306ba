"""Convolutions of few pixels as products: the same numbers, where they are for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spf_kit import families
from spf_kit.adapters.inject import AdapterHandle
from spf_kit.families import convolutions
from spf_kit.families.convolutions import FewPixels, few_pixels
from spf_kit.schema import Adapter, Base


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if small layers were large."""
    monkeypatch.setattr(convolutions, "MANY", 100)


def layer(**settings: object) -> nn.Conv2d:
    made = nn.Conv2d(6, 5, 3, **{"padding": 1} | settings)  # type: ignore[arg-type]
    made.weight.data = made.weight.data.to(memory_format=torch.channels_last)
    return made.requires_grad_(False)


@pytest.mark.parametrize("size", [(1, 4, 4), (1, 1, 1), (2, 3, 5), (4, 4, 4), (1, 17, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_the_convolution(size: tuple[int, int, int], bias: bool) -> None:
    """The picture and its gradient, beside float64's own convolution."""
    made = layer(bias=bias)
    few_pixels(made)
    x = torch.randn(size[0], 6, *size[1:]).requires_grad_()
    found = made(x)
    push = torch.randn_like(found)
    (gradient,) = torch.autograd.grad(found, x, push)

    exact = x.detach().double().requires_grad_()
    wanted = F.conv2d(
        exact, made.weight.double(), None if made.bias is None else made.bias.double(), padding=1
    )
    (wanted_gradient,) = torch.autograd.grad(wanted, exact, push.double())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=1e-5, atol=1e-5)


def products(made: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often weights are multiplied as a matrix."""
    calls: list[int] = []
    linear = F.linear
    monkeypatch.setattr(convolutions.F, "linear", lambda *a: (calls.append(1), linear(*a))[1])
    made(x)
    return len(calls)


def test_only_few_pixels_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer()
    few_pixels(made)
    assert products(made, torch.randn(1, 6, 16, 16), monkeypatch) == 1
    assert products(made, torch.randn(1, 6, 16, 17), monkeypatch) == 0
    made.weight.data = made.weight.data.contiguous()  # the matrix would be a copy
    assert products(made, torch.randn(1, 6, 16, 16), monkeypatch) == 0


@pytest.mark.parametrize(
    "other",
    [
        nn.Conv2d(6, 5, 1), nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.Conv2d(2, 3, 3, padding=1),
        layer(stride=2), layer(padding=0), layer(dilation=2), layer(padding_mode="circular"),
        nn.Linear(40, 40),
    ],
)  # fmt: skip
def test_other_layers_stay(other: nn.Module) -> None:
    kind = type(other)
    few_pixels(other)
    assert type(other) is kind


def test_a_loaded_unet_predicts_and_learns_the_same() -> None:
    """With adapters on its convolutions, whose names and weights are as before."""

    def learnt(channels_last: bool) -> tuple[list[str], int, Tensor, list[Tensor]]:
        family = families.load(Base(channels_last=channels_last))
        names = list(family.unet.state_dict())
        handle = AdapterHandle.inject(family, Adapter(targets=["cross-attention", "convolutions"]))
        draw = torch.Generator().manual_seed(0)
        for parameter in handle.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.05)
        noisy = torch.randn(1, 4, 16, 16, generator=draw)
        prediction = family.predict(noisy, torch.tensor([500]), family.encode_text(["a man, red hat"]))
        prediction.square().mean().backward()
        swapped = sum(isinstance(module, FewPixels) for module in family.unet.modules())
        return names, swapped, prediction.detach(), [parameter.grad for parameter in handle.parameters()]

    names, swapped, prediction, gradients = learnt(channels_last=True)
    same_names, none, expected, expected_gradients = learnt(channels_last=False)
    assert swapped > 5
    assert none == 0
    assert names == same_names
    torch.testing.assert_close(prediction, expected, rtol=1e-4, atol=1e-5)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))
