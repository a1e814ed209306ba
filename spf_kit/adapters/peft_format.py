"""LoHa and LoKr as peft's folders hold them: LyCORIS' parts under peft's names, and a configuration from
which peft makes layers of the very same shapes. What it cannot make is refused.

peft scales a LoKr by alpha / r even where both matrices are whole, so alpha = r stands for the scale 1 there.
https://github.com/huggingface/peft/blob/main/src/peft/tuners/lokr/layer.py, `update_layer`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spf_kit.adapters.formats import PeftPart, cast, refuse_flat_name
from spf_kit.adapters.keys import kernel
from spf_kit.adapters.loha import LohaLayer
from spf_kit.adapters.lokr import LokrLayer
from spf_kit.adapters.parts import NAMES
from spf_kit.adapters.update import Update
from spf_kit.errors import UserError

KINDS = ("loha", "lokr")


def as_held(layer: Update) -> Update:
    """The same update with kernels inside matrices, and no alpha where it has no effect, as peft has it."""
    if layer.kind not in KINDS:
        return layer
    flat = {part: tensor.flatten(1) for part, tensor in layer.tensors().items() if part.endswith("_b")}
    held = replace(layer, **flat)  # type: ignore[type-var]
    return held if held.rank else replace(held, alpha=0.0)  # type: ignore[type-var]


def part(component: str, layers: Mapping[str, Update], dtype: torch.dtype) -> PeftPart:
    """One component's folder; layers by their names at run time.

    Raises UserError for what peft's layers cannot hold.
    """
    kinds = sorted({layer.kind for layer in layers.values()})
    if len(kinds) > 1:
        raise UserError(
            f"the {component} has layers of {' and '.join(NAMES[kind] for kind in kinds)}, and a peft folder "
            "holds one kind: write it with format kohya"
        )
    tensors: dict[str, Tensor] = {}
    for module, layer in layers.items():
        refuse_flat_name(component, module, "peft")
        if layer.dora_scale is not None:
            raise _impossible(module, f"peft has no {NAMES[layer.kind]} with DoRA's magnitudes")
        for name, tensor in as_held(layer).tensors().items():
            tensors[f"base_model.model.{module}.{name}"] = cast(tensor, dtype, module)
    make = _loha_config if kinds == ["loha"] else _lokr_config
    return PeftPart(tensors, make(layers))


def _impossible(module: str, reason: str) -> UserError:
    return UserError(
        f"the layer {module!r} cannot be written in the format peft: {reason}; write it with format kohya"
    )


# --- configurations ---------------------------------------------------------------------------------------


def _loha_config(layers: Mapping[str, Update]) -> dict[str, Any]:
    from peft import LoHaConfig

    cores = {}
    for module, layer in layers.items():
        assert isinstance(layer, LohaLayer)
        cores[module] = layer.hada_t1
    ranks = {module: layer.rank for module, layer in layers.items()}
    alphas = {module: layer.alpha for module, layer in layers.items()}
    return _config(LoHaConfig, ranks, alphas, use_effective_conv2d=_has_cores(cores))


def _lokr_config(layers: Mapping[str, Update]) -> dict[str, Any]:
    from peft import LoKrConfig

    sizes = {module: _Sizes.of(module, layer) for module, layer in layers.items()}
    both = any(not size.small_whole for size in sizes.values())
    ranks, alphas = {}, {}
    for module, size in sizes.items():
        # with whole matrices alone, any rank from which on peft makes both whole
        ranks[module] = size.rank or max(1, size.large_bound, size.small_bound if both else 1)
        alphas[module] = layers[module].alpha if size.rank else float(ranks[module])
        small_whole = not (both and ranks[module] < size.small_bound)
        if (small_whole, ranks[module] >= size.large_bound) != (size.small_whole, size.large_whole):
            raise _impossible(module, f"at rank {ranks[module]} peft decomposes other parts of it")
    cores = {m: size.core for m, size in sizes.items() if size.core is not None or not size.large_whole}
    return _config(
        LoKrConfig, ranks, alphas, use_effective_conv2d=_has_cores(cores), decompose_both=both,
        decompose_factor=_factor(sizes),
    )  # fmt: skip


@dataclass(frozen=True)
class _Sizes:
    """Of a LoKr C kron D: C is (a, b), D is (c, d, ...)."""

    small: tuple[int, int]
    large: tuple[int, int]
    small_whole: bool
    large_whole: bool
    rank: int
    core: Tensor | None

    @classmethod
    def of(cls, module: str, layer: Update) -> _Sizes:
        assert isinstance(layer, LokrLayer)
        held = as_held(layer)
        assert isinstance(held, LokrLayer)
        a, b = held.small(torch.float32).shape
        if held.lokr_w2 is not None:
            c, d = held.lokr_w2.shape[:2]
        else:
            assert held.lokr_w2_a is not None
            assert held.lokr_w2_b is not None
            with_core = held.lokr_t2 is not None
            c, columns = held.lokr_w2_a.shape[1 if with_core else 0], held.lokr_w2_b.shape[1]
            d = columns if with_core else columns // math.prod(kernel(module))
        ranks = {part.shape[0] for part in (held.lokr_w1_b, held.lokr_w2_b) if part is not None}
        if len(ranks) > 1:
            raise _impossible(module, f"it has two ranks, {min(ranks)} and {max(ranks)}")
        whole = held.lokr_w1 is not None, held.lokr_w2 is not None
        return cls((a, b), (c, d), *whole, held.rank, held.lokr_t2)

    @property
    def small_bound(self) -> int:
        """The rank from which on a decomposition of C would be no smaller: half its longer side."""
        return -(-max(self.small) // 2)

    @property
    def large_bound(self) -> int:
        return -(-max(self.large) // 2)


def _factor(sizes: Mapping[str, _Sizes]) -> int:
    """The `decompose_factor` with which peft divides every layer's sides as they are divided here."""
    from peft.tuners.lokr.layer import factorization

    most = max(max(size.small) for size in sizes.values())
    wrong = next(iter(sizes))
    for factor in (-1, *range(1, most + 1)):
        sides = (
            (module, (small, large))
            for module, size in sizes.items()
            for small, large in zip(size.small, size.large, strict=True)
        )
        found = next((m for m, pair in sides if factorization(math.prod(pair), factor) != pair), None)
        if found is None:
            return factor
        wrong = found if factor == -1 else wrong
    raise _impossible(wrong, "no decompose_factor of peft's divides its sides as they are")


def _has_cores(cores: Mapping[str, Tensor | None]) -> bool:
    """Whether peft is to make Tucker cores, then in all decomposed convolutions wider than one pixel."""
    if all(core is None for core in cores.values()):
        return False
    for module, core in cores.items():
        if core is None and kernel(module):
            raise _impossible(module, "it has no Tucker core, but others have, and peft makes all or none")
        if core is not None and math.prod(core.shape[2:]) == 1:
            raise _impossible(module, "it has a Tucker core of one pixel")
    return True


def _config(
    cls: type, ranks: Mapping[str, int], alphas: Mapping[str, float], **options: Any
) -> dict[str, Any]:
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = cls(
        r=rank,
        alpha=alpha,
        target_modules=sorted(ranks),
        rank_pattern={module: r for module, r in sorted(ranks.items()) if r != rank},
        alpha_pattern={module: a for module, a in sorted(alphas.items()) if a != alpha},
        inference_mode=True,
        **options,
    ).to_dict()
    config["target_modules"] = sorted(ranks)  # peft keeps a set, whose order differs between runs
    return {key: value for key, value in config.items() if key != "task_type"}
