"""Optimizers by name, their arguments checked, and learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from spf_kit.errors import UserError, nearest
from spf_kit.schema import Train

# Set by the trainer, or settings that would turn one optimizer into another: not the user's to pass.
RESERVED = {
    "self",
    "params",
    "lr",
    "args",
    "optim_bits",
    "is_paged",
    "kwargs",
    "capturable",
    "differentiable",
}


@dataclass(frozen=True)
class Spec:
    """One optimizer: where its class is, and what sets it apart."""

    name: str
    module: str
    cls: str
    package: str
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what the class needs and does not assume
    one_rate: bool = False  # all parameter groups must share one learning rate
    averages: bool = False  # keeps its own average of the weights: .train() and .eval(), no schedule, no EMA

    def load(self) -> type[Optimizer]:
        """The class. Raises UserError if its package is not installed or broken."""
        try:
            with _quiet_import():
                return getattr(importlib.import_module(self.module), self.cls)
        except Exception as error:  # bitsandbytes raises many kinds when its native library does not fit
            raise UserError(
                f"train.optimizer = {self.name!r} needs the package {self.package!r}, which cannot be "
                f"imported: {type(error).__name__}: {error}; install or mend it, or choose 'adamw'"
            ) from error


def _table() -> dict[str, Spec]:
    momentum = {"momentum": 0.9}  # bitsandbytes has no SGD or LARS without momentum, and assumes none
    # an Adafactor that follows the configured learning rate instead of finding its own
    manual = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    # one kernel for all of an adapter's many small tensors: an update in 1.6 instead of 5.7 ms on the CPU
    fused = {"fused": True}
    own = [
        Spec("adamw", "torch.optim", "AdamW", "torch", fused),
        Spec("adam", "torch.optim", "Adam", "torch", fused),
        Spec("sgd", "torch.optim", "SGD", "torch", momentum),
        Spec("adafactor", "transformers.optimization", "Adafactor", "transformers", manual),
        Spec("prodigy", "prodigyopt", "Prodigy", "prodigyopt", one_rate=True),
        Spec("adamw_schedulefree", "schedulefree", "AdamWScheduleFree", "schedulefree", averages=True),
        Spec("radam_schedulefree", "schedulefree", "RAdamScheduleFree", "schedulefree", averages=True),
        Spec("sgd_schedulefree", "schedulefree", "SGDScheduleFree", "schedulefree", averages=True),
    ]
    eight_bit = ["AdamW", "Adam", "Lion", "LAMB", "LARS", "SGD", "RMSprop", "Adagrad", "AdEMAMix"]
    paged = ["AdamW", "Adam", "Lion", "AdEMAMix"]
    classes = [f"{name}8bit" for name in eight_bit] + [f"Paged{name}8bit" for name in paged]
    classes += ["Lion", "PagedAdamW"]
    bitsandbytes = [
        Spec(
            c.lower(),
            "bitsandbytes.optim",
            c,
            "bitsandbytes",
            momentum if c in ("SGD8bit", "LARS8bit") else {},
        )
        for c in classes
    ]
    return {spec.name: spec for spec in own + bitsandbytes}


OPTIMIZERS: Mapping[str, Spec] = _table()


def find(name: str) -> Spec:
    """The optimizer called `name`; case, hyphens and underscores do not matter. Raises UserError."""
    plain = {key.replace("_", ""): spec for key, spec in OPTIMIZERS.items()}
    spec = plain.get(name.lower().replace("_", "").replace("-", ""))
    if spec is None:
        raise UserError(
            f"train.optimizer = {name!r} is not known;{nearest(name.lower(), OPTIMIZERS)} "
            f"there are {', '.join(sorted(OPTIMIZERS))}"
        )
    return spec


def build(train: Train, parameters: Mapping[str, Sequence[Tensor]]) -> Optimizer:
    """The configured optimizer over one parameter group for each component ("unet", "text_encoder"), and each
    "<component> <pattern>" of `train.learning_rates`.

    Raises UserError for an unknown optimizer, an argument that it does not take, or values that it refuses.
    """
    spec = find(train.optimizer)
    cls = spec.load()
    arguments = _arguments(spec, cls, train.optimizer_args)
    rates = base_rates(train, list(parameters))
    groups = [
        {"params": list(tensors), "lr": rates[group], "name": group}
        for group, tensors in parameters.items()
        if tensors
    ]
    # An Adafactor that finds its own rate refuses to be given one.
    rate = {} if arguments.get("relative_step") else {"lr": train.learning_rate}
    if not rate:
        groups = [{key: value for key, value in group.items() if key != "lr"} for group in groups]
    try:
        with contextlib.redirect_stdout(sys.stderr):  # prodigyopt prints; standard output may be JSON
            return cls(groups, **rate, **arguments)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"the optimizer {spec.name!r} refuses train.learning_rate = {train.learning_rate} with "
            f"train.optimizer_args = {train.optimizer_args}: {error}"
        ) from error


def check(train: Train) -> None:
    """Everything about the optimizer that can be wrong, before any weight is loaded. Raises UserError."""
    spec = find(train.optimizer)
    if spec.averages and train.ema is not None:
        raise UserError(
            f"train.optimizer = {spec.name!r} averages the weights by itself: remove train.ema = {train.ema}"
        )
    build(train, {"unet": [torch.nn.Parameter(torch.zeros(1))]})
    base_rates(train, ["unet", "text_encoder", *(f"unet {pattern}" for pattern in train.learning_rates)])


def advice(train: Train) -> list[str]:
    """What is allowed and hardly meant, one sentence each."""
    spec, found = find(train.optimizer), []
    if spec.one_rate and train.learning_rate < 0.1:
        found.append(
            f"train.learning_rate = {train.learning_rate:g} multiplies the step size that {spec.name} finds "
            "by itself: 1 is usual"
        )
    if spec.averages and train.schedule != "constant":
        found.append(
            f"{spec.name} needs no schedule: train.schedule = {train.schedule!r} is taken as 'constant'"
        )
    return found


def base_rates(train: Train, groups: Sequence[str]) -> dict[str, float]:
    """Each group's learning rate before the schedule.

    Raises UserError if they differ and the optimizer wants one for all.
    """
    one_rate = find(train.optimizer).one_rate
    text_rate = train.text_encoder_learning_rate
    if text_rate is None:
        text_rate = train.learning_rate if one_rate else train.learning_rate / 2
    rates = {}
    for group in groups:
        component, _, pattern = group.partition(" ")
        rate = text_rate if component.startswith("text_encoder") else train.learning_rate
        rates[group] = train.learning_rates[pattern] if pattern else rate
    if one_rate and len(set(rates.values()) - {0.0}) > 1:
        raise UserError(
            f"train.optimizer = {train.optimizer!r} finds one step size for everything: "
            f"train.text_encoder_learning_rate = {text_rate} and train.learning_rates must be 0 or equal to "
            f"train.learning_rate = {train.learning_rate}"
        )
    return rates


def _arguments(spec: Spec, cls: type[Optimizer], given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults and the user's arguments, each a name that the constructor knows."""
    valid = [name for name in inspect.signature(cls).parameters if name not in RESERVED]
    for name in given:
        if name == "lr":
            raise UserError("train.optimizer_args has 'lr': set train.learning_rate instead")
        if name not in valid:
            raise UserError(
                f"train.optimizer_args has {name!r}, which the optimizer {spec.name!r} does not take;"
                f"{nearest(name, valid)} it takes {', '.join(valid)}"
            )
    # torch takes one of the two; the user's word counts
    defaults = {k: v for k, v in spec.defaults.items() if k != "fused" or not given.get("foreach")}
    # TOML has lists where Python's optimizers have tuples (betas, eps)
    return {**defaults, **{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}}


