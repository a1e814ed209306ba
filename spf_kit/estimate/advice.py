"""The cheapest change of settings with which a training fits a card."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from spf_kit.config.problems import show
from spf_kit.estimate.peak import Estimate, estimate
from spf_kit.training import stages

if TYPE_CHECKING:
    from spf_kit.config import Resolved

SMALLEST = 256  # pixels of a picture's side that are worth training
HALVED_LAYERS = ["1/2", "1/4", "1/8"]  # the largest layers' attention costs most and says least


@dataclass(frozen=True)
class Change:
    """Settings that go together, as --set takes them."""

    settings: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        return " ".join(f"--set {key}={_shell(value)}" for key, value in self.settings)


def cheapest(
    resolved: Resolved, vram: int, *, measure: Callable[[Resolved], Estimate] | None = None
) -> tuple[list[Change], Estimate] | None:
    """The changes with which the run fits into `vram` bytes, and its estimate then; None if none do.

    They are tried in the order of `candidates`, one on top of the other; what turns out not to be needed is
    taken back, the dearest first.
    """
    measure = measure or (lambda changed: estimate(changed, only_largest=True))
    made: list[Change] = []
    for change in candidates(resolved):
        made.append(change)
        found = measure(apply(resolved, made))
        if found.needed <= vram:
            break
    else:
        return None
    for change in made[-2::-1]:
        fewer = [other for other in made if other is not change]
        less = measure(apply(resolved, fewer))
        if less.needed <= vram:
            made, found = fewer, less
    return made, found


def candidates(resolved: Resolved) -> Iterator[Change]:
    """Changes that save memory, what costs a user least first: nothing or digits that nobody sees, then time,
    then digits of the base, what the losses look at, more digits of the base, and the pictures' size."""
    config, plugins = resolved.config, resolved.plugins
    train, base, data = config.train, config.base, config.data
    if not base.offload and train.compile == "no":
        yield _change(("base.offload", True))
    if base.attention == "sliced":
        yield _change(("base.attention", "sdpa"))
    if "8bit" not in train.optimizer:
        yield _change(("train.optimizer", "adamw8bit"), ("train.optimizer_args", {}))
    if data.cache == "none":
        yield _change(("data.cache", "disk"))
    if train.mixed_precision == "no" or base.dtype == "float32":
        yield _change(("train.mixed_precision", "bf16"), ("base.dtype", "bfloat16"))
    if not train.gradient_checkpointing:
        yield _change(("train.gradient_checkpointing", True))
    if config.evaluate.batch_size > 1:
        yield _change(("evaluate.batch_size", 1))
    batch, accumulation = train.batch_size, train.gradient_accumulation
    while batch > 1 and batch % 2 == 0:
        batch, accumulation = batch // 2, accumulation * 2  # the same samples in each optimizer step
        yield _change(("train.batch_size", batch), ("train.gradient_accumulation", accumulation))
    if batch > 1:
        yield _change(("train.batch_size", 1), ("train.gradient_accumulation", accumulation * batch))
    if base.quantize is None:
        yield _change(("base.quantize", "8bit"))
    for plugin in plugins:
        if getattr(plugin, "decoder", None) == "vae":
            yield _change((f"loss.{plugin.id}.decoder", "linear"))
    for plugin in plugins:
        if getattr(plugin, "layers", None) == ["all"] and stages.union([plugin]).attention:
            yield _change((f"loss.{plugin.id}.layers", HALVED_LAYERS))
    if base.quantize != "nf4":
        yield _change(("base.quantize", "nf4"))
    step = max(data.bucket_step, data.resolution // 8 // data.bucket_step * data.bucket_step)
    for side in range(data.resolution - step, SMALLEST - 1, -step):
        yield _change(("data.resolution", side))


def apply(resolved: Resolved, changes: Sequence[Change]) -> Resolved:
    """The preset with these settings; a later change of a key counts."""
    config = resolved.config.model_copy(deep=True)
    plugins = [plugin.model_copy(deep=True) for plugin in resolved.plugins]
    for key, value in (setting for change in changes for setting in change.settings):
        section, *path = key.split(".")
        if section == "loss":
            owner: Any = next(plugin for plugin in plugins if plugin.id == ".".join(path[:-1]))
        else:
            owner = getattr(config, section)
        setattr(owner, path[-1], value)
    return replace(resolved, config=config, plugins=plugins)


def settings(changes: Sequence[Change]) -> list[tuple[str, Any]]:
    """All of them, each key once."""
    return list(dict(setting for change in changes for setting in change.settings).items())


def _change(*settings: tuple[str, Any]) -> Change:
    return Change(settings)


def _shell(value: Any) -> str:
    text = value if isinstance(value, str) else show(value)
    return f"'{text}'" if any(char in text for char in ' "[]{}') else text
