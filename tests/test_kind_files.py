"""Files of LoHa, LoKr and OFT: against LyCORIS' own functions, plain formulas, and the model at run time."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from spf_kit import families
from spf_kit.adapters import files, merge, rows
from spf_kit.adapters.index import index
from spf_kit.adapters.inject import attach, inject
from spf_kit.adapters.inspect import inspect
from spf_kit.adapters.layers import LohaLayer, LokrLayer, LoraLayer, OftLayer, Update
from spf_kit.adapters.merge_loras import merge_layer
from spf_kit.adapters.norms import norm
from spf_kit.adapters.parts import describe, factorize
from spf_kit.adapters.rows import Adder
from spf_kit.adapters.scratch import Scratch
from spf_kit.errors import UserError
from spf_kit.schema import Adapter, Base

torch.set_num_threads(1)
CONV = "down_blocks.0.resnets.0.conv1"
PROJ = "mid_block.attentions.0.proj_in"


def lycoris(name: str) -> Any:
    """A module of LyCORIS' functions. Its package imports more at its top than they need."""
    if "lycoris" not in sys.modules:
        spec = importlib.util.find_spec("lycoris")
        if spec is None:
            pytest.skip("needs lycoris-lora, which the extra 'dev' installs")
        package = types.ModuleType("lycoris")
        package.__path__ = list(spec.submodule_search_locations or [])
        sys.modules["lycoris"] = package
    return importlib.import_module(f"lycoris.functional.{name}")


