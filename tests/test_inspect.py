"""What `inspect` says of a file, against the bytes themselves and plain formulas."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file
from torch import Tensor

from spf_kit import cli_about
from spf_kit.adapters import files, hashes
from spf_kit.adapters.files import LoraFile
from spf_kit.adapters.inspect import inspect
from spf_kit.adapters.layers import LohaLayer, LokrLayer, LoraLayer, OftLayer, Update
from spf_kit.adapters.norms import norm
from spf_kit.adapters.tensors import kohya_hashes

DOWN, MID, UP = "down_blocks.0", "mid_block", "up_blocks.3"
TEXT = "text_model.encoder.layers.2.self_attn.q_proj"


def draw(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


def lora(rank: int = 2, alpha: float = 3.0) -> LoraLayer:
    return LoraLayer(draw(rank, 8), draw(6, rank), alpha)


METADATA = {
    "ss_output_name": "hat", "ss_network_dim": "2", "ss_seed": "7", "ss_vae_name": "None",
    "ss_lowram": "False",
    "ss_sd_model_name": "v1-5.safetensors", "ss_sd_model_hash": "c0ffee00", "ss_new_sd_model_hash": "ab" * 32,
    "ss_base_model_version": "sd_v1", "ss_bucket_info": '{"buckets": {}}',
    "ss_tag_frequency": json.dumps({"1_a": {f"tag {n}": n for n in range(40)}, "2_b": {" tag 3": 100}}),
    "modelspec.title": "A hat", "modelspec.trigger_phrase": "wearing a hat", "modelspec.author": "somebody",
}  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    module = "attentions.0.transformer_blocks.0.attn2.to_k"
    layers: dict[tuple[str, str], Update] = {
        ("unet", f"{DOWN}.{module}"): lora(),
        ("unet", f"{MID}.{module}"): lora(4, 8.0),
        ("unet", f"{MID}.{module.replace('to_k', 'to_v')}"): lora(2, 1.0),
        ("text_encoder", TEXT): lora(),
    }
    return files.write(LoraFile(layers, METADATA), tmp_path / "hat.safetensors", dtype="float32")


def test_counts_beyond_all_captions_are_left_out(tmp_path: Path) -> None:
    """Python refuses to print integers of more than 4300 digits; the sum of two may have one more."""
    counts = "9" * 4300
    folders = f'{{"a": {{"x": {counts}, "y": 3}}, "b": {{"x": {counts}}}}}'
    file = files.write(
        LoraFile({("unet", MID): lora()}, {"ss_tag_frequency": folders}), tmp_path / "a.safetensors"
    )
    assert inspect(file)["tags"] == {"y": 3}


def test_a_folder_of_several_parts_has_no_hash_of_one_of_them(path: Path, tmp_path: Path) -> None:
    folder = files.write(files.read(path), tmp_path / "peft", "peft")
    assert "sshs_model_hash" in files.read(folder / "unet").metadata
    assert files.read(folder).metadata["ss_output_name"] == "hat"
    assert not [key for key in files.read(folder).metadata if "hash_sha256" in key or key.startswith("sshs_")]


def test_a_lora_tells_its_blocks_its_base_and_its_training(path: Path) -> None:
    told = inspect(path)
    unet = told["components"]["unet"]
    assert unet["ranks"] == {DOWN: 2, MID: {"2": 1, "4": 1}}
    assert unet["alphas"] == {DOWN: 3.0, MID: {"1.0": 1, "8.0": 1}}
    assert told["components"]["text_encoder"]["alphas"] == {"layers.2": 3.0}
    assert told["base"] == {
        "name": "v1-5.safetensors", "version": "sd_v1", "autov1": "c0ffee00", "sha256": "ab" * 32
    }  # fmt: skip
    assert list(told["training"].items())[:3] == [("output_name", "hat"), ("network_dim", "2"), ("seed", "7")]
    assert told["training"]["lowram"] == "False"
    assert not {"vae_name", "bucket_info", "tag_frequency", "sd_model_name"} & told["training"].keys()
    assert list(told["tags"].items())[:2] == [("tag 3", 103), ("tag 39", 39)]
    assert len(told["tags"]) == 40
    assert told["modelspec"]["author"] == "somebody"
    assert told["thumbnail"] is None
    assert told["note"] is None


def test_people_see_the_first_of_many_entries(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli_about.inspect(path)
    printed = capsys.readouterr().out
    assert "wearing a hat" in printed
    assert "tag 39: 39" in printed
    assert "tag 1: 1" not in printed
    assert "... and 16 more, with --json" in printed


def test_nothing_is_loaded_to_inspect(path: Path) -> None:
    """Not even torch, whose import alone takes longer than all the rest."""
    code = f"import sys; from spf_kit.adapters.inspect import inspect; inspect({str(path)!r}); "
    code += "print([name for name in ('torch', 'numpy', 'diffusers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- hashes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two megabytes without any hash in its metadata, as other trainers leave files."""
    path = tmp_path_factory.mktemp("large") / "a.safetensors"
    name = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {
        f"{name}.lora_down.weight": draw(300, 900), f"{name}.lora_up.weight": draw(900, 300),
        f"{name}.alpha": torch.tensor(4.0),
    }  # fmt: skip
    save_file(tensors, path, {"ss_seed": "1", "ss_tag_frequency": '{"ä": 1}', "other": "x" * 1000})
    return path


