"""Which layers of a base a new adapter sits on, and how each is made: the settings against the model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from spf_kit.adapters.blocks import assign
from spf_kit.adapters.index import LayerKey
from spf_kit.adapters.spec import Spec
from spf_kit.errors import UserError

if TYPE_CHECKING:
    from spf_kit.families.base import Family
    from spf_kit.schema import Adapter


def chosen(family: Family, cfg: Adapter) -> dict[LayerKey, Spec]:
    """The layers by component and module at run time. A rank of 0 leaves a layer out; OFT leaves out the
    convolutions of one pixel that stand for linear layers in some bases: its files know none.

    Raises UserError for an unknown target, a pattern that means no layer, or if no layer is left.
    """
    modules, components = family.adapter_modules(cfg.targets), family.components()
    files = {
        (component, family.file_module_name(component, module)): (component, module)
        for component, names in modules.items()
        for module in names
        if cfg.kind != "oft" or not _is_convolution(components[component].get_submodule(module))
    }
    ranks = assign(cfg.ranks, files, "adapter.ranks")
    alphas = assign(cfg.alphas, files, "adapter.alphas")
    found = {}
    for layer, place in files.items():
        _, rank = ranks.get(layer, ("", cfg.rank))
        _, alpha = alphas.get(layer, ("", cfg.alpha))
        if rank:
            found[place] = _spec(cfg, rank, alpha)
    if not found:
        raise UserError("adapter.ranks leaves no layer to train: give some of them a rank above 0")
    return found


def _is_convolution(module: nn.Module) -> bool:
    """Also under an earlier adapter."""
    return isinstance(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module, nn.Conv2d)


def _spec(cfg: Adapter, rank: int, alpha: float | None) -> Spec:
    alpha = rank if alpha is None else alpha
    # rank-stabilised: alpha / sqrt(r) = (alpha * sqrt(r)) / r, so that files and loaders need no flag
    alpha = alpha * math.sqrt(rank) if cfg.rank_stabilized else alpha
    return Spec(rank, alpha, cfg.dora, cfg.kind, cfg.factor, cfg.decompose_both, cfg.constraint)