def draw(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return lambda *size: torch.randn(size, generator=generator)


def samples() -> dict[str, tuple[Update, tuple[int, ...]]]:
    """One of every shape that files hold, and the weight it is for."""
    r = draw(0)
    return {
        "loha": (LohaLayer(r(12, 3), r(3, 8), r(12, 3), r(3, 8), 2.0), (12, 8)),
        "loha conv": (LohaLayer(r(12, 3), r(3, 72), r(12, 3), r(3, 72), 2.0), (12, 8, 3, 3)),
        "loha tucker": (
            LohaLayer(r(3, 12), r(3, 8), r(3, 12), r(3, 8), 2.0, r(3, 3, 3, 3), r(3, 3, 3, 3)),
            (12, 8, 3, 3),
        ),
        "lokr": (LokrLayer(3.0, lokr_w1=r(3, 2), lokr_w2_a=r(4, 2), lokr_w2_b=r(2, 4)), (12, 8)),
        "lokr whole": (LokrLayer(3.0, lokr_w1=r(3, 2), lokr_w2=r(4, 4)), (12, 8)),
        "lokr whole conv": (LokrLayer(3.0, lokr_w1=r(3, 2), lokr_w2=r(4, 4, 3, 3)), (12, 8, 3, 3)),
        "lokr both": (
            LokrLayer(3.0, lokr_w1_a=r(3, 1), lokr_w1_b=r(1, 2), lokr_w2_a=r(4, 1), lokr_w2_b=r(1, 4)),
            (12, 8),
        ),
        "lokr conv": (LokrLayer(3.0, lokr_w1=r(3, 2), lokr_w2_a=r(4, 2), lokr_w2_b=r(2, 36)), (12, 8, 3, 3)),
        "lokr tucker": (
            LokrLayer(3.0, lokr_w1=r(3, 2), lokr_t2=r(2, 2, 3, 3), lokr_w2_a=r(2, 4), lokr_w2_b=r(2, 4)),
            (12, 8, 3, 3),
        ),
        "oft": (OftLayer(r(3, 4, 4) * 0.3, 0.0), (12, 8)),
        "oft conv": (OftLayer(r(3, 4, 4) * 0.3, 0.0), (12, 8, 3, 3)),
        "oft held": (OftLayer(r(3, 4, 4) * 0.3, 0.05), (12, 8)),
        "oft rescaled": (OftLayer(r(3, 4, 4) * 0.3, 0.0, r(12, 1)), (12, 8)),
    }


SAMPLES = samples()
each = pytest.mark.parametrize("name", list(SAMPLES))


def weight_of(name: str) -> Tensor:
    return draw(9)(*SAMPLES[name][1])


def theirs(layer: Update, weight: Tensor) -> Tensor:
    """What LyCORIS adds to a weight."""
    if isinstance(layer, LohaLayer):
        parts = (layer.hada_w1_b, layer.hada_w1_a, layer.hada_w2_b, layer.hada_w2_a)
        scale = torch.tensor(layer.alpha / layer.rank)
        if layer.hada_t1 is None:
            return lycoris("loha").make_weight(*parts, scale).reshape(weight.shape)
        first, second = parts[:2], parts[2:]
        return lycoris("loha").make_weight_tucker(layer.hada_t1, *first, layer.hada_t2, *second, scale)
    if isinstance(layer, LokrLayer):
        first = (layer.lokr_w1, layer.lokr_w1_a, layer.lokr_w1_b)
        second = (layer.lokr_w2, layer.lokr_w2_a, layer.lokr_w2_b)
        scale = layer.alpha / layer.rank if layer.rank else 1.0
        found = lycoris("lokr").kron_weight(*first, *second, layer.lokr_t2, scale=scale, backend="torch")
        return found.reshape(weight.shape)
    assert isinstance(layer, OftLayer)
    limit = layer.alpha * weight.shape[0] or None
    return lycoris("diag_oft").diff_weight(
        weight, layer.oft_blocks, layer.rescale, constraint=limit, backend="torch"
    )


# --- formulas ---------------------------------------------------------------------------------------------


@each
def test_a_delta_is_that_of_lycoris(name: str) -> None:
    layer, weight = SAMPLES[name][0], weight_of(name)
    torch.testing.assert_close(layer.delta(weight), theirs(layer, weight), rtol=1e-4, atol=1e-5)


@each
def test_rows_are_those_of_lycoris(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a merge adds them: some rows at a time, in memory that is used again, beside another layer's."""
    layer, weight = SAMPLES[name][0], weight_of(name)
    monkeypatch.setattr(rows, "BLOCK", 1)
    flat, scratch = weight.flatten(1), Scratch()
    total, shape = flat.clone(), tuple(weight.shape)
    adders = [Adder([(layer, factor)], shape, list) for factor in (0.5, -0.2)]
    ranges = list(rows.row_ranges(shape, [layer]))
    assert len(ranges) > 1
    for part in ranges:
        here = slice(part.start, part.stop)
        for adder in adders:
            adder.add(total[here], flat[here], part.start, scratch)
    wanted = flat + 0.3 * theirs(layer, weight).flatten(1)
    torch.testing.assert_close(total, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in SAMPLES if "oft" not in name])
def test_factors_and_norms_are_those_of_lycoris(name: str) -> None:
    """What resizing, norms and merges of LoRAs into one work with."""
    layer, weight = SAMPLES[name][0], weight_of(name)
    wanted = theirs(layer, weight)
    up, down = layer.factors()
    torch.testing.assert_close((up @ down).float(), wanted.flatten(1), rtol=1e-4, atol=1e-5)
    assert norm(layer) == pytest.approx(float(wanted.double().norm()), rel=1e-5)
    cut = merge_layer([(layer, 1.0)], None, kernel=tuple(weight.shape[2:])).layer
    torch.testing.assert_close(cut.update(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", ["loha", "lokr", "lokr whole conv", "loha tucker"])
def test_magnitudes_are_those_of_lycoris(name: str, axis: int) -> None:
    layer, weight = SAMPLES[name][0], weight_of(name)
    size = [1] * weight.dim()
    size[axis] = weight.shape[axis]
    magnitude = draw(4)(*size).abs() + 0.5
    layer = type(layer)(**{**vars(layer), "dora_scale": magnitude})
    whole = weight + theirs(SAMPLES[name][0], weight)
    wanted = lycoris("general").weight_decompose(whole, magnitude, wd_on_out=axis == 0, backend="torch")
    assert layer.dora_axis == axis
    torch.testing.assert_close(layer.delta(weight) + weight, wanted, rtol=1e-4, atol=1e-5)


@each
def test_shapes_and_ranks_are_told_from_headers(name: str) -> None:
    layer, _ = SAMPLES[name]
    found = describe({part: tuple(tensor.shape) for part, tensor in layer.tensors().items()})
    assert (found.kind, found.rank, found.shape) == (layer.kind, layer.rank, layer.shape)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4096), st.integers(-1, 64).filter(bool))
def test_sizes_are_factorised_as_by_lycoris(size: int, factor: int) -> None:
    assert factorize(size, factor) == lycoris("general").factorization(size, factor)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4),
    st.integers(1, 3), st.floats(-2, 2),
)  # fmt: skip
def test_kronecker_products_by_torch_in_float64(
    r: int, a: int, b: int, c: int, d: int, seed: int, weight: float
) -> None:
    make = draw(seed)
    w1, w2_a, w2_b = make(a, b), make(c, r), make(r, d)
    layer = LokrLayer(1.5, lokr_w1=w1, lokr_w2_a=w2_a, lokr_w2_b=w2_b)
    wanted = 1.5 / r * torch.kron(w1.double(), w2_a.double() @ w2_b.double())
    torch.testing.assert_close(layer.update(torch.float64), wanted)
    up, down = layer.factors()
    torch.testing.assert_close(up @ down, wanted)
    total = torch.zeros(a * c, b * d)
    adder = Adder([(layer, weight)], tuple(total.shape), list)
    adder.add(total, torch.zeros_like(total), 0, Scratch())
    torch.testing.assert_close(total.double(), weight * wanted, rtol=1e-4, atol=1e-5)