def test_hashes_are_those_of_the_bytes(large: Path) -> None:
    data = large.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    # kohya's legacy hash is that of the file as it is without the metadata of others
    bare = safetensors.torch.save(
        safetensors.torch.load(data), {"ss_seed": "1", "ss_tag_frequency": '{"ä": 1}'}
    )
    assert len(bare) < len(data)
    assert inspect(large)["hashes"] == {
        "sha256": hashlib.sha256(data).hexdigest(),
        "autov1": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8],
        "autov2": hashlib.sha256(data).hexdigest()[:10],
        "autov3": hashlib.sha256(data[start:]).hexdigest()[:12],
        "sshs_model_hash": hashlib.sha256(data[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(bare[0x100000:0x110000]).hexdigest()[:8],
    }


@pytest.mark.parametrize("metadata", [None, {}, {"other": "x"}])
def test_the_legacy_hash_without_training_metadata(
    large: Path, tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    """kohya hands an empty table to safetensors, which writes it: all bytes behind lie elsewhere."""
    tensors = safetensors.torch.load(large.read_bytes())
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    theirs = hashlib.sha256(safetensors.torch.save(tensors, {})[0x100000:0x110000]).hexdigest()[:8]
    assert inspect(tmp_path / "a.safetensors")["hashes"]["sshs_legacy_hash"] == theirs
    assert kohya_hashes(tensors, metadata or {})["sshs_legacy_hash"] == theirs


def test_a_file_of_more_than_a_gigabyte_is_hashed_if_asked(
    large: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stored = inspect(large)["hashes"], inspect(path)["hashes"]["sshs_model_hash"]
    monkeypatch.setattr(hashes, "FREE", 100)
    assert inspect(large)["hashes"].keys() == {"autov1", "sshs_legacy_hash"}
    assert inspect(large, hash=True)["hashes"] == whole
    told = inspect(path)["hashes"]
    assert told["sshs_model_hash"] == stored  # as the metadata say
    assert told["autov3"] == stored[:12]


def test_tensors_that_were_changed_later_are_told(path: Path, tmp_path: Path) -> None:
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    changed = {name: tensor * 2 for name, tensor in safetensors.torch.load_file(path).items()}
    save_file(changed, tmp_path / "changed.safetensors", metadata)
    told = inspect(tmp_path / "changed.safetensors")
    assert "changed later" in told["note"]
    assert told["hashes"]["sshs_model_hash"] != metadata["sshs_model_hash"]


# --- norms ------------------------------------------------------------------------------------------------


def test_norms_are_those_of_the_updates() -> None:
    """Against plain products in float64."""
    a, b, c, d = draw(12, 3), draw(3, 8), draw(12, 3) + 1, draw(3, 8) - 1
    core, other = draw(3, 3, 3, 3), draw(3, 3, 3, 3) + 1
    tucker = torch.einsum("rshw,ro,si->oihw", core.double(), a.T.double(), b.double())
    second = torch.einsum("rshw,ro,si->oihw", other.double(), c.T.double(), d.double())
    small, large, w, v = draw(3, 2), draw(4, 5, 3, 3), draw(4, 2), draw(2, 5)
    cases: list[tuple[Update, Tensor]] = [
        (LoraLayer(b, a, 2.0), 2 / 3 * a.double() @ b.double()),
        (LoraLayer(draw(2, 5, 3, 3), draw(7, 2, 1, 1), 2.0),
         draw(7, 2, 1, 1).flatten(1).double() @ draw(2, 5, 3, 3).flatten(1).double()),
        (LohaLayer(a, b, c, d, 2.0), 2 / 3 * (a.double() @ b.double()) * (c.double() @ d.double())),
        (LohaLayer(a.T, b, c.T, d, 2.0, core, other), 2 / 3 * tucker * second),
        (LokrLayer(2.0, lokr_w1=small, lokr_w2=large),
         torch.kron(small.double().reshape(3, 2, 1, 1), large.double())),
        (LokrLayer(-3.0, lokr_w1=small, lokr_w2_a=w, lokr_w2_b=v),
         3 / 2 * torch.kron(small.double(), w.double() @ v.double())),
        (LokrLayer(1.0, lokr_w1_a=w, lokr_w1_b=v, lokr_w2=draw(2, 2)),
         1 / 2 * torch.kron(w.double() @ v.double(), draw(2, 2).double())),
    ]  # fmt: skip
    for layer, update in cases:
        assert norm(layer) == pytest.approx(float(update.square().sum().sqrt()), rel=1e-5)
    assert norm(OftLayer(torch.zeros(2, 4, 4), 0.0)) is None
    assert norm(LoraLayer(b, a, 2.0, dora_scale=torch.ones(12, 1))) is None


def test_norms_are_told_by_block_on_request(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "norms" not in inspect(path)
    cli_about.inspect(path, norms=True, json=True)
    told = json.loads(capsys.readouterr().out)["norms"]
    expected: dict[str, float] = {}
    for (component, module), layer in files.read(path).layers.items():
        block = "layers.2" if component == "text_encoder" else ".".join(module.split(".")[:2])
        block = MID if block.startswith(MID) else block
        expected[block] = expected.get(block, 0.0) + float(layer.update(torch.float64).square().sum())
    assert told["unet"] == pytest.approx(
        {k: v**0.5 for k, v in expected.items() if k != "layers.2"}, rel=1e-5
    )
    assert told["text_encoder"] == pytest.approx({"layers.2": expected["layers.2"] ** 0.5}, rel=1e-5)


def test_large_products_are_not_multiplied_out() -> None:
    """A file of half a megabyte can stand for a matrix of terabytes."""
    tall, wide = torch.ones(60_000, 1), torch.ones(1, 60_000)
    assert norm(LoraLayer(wide, tall, 1.0)) == pytest.approx(60_000)
    assert norm(LohaLayer(tall, wide, tall, wide, 1.0)) == pytest.approx(60_000)
    assert norm(LokrLayer(1.0, lokr_w1=tall, lokr_w2=wide)) == pytest.approx(60_000)
    cored = LokrLayer(
        1.0, lokr_w1=torch.ones(1, 1), lokr_w2_a=wide, lokr_w2_b=wide, lokr_t2=torch.ones(1, 1, 3, 3)
    )
    assert norm(cored) == pytest.approx(3 * 60_000)


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("cored", [False, True])
def test_a_loha_has_no_more_columns_than_the_weight(rank: int, cored: bool) -> None:
    """Of 9 outputs and 7 inputs: rank 2 has 4 columns, 3 would have 9 and 4 would have 16."""
    a, b, c, d = draw(9, rank), draw(rank, 7), draw(9, rank) + 1, draw(rank, 7) - 1
    layer = LohaLayer(a, b, c, d, 2.0)
    update = 2 / rank * (a.double() @ b.double()) * (c.double() @ d.double())
    if cored:
        core, other = draw(rank, rank, 1, 1), draw(rank, rank, 1, 1) + 1
        first, second = (
            x.double() @ t[:, :, 0, 0].double() @ y.double() for x, t, y in ((a, core, b), (c, other, d))
        )
        layer, update = LohaLayer(a.T, b, c.T, d, 2.0, core, other), 2 / rank * first * second
    up, down = layer.factors()
    assert up.shape[1] == down.shape[0] == min(rank**2, 7)
    torch.testing.assert_close(up @ down, update, rtol=1e-5, atol=1e-6)


# --- base models ------------------------------------------------------------------------------------------


U = "model.diffusion_model."


def model(
    tmp_path: Path, *, width: int = 768, extra: tuple[str, ...] = (), **metadata: str
) -> dict[str, Any]:
    """The names of a checkpoint with a few of its tensors, and what is said of it."""
    names = {
        f"{U}input_blocks.0.0.weight": torch.ones(320, 4, 3, 3),
        f"{U}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.ones(320, width).half(),
        **{name: torch.ones(2).half() for name in extra},
    }
    save_file(names, tmp_path / "model.safetensors", metadata)
    return inspect(tmp_path / "model.safetensors")


def test_a_checkpoint_tells_its_parts(tmp_path: Path) -> None:
    told = model(
        tmp_path, extra=("first_stage_model.encoder.conv_in.bias", "model_ema.decay", "alphas_cumprod")
    )
    assert (told["family"], told["vae"], told["ema"]) == ("sd15", True, True)
    assert told["components"]["unet"] == {
        "tensors": 2, "parameters": 320 * 36 + 320 * 768, "dtype": {"F32": 1, "F16": 1}
    }  # fmt: skip
    assert told["components"]["vae"] == {"tensors": 1, "parameters": 2, "dtype": "F16"}
    assert told["components"]["ema"]["tensors"] == told["components"]["other"]["tensors"] == 1
    assert (told["prediction_type"], told["zero_terminal_snr"]) == ("epsilon", False)
    assert told["hashes"]["autov2"] == told["hashes"]["sha256"][:10]
    assert "sshs_model_hash" not in told["hashes"]
    bare = model(tmp_path)
    assert (bare["vae"], bare["ema"]) == (False, False)


def test_what_a_checkpoint_predicts_is_told(tmp_path: Path) -> None:
    v = "v_prediction"
    assert model(tmp_path, extra=("v_pred", "ztsnr"))["prediction_type"] == v
    assert model(tmp_path, extra=("v_pred", "ztsnr"))["zero_terminal_snr"] is True
    assert model(tmp_path, **{"modelspec.prediction_type": "v"})["prediction_type"] == v
    assert model(tmp_path, width=1024)["prediction_type"] == "epsilon"
    bias = f"{U}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    assert (
        model(tmp_path, width=1024, extra=(bias,))["prediction_type"] == "epsilon"
    )  # all the same: no spread
    stored = {"spf_kit.scheduler": '{"prediction_type": "v_prediction", "rescale_betas_zero_snr": true}'}
    assert model(tmp_path, **stored)["zero_terminal_snr"] is True


def test_a_model_folder_tells_what_it_predicts() -> None:
    from spf_kit.embedded import base_path

    told = inspect(base_path())
    scheduler = json.loads((base_path() / "scheduler/scheduler_config.json").read_text())
    assert told["prediction_type"] == scheduler.get("prediction_type", "epsilon")
    assert told["vae"]
    unet = base_path() / "unet/diffusion_pytorch_model.safetensors"
    assert (
        told["hashes"]["unet/diffusion_pytorch_model.safetensors"]
        == hashlib.sha256(unet.read_bytes()).hexdigest()
    )
