"""LoRAs cut to a rank, against the decomposition of the whole update in float64."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spf_kit.adapters import files
from spf_kit.adapters.files import LoraFile
from spf_kit.adapters.layers import LohaLayer, LokrLayer, LoraLayer, OftLayer, Update
from spf_kit.adapters.low_rank import cut_matrix, rank_for
from spf_kit.adapters.resize import resize, share
from spf_kit.errors import UserError
from spf_kit.headers import read_header

torch.set_num_threads(1)
PROJ = ("unet", "mid_block.attentions.0.proj_in")
CONV = ("unet", "down_blocks.0.resnets.0.conv1")
TEXT = ("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj")
METADATA = {
    "ss_network_dim": "8", "ss_network_alpha": "2.0", "ss_network_module": "lycoris.kohya", "ss_seed": "1",
    "ss_network_args": '{"algo": "loha"}', "spf_kit.measured": "{}", "modelspec.title": "hats",
}  # fmt: skip


def draw(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *size: torch.randn(size, generator=generator)


def sample(kind: str = "lora") -> LoraFile:
    """Layers of rank 8, a matrix, a convolution and one of another alpha, with spectra that fall."""
    r = draw(0)
    falls = torch.logspace(0, -2, 8)
    layers: dict[tuple[str, str], Update] = {
        PROJ: LoraLayer(r(8, 24), r(20, 8) * falls, 2.0),
        CONV: LoraLayer(r(8, 6, 3, 3), r(16, 8, 1, 1) * falls[:, None, None], 8.0),
        TEXT: LoraLayer(r(3, 12), r(12, 3), 3.0),
    }
    if kind == "loha":
        layers[PROJ] = LohaLayer(r(20, 3), r(3, 24), r(20, 3), r(3, 24), 2.0)
        layers[CONV] = LohaLayer(r(16, 2), r(2, 54), r(16, 2), r(2, 54), 2.0)
    if kind == "lokr":
        layers[PROJ] = LokrLayer(1.0, lokr_w1=r(4, 4), lokr_w2=r(5, 6))
    return LoraFile(layers, dict(METADATA))


def exact(layer: Update) -> Tensor:
    return layer.update(torch.float64).flatten(1)


# --- resize -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("rank", [1, 4])
def test_a_rank_is_the_best_of_its_kind(tmp_path: Path, kind: str, rank: int) -> None:
    """Eckart and Young, by the singular values of the whole update in float64."""
    source = sample(kind)
    path = files.write(source, tmp_path / "a.safetensors", dtype="float32")
    told = resize(path, tmp_path / "b.safetensors", rank)
    found = files.read(tmp_path / "b.safetensors")
    lost, total, worst = 0.0, 0.0, {}
    for key, layer in source.layers.items():
        values = torch.linalg.svdvals(exact(layer))
        missing = (exact(layer) - exact(found.layers[key])).norm()
        best = values[rank:].norm() if found.layers[key].rank == rank else values.new_zeros(())
        torch.testing.assert_close(missing, best, rtol=1e-4, atol=1e-6 * float(values.norm()))
        assert found.layers[key].scale == 1.0
        lost, total = lost + float(missing) ** 2, total + float(values.norm()) ** 2
        worst[f"{key[0]}: {key[1]}"] = float(missing / values.norm())
    assert told["residual"] == pytest.approx((lost / total) ** 0.5, rel=1e-3, abs=1e-6)
    assert told["worst"]["layer"] == max(worst, key=lambda name: worst[name])
    assert told["worst"]["residual"] == pytest.approx(max(worst.values()), rel=1e-3)


def test_layers_that_need_no_cut_keep_every_bit_and_their_alpha(tmp_path: Path) -> None:
    source = sample()
    path = files.write(source, tmp_path / "a.safetensors", dtype="float32")
    told = resize(path, tmp_path / "b.safetensors", 8)
    assert (told["cut"], told["residual"], told["rank"]) == (0, 0.0, [3, 8])
    found = files.read(tmp_path / "b.safetensors")
    assert found.metadata == files.read(path).metadata
    for key, layer in source.layers.items():
        assert torch.equal(found.layers[key].up, layer.up)  # type: ignore[attr-defined]
        assert found.layers[key].alpha == layer.alpha
    told = resize(path, tmp_path / "c.safetensors", 4)
    assert told["cut"] == 2
    assert torch.equal(files.read(tmp_path / "c.safetensors").layers[TEXT].up, source.layers[TEXT].up)  # type: ignore[attr-defined]


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.999, 1.0])
def test_a_share_of_the_squared_norm_is_kept_with_no_rank_too_many(tmp_path: Path, keep: float) -> None:
    source = sample()
    path = files.write(source, tmp_path / "a.safetensors", dtype="float32")
    resize(path, tmp_path / "b.safetensors", keep=keep)
    resize(path, tmp_path / "c.safetensors", 2, keep)
    found, capped = (files.read(tmp_path / f"{name}.safetensors").layers for name in "bc")
    for key, layer in source.layers.items():
        squares = torch.linalg.svdvals(exact(layer)).square()
        rank = found[key].rank
        assert squares[:rank].sum() >= (keep - 1e-9) * squares.sum()
        assert rank == 1 or squares[: rank - 1].sum() < keep * squares.sum()
        assert capped[key].rank == min(rank, 2)


def test_the_file_tells_what_it_is_now(tmp_path: Path) -> None:
    path = files.write(sample("loha"), tmp_path / "a.safetensors", dtype="float32")
    told = resize(path, tmp_path / "b.safetensors", 2, dtype="float16")
    metadata = read_header(tmp_path / "b.safetensors").metadata
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "2.0")
    assert (metadata["ss_network_module"], metadata["modelspec.title"]) == ("networks.lora", "hats")
    assert not {"ss_network_args", "spf_kit.measured"} & metadata.keys()
    note = json.loads(metadata["spf_kit.resized"])
    assert note == {"file": "a.safetensors", "rank": 2, "keep": None, "residual": told["residual"]}
    resize(path, tmp_path / "c.safetensors", keep=0.8)
    assert read_header(tmp_path / "c.safetensors").metadata["ss_network_dim"] == "Dynamic"


def test_the_residual_has_the_rounding_in_it(tmp_path: Path) -> None:
    source = sample()
    path = files.write(source, tmp_path / "a.safetensors", dtype="float32")
    told = resize(path, tmp_path / "b.safetensors", 8, dtype="bfloat16")
    found = files.read(tmp_path / "b.safetensors").layers
    lost = sum((exact(found[key]) - exact(layer)).norm() ** 2 for key, layer in source.layers.items())
    total = sum(exact(layer).norm() ** 2 for layer in source.layers.values())
    assert told["residual"] == pytest.approx(float(lost / total) ** 0.5, rel=1e-4)
    assert 1e-4 < told["residual"] < 1e-2


def test_other_formats_stay_what_they_are(tmp_path: Path) -> None:
    for format, name in (("peft", "a"), ("diffusers", "a.safetensors")):
        path = files.write(sample(), tmp_path / name, format, "float32")  # type: ignore[arg-type]
        out = tmp_path / f"out-{format}{path.suffix}"
        resize(path, out, 2)
        assert files.read(out).format == format
        assert files.read(out).ranks == {2}
    resize(tmp_path / "a", tmp_path / "file.safetensors", 2)
    assert files.read(tmp_path / "file.safetensors").format == "kohya"


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    r = draw(1)
    dora = LoraFile({PROJ: LoraLayer(r(4, 24), r(20, 4), 4.0, r(20, 1).abs())})
    path = files.write(dora, tmp_path / "dora.safetensors", dtype="float32")
    told = resize(path, tmp_path / "same.safetensors", 4)  # it has the rank
    assert told["cut"] == 0
    same = load_file(tmp_path / "same.safetensors")
    assert all(torch.equal(same[name], tensor) for name, tensor in load_file(path).items())
    oft = files.write(LoraFile({PROJ: OftLayer(r(5, 4, 4), 0.0)}), tmp_path / "oft.safetensors")
    before = sorted(os.listdir(tmp_path))
    for arguments, reason in (
        ((path, 3), r"dora\.safetensors' is a DoRA: what a cut of 'mid_block\.\S+' would lose depends"),
        ((path, None, 0.9), "is a DoRA"),
        ((oft, 2), r"oft\.safetensors' holds an OFT"),
        ((path,), "--rank N, --keep 0.9, or both"),
        ((path, 0), "--rank 0 is no rank"),
        ((path, None, 1.5), r"--keep 1\.5 is no share"),
        ((tmp_path / "none.safetensors", 2), "does not exist"),
    ):
        with pytest.raises(UserError, match=reason):
            resize(arguments[0], tmp_path / "out.safetensors", *arguments[1:])  # type: ignore[misc]
    assert sorted(os.listdir(tmp_path)) == before


def test_shares_against_plain_norms() -> None:
    source = sample("loha").layers
    one, other = source[PROJ], sample("lokr").layers[PROJ]
    found = share(one, other)
    assert found.kept + found.lost == pytest.approx(float(exact(one).norm() ** 2))
    assert found.lost == pytest.approx(float((exact(one) - exact(other)).norm() ** 2))
    assert share(one, one).lost == 0.0


def test_the_commands_talk(spf_kit: Callable[..., Any], tmp_path: Path) -> None:
    files.write(sample(), tmp_path / "a.safetensors", dtype="float16")
    done = spf_kit("resize", "a.safetensors", "--keep", "0.9", "--rank", "4", "-o", "b.safetensors", "--json")
    assert done.code == 0, done.err
    assert 0 < done.json["residual"] <= done.json["worst"]["residual"]
    assert done.json["dtype"] == "float16"
    refused = spf_kit("resize", "a.safetensors", "--rank", "2", "--output", "b.safetensors")
    assert refused.code == 2
    assert "--overwrite" in refused.err
    told = spf_kit("resize", "a.safetensors", "--rank", "2", "--output", "b.safetensors", "--overwrite")
    assert "of the update is missing" in told.out.replace("\n", " ")


# --- large matrices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spectrum", ["flat", "falling", "low rank"])
@pytest.mark.parametrize("shape", [(320, 400), (256, 40, 3, 3)])
def test_a_large_matrix_is_cut_nearly_as_well_as_can_be(spectrum: str, shape: tuple[int, ...]) -> None:
    """The stated accuracy, against the whole decomposition; a flat spectrum, as of noise, is the hardest."""
    r, rank = draw(2), 8
    matrix = r(*shape).flatten(1)
    if spectrum != "flat":
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        values = torch.arange(1, len(values) + 1) ** -1.0
        matrix = left * (values if spectrum == "falling" else values * (values >= 1 / rank)) @ right
    cut = cut_matrix(matrix.reshape(shape), rank)
    values = torch.linalg.svdvals(matrix.double())
    missing = (matrix.double() - exact(cut.layer)).norm()
    assert cut.layer.shape == shape
    assert cut.lost == pytest.approx(float(missing) ** 2, rel=1e-4, abs=1e-10)
    assert missing <= 1.005 * values[rank:].norm() + 1e-5 * values.norm()
    assert cut.kept >= 0.98 * float(values[:rank].square().sum())
    again = cut_matrix(matrix.reshape(shape), rank)
    assert torch.equal(again.layer.up, cut.layer.up)  # seeded


def test_a_rank_for_a_share() -> None:
    squares = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert [rank_for(squares, keep) for keep in (0.1, 0.4, 0.41, 0.7, 0.95, 1.0)] == [1, 1, 2, 2, 4, 4]
    assert rank_for(torch.zeros(3), 0.5) == 1


def test_a_file_of_others_is_told(tmp_path: Path) -> None:
    save_file({"model.diffusion_model.out.2.weight": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="is a checkpoint, not a LoRA"):
        resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", 2)