def test_a_rotation_keeps_what_rotations_keep() -> None:
    """R^T W has the singular values of W, block by block; at half strength it has not."""
    layer, weight = SAMPLES["oft"][0], weight_of("oft")
    turned = weight + layer.delta(weight)
    for block, before in zip(turned.split(4), weight.split(4)):
        torch.testing.assert_close(torch.linalg.svdvals(block), torch.linalg.svdvals(before))


# --- reading ----------------------------------------------------------------------------------------------


def save(path: Path, name: str, layer: Update, prefix: str = "lora_unet_") -> Path:
    """As LyCORIS saves it."""
    tensors = {f"{prefix}{name.replace('.', '_')}.{part}": t for part, t in layer.tensors().items()}
    tensors[f"{prefix}{name.replace('.', '_')}.alpha"] = torch.tensor(layer.alpha)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


@each
def test_files_of_lycoris_are_read(tmp_path: Path, name: str) -> None:
    layer, weight = SAMPLES[name][0], weight_of(name)
    read = files.read(save(tmp_path / "a.safetensors", CONV, layer))
    found = read.layers["unet", CONV]
    assert (read.kind, found.rank, found.alpha) == (layer.kind, layer.rank, pytest.approx(layer.alpha))
    torch.testing.assert_close(found.delta(weight), theirs(layer, weight), rtol=1e-4, atol=1e-5)


def test_without_an_alpha_the_scale_is_one_and_no_rotation_is_limited(tmp_path: Path) -> None:
    for name in ("loha", "lokr", "oft"):
        layer = SAMPLES[name][0]
        tensors = {f"lora_unet_x_conv1.{part}": t for part, t in layer.tensors().items()}
        save_file(tensors, tmp_path / "a.safetensors")
        (found,) = files.read(tmp_path / "a.safetensors").layers.values()
        assert found.scale == 1.0
        assert found.alpha == (0.0 if name == "oft" else layer.rank)


def test_kohyas_own_oft_and_the_rotations_of_lycoris_2(tmp_path: Path) -> None:
    layer, weight = SAMPLES["oft"][0], weight_of("oft")
    assert isinstance(layer, OftLayer)
    read = files.read(save(tmp_path / "a.safetensors", PROJ, layer, "oft_unet_"))
    torch.testing.assert_close(read.layers["unet", PROJ].delta(weight), layer.delta(weight))
    key = f"lora_unet_{PROJ.replace('.', '_')}"
    save_file({f"{key}.oft_diag": layer.rotations().float().contiguous()}, tmp_path / "b.safetensors")
    read = files.read(tmp_path / "b.safetensors")
    torch.testing.assert_close(
        read.layers["unet", PROJ].delta(weight), layer.delta(weight), rtol=1e-4, atol=1e-5
    )
    save_file({f"{key}.oft_diag": torch.ones(3, 4, 4)}, tmp_path / "c.safetensors")
    with pytest.raises(UserError, match="no rotation: which format that is cannot be told"):
        files.read(tmp_path / "c.safetensors")


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"hada_w1_a": (4, 2), "hada_w1_b": (2, 4), "hada_w2_a": (4, 2)}, "has no hada_w2_b tensor"),
        (
            {"hada_w1_a": (4, 2), "hada_w1_b": (2, 4), "hada_w2_a": (4, 2), "hada_w2_b": (3, 4)},
            "shapes that do not fit each other",
        ),
        (
            {"hada_w1_a": (4, 2), "hada_w1_b": (2, 4), "hada_w2_a": (4, 3), "hada_w2_b": (3, 4)},
            "has two ranks, 2 and 3",
        ),
        ({"lokr_w1": (2, 2)}, "has no lokr_w2_a and no lokr_w2_b"),
        ({"lokr_w1": (2, 2), "lokr_w1_a": (2, 2), "lokr_w2": (2, 2)}, "has lokr_w1 whole and in parts"),
        ({"lokr_w1": (2, 2, 2), "lokr_w2": (2, 2)}, "shapes that do not fit"),
        ({"lokr_w1": (2, 2), "lokr_w2": (0, 2)}, "shapes that do not fit"),
        ({"oft_blocks": (2, 4, 3)}, "shapes that do not fit"),
        ({"oft_blocks": (2, 3, 4, 4)}, "is a BOFT"),
        ({"oft_blocks": (2, 4, 4), "rescale": (7, 1)}, "shapes that do not fit"),
        ({"lokr_t1": (2, 2)}, "a LoKr with parts of its own"),
        ({"lokr_w1": (2, 2), "lokr_w2": (2, 2), "hada_w1_a": (2, 2)}, "mixes the parts of LoHa and LoKr"),
    ],
)
def test_damaged_files_are_sentences(tmp_path: Path, parts: dict[str, tuple[int, ...]], reason: str) -> None:
    tensors = {f"lora_unet_mid_block_attentions_0_proj_in.{p}": torch.ones(s) for p, s in parts.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=reason) as caught:
        files.read(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)


