"""LoRAs merged into checkpoints and into each other: the same model as base + LoRAs at run time."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from spf_kit import families
from spf_kit.adapters import files, merge
from spf_kit.adapters.files import LoraFile, LoraLayer
from spf_kit.adapters.inject import inject
from spf_kit.adapters.inspect import inspect
from spf_kit.adapters.layers import load_layer
from spf_kit.adapters.merge_loras import merge_layer, merge_loras
from spf_kit.adapters.weights import Weights, parse, parse_weighted
from spf_kit.embedded import base_path
from spf_kit.errors import UserError
from spf_kit.families.single_file import merge_targets, write_single_file
from spf_kit.headers import read_header
from spf_kit.schema import Adapter, Base

torch.set_num_threads(1)
KINDS = {
    "plain": {"alpha": 2.0, "targets": ["cross-attention", "text-encoder"]},
    "locon": {"rank": 3, "targets": ["cross-attention", "convolutions"]},
    "dora": {"dora": True, "targets": ["cross-attention", "convolutions", "text-encoder"]},
}


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One trained LoRA of each kind."""
    folder, family, found = tmp_path_factory.mktemp("loras"), families.load(Base(model="embedded")), {}
    for number, (name, changes) in enumerate(KINDS.items()):
        handle = inject(family, Adapter.model_validate({"rank": 4} | changes))
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        metadata = {"modelspec.trigger_phrase": f"the {name}", "ss_base_model_version": "embedded"}
        found[name] = files.write(
            handle.to_lora_file(metadata), folder / f"{name}.safetensors", dtype="float16"
        )
        handle.remove()
    return found


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as a single file in float16, with metadata of others and a tensor that nobody knows."""
    path = write_single_file(base_path(), tmp_path_factory.mktemp("base") / "base.safetensors", "float16")
    header, tensors = read_header(path), load_file(path)
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors["alphas_cumprod"] = torch.rand(1000, dtype=torch.float64)
    metadata = header.metadata | {"modelspec.title": "My base", "modelspec.hash_sha256": "0xold"}
    save_file(dict(reversed(tensors.items())), path, metadata)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as a diffusers folder in float32, with what real folders hold beside the weights."""
    path = tmp_path_factory.mktemp("base") / "folder"
    family = families.load(Base(model="embedded"))
    family.pipeline().save_pretrained(path)
    (path / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"PK\x03\x04 a stale pickle")
    (path / "README.md").write_text("hello")
    return path


@torch.no_grad()
def output(model: Path) -> Tensor:
    family = families.load(Base(model=str(model)))
    noise = torch.randn((1, family.latent_channels, 8, 8), generator=torch.Generator().manual_seed(7))
    return family.predict(noise, torch.tensor([600]), family.encode_text(["a woman, red hair"]))


def expected(
    base: Path, key_of: Callable[[str, str], str], loras: list[tuple[Path, Weights]]
) -> dict[str, Tensor]:
    """The merged tensors by definition: W + sum of weight * delta(W), each delta from a loaded LoRA."""
    tensors = load_file(base)
    totals = {}
    for path, weights in loras:
        for (component, module), layer in files.read(path).layers.items():
            key = key_of(component, module)
            start = totals.get(key, tensors[key].double())
            totals[key] = start + weights.of(component) * layer.delta(tensors[key]).double()
    return tensors | {key: total.to(tensors[key].dtype) for key, total in totals.items()}


# --- into a single file -----------------------------------------------------------------------------------


