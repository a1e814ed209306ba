"""What saves memory, in combination: every pair of values trains, or is refused with the reason.

A covering array: each row is a run of two steps on the embedded base, and every pair of values of two
settings stands together in some row.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from spf_kit import config, families
from spf_kit.data.cache import LatentCache
from spf_kit.errors import UserError
from spf_kit.schema import Base
from spf_kit.training import trainer

Row = dict[str, str]

COMMON = [
    "data.resolution=32", "data.buckets=false", "train.steps=2", "train.batch_size=1", "preview.every=0",
    "train.log_tensorboard=false", "adapter.rank=2", "train.threads=1", "evaluate.enabled=false",
    "train.learning_rate=1e-3", 'output.dtype="float32"',
]  # fmt: skip
SETTINGS: Mapping[str, Sequence[str]] = {
    "recipe": ["naive", "spf", "spf with text-encoder"],
    "kind": ["lora", "dora", "oft"],
    "optimizer": ["adamw", "adamw8bit", "pagedadamw8bit", "prodigy"],
    "quantize": ["", "fp8", "8bit", "nf4"],
    "dtype": ["float32", "float16", "bfloat16"],
    "precision": ["no", "bf16"],
    "attention": ["sdpa", "sliced"],
    "checkpointing": ["false", "true"],
    "accumulation": ["1", "2"],
    "cache": ["memory", "disk", "none"],
    "vae": ["whole", "tiling", "slicing"],
}
# what is refused, whatever else is set, and the reason
REFUSED = {
    "xformers without a GPU": (["base.attention=xformers"], "attention = 'xformers' "),
    "fp16 without a GPU": (["train.mixed_precision=fp16"], "needs a GPU and there is none"),
    "two half types": (
        ["base.dtype=float16", "train.mixed_precision=bf16"],
        'computes in bfloat16, but base.dtype = "float16"',
    ),
    "two half types on a GPU": (
        ["base.dtype=bfloat16", "train.mixed_precision=fp16"],
        'computes in float16, but base.dtype = "bfloat16"',
    ),
    **{
        f"{kind} compiled": (
            [f"base.quantize={kind}", "train.compile=regional"], "keeps every widened weight",
        )
        for kind in ("fp8", "8bit", "nf4")
    },
    "OFT on convolutions": (
        ["adapter.kind=oft", 'adapter.targets=["convolutions"]'],
        "OFT is trained on linear layers alone",
    ),
    "DoRA of another kind": (["adapter.kind=loha", "adapter.dora=true"], "magnitudes are trained with LoRA"),
    "a schedule-free average of an average": (
        ["train.optimizer=adamw_schedulefree", "train.ema=0.9"], "averages the weights by itself",
    ),
}  # fmt: skip


def sets(row: Row) -> list[str]:
    kind = row.get("kind", "lora")
    found = [
        *COMMON,
        f'adapter.kind="{"lora" if kind == "dora" else kind}"',
        f"adapter.dora={str(kind == 'dora').lower()}",
        f'train.optimizer="{row.get("optimizer", "adamw")}"',
        f'base.dtype="{row.get("dtype", "float32")}"',
        f'train.mixed_precision="{row.get("precision", "no")}"',
        f'base.attention="{row.get("attention", "sdpa")}"',
        f"train.gradient_checkpointing={row.get('checkpointing', 'false')}",
        f"train.gradient_accumulation={row.get('accumulation', '1')}",
        f'data.cache="{row.get("cache", "memory")}"',
        f"base.vae_tiling={str(row.get('vae') == 'tiling').lower()}",
        f"base.vae_slicing={str(row.get('vae') == 'slicing').lower()}",
    ]
    if row.get("quantize"):
        found.append(f'base.quantize="{row["quantize"]}"')
    targets = ["cross-attention", "self-attention", "feed-forward"]
    if "text-encoder" in row.get("recipe", ""):
        targets.append("text-encoder")
    return [*found, f"adapter.targets={json.dumps(targets)}"]


def meets(a: tuple[str, str], b: tuple[str, str]) -> bool:
    """Whether two values may stand together."""
    return {a, b} != {("dtype", "float16"), ("precision", "bf16")}


def covering() -> list[Row]:
    """Rows in which every pair of values meets, greedily: each takes what has most pairs still open."""
    values = [(name, value) for name, listed in SETTINGS.items() for value in listed]
    todo = {frozenset(p) for p in itertools.combinations(values, 2) if p[0][0] != p[1][0] and meets(*p)}
    rows = []
    while todo:
        row = dict(min(map(sorted, todo)))
        for name in sorted(SETTINGS.keys() - row.keys(), key=lambda name: (-len(SETTINGS[name]), name)):
            allowed = [v for v in SETTINGS[name] if all(meets((name, v), item) for item in row.items())]
            row[name] = max(allowed, key=lambda v: sum({(name, v), item} in todo for item in row.items()))
        todo -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
        rows.append({name: row[name] for name in SETTINGS})
    return rows


ROWS = covering()


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(filter(None, row.values())))
def test_every_pair_trains(row: Row, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPF_KIT_CACHE", str(tmp_path / "cache"))
    recipe = row["recipe"].partition(" ")[0]
    resolved = config.load("glasses", data=pictures, recipe=recipe, sets=sets(row))
    result = trainer.train(resolved, tmp_path / "run")
    lines = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    tensors = load_file(result.lora)
    assert all(torch.isfinite(value).all() for value in tensors.values())
    assert (result.family.text_encoder is None) == ("text-encoder" not in row["recipe"])
    assert (result.family.vae is None) == (row["cache"] != "none")


def test_every_pair_is_there() -> None:
    for a, b in itertools.combinations(SETTINGS, 2):
        pairs = {pair for pair in itertools.product(SETTINGS[a], SETTINGS[b]) if meets(*zip((a, b), pair))}
        assert {(row[a], row[b]) for row in ROWS} == pairs


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_with_the_reason(name: str, pictures: Path, tmp_path: Path) -> None:
    given, reason = REFUSED[name]

    def run() -> None:
        resolved = config.load("glasses", data=pictures, recipe="naive", sets=[*COMMON, *given])
        trainer.train(resolved, tmp_path / "run")

    with pytest.raises(UserError, match=re.escape(reason)):
        run()
    assert not (tmp_path / "run").exists()


# --- the VAE ----------------------------------------------------------------------------------------------


def test_tiles_change_large_pictures_a_little_and_small_ones_not_at_all() -> None:
    whole, tiled = (families.load(Base(model="embedded", vae_tiling=tiling)) for tiling in (False, True))
    side = whole.vae.config.sample_size
    source = torch.Generator().manual_seed(0)
    small = torch.rand(1, 3, side, side, generator=source) * 2 - 1
    large = F.interpolate(small, scale_factor=2, mode="bilinear")
    with torch.no_grad():
        assert torch.equal(whole.encode_image(small)[0], tiled.encode_image(small)[0])
        expected, found = whole.encode_image(large)[0], tiled.encode_image(large)[0]
        assert found.shape == expected.shape
        assert 0 < (found - expected).norm() < 0.2 * expected.norm()
    assert LatentCache("memory", whole).base != LatentCache("memory", tiled).base, "other latents"
    tiled.free_encoders(["vae"])
    tiled.reload_encoders()
    assert tiled.vae.use_tiling
    assert not tiled.vae.use_slicing