# --- writing ----------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_written_is_read(tmp_path: Path, name: str, dtype: str) -> None:
    layer, weight = SAMPLES[name][0], weight_of(name)
    path = files.write(files.LoraFile({("unet", CONV): layer}), tmp_path / "a.safetensors", dtype=dtype)
    again = files.read(path).layers["unet", CONV]
    torch.testing.assert_close(again.delta(weight), layer.delta(weight), rtol=5e-2, atol=5e-2)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        stem = "lora_unet_" + CONV.replace(".", "_")
        assert set(file.keys()) == {f"{stem}.{part}" for part in [*layer.tensors(), "alpha"]}
    # peft's folders of LoHa and LoKr have tests of their own
    for format in ("diffusers", "peft") if layer.kind == "oft" else ("diffusers",):
        other = tmp_path / ("folder" if format == "peft" else "b.safetensors")
        with pytest.raises(UserError, match="write it with format kohya"):
            files.write(files.LoraFile({("unet", CONV): layer}), other, format)  # type: ignore[arg-type]


# --- with a model -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A trained LoRA, DoRA, LoHa, LoKr and OFT on the embedded base."""
    folder, family, paths = tmp_path_factory.mktemp("mixed"), families.load(Base(model="embedded")), []
    targets = ["cross-attention", "convolutions", "text-encoder"]
    for number, changes in enumerate(
        ({}, {"dora": True}, {"kind": "loha"}, {"kind": "lokr"}, {"kind": "oft", "rank": 8})
    ):
        own = [target for target in targets if target != "convolutions" or changes.get("kind") != "oft"]
        cfg = Adapter.model_validate({"rank": 2, "targets": own} | changes)
        handle = inject(family, cfg, name="made")
        random = draw(number)
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.add_(random(*parameter.shape) * 0.03)
        name = "dora" if cfg.dora else cfg.kind
        paths.append(folder / f"{name}.safetensors")
        files.write(handle.to_lora_file(), paths[-1], dtype="float32")
        handle.remove()
    return paths


def test_all_kinds_merge_into_a_checkpoint_as_they_act_together(mixed: list[Path], tmp_path: Path) -> None:
    """`--check`: base and adapters at run time, and the merged file."""
    texts = [
        f"{mixed[0]}:0.7",
        f"{mixed[1]}:unet=0.4,te=-0.3",
        f"{mixed[2]}:-0.5",
        str(mixed[3]),
        f"{mixed[4]}:0.6",
    ]
    told = merge.run(texts, into="embedded", output=tmp_path / "all.safetensors", dtype="float32", check=True)
    assert told["check"]["agrees"]
    assert told["check"]["unet"]["relative"] < 1e-5


@pytest.mark.parametrize("number", range(5))
def test_each_kind_merges_as_it_acts(mixed: list[Path], tmp_path: Path, number: int) -> None:
    texts, output = [f"{mixed[number]}:0.8"], tmp_path / "a.safetensors"
    told = merge.run(texts, into="embedded", output=output, dtype="float32", check=True)
    assert told["check"]["unet"]["relative"] < 1e-5
    assert told["check"]["text_encoder"]["relative"] < 1e-5


def test_each_kind_is_inspected_from_its_header(mixed: list[Path]) -> None:
    kinds = [inspect(path)["kind"] for path in mixed]
    assert kinds == ["locon", "dora", "loha", "lokr", "oft"]
    told = inspect(mixed[2])
    assert (told["rank"], told["alpha"]) == (2, 2.0)
    assert set(told["components"]["unet"]["ranks"].values()) == {2}
    assert inspect(mixed[4])["rank"] == 8
    assert inspect(mixed[3])["rank"] == 2


