"""A LoRA of another rank: each layer's best approximation, and what it loses.

Layers that have the rank already, or less, keep every bit and their alpha; the others get alpha = rank, so
that loaders scale by 1. LoHa and LoKr are products too (`Update.factors`) and become a LoRA.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from spf_kit.adapters import files, keys
from spf_kit.adapters.files import LoraFile
from spf_kit.adapters.index import LayerKey
from spf_kit.adapters.keys import Format
from spf_kit.adapters.layers import LoraLayer, Update
from spf_kit.adapters.low_rank import Share, square, square_of_product, whole_residual
from spf_kit.adapters.merge_loras import merge_layer
from spf_kit.adapters.parts import NAMES
from spf_kit.adapters.streaming import Progress
from spf_kit.adapters.tensors import parse_dtype
from spf_kit.errors import UserError
from spf_kit.files import refuse_existing

_OF_THE_NETWORK = ("ss_network_args", "spf_kit.measured")  # no longer true of a LoRA that was cut


def resize(
    lora: str | Path,
    output: str | Path,
    rank: int | None = None,
    keep: float | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the LoRA with at most `rank` in each layer, in its own format.

    Args:
        rank: of every layer, or with `keep` the most that one gets; layers of less keep what they have.
        keep: share of a layer's squared norm, above 0 and up to 1; each layer gets the smallest rank for it.
        dtype: of the tensors; None keeps the file's.

    Returns:
        JSON-able: `residual` is the relative Frobenius norm of what is missing in the file as written, its
        rounding included, of all layers together; `worst` names the layer that lost most.

    Raises:
        UserError: neither `rank` nor `keep` is given, or one is out of range; the file is missing or damaged,
            is an OFT, or a DoRA that would have to be cut; `output` exists without `overwrite`.
    """
    output = Path(output)
    _check(rank, keep)
    refuse_existing(output, overwrite)
    source = files.read(lora)
    wanted = _format(source, output)
    files.check_output(output, wanted, overwrite)
    layers: dict[LayerKey, Update] = {}
    for number, (key, layer) in enumerate(source.layers.items(), start=1):
        layers[key] = _resized(source, key, layer, rank, keep)
        if progress:
            progress(number, len(source.layers), key[1])
    kept = parse_dtype(dtype or source.dtype)
    held = files.folded(layers, kept) if wanted == "diffusers" else layers
    shares = {key: share(layer, held[key].to(kept)) for key, layer in source.layers.items()}
    residual, worst = whole_residual(shares.values()), max(shares, key=lambda key: shares[key].residual)
    cut = sum(layers[key] is not layer for key, layer in source.layers.items())
    made = LoraFile(layers, dict(source.metadata), source.format, unet_names=source.unet_names)
    if cut:
        note = {"file": Path(lora).name, "rank": rank, "keep": keep, "residual": residual}
        made.metadata = _metadata(made, note)
    files.write(made, output, wanted, kept)
    ranks = sorted(made.ranks)
    return {
        "lora": str(lora),
        "output": str(output),
        "layers": len(layers),
        "cut": cut,
        "rank": ranks[0] if len(ranks) == 1 else ranks,
        "parameters": sum(t.numel() for layer in layers.values() for t in layer.tensors().values()),
        "residual": residual,
        "worst": {"layer": f"{worst[0]}: {worst[1]}", "residual": shares[worst].residual},
        "dtype": str(kept).removeprefix("torch."),
        "sentence": f"{output}: {cut} of {len(layers)} layers cut, rank "
        + (f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}")
        + f"; {residual:.2%} of the update is missing, {shares[worst].residual:.2%} in the worst layer",
    }


def _check(rank: int | None, keep: float | None) -> None:
    if rank is None and keep is None:
        raise UserError("say how far the LoRA shall be cut: --rank N, --keep 0.9, or both")
    if rank is not None and rank < 1:
        raise UserError(f"--rank {rank} is no rank: give 1 or more")
    if keep is not None and not 0 < keep <= 1:
        raise UserError(f"--keep {keep:g} is no share: give a number above 0 and up to 1")


def _resized(source: LoraFile, key: LayerKey, layer: Update, rank: int | None, keep: float | None) -> Update:
    """The very layer, where it needs no cut."""
    if layer.depends_on_weight:
        raise UserError(
            f"{source.name} holds an {NAMES[layer.kind]} ({key[1]}): it has blocks in place of a rank, and "
            "what it adds depends on the base: train it anew with smaller blocks"
        )
    narrow = rank is not None and isinstance(layer, LoraLayer) and layer.rank <= rank
    if keep is None and narrow:
        return layer
    if layer.dora_scale is not None:
        raise UserError(
            f"{source.name} is a DoRA: what a cut of {key[1]!r} would lose depends on the base; only a rank "
            "that all its layers have already can be given"
        )
    cut = merge_layer([(layer, 1.0)], rank, keys.kernel(key[1]), keep).layer
    return layer if isinstance(layer, LoraLayer) and cut.rank == layer.rank else cut


def share(before: Update, after: Update) -> Share:
    """How much of an update another keeps, both without DoRA: |U|^2 - |U - U'|^2 and |U - U'|^2.

    With U - U' as one product of thin factors, whose triangles by QR have its norm: a difference of squared
    norms would drown in rounding. Where they are not thin (LoHa of a large rank), as the matrix that it is.
    """
    (up, down), (new_up, new_down) = before.factors(), after.factors()
    total = square_of_product(up, down)
    if up.shape == new_up.shape and torch.equal(up, new_up) and torch.equal(down, new_down):
        return Share(total, 0.0)
    if up.shape[1] >= min(len(up), down.shape[1]):
        rest = (up @ down).addmm_(new_up, new_down, alpha=-1)
        return Share(total - square(rest), square(rest))
    lost = square_of_product(torch.cat([up, -new_up], dim=1), torch.cat([down, new_down]))
    return Share(total - lost, lost)


def _format(source: LoraFile, output: Path) -> Format:
    """The file's own; a peft folder can become a file."""
    return "kohya" if source.format == "peft" and output.suffix == ".safetensors" else source.format


def _metadata(made: LoraFile, note: Mapping[str, Any]) -> dict[str, str]:
    """The LoRA's own, with the network that it is now and what it was made of."""
    ranks, alphas = made.ranks, {layer.alpha for layer in made.layers.values()}
    kinds = {layer.kind for layer in made.layers.values()}
    kept = {key: value for key, value in made.metadata.items() if key not in _OF_THE_NETWORK}
    if kinds == {"lora"} and "ss_network_module" in kept:
        kept["ss_network_module"] = "networks.lora"
    if "ss_network_dim" in kept:  # "Dynamic": as kohya's own resizing writes it
        kept["ss_network_dim"] = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
        kept["ss_network_alpha"] = str(float(alphas.pop())) if len(alphas) == 1 else "Dynamic"
    return {**kept, "spf_kit.resized": json.dumps(note)}
