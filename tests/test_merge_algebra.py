"""What merging must keep whatever is merged: laws of the sum, against plain formulas in float64.

A file of four weights, layers of every kind for each, and random weights of the LoRAs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from spf_kit import headers
from spf_kit.adapters import compute, files, rows, streaming, transfer
from spf_kit.adapters.files import LoraFile
from spf_kit.adapters.index import index
from spf_kit.adapters.layers import LohaLayer, LokrLayer, LoraLayer, OftLayer, Update
from spf_kit.adapters.streaming import Change, rewrite
from spf_kit.adapters.tensors import DTYPES
from spf_kit.errors import UserError
from spf_kit.headers import read_header

torch.set_num_threads(1)
SHAPES = {"matrix": (24, 16), "conv": (16, 12, 3, 3), "point": (8, 20, 1, 1), "qkv": (36, 16)}
MODULES = {name: f"mid_block.attentions.{n}.proj_in" for n, name in enumerate(SHAPES)}
KINDS = ("lora", "dora", "dora of inputs", "loha", "lokr", "oft", "loha with magnitudes")
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def layer(kind: str, shape: tuple[int, ...], seed: int) -> Update:
    generator = torch.Generator().manual_seed(seed)

    def r(*size: int) -> Tensor:
        return torch.randn(size, generator=generator) * 0.4

    (o, i, *kernel), k = shape, torch.Size(shape[1:]).numel()
    tail = [1] * len(kernel)
    if kind in ("lora", "dora", "dora of inputs"):
        size = {"dora": (o, 1, *tail), "dora of inputs": (1, i, *tail)}.get(kind)
        return LoraLayer(r(3, i, *kernel), r(o, 3, *tail), 1.5, r(*size).abs() + 1 if size else None)
    if kind.startswith("loha"):
        magnitudes = r(o, 1).abs() + 1 if "magnitudes" in kind else None
        return LohaLayer(r(o, 2), r(2, k), r(o, 2), r(2, k), 3.0, dora_scale=magnitudes)
    if kind == "lokr":
        return LokrLayer(2.0, lokr_w1=r(4, 2), lokr_w2_a=r(o // 4, 2), lokr_w2_b=r(2, k // 2))
    return OftLayer(r(o // 4, 4, 4), 0.0)


def plain(update: Update, weight: Tensor) -> Tensor:
    """W' - W in float64, as the papers have it."""
    w = weight.double()
    flat = w.flatten(1)
    if isinstance(update, OftLayer):
        b = update.oft_blocks.double()
        q, one = b - b.mT, torch.eye(b.shape[1], dtype=torch.float64)
        rotations = (one + q) @ torch.linalg.inv(one - q)
        return (torch.block_diag(*rotations).T @ flat - flat).reshape(w.shape)
    p = {part: tensor.double() for part, tensor in update.tensors().items()}
    if isinstance(update, LoraLayer):
        u = p["up"].flatten(1) @ p["down"].flatten(1)
    elif isinstance(update, LohaLayer):
        u = (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])
    else:
        u = torch.kron(p["lokr_w1"], p["lokr_w2_a"] @ p["lokr_w2_b"])
    changed = w + (u * update.alpha / update.rank).reshape(w.shape)
    if "dora_scale" not in p:
        return changed - w
    axis = 0 if p["dora_scale"].shape[0] > 1 else 1
    norms = changed.square().sum([d for d in range(w.dim()) if d != axis], keepdim=True).sqrt()
    return p["dora_scale"].reshape(norms.shape) * changed / norms - w


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases of each type, and for each kind a file with a layer for each weight, thirds of q, k, v apart."""
    folder = tmp_path_factory.mktemp("algebra")
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    for name, dtype in TYPES.items():
        other = {
            "norm": torch.rand(7).to(dtype),
            "ids": torch.arange(9),
            "none": torch.empty(0, 4, dtype=dtype),
        }
        save_file({k: v.to(dtype) for k, v in tensors.items()} | other, folder / f"{name}.safetensors")
    for number, kind in enumerate(KINDS):
        layers: dict[tuple[str, str], Update] = {}
        for seed, (name, shape) in enumerate(SHAPES.items()):
            rows_of = shape[0] // 3 if name == "qkv" else shape[0]
            layers["unet", MODULES[name]] = layer(kind, (rows_of, *shape[1:]), 10 * number + seed)
        files.write(LoraFile(layers), folder / f"{kind}.safetensors", dtype="float32")
    return folder


Weighted = Sequence[tuple[str, float]]


def changes(place: Path, weighted: Weighted) -> dict[str, list[Change]]:
    found: dict[str, list[Change]] = {name: [] for name in SHAPES}
    for kind, factor in weighted:
        layers = index(place / f"{kind}.safetensors").layers
        for name, module in MODULES.items():
            third = KINDS.index(kind) % 3 if name == "qkv" else None
            found[name].append(Change(layers["unet", module], factor, third))
    return found


def merged(place: Path, weighted: Weighted, base: str = "F32", dtype: str | None = None) -> dict[str, Tensor]:
    out = place / "out.safetensors"
    out.unlink(missing_ok=True)
    header = read_header(place / f"{base}.safetensors")
    rewrite(header, changes(place, weighted), out, metadata={}, dtype=dtype)
    return load_file(out)


def by_definition(place: Path, weighted: Weighted, base: str = "F32") -> dict[str, Tensor]:
    tensors = load_file(place / f"{base}.safetensors")
    totals = {name: tensors[name].double() for name in SHAPES}
    for kind, factor in weighted:
        for name, update in zip(SHAPES, files.read(place / f"{kind}.safetensors").layers.values()):
            total, weight = totals[name], tensors[name]
            if name == "qkv":
                third = KINDS.index(kind) % 3
                total, weight = total.chunk(3)[third], weight.chunk(3)[third]
            total += factor * plain(update, weight)
    return totals


def close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float = 2e-6) -> None:
    for name in SHAPES:
        error = (found[name].double() - wanted[name].double()).norm()
        assert error <= tolerance * (1 + wanted[name].double().norm()), name


factors = st.floats(-2, 2, width=16)
mixtures = st.lists(st.tuples(st.sampled_from(KINDS), factors), min_size=1, max_size=5)
few = settings(max_examples=10, deadline=None)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_its_formula(place: Path, kind: str) -> None:
    wanted = by_definition(place, [(kind, 0.7)])
    close(merged(place, [(kind, 0.7)]), wanted)
    plain_file = load_file(place / "F32.safetensors")
    assert all(not torch.equal(wanted[name], plain_file[name].double()) for name in SHAPES)


@few
@given(mixtures)
def test_a_mixture_is_the_sum_of_its_parts(place: Path, mixture: Weighted) -> None:
    close(merged(place, mixture), by_definition(place, mixture))


@few
@given(st.sampled_from(KINDS), factors, factors)
def test_it_is_linear_in_the_weight(place: Path, kind: str, a: float, b: float) -> None:
    base = load_file(place / "F32.safetensors")
    once, one, other = (merged(place, [(kind, weight)]) for weight in (a + b, a, b))
    close(once, {name: one[name].double() + other[name] - base[name] for name in SHAPES}, 4e-6)


@few
@given(mixtures)
def test_a_weight_and_its_negative_leave_the_base(place: Path, mixture: Weighted) -> None:
    back = [(kind, -weight) for kind, weight in mixture]
    close(merged(place, [*mixture, *back]), load_file(place / "F32.safetensors"), 1e-5)


@few
@given(st.lists(st.tuples(st.sampled_from(("lora", "loha", "lokr")), factors), min_size=1, max_size=3))
def test_merged_and_unmerged_is_the_base(place: Path, mixture: Weighted) -> None:
    """In two files; what does not depend on the weight can be taken out of a checkpoint again."""
    save_file(merged(place, mixture), place / "there.safetensors")
    back = merged(place, [(kind, -weight) for kind, weight in mixture], "there")
    close(back, load_file(place / "F32.safetensors"), 1e-5)


@few
@given(mixtures, st.randoms(use_true_random=False))
def test_the_order_does_not_matter(place: Path, mixture: Weighted, random: object) -> None:
    turned = list(mixture)
    random.shuffle(turned)  # type: ignore[attr-defined]
    close(merged(place, turned), merged(place, mixture))


@few
@given(mixtures, st.sampled_from(sorted(TYPES)), st.sampled_from([None, *sorted(TYPES)]))
def test_sums_are_rounded_once(place: Path, mixture: Weighted, base: str, dtype: str | None) -> None:
    """To the type of the file, or the wanted one: never more than half a unit of it from the sum."""
    found, wanted = merged(place, mixture, base, dtype), by_definition(place, mixture, base)
    kept = TYPES[dtype or base]
    for name in SHAPES:
        assert found[name].dtype == kept
        unit = torch.finfo(kept).eps * wanted[name].abs() + torch.finfo(kept).tiny
        noise = 4e-6 * (1 + wanted[name].abs().max())  # of the sum in float32
        assert ((found[name].double() - wanted[name]).abs() <= 0.51 * unit + noise).all()
    assert found["norm"].dtype == kept
    assert torch.equal(found["ids"], torch.arange(9))


@pytest.fixture
def in_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of some rows, where a weight of these sizes would be one."""
    monkeypatch.setattr(rows, "BLOCK", 40)