def test_products_become_one_lora(mixed: list[Path], tmp_path: Path) -> None:
    """LoRA, LoHa and LoKr exactly, or cut to a rank with the residual told; DoRA and OFT are refused."""
    sources = [(mixed[0], 0.7), (mixed[2], -0.4), (mixed[3], 1.0)]
    told = merge.run([f"{p}:{w}" for p, w in sources], into=None, output=tmp_path / "one.safetensors")
    assert told["residual"] < 1e-6
    one = files.read(tmp_path / "one.safetensors")
    assert one.kind == "locon"
    for key, layer in list(one.layers.items())[::9]:
        parts = [(files.read(p).layers[key], w) for p, w in sources]
        total = sum(w * part.update(torch.float64).reshape(layer.shape) for part, w in parts)
        torch.testing.assert_close(layer.update(torch.float64), total, rtol=1e-3, atol=1e-5)
    cut = merge.run([str(mixed[2])], into=None, output=tmp_path / "cut.safetensors", rank=2)
    assert 0 < cut["residual"] < 1
    for path, name in ((mixed[1], "DoRA"), (mixed[4], "OFT")):
        with pytest.raises(UserError, match=rf"is a {name}: what it adds depends on the base"):
            merge.run([str(mixed[0]), str(path)], into=None, output=tmp_path / "no.safetensors")


def test_a_cut_is_the_best_of_its_rank() -> None:
    for name in ("loha", "loha conv", "lokr", "lokr whole", "loha tucker"):
        layer = SAMPLES[name][0]
        total = layer.update(torch.float64).flatten(1)
        cut = merge_layer([(layer, 1.0)], 2, (3, 3) if "conv" in name else ())
        error = (cut.layer.update(torch.float64).flatten(1) - total).norm()
        best = torch.linalg.svdvals(total)[2:].norm()
        torch.testing.assert_close(error, best, rtol=1e-4, atol=1e-4)
        assert cut.residual == pytest.approx(float(best / total.norm()), rel=1e-4, abs=1e-6)
    assert merge_layer([(SAMPLES["loha conv"][0], 1.0)], 2, (3, 3)).layer.shape == (12, 8, 3, 3)


def test_one_file_may_mix_kinds(tmp_path: Path) -> None:
    """LyCORIS' presets give each kind of module an algorithm of its own."""
    family = families.load(Base(model="embedded"))
    found = family.unet.get_submodule(CONV).weight.shape
    width = family.unet.get_submodule("down_blocks.0.attentions.0.proj_in").weight.shape
    random = draw(3)
    layers: dict[tuple[str, str], Update] = {
        ("unet", CONV): LokrLayer(
            1.0, lokr_w1=random(2, 2), lokr_w2=random(found[0] // 2, found[1] // 2, 3, 3)
        ),
        ("unet", "down_blocks.0.attentions.0.proj_in"): LoraLayer(
            random(2, width[1]), random(width[0], 2), 1.0
        ),
    }
    path = files.write(files.LoraFile(layers), tmp_path / "a.safetensors", dtype="float32")
    assert index(path).kind == "lokr+lora"
    handle = attach(family, files.read(path), name="both")
    assert sum(map(len, handle.modules.values())) == 2
    handle.remove()
    told = merge.run([str(path)], into="embedded", output=tmp_path / "b.safetensors", check=True)
    assert told["check"]["agrees"]


def test_metadata_names_the_algorithm() -> None:
    from spf_kit.adapters.metadata import _about_network
    from spf_kit.schema import Attribute, Config

    def network(**adapter: object) -> tuple[str, dict[str, Any]]:
        config = Config(attribute=Attribute(name="a", target="b"), adapter=Adapter.model_validate(adapter))
        about = _about_network(config)
        return about["network_module"], json.loads(about["network_args"])

    assert network() == ("networks.lora", {})
    assert network(kind="loha") == ("lycoris.kohya", {"algo": "loha"})
    assert network(kind="oft") == ("lycoris.kohya", {"algo": "diag-oft"})
    lokr = {"algo": "lokr", "factor": 8, "decompose_both": True}
    assert network(kind="lokr", factor=8, decompose_both=True) == ("lycoris.kohya", lokr)
    module, arguments = network(targets=["convolutions"], ranks={"convolutions": 4})
    assert (module, arguments["conv_dim"]) == ("networks.lora", 4)
