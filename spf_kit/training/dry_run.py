"""The dry run: everything that `train` checks, without training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spf_kit import families, launch
from spf_kit.adapters.fit import check_family
from spf_kit.adapters.index import index
from spf_kit.adapters.weights import parse
from spf_kit.data.dataset import survey
from spf_kit.training import optimizers, session, stages, tools
from spf_kit.training.machine import device

if TYPE_CHECKING:
    from spf_kit.config import Resolved
    from spf_kit.families.base import Family


@dataclass(frozen=True)
class Checked:
    """What a dry run found out."""

    family: Family
    info: dict[str, Any]  # JSON: pictures, samples, steps, epochs, warnings
    summary: list[str] = field(default_factory=list)  # lines for people


def check(resolved: Resolved) -> Checked:
    """Everything that `train` checks, without training. Raises UserError with all that is wrong."""
    config, train = resolved.config, resolved.config.train
    session.check(resolved)
    session.check_devices(train)
    family = families.load(config.base, device=device())
    plugins, idle = tools.split_by_clip(resolved.plugins, config, family)
    stages.check(plugins)
    tools.clip_pair(stages.union(plugins), config, family)
    for path, _ in map(parse, config.adapter.on):
        check_family(index(path), family)
    masks = stages.union(plugins).picture_masks
    pictures, report = survey(config.data, config.attribute.target, family, masks=masks)
    report.raise_errors()
    samples = sum(picture.repeats for picture in pictures)
    per_step = train.batch_size * train.gradient_accumulation * launch.count()
    steps = math.ceil(train.epochs * samples / per_step) if train.epochs else train.steps
    info = {
        "pictures": len(pictures),
        "samples": samples,
        "steps": steps,
        "epochs": round(steps * per_step / samples, 2),
        "warnings": {kind: len(items) for kind, items in report.warnings.items()},
    }
    summary = [
        f"{len(pictures)} pictures, {samples} samples an epoch; {steps} steps of {per_step} samples are "
        f"{info['epochs']:g} epochs",
        *(
            f"warning: {line}"
            for line in (*report.lines(), *optimizers.advice(train), *launch.advice(), *idle)
        ),
    ]
    return Checked(family, info, summary)