@pytest.mark.parametrize("held", [compute.HELD, 0])
def test_blocks_and_many_layers_change_nothing(
    place: Path, in_small_blocks: None, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    """All layers at once with one block after another, and one layer after another."""
    monkeypatch.setattr(compute, "HELD", held)
    mixture = [(kind, 0.5) for kind in KINDS]
    close(merged(place, mixture), by_definition(place, mixture))


def test_threads_give_the_same_bytes(place: Path, in_small_blocks: None) -> None:
    mixture = [(kind, 0.5) for kind in KINDS]
    alone = merged(place, mixture, "F16")
    try:
        torch.set_num_threads(4)
        together = merged(place, mixture, "F16")
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(alone[name], together[name]) for name in alone)


@pytest.mark.parametrize("copies", ["by the system", "through buffers", "refused by the system"])
def test_what_is_untouched_keeps_its_bytes_and_its_place(
    place: Path, monkeypatch: pytest.MonkeyPatch, copies: str
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(transfer.errno.EXDEV, "another file system")

    if copies == "through buffers":
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    if copies == "refused by the system":
        monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    monkeypatch.setattr(streaming, "COPIED", 100)  # bytes: in many pieces
    monkeypatch.setattr(transfer, "CHUNK", 30)
    monkeypatch.setattr(transfer, "CACHED", 1000)
    header, out = read_header(place / "BF16.safetensors"), place / "copy.safetensors"
    for changed in ({}, {"conv": changes(place, [("lora", 1.0)])["conv"]}):
        out.unlink(missing_ok=True)
        names: list[str] = []
        rewrite(header, changed, out, metadata={"a": "b"}, progress=names.append)
        assert sorted(names) == sorted(header.tensors)
        there = read_header(out)
        assert list(there.tensors) == list(header.tensors)
        before, after = header.path.read_bytes(), out.read_bytes()
        for name, info in there.tensors.items():
            old = header.tensors[name]
            same = before[old.start : old.end] == after[info.start : info.end]
            assert same == (name not in changed)


def test_headers_and_torch_agree_on_what_is_a_floating_number() -> None:
    assert {name for name, dtype in DTYPES.items() if dtype.is_floating_point} == headers.FLOATING


def test_a_file_that_becomes_shorter_is_told(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes((place / "F32.safetensors").read_bytes())
    header = read_header(path)
    os.truncate(path, header.data_start + 10)
    for number, changed in enumerate(({}, changes(place, [("lora", 1.0)]))):
        with pytest.raises(UserError, match=r"a\.safetensors' became shorter while it was read"):
            rewrite(header, changed, tmp_path / f"{number}.out", metadata={})