@contextlib.contextmanager
def _quiet_import() -> Iterator[None]:
    """bitsandbytes warns at import of kernels for 4-bit weights, which no optimizer uses."""
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


# --- schedules ----------------------------------------------------------------------------------------------


def multiplier(kind: str, step: int, total: int, warmup: int) -> float:
    """Factor of the learning rate at `step` (1 to `total`): linear warm-up, then the schedule's shape.

    Never zero, so that no step is wasted: step s of w warm-up steps has s / (w + 1), and a falling schedule
    reaches zero one step after the end.
    """
    if step <= warmup:
        return step / (warmup + 1)
    done = (step - 1 - warmup) / max(1, total - warmup)  # [0, 1)
    shapes: dict[str, Callable[[float], float]] = {
        "constant": lambda x: 1.0,
        "linear": lambda x: 1.0 - x,
        "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
    }
    return shapes[kind](done)


@dataclass(frozen=True)
class Schedule:
    """Sets each parameter group's learning rate. Keeps no state: the step is all it needs."""

    kind: str
    warmup: int
    total: int
    rates: Mapping[str, float]  # by group name

    @classmethod
    def of(cls, train: Train, total: int, groups: Sequence[str]) -> Schedule:
        """As configured; a schedule-free optimizer takes the warm-up and a constant rate."""
        kind = "constant" if find(train.optimizer).averages else train.schedule
        return cls(kind, train.warmup, total, base_rates(train, groups))

    def apply(self, optimizer: Optimizer, step: int) -> dict[str, float]:
        """Write the rates for `step` into the optimizer and return them by group."""
        factor = multiplier(self.kind, step, self.total, self.warmup)
        for group in optimizer.param_groups:
            group["lr"] = self.rates[group["name"]] * factor
        return {group["name"]: group["lr"] for group in optimizer.param_groups}
