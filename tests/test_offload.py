"""Turns of modules on a GPU, seen without one: where each would be, and that no weight is used while away.

Places are recorded instead of moved to; every operation of torch is watched for weights that are away.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from spf_kit import config, families, schema
from spf_kit.adapters.inject import AdapterHandle
from spf_kit.errors import UserError
from spf_kit.estimate.advice import candidates
from spf_kit.estimate.peak import estimate
from spf_kit.families import offload
from spf_kit.families.base import Family
from spf_kit.sampling import generate


class Places(TorchDispatchMode):
    """Where the modules are said to be: "device" or "host". Raises where a weight is used that is away."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family = family
        self.of: dict[str, str] = {"unet": "device", "vae": "host", "text_encoder": "host"}
        self.moves: list[tuple[str, str]] = []
        self.used: set[str] = set()

    def _named(self) -> dict[str, nn.Module]:
        return {name: getattr(self.family, name) for name in self.of}

    def move(self, module: nn.Module, device: torch.device) -> None:
        name = next(name for name, own in self._named().items() if own is module)
        place = "host" if device is offload.HOST else "device"
        if self.of[name] != place:
            self.moves.append((name, place))
            self.of[name] = place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {
            t.untyped_storage().data_ptr() for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)
        }
        for name in self.of:
            if given & self.weights[name]:
                self.used.add(name)
                assert self.of[name] == "device", f"{func} uses a weight of the {name}, which is away"
        return func(*args, **kwargs)

    def __enter__(self) -> Places:
        self.weights = {
            name: {p.untyped_storage().data_ptr() for p in module.parameters()}
            for name, module in self._named().items()
        }
        return super().__enter__()


@pytest.fixture
def family() -> Family:
    return families.load(schema.Base(model="embedded"))


@pytest.fixture
def places(family: Family, monkeypatch: pytest.MonkeyPatch) -> Places:
    """As `StableDiffusionFamily` puts the turns on where there is a GPU."""
    found = Places(family)
    monkeypatch.setattr(offload, "move", found.move)
    family.offload = True
    for name in found.of:
        offload.take_turns(family, name)
    return found


def draw(family: Family) -> Tensor:
    return generate(family, ["a woman", "a man"], [1, 2], steps=2, batch_size=1)


def test_one_module_at_a_time_draws_and_the_pictures_are_the_same(family: Family, places: Places) -> None:
    plain = draw(families.load(schema.Base(model="embedded")))
    with places:
        drawn = draw(family)
    assert torch.equal(drawn, plain)
    assert places.used == {"unet", "vae", "text_encoder"}
    turn = [("vae", "device"), ("unet", "host")]
    back = [("vae", "host"), ("unet", "device")]
    assert places.moves[:2] == [("text_encoder", "device"), ("text_encoder", "host")]
    assert sorted(places.moves[2:4]) == sorted(turn)
    assert sorted(places.moves[4:6]) == sorted(back)
    assert sorted(places.moves[6:]) == sorted(turn)  # the second picture; the UNet comes when it is called


def test_what_was_decoded_under_autograd_keeps_its_weights_until_the_backward_pass(
    family: Family, places: Places
) -> None:
    noisy = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with places:
        condition = family.encode_text(["a woman"])
        prediction = family.predict(noisy, torch.tensor([500]), condition)
        family.decode(noisy - prediction).mean().backward()
        assert (places.of["vae"], places.of["unet"]) == ("device", "device")
        with torch.no_grad():
            family.predict(noisy, torch.tensor([500]), condition)
    assert (places.of["vae"], places.of["unet"]) == ("host", "device")
    assert noisy.grad is not None
    assert noisy.grad.abs().sum() > 0


def test_a_trained_text_encoder_stays(family: Family, places: Places) -> None:
    handle = AdapterHandle.inject(family, schema.Adapter(rank=2, targets=["text-encoder"]))
    with places:
        family.encode_text(["a woman"])["encoder_hidden_states"].sum().backward()
    assert places.moves == [("text_encoder", "device")]
    assert all(p.grad is not None for name, p in handle.named_parameters() if name.endswith(".up"))


def test_a_quantised_unet_stays(family: Family, places: Places) -> None:
    family.quantize = "nf4"
    with places:
        draw(family)
    assert ("unet", "host") not in places.moves
    assert ("vae", "host") in places.moves


def test_parameters_stay_the_objects_that_they_are() -> None:
    layer = nn.Linear(2, 2)
    before = list(layer.parameters())
    offload.move(layer, offload.HOST)
    assert all(a is b for a, b in zip(before, layer.parameters(), strict=True))
    bare = nn.Linear(2, 2, device="meta")
    offload.move(bare, offload.HOST)  # not loaded yet: nothing to move
    assert bare.weight.is_meta


def test_pipelines_draw_on_the_device_wherever_the_weights_are(family: Family, places: Places) -> None:
    family.device = torch.device("meta")  # anything but where they are
    assert family.pipeline()._execution_device == torch.device("meta")


def test_without_a_gpu_nothing_takes_turns_and_a_run_says_so(
    spf_kit: Callable[..., Any], pictures: Path
) -> None:
    loaded = families.load(schema.Base(model="embedded", offload=True))
    assert not loaded.offload
    assert not hasattr(loaded.unet, "_hf_hook")
    sets = ["base.offload=true", "train.steps=1", "preview.every=0", "evaluate.enabled=false"]
    options = [part for text in sets for part in ("--set", text)]
    result = spf_kit("train", "glasses", "--recipe", "naive", "--data", pictures, "--output", "run", *options)
    assert result.code == 0
    if not torch.cuda.is_available():
        assert "base.offload = true has no effect here" in result.err


def test_compiled_code_and_turns_exclude_each_other() -> None:
    with pytest.raises(UserError, match=r'base\.offload = true: .*train\.compile = "regional"'):
        config.load("glasses", sets=["base.offload=true", "train.compile=regional"])


# --- in the estimate --------------------------------------------------------------------------------------


def test_drawing_is_part_of_what_a_card_needs() -> None:
    sets = ["preview.every=0", "evaluate.enabled=false", "train.batch_size=1"]
    silent = estimate(config.load("glasses", recipe="naive", base="sd15", sets=sets))
    assert silent.drawing is None
    together, apart = (
        estimate(config.load("glasses", recipe="naive", base="sd15", sets=[f"base.offload={way}"]))
        for way in ("false", "true")
    )
    family = families.load(schema.Base(model="sd15", dtype="float16"), device="meta", weights=False)
    unet, vae, text = (
        sum(t.nbytes for t in (*m.parameters(), *m.buffers()))
        for m in (family.unet, family.vae, family.text_encoder)
    )
    assert together.drawing is not None
    assert apart.drawing is not None
    # and the adapter, which is on the UNet
    assert together.drawing.parts["weights"] == pytest.approx(unet + vae + text, rel=0.01)
    assert apart.drawing.parts["weights"] in (
        pytest.approx(unet, rel=0.01),
        pytest.approx(vae, rel=0.01),
    )
    assert apart.drawing.total < together.drawing.total
    assert together.needed >= together.drawing.total
    assert together.worst is max((together.step, together.reading, together.drawing), key=lambda p: p.total)


def test_turns_are_the_first_advice_and_never_beside_compiled_code() -> None:
    first = next(candidates(config.load("glasses", base="sd15")))
    assert str(first) == "--set base.offload=true"
    others = candidates(config.load("glasses", base="sd15", sets=["train.compile=regional"]))
    assert not any("offload" in str(change) for change in others)
