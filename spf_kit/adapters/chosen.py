"""Which layers of a base a new adapter sits on, and how each is made: the settings against the model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from spf_kit.adapters.index import LayerKey
from spf_kit.adapters.spec import Spec

if TYPE_CHECKING:
    from spf_kit.families.base import Family
    from spf_kit.schema import Adapter


def chosen(family: Family, cfg: Adapter) -> dict[LayerKey, Spec]:
    """The layers by component and module at run time.

    Raises UserError for an unknown target.
    """
    spec = _spec(cfg, cfg.rank, cfg.alpha)
    modules = family.adapter_modules(cfg.targets)
    return {(component, module): spec for component, names in modules.items() for module in names}


def _spec(cfg: Adapter, rank: int, alpha: float | None) -> Spec:
    alpha = rank if alpha is None else alpha
    # rank-stabilised: alpha / sqrt(r) = (alpha * sqrt(r)) / r, so that files and loaders need no flag
    alpha = alpha * math.sqrt(rank) if cfg.rank_stabilized else alpha
    return Spec(rank, alpha, cfg.dora, cfg.kind, cfg.factor, cfg.decompose_both, cfg.constraint)
