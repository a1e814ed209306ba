"""What loading saves, in memory and time, and that it changes nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spf_kit import families
from spf_kit.adapters.inject import AdapterHandle
from spf_kit.config import load as load_preset
from spf_kit.data import entries
from spf_kit.errors import UserError
from spf_kit.families import loading, sources
from spf_kit.families.base import Family
from spf_kit.families.detect import embedded_folder
from spf_kit.schema import Adapter, Base
from spf_kit.training import trainer
from spf_kit.training.text import TextCache


@pytest.fixture(autouse=True)
def cache_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test writes into the user's own cache."""
    monkeypatch.setenv("SPF_KIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- the memory format ------------------------------------------------------------------------------------


def learnt(family: Family) -> tuple[Tensor, list[Tensor]]:
    """A prediction and the gradient of its square, at an adapter that acts."""
    handle = AdapterHandle.inject(family, Adapter(targets=["cross-attention", "convolutions"]))
    draw = torch.Generator().manual_seed(0)
    for parameter in handle.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.05)
    noisy = torch.randn(2, 4, 16, 12, generator=draw)
    condition = family.encode_text(["a man, red hat", ""])
    prediction = family.predict(noisy, torch.tensor([100, 900]), condition)
    prediction.square().mean().backward()
    return prediction.detach(), [parameter.grad for parameter in handle.parameters()]


def test_channels_last_computes_the_same() -> None:
    laid_out = families.load(Base(channels_last=True))
    weight = laid_out.unet.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    prediction, gradients = learnt(laid_out)
    expected, expected_gradients = learnt(families.load(Base(channels_last=False)))
    torch.testing.assert_close(prediction, expected, rtol=1e-4, atol=1e-5)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


@pytest.mark.parametrize(
    ("width", "dtype", "device", "suits"),
    [
        (1024, torch.float32, "cpu", True),
        (1024, torch.bfloat16, "cpu", False),
        (1024, torch.float32, "cuda", False),
        (64, torch.float32, "cpu", False),
    ],
)
def test_the_format_is_chosen_by_what_was_measured(
    width: int, dtype: torch.dtype, device: str, suits: bool
) -> None:
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Conv2d(width, width, 3) for _ in range(4)))
    assert loading.suits_channels_last(module, dtype, device) is suits


def test_the_embedded_base_keeps_its_bits(base: Family) -> None:
    assert base.unet.conv_in.weight.is_contiguous()


# --- memory -----------------------------------------------------------------------------------------------


def test_a_file_that_is_mapped_anew_gives_the_same_tensors(
    base: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    from safetensors import safe_open

    monkeypatch.setattr("safetensors.safe_open", lambda *a, **k: opened.append(a) or safe_open(*a, **k))
    monkeypatch.setattr(sources, "MAPPED", 2**20)
    again = families.load(Base())
    assert len(opened) > 10
    for name, tensor in base.unet.state_dict().items():
        assert torch.equal(tensor, again.unet.state_dict()[name])


def test_the_unet_can_come_later(base: Family) -> None:
    family = families.load(Base(), unet=False)
    assert {parameter.device.type for parameter in family.unet.parameters()} == {"meta"}
    layers = family.attention_layers()
    pixels = torch.zeros(1, 3, 64, 64)
    assert torch.equal(family.encode_image(pixels)[0], base.encode_image(pixels)[0])
    family.load_unet()
    loaded = family.unet
    family.load_unet()
    assert family.unet is loaded, "nothing is loaded twice"
    assert family.attention_layers() == layers
    for name, tensor in base.unet.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


def test_a_run_loads_the_unet_when_the_encoders_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spf_kit.families.sd15 import SD15Family

    freed: list[list[str]] = []
    load_unet = SD15Family.load_unet
    monkeypatch.setattr(
        SD15Family, "load_unet", lambda self: freed.append(list(self.freed)) or load_unet(self)
    )
    sets = ["evaluate.enabled=false", "preview.every=0", "train.log_tensorboard=false", 'data.cache="disk"']
    trainer.train(load_preset("glasses", recipe="naive", steps=1, sets=sets), tmp_path / "run")
    assert freed == [["vae", "text_encoder"]]


# --- caches -----------------------------------------------------------------------------------------------


def test_texts_on_disk_are_found_again_and_keyed_by_what_made_them(base: Family, cache_place: Path) -> None:
    asked: list[str] = []

    def encode(texts: list[str], **how: Any) -> dict[str, Tensor]:
        asked.extend(texts)
        return base.encode_text(texts, **how)

    def cache(texts: list[str], **how: int) -> TextCache:
        return TextCache(
            lambda chunk: encode(chunk, **how), texts, base.device,
            keys=lambda some: base.text_keys(some, **how),
        )  # fmt: skip

    in_memory = TextCache(encode, ["a man", "", "a hat"], base.device)
    asked.clear()
    first = cache(["a man", "", "a hat"])
    assert sorted(asked) == ["", "a hat", "a man"]
    asked.clear()
    again = cache(["", "a man", "a dog"])
    assert asked == ["a dog"], "what is there is not made again"
    for found in (first, again):
        for name, value in in_memory(["a man", ""]).items():
            assert torch.allclose(found(["a man", ""])[name], value, atol=1e-5)
    asked.clear()
    cache(["a man"], clip_skip=2)
    cache(["a man"], chunks=2)
    assert asked == ["a man", "a man"]
    for path in cache_place.rglob("*.texts"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged or removed while training ran: start again with --resume"):
        first(["a man"])
    asked.clear()
    cache(["a man", "a hat"])
    assert asked == ["a hat", "a man"], "what was damaged before the start is made again"
    cache(["a man", "a hat"])
    assert len(asked) == 2


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[str], Family]:
    """The embedded base with one component's weights changed."""

    def make(component: str) -> Family:
        folder = tmp_path / component
        shutil.copytree(embedded_folder(), folder)
        file = next((folder / component).glob("*.safetensors"))
        weights = load_file(file)
        save_file({name: tensor * 1.01 for name, tensor in weights.items()}, file)
        return families.load(Base(model=str(folder)), unet=False)

    return make


def test_caches_ask_for_the_weights_that_made_them_alone(
    base: Family, changed: Callable[[str], Family]
) -> None:
    unet, vae, text = changed("unet"), changed("vae"), changed("text_encoder")
    latents, words = base.latents_key(), base.text_keys(["a man"])
    assert len({family.base_hash() for family in (base, unet, vae, text)}) == 4
    assert [family.latents_key() == latents for family in (unet, vae, text)] == [True, False, True]
    assert [family.text_keys(["a man"]) == words for family in (unet, vae, text)] == [True, True, False]
    assert base.text_keys(["a man "]) == words, "the same tokens"
    assert base.text_keys(["a man", "a hat"]) == [*words, *base.text_keys(["a hat"])]


def test_a_key_names_a_file_of_its_own(cache_place: Path) -> None:
    path = entries.place("texts", "ab12")
    assert path == cache_place / "texts" / "ab" / "ab12.texts"
    entries.write(path, {"x": torch.arange(3)})
    found = entries.read(path)
    assert found is not None
    assert json.dumps(found["x"].tolist()) == "[0, 1, 2]"
    assert entries.read(path.with_name("other")) is None
