"""Several LoRAs into one: the sum of their updates, cut to a rank by its singular value decomposition.

The sum of updates of ranks r_1, ..., r_n has at most rank R = r_1 + ... + r_n, and its factors are known:
U = [w_1 s_1 up_1, ...] (o, R) and D = [down_1; ...] (R, i). `low_rank` cuts their product.

LoHa and LoKr are products too, of higher rank (`Update.factors`): r^2 columns, or a Kronecker factor's size
times r. Where R exceeds the rank that a matrix can have, the decomposition is made all the same, and loses
nothing. DoRA and OFT add what depends on the base, and no LoRA can say that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from spf_kit.adapters import files, keys
from spf_kit.adapters.guess import family_name, guess_family
from spf_kit.adapters.index import IndexedLayer, LayerKey
from spf_kit.adapters.keys import flatten
from spf_kit.adapters.layers import LAYERS, LoraLayer, Update, load_layer
from spf_kit.adapters.low_rank import Cut, cut_product, whole_residual
from spf_kit.adapters.merge_plan import Source, Weighted, open_sources
from spf_kit.adapters.parts import NAMES
from spf_kit.adapters.streaming import Progress
from spf_kit.adapters.tensors import DTYPES, parse_dtype
from spf_kit.errors import UserError
from spf_kit.files import refuse_existing


def merge_loras(
    loras: Sequence[Weighted],
    output: str | Path,
    rank: int | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write one LoRA in kohya's format that does what `loras` do together, each times its weight.

    Args:
        rank: of the result; None keeps the sum exactly, at the sum of the ranks. A layer never gets more than
            that sum.
        dtype: None takes the widest of the LoRAs'.

    Returns:
        JSON-able: `residual` is the share of the update that the rank leaves out, 0 if nothing, of all layers
        together; `worst` names the layer that lost most.

    Raises:
        UserError: something is missing or damaged, the LoRAs are of different families or hold DoRA or OFT,
            whose sum depends on the base, or `output` exists without `overwrite`.
    """
    output = Path(output)
    refuse_existing(output, overwrite)
    sources = open_sources(loras)
    _check(sources)
    groups = _by_layer(sources)
    layers, cuts = {}, {}
    for number, (key, parts) in enumerate(groups.items(), start=1):
        cut = merge_layer(parts, rank, keys.kernel(key[1]))
        layers[key], cuts[key] = cut.layer, cut
        if progress:
            progress(number, len(groups), key[1])
    kept = parse_dtype(dtype) if dtype else _widest(sources)
    sai = any(source.lora.unet_names == "sai" for source in sources)
    merged = files.LoraFile(dict(layers), _metadata(sources, layers), unet_names="sai" if sai else None)
    files.write(merged, output, "kohya", kept)
    residual = whole_residual(cuts.values())
    worst = max(cuts, key=lambda key: cuts[key].residual)
    ranks = sorted(merged.ranks)
    return {
        "output": str(output),
        "loras": [{"file": str(s.lora.path), "weight": str(s.weights)} for s in sources],
        "layers": len(layers),
        "rank": ranks[0] if len(ranks) == 1 else ranks,
        "residual": residual,
        "worst": {"layer": f"{worst[0]}: {worst[1]}", "residual": cuts[worst].residual},
        "sentence": f"{output}: {len(sources)} LoRAs in one, rank {ranks[-1]}, {residual:.2%} of it lost",
    }


def merge_layer(
    parts: Sequence[tuple[Update, float]],
    rank: int | None,
    kernel: tuple[int, ...] = (),
    keep: float | None = None,
) -> Cut:
    """One layer of some LoRAs, each with its weight, as one of `rank` (None: as many as needed), see
    `cut_product`. `kernel` is that of the weight, where the layers' shapes do not tell it."""
    shape = max((layer.shape for layer, _ in parts), key=len)
    if len(shape) == 2 and kernel and any(layer.kind != "lora" for layer, _ in parts):
        if shape[1] % math.prod(kernel):
            raise UserError(
                f"a layer of the shape {list(shape)} does not fit a convolution of {kernel[0]} x {kernel[-1]}"
                ": the LoRA is damaged, or made for another model"
            )
        shape = (shape[0], shape[1] // math.prod(kernel), *kernel)
    factors = [(layer.factors(), weight) for layer, weight in parts]
    up = torch.cat([up * weight for (up, _), weight in factors], dim=1)
    down = torch.cat([down for (_, down), _ in factors])
    return cut_product(up, down, shape, rank, keep)


def _by_layer(sources: Sequence[Source]) -> dict[LayerKey, list[tuple[Update, float]]]:
    """The layers of all LoRAs by where they sit, whatever naming each file has. Weight 0 adds nothing."""
    names: dict[LayerKey, LayerKey] = {}
    found: dict[LayerKey, list[tuple[IndexedLayer, float, Path]]] = {}
    for source in sources:
        for (component, module), layer in source.lora.layers.items():
            place = (component, flatten(module))
            names.setdefault(place, (component, module))
            own = found.setdefault(place, [])
            if own and math.prod(own[0][0].shape) != math.prod(layer.shape):
                raise UserError(
                    f"the LoRAs do not fit each other: the layer {module!r} of {component} is "
                    f"{list(own[0][0].shape)} in {str(own[0][2])!r} and {list(layer.shape)} in "
                    f"{str(source.lora.path)!r}"
                )
            own.append((layer, source.weights.of(component), source.lora.path))
    return {
        names[place]: [(load_layer(layer), weight) for layer, weight, _ in own]
        for place, own in found.items()
    }


def _check(sources: Sequence[Source]) -> None:
    for source in sources:
        for layer in source.lora.layers.values():
            if layer.dora_axis is not None or LAYERS[layer.kind].depends_on_weight:
                name = "DoRA" if layer.dora_axis is not None else NAMES[layer.kind]
                raise UserError(
                    f"{str(source.lora.path)!r} is a {name}: what it adds depends on the base, so merge it "
                    "into a checkpoint with --into"
                )
    families = {guess_family(s.lora.layers, s.lora.metadata): s.lora.path for s in sources}
    if len(families) > 1:
        told = " and ".join(f"{str(path)!r} for {family_name(name)}" for name, path in families.items())
        raise UserError(f"the LoRAs are of different families: {told}")


def _widest(sources: Sequence[Source]) -> torch.dtype:
    types = {DTYPES[layer.dtype] for source in sources for layer in source.lora.layers.values()}
    return max(types, key=lambda dtype: dtype.itemsize)


def _metadata(sources: Sequence[Source], layers: dict[LayerKey, LoraLayer]) -> dict[str, str]:
    """What all LoRAs say alike, and which they were."""
    first, *others = (source.lora.metadata for source in sources)
    common = {
        key: value
        for key, value in first.items()
        if all(other.get(key) == value for other in others)
        and key.startswith(("ss_base_", "ss_v2", "ss_sd_", "ss_clip_skip", "modelspec."))
        and key != "modelspec.hash_sha256"
    }
    rank = max(layer.rank for layer in layers.values())
    triggers = [source.lora.metadata.get("modelspec.trigger_phrase", "") for source in sources]
    told = [f"{source.lora.path.name} ({source.weights})" for source in sources]
    entries = [{"file": s.lora.path.name, "weight": str(s.weights)} for s in sources]
    return {
        **common,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "modelspec.trigger_phrase": ", ".join(dict.fromkeys(filter(None, triggers))),
        "modelspec.merged_from": ", ".join(told),
        "spf_kit.merged": json.dumps(entries),
    }