def test_a_single_file_keeps_its_layout(single: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    output_path, calls = tmp_path / "merged.safetensors", []
    weighted = [
        (loras["plain"], 0.7),
        (loras["locon"], -0.5),
        (loras["dora"], Weights(1.0, {"text_encoder": 0.3})),
    ]
    told = merge.merge(weighted, single, output_path, progress=lambda *call: calls.append(call))
    before, after = read_header(single), read_header(output_path)
    assert list(after.tensors) == list(before.tensors)  # the order of the bytes
    assert all(
        (a.dtype, a.shape) == (b.dtype, b.shape)
        for a, b in zip(after.tensors.values(), before.tensors.values())
    )
    places = merge_targets(before)
    wanted = expected(
        single, lambda c, m: places[c, m],
        [(path, w if isinstance(w, Weights) else Weights(w)) for path, w in weighted],
    )  # fmt: skip
    old, got = load_file(single), load_file(output_path)
    changed = {name for name in old if not torch.equal(old[name], got[name])}
    assert len(changed) == told["weights_changed"]
    assert changed == {name for name in old if not torch.equal(old[name], wanted[name])}
    for name in changed:  # sums in float32 may round to the next float16 now and then, no more
        assert (got[name] != wanted[name]).float().mean() < 0.01
        torch.testing.assert_close(got[name], wanted[name], rtol=2e-3, atol=1e-6)
    assert "alphas_cumprod" not in changed
    assert [call[0] for call in calls] == list(range(1, len(old) + 1))
    assert {call[1] for call in calls} == {len(old)}


def test_metadata_is_kept_and_extended(single: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    first = tmp_path / "first.safetensors"
    merge.merge([(loras["plain"], 0.7)], single, first)
    second = tmp_path / "second.safetensors"
    merge.merge([(loras["locon"], Weights(1.0, {"unet": -2.0}))], first, second)
    before, after = read_header(single).metadata, read_header(second).metadata
    assert "modelspec.hash_sha256" not in after  # it no longer holds
    kept = {key for key in before if key != "modelspec.hash_sha256"}
    assert all(after[key] == before[key] for key in kept)
    assert after["modelspec.merged_from"] == "plain.safetensors (0.7), locon.safetensors (unet=-2)"
    assert [entry["file"] for entry in json.loads(after["spf_kit.merged"])] == [
        "plain.safetensors",
        "locon.safetensors",
    ]
    told = inspect(second)
    assert (told["kind"], told["family"], told["title"]) == ("checkpoint", "embedded", "My base")
    assert told["merged"][0]["trigger"] == "the plain"


def test_weight_zero_changes_no_byte_of_the_data(
    single: Path, loras: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "same.safetensors"
    told = merge.merge([(loras["plain"], 0.0), (loras["dora"], 0.0)], single, path)
    assert told["weights_changed"] == 0
    before, after = read_header(single), read_header(path)
    assert path.read_bytes()[after.data_start :] == single.read_bytes()[before.data_start :]


def test_merged_is_base_plus_loras_at_run_time(single: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    specs = [f"{loras['plain']}:0.8", f"{loras['locon']}:-0.5", f"{loras['dora']}:unet=0.6,te=-0.4"]
    path = tmp_path / "merged.safetensors"
    told = merge.run(specs, into=str(single), output=path, dtype="float32", check=True)
    assert told["check"]["agrees"]
    assert told["check"]["unet"]["relative"] < 1e-4
    assert told["check"]["text_encoder"]["relative"] < 1e-4
    types = {info.dtype for name, info in read_header(path).tensors.items() if "position_ids" not in name}
    assert types == {"F32"}  # even alphas_cumprod, which was float64
    half = merge.run(specs, into=str(single), output=tmp_path / "half.safetensors", check=True)
    assert half["check"]["agrees"]
    assert half["check"]["unet"]["relative"] > told["check"]["unet"]["relative"]  # rounding shows


def test_a_wrong_merge_fails_its_check(single: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    from spf_kit.adapters.check import check

    path = tmp_path / "merged.safetensors"
    merge.merge([(loras["plain"], 1.0)], single, path)
    with pytest.raises(UserError, match="does not do what base and LoRA do"):
        check([(loras["plain"], -1.0)], single, path)


# --- into a folder ----------------------------------------------------------------------------------------


def test_a_folder_is_copied_and_its_weights_changed(
    folder: Path, loras: dict[str, Path], tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    merge.merge([(loras["locon"], 0.5)], folder, merged)
    listing = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    now = {p.relative_to(merged).as_posix() for p in merged.rglob("*") if p.is_file()}
    assert listing - now == {"unet/diffusion_pytorch_model.bin"}  # pickles that are no longer true
    assert now <= listing
    changed = {name for name in now if (folder / name).read_bytes() != (merged / name).read_bytes()}
    assert changed == {"unet/diffusion_pytorch_model.safetensors"}
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize(("name", "weight"), [("plain", 0.7), ("locon", -0.5)])
def test_diffusers_fuses_the_same_weights(
    folder: Path, loras: dict[str, Path], tmp_path: Path, name: str, weight: float
) -> None:
    from diffusers import StableDiffusionPipeline

    told = merge.merge([(loras[name], weight)], folder, tmp_path / "merged")
    theirs = StableDiffusionPipeline.from_pretrained(folder)
    theirs.load_lora_weights(str(loras[name].parent), weight_name=loras[name].name)
    theirs.fuse_lora(lora_scale=weight)
    theirs.unload_lora_weights()
    ours = StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    plain = StableDiffusionPipeline.from_pretrained(folder)
    changed = 0
    for component in ("unet", "text_encoder"):
        states = [getattr(pipeline, component).state_dict() for pipeline in (ours, theirs, plain)]
        assert states[0].keys() == states[1].keys()
        for key in states[0]:
            torch.testing.assert_close(states[0][key], states[1][key], rtol=1e-4, atol=1e-6)
            changed += not torch.equal(states[0][key], states[2][key])
    assert changed == told["weights_changed"]


def test_a_folder_and_a_single_file_give_the_same_model(
    folder: Path, loras: dict[str, Path], tmp_path: Path
) -> None:
    single = write_single_file(folder, tmp_path / "base.safetensors")
    specs = [(path, 0.5) for path in loras.values()]
    merge.merge(specs, folder, tmp_path / "folder")
    merge.merge(specs, single, tmp_path / "single.safetensors")
    models = [families.load(Base(model=str(tmp_path / name))) for name in ("folder", "single.safetensors")]
    for component, module in models[0].components().items():
        other = models[1].components()[component].state_dict()
        assert all(torch.equal(value, other[name]) for name, value in module.state_dict().items())


def test_a_folder_in_half_precision_says_so(folder: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    import transformers

    merged = tmp_path / "merged"
    merge.merge([(loras["plain"], 1.0)], folder, merged, "float16")
    for component in ("unet", "vae", "text_encoder"):
        (file,) = (merged / component).glob("*.safetensors")
        assert {info.dtype for info in read_header(file).tensors.values()} == {"F16"}
    assert transformers.CLIPTextModel.from_pretrained(merged / "text_encoder").dtype == torch.float16
    torch.testing.assert_close(
        output(merged), output_of(folder, loras["plain"], tmp_path), rtol=0.05, atol=0.02
    )


def output_of(folder: Path, lora: Path, tmp_path: Path) -> Tensor:
    merge.merge([(lora, 1.0)], folder, tmp_path / "full")
    return output(tmp_path / "full")


def test_shards_and_variants_are_changed_alike(folder: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    base = tmp_path / "base"
    shutil.copytree(folder, base, ignore=shutil.ignore_patterns("*.bin"))
    (whole,) = (base / "unet").glob("*.safetensors")
    tensors = load_file(whole)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for part, own in parts.items():
        save_file({name: tensors[name] for name in own}, whole.with_name(part))
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(halves, whole.with_name("diffusion_pytorch_model.fp16.safetensors"))
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {name: part for part, own in parts.items() for name in own},
    }
    (base / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    merged, unet = tmp_path / "merged", tmp_path / "merged" / "unet"
    merge.merge([(loras["locon"], 1.0)], base, merged)
    wanted = load_file(unet / whole.name)
    assert any(not torch.equal(wanted[name], tensors[name]) for name in names)
    sharded = load_file(unet / "a.safetensors") | load_file(unet / "b.safetensors")
    assert all(torch.equal(sharded[name], wanted[name]) for name in names)
    half = load_file(unet / "diffusion_pytorch_model.fp16.safetensors")
    assert all(torch.allclose(half[name].float(), wanted[name], rtol=2e-3, atol=1e-4) for name in names)
    merge.merge([(loras["locon"], 1.0)], base, tmp_path / "bf16", "bfloat16")
    told = json.loads((tmp_path / "bf16/unet/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert told["metadata"]["total_size"] == 2 * sum(t.numel() for t in tensors.values())


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.fixture
def in_a_clean_place(tmp_path: Path) -> Iterator[Path]:
    """A place for an output, where a refusal leaves nothing."""
    place = tmp_path / "place"
    place.mkdir()
    yield place
    assert os.listdir(place) == []


def test_refusals_leave_nothing(
    single: Path, loras: dict[str, Path], tmp_path: Path, in_a_clean_place: Path
) -> None:
    out, plain = in_a_clean_place / "out.safetensors", loras["plain"]
    other = tmp_path / "other.safetensors"
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file(
        {f"{name}.lora_down.weight": torch.ones(4, 768), f"{name}.lora_up.weight": torch.ones(320, 4)}, other
    )
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(plain.read_bytes()[:-100])
    huge = files.read(plain)
    for layer in huge.layers.values():
        layer.up.fill_(60_000)
        layer.down.fill_(10)
    files.write(huge, tmp_path / "huge.safetensors")
    for layer in huge.layers.values():  # finite each, and their product not even in float32
        layer.up, layer.down = (torch.full_like(t, 1e30, dtype=torch.float32) for t in (layer.up, layer.down))
    files.write(huge, tmp_path / "overflowing.safetensors", dtype="float32")
    nan = load_file(plain)
    nan[next(n for n in nan if n.endswith("up.weight"))].fill_(torch.nan)
    save_file(nan, tmp_path / "nan.safetensors")
    for arguments, reason in (
        (
            ([(other, 1.0)], single, out),
            r"other\.safetensors' was made for Stable Diffusion 1\.x .*the embedded base",
        ),
        (([(tmp_path / "none.safetensors", 1.0)], single, out), r"none\.safetensors' does not exist"),
        (([(plain, 1.0)], tmp_path / "none", out), r"the checkpoint '.*none' does not exist"),
        (([(broken, 1.0)], single, out), r"broken\.safetensors' is damaged"),
        (([(tmp_path / "nan.safetensors", 1.0)], single, out), r"nan\.safetensors' is damaged.*NaN"),
        (([(tmp_path / "huge.safetensors", 1.0)], single, out), "too large for F16: lower the LoRA's weight"),
        (([(tmp_path / "overflowing.safetensors", 1.0)], single, out), "too large for F16"),
        (([(single, 1.0)], single, out), "is a checkpoint, not a LoRA"),
        (([(plain, 1.0)], plain, out), "is a LoRA, not a base model"),
        (([(plain, 1.0)], single, out.with_suffix(".ckpt")), r"must end in \.safetensors"),
        (([(plain, 1.0)], single, out, "float7"), "the dtype 'float7' is unknown"),
        (([], single, out), "nothing to merge"),
    ):
        with pytest.raises(UserError, match=reason):
            merge.merge(*arguments)


def test_existing_outputs_and_outputs_inside_the_input_are_refused(
    folder: Path, loras: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match="exists"):
        merge.merge([(loras["plain"], 1.0)], folder, out)
    merge.merge([(loras["plain"], 1.0)], folder, out, overwrite=True)
    assert (out / "unet").is_dir()
    with pytest.raises(UserError, match="lies within the folder that is merged"):
        merge.merge([(loras["plain"], 1.0)], folder, folder / "merged")
    with pytest.raises(UserError, match="exists"):
        merge_loras([(loras["plain"], 1.0)], out)
    for arguments, reason in (
        ({"into": str(folder), "rank": 4}, "--rank belongs to a merge without --into"),
        ({"into": None, "check": True}, "--check compares with a base model"),
    ):
        with pytest.raises(UserError, match=reason):
            merge.run([str(loras["plain"])], output=tmp_path / "x.safetensors", **arguments)  # type: ignore[arg-type]


def test_an_interrupted_merge_leaves_the_old_output(
    single: Path, loras: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    out.write_text("precious")

    def stop(done: int, total: int, text: str) -> None:
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge.merge([(loras["plain"], 1.0)], single, out, overwrite=True, progress=stop)
    assert out.read_text() == "precious"
    assert os.listdir(tmp_path) == ["out.safetensors"]


# --- algebra ----------------------------------------------------------------------------------------------


def layer(seed: int, shape: tuple[int, ...], rank: int, *, dora: bool = False) -> LoraLayer:
    g = torch.Generator().manual_seed(seed)
    down, up = torch.randn((rank, *shape[1:]), generator=g), torch.randn((shape[0], rank), generator=g)
    up = up[:, :, None, None] if len(shape) == 4 else up
    scale = torch.rand((shape[0], *[1] * (len(shape) - 1)), generator=g) + 0.5 if dora else None
    return LoraLayer(down, up, float(rank) / 2, scale)


shapes = st.sampled_from([(6, 5), (4, 3, 3, 3), (5, 4, 1, 1)])
factors = st.floats(-2, 2, allow_nan=False, width=16)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 99), st.integers(1, 4), st.booleans(), factors, factors)
def test_merging_is_linear_in_the_weights(
    shape: tuple[int, ...], seed: int, rank: int, dora: bool, a: float, b: float
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))
    delta = layer(seed, shape, rank, dora=dora).delta(weight)
    once = weight + (a + b) * delta
    twice = weight + a * delta + b * delta  # every difference is that from the plain weight
    torch.testing.assert_close(once, twice, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(once - (a + b) * delta, weight, rtol=1e-4, atol=1e-4)


@settings(max_examples=8, deadline=None)
@given(order=st.permutations(["plain", "locon", "dora"]), weights=st.tuples(factors, factors, factors))
def test_the_order_of_loras_does_not_matter(
    order: list[str], weights: tuple[float, ...], small: tuple[Path, dict[str, Path], Path]
) -> None:
    base, loras, place = small
    given_weights = dict(zip(["plain", "locon", "dora"], weights))
    results = []
    for names in (order, ["plain", "locon", "dora"]):
        path = place / "out.safetensors"
        merge.merge(
            [(loras[name], given_weights[name]) for name in names], base, path, "float32", overwrite=True
        )
        results.append(load_file(path))
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def small(
    single: Path, loras: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Path], Path]:
    """Two layers of each LoRA, so that an example takes no time."""
    place, found = tmp_path_factory.mktemp("small"), {}
    for name, path in loras.items():
        lora = files.read(path)
        chosen = sorted(key for key in lora.layers if key[0] == "unet" and "mid_block" in key[1])[:2]
        part = replace(lora, layers={key: lora.layers[key] for key in chosen})
        found[name] = files.write(part, place / f"{name}.safetensors")
    return single, found, place


def test_merge_then_unmerge(small: tuple[Path, dict[str, Path], Path]) -> None:
    base, loras, place = small
    merge.merge([(loras["locon"], 0.7)], base, place / "in.safetensors", "float32", overwrite=True)
    merge.merge(
        [(loras["locon"], -0.7)], place / "in.safetensors", place / "back.safetensors", overwrite=True
    )
    before, after = load_file(base), load_file(place / "back.safetensors")
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor.to(after[name].dtype), rtol=1e-5, atol=1e-5)


# --- LoRAs into one ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 7), (8, 6, 3, 3)])
@pytest.mark.parametrize("rank", [1, 3, 5, None])
def test_a_cut_layer_is_the_best_of_its_rank(shape: tuple[int, ...], rank: int | None) -> None:
    """Against the singular value decomposition of the whole sum."""
    parts = [(layer(0, shape, 2), 0.8), (layer(1, shape, 3), -1.5)]
    total = sum(weight * part.update(torch.float64) for part, weight in parts)
    values = torch.linalg.svdvals(total.flatten(1))
    cut = merge_layer(parts, rank)
    assert cut.layer.rank == min(rank or 5, 5)
    assert cut.layer.alpha == cut.layer.rank
    lost = values[cut.layer.rank :].square().sum().sqrt() if rank else torch.tensor(0.0)
    error = (cut.layer.update(torch.float64) - total).norm()
    torch.testing.assert_close(error, lost.double(), rtol=1e-4, atol=1e-5)
    assert cut.residual == pytest.approx(float(lost / values.norm()), rel=1e-4, abs=1e-6)


def test_loras_in_one_do_what_they_did_together(single: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    specs = [f"{loras['plain']}:0.7", f"{loras['locon']}:-0.5"]
    exact = merge.run(specs, into=None, output=tmp_path / "exact.safetensors", dtype="float32")
    assert (exact["residual"], exact["rank"]) == (0.0, {3: 3, 4: 4, 7: 7}.keys() and [3, 4, 7])
    merge.run([str(tmp_path / "exact.safetensors")], into=str(single), output=tmp_path / "one.safetensors")
    merge.run(specs, into=str(single), output=tmp_path / "two.safetensors")
    one, two = load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "two.safetensors")
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=2e-3, atol=1e-4)
    cut = merge.run(specs, into=None, output=tmp_path / "cut.safetensors", rank=2)
    assert 0 < cut["residual"] < 1
    assert cut["residual"] <= cut["worst"]["residual"]
    told = inspect(tmp_path / "cut.safetensors")
    assert (told["rank"], told["trigger"], told["family"]) == (2, "the plain, the locon", "embedded")


def test_loras_that_cannot_be_summed_are_refused(loras: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file(
        {f"{name}.lora_down.weight": torch.ones(4, 768), f"{name}.lora_up.weight": torch.ones(320, 4)}, other
    )
    for paths, reason in (
        ([loras["plain"], loras["dora"]], "is a DoRA: what it adds depends on the base"),
        ([loras["plain"], other], "are of different families"),
    ):
        with pytest.raises(UserError, match=reason):
            merge_loras([(path, 1.0) for path in paths], tmp_path / "out.safetensors")


def test_layers_are_read_one_at_a_time(loras: dict[str, Path], single: Path, tmp_path: Path) -> None:
    """Memory does not grow with the number of LoRAs: no more than one layer is alive at any time."""
    import weakref

    from spf_kit.adapters import compute

    alive: list[weakref.ref[LoraLayer]] = []
    most = 0

    def counting(indexed: object) -> LoraLayer:
        nonlocal most
        loaded = load_layer(indexed)  # type: ignore[arg-type]
        alive.append(weakref.ref(loaded))
        most = max(most, sum(reference() is not None for reference in alive))
        return loaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compute, "load_layer", counting)
        patch.setattr(compute, "HELD", 0)
        merge.merge([(path, 0.5) for path in loras.values()], single, tmp_path / "out.safetensors")
    assert len(alive) > 100
    assert most <= 2


def test_a_result_takes_no_other_files_place(
    spf_kit: Callable[..., Any], folder: Path, single: Path, loras: dict[str, Path], tmp_path: Path
) -> None:
    """With --overwrite too. The checkpoint itself may be replaced, but then nothing is compared with it."""
    lora, base = tmp_path / "a.safetensors", tmp_path / "base.safetensors"
    lora.write_bytes(loras["plain"].read_bytes())
    base.write_bytes(single.read_bytes())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "novel.txt").write_text("hello")
    for into, out, words in (
        (base, "a.safetensors", "is one of the LoRAs"),
        (folder, "b", "is no diffusers folder but holds 'novel.txt'"),
        (folder, ".", "where you are, or above it"),
        (folder, "..", "where you are, or above it"),
    ):
        refused = spf_kit("merge", lora, "--into", into, "--output", out, "--overwrite")
        assert refused.code == 2
        assert words in refused.err
    again = ("merge", lora, "--into", base, "--output", "base.safetensors", "--overwrite")
    assert "--check compares with the checkpoint as it was" in spf_kit(*again, "--check").err
    assert lora.read_bytes() == loras["plain"].read_bytes()
    assert base.read_bytes() == single.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b", "base.safetensors"]
    assert spf_kit(*again).code == 0
    assert base.read_bytes() != single.read_bytes()


@pytest.mark.parametrize("into", ["single", "folder"])
def test_a_full_disk_is_told_before_anything_is_written(
    request: pytest.FixtureRequest, loras: dict[str, Path], in_a_clean_place: Path, into: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """By the name that the user gave, and the sizes."""
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9e9, 9e9, 1e6))  # type: ignore[attr-defined]
    output = in_a_clean_place / "new" / ("out.safetensors" if into == "single" else "out")
    words = rf"cannot write '{re.escape(str(output))}': the result needs \d+ MB, the disk has 1 MB left"
    with pytest.raises(UserError, match=words):
        merge.merge([(loras["plain"], 1.0)], request.getfixturevalue(into), output)


@pytest.mark.parametrize("where", ["copy", "write"])
def test_a_disk_that_fills_up_meanwhile_leaves_nothing(
    single: Path, loras: dict[str, Path], in_a_clean_place: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by the thread that copies or by one that computes; the others end, too."""
    from spf_kit.adapters.transfer import Transfer

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Transfer, where, full)
    output, written = in_a_clean_place / "out.safetensors", list[str]()
    with pytest.raises(UserError, match=rf"cannot write '{re.escape(str(output))}'.*free some space"):
        merge.merge([(loras["plain"], 1.0)], single, output, progress=lambda *told: written.append(told[2]))
    assert len(written) < 32  # of 64 that change, as far as the others were meanwhile


# --- weights of LoRAs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path", "weights"),
    [
        ("a.safetensors", "a.safetensors", {}),
        ("a.safetensors:0.8", "a.safetensors", {"unet": 0.8, "text_encoder": 0.8}),
        ("a.safetensors:-1", "a.safetensors", {"unet": -1.0}),
        ("dir/a.safetensors:unet=0.8,te=0.4", "dir/a.safetensors", {"unet": 0.8, "text_encoder_2": 0.4}),
        ("a.safetensors:te1=0", "a.safetensors", {"unet": 1.0, "text_encoder": 0.0, "text_encoder_2": 1.0}),
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", {"unet": 1.0}),
        (r"C:\loras\a.safetensors:0.5", r"C:\loras\a.safetensors", {"unet": 0.5}),
        ("C:/loras/a.safetensors", "C:/loras/a.safetensors", {"unet": 1.0}),
        ("C:a.safetensors", "C:a.safetensors", {"unet": 1.0}),
    ],
)
def test_weights_are_parsed(text: str, path: str, weights: dict[str, float]) -> None:
    found_path, found = parse(text)
    assert str(found_path) == path
    assert {component: found.of(component) for component in weights} == weights


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a.safetensors:", "'' is no weight"),
        ("a.safetensors:lots", "'lots' is no weight"),
        ("a.safetensors:nan", "'nan' is no weight"),
        ("a.safetensors:1e999", "'1e999' is no weight"),
        ("a.safetensors:vae=1", "unknown component 'vae'"),
        ("a.safetensors:unet=x", "'x' is no weight"),
        ("a.safetensors:unet=1,unet=2", "'unet=2' weighs the unet again"),
        ("a.safetensors:te1=1,te=2", "'te=2' weighs the text encoder again"),
        (":0.8", "names no file"),
    ],
)
def test_wrong_weights_are_sentences(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        parse(text)


def test_a_name_with_a_colon_is_a_name_if_it_exists(tmp_path: Path) -> None:
    path = tmp_path / "style:0.5"
    path.write_text("")
    assert parse(str(path)) == (path, Weights())
    assert parse(f"{path}:2") == (path, Weights(2.0))
    assert parse_weighted(f"{path}:unet=2,te=2") == (path, 2.0)
    with pytest.raises(UserError, match="weighs components apart"):
        parse_weighted(f"{path}:unet=2")


def test_a_lora_file_of_no_effect_merges_to_the_base(single: Path, tmp_path: Path) -> None:
    key = ("unet", "mid_block.attentions.0.proj_in")
    outputs, inputs = read_header(single).tensors[merge_targets(read_header(single))[key]].shape[:2]
    zero = LoraFile({key: LoraLayer(torch.ones(2, inputs), torch.zeros(outputs, 2), 2.0)})
    path = files.write(zero, tmp_path / "zero.safetensors")
    merge.merge([(path, 1.0)], single, tmp_path / "out.safetensors")
    before, after = load_file(single), load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
