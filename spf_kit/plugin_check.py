"""`spf-kit losses check FILE`: does a plugin, run on random steps, keep the promises of the plugin API?

Shapes: B samples, C latent channels, h x w latent size.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from spf_kit.data.random import generator
from spf_kit.discovery import load_file
from spf_kit.losses import PASSES, Loss, Mask, Plugin, PriorBatch, Step
from spf_kit.random_step import HEIGHT, WIDTH, random_step

KINDS = ("epsilon", "v_prediction", "flow")


@dataclass(frozen=True)
class Result:
    """One promise: kept, or what came instead of what."""

    plugin: str
    check: str
    passed: bool
    detail: str = ""


class _Broken(Exception):
    """A promise that is not kept; the message says what came and what was expected."""


def check_file(path: Path, parameters: Mapping[str, Any] | None = None) -> list[Result]:
    """Check every plugin that a file registers. Raises UserError if the file cannot be loaded."""
    return [result for cls in load_file(path) for result in check_plugin(cls, parameters)]


def check_plugin(cls: type[Plugin], parameters: Mapping[str, Any] | None = None) -> list[Result]:
    """Check one plugin class, built from its defaults and `parameters`. Nothing is raised for its faults."""
    try:
        make(cls, parameters)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'fields'}: {e['msg']}" for e in error.errors()
        )
        return [Result(cls.name, "builds from its defaults", False, problems)]
    results = [Result(cls.name, "builds from its defaults", True)]
    for title, check in CHECKS:
        try:
            check(lambda: make(cls, parameters))
            results.append(Result(cls.name, title, True))
        except Exception as error:  # a third party's code may raise anything
            detail = str(error) if isinstance(error, _Broken) else f"{type(error).__name__}: {error}"
            results.append(Result(cls.name, title, False, detail))
    return results


def make(cls: type[Plugin], parameters: Mapping[str, Any] | None = None) -> Plugin:
    """An instance. Raises ValidationError."""
    return cls.model_validate(dict(parameters or {}))


# --- what a promise is checked with ---------------------------------------------------------------------


def only(step: Step, sample: int) -> Step:
    """The same step with one of its samples."""
    at = slice(sample, sample + 1)
    prior = step.prior_batch
    return replace(
        step.rows([sample]),
        prior_batch=prior and PriorBatch(prior.prediction[at], prior.target[at], prior.timesteps[at]),
        mask=None if step.mask is None else step.mask[at],
    )


def inputs(step: Step) -> dict[str, Tensor]:
    """Every tensor that a plugin could change by mistake, by name."""
    found = {"latents": step.latents, "noise": step.noise, "noisy_latents": step.noisy_latents}
    found |= {"timesteps": step.timesteps, "target": step.target}
    for name, run in step.passes.items():
        found[f"passes[{name!r}]"] = run.prediction
        for layer in run.attention.values():
            found[f"{name}: queries of {layer.name}"] = layer.queries
            found[f"{name}: keys of {layer.name}"] = layer.keys
    if step.prior_batch:
        found |= {"prior.prediction": step.prior_batch.prediction, "prior.target": step.prior_batch.target}
    if step.tools.update_norms:
        found["update_norms()"] = step.tools.update_norms()
    given = {"mask": step.mask, "picture_mask": step.given_masks}
    return found | {name: mask for name, mask in given.items() if mask is not None}


def call(plugin: Plugin, step: Step) -> Tensor:
    if not isinstance(plugin, Loss | Mask):
        raise _Broken("it derives from neither Loss nor Mask")
    return plugin(step)


# --- the promises -----------------------------------------------------------------------------------------

Make = Callable[[], Plugin]


def _steps(make: Make) -> Iterator[tuple[str, Plugin, Step]]:
    for kind in KINDS:
        for batch in (1, 4):
            plugin = make()
            yield f"{kind}, {batch} samples", plugin, random_step(plugin, kind=kind, batch=batch)


def _declares(make: Make) -> None:
    plugin = make()
    unknown = plugin.needs.passes - PASSES.keys()
    if unknown:
        raise _Broken(f"needs the passes {sorted(unknown)}; there are {', '.join(PASSES)}")
    for _, plugin, step in _steps(make):
        try:
            call(plugin, step)
        except RuntimeError as error:
            if "do not declare" in str(error):
                raise _Broken(str(error)) from error
            raise


def _shape(make: Make) -> None:
    for where, plugin, step in _steps(make):
        value, count = call(plugin, step), len(step.latents)
        expected = (count, 1, HEIGHT, WIDTH) if isinstance(plugin, Mask) else (count,)
        if tuple(value.shape) != expected:
            raise _Broken(f"returned shape {tuple(value.shape)} instead of {expected} ({where})")
        if not torch.isfinite(value).all():
            raise _Broken(f"returned {value.detach().flatten()[:8].tolist()} ({where})")
        if isinstance(plugin, Mask) and not (value.min() >= 0 and value.max() <= 1):
            raise _Broken(
                f"the mask has values from {value.min():g} to {value.max():g}, not in [0, 1] ({where})"
            )


def _gradient(make: Make) -> None:
    """A mask has none; a loss' gradient agrees with central differences, in float64."""
    plugin = make()
    step = random_step(plugin, dtype=torch.float64)
    value = call(plugin, step)
    if isinstance(plugin, Mask):
        if value.requires_grad:
            raise _Broken("the mask carries a gradient: compute it under torch.no_grad()")
        return
    leaves = {name: t for name, t in inputs(step).items() if t.requires_grad}
    if not value.requires_grad:
        raise _Broken("no gradient reaches a prediction made with the adapter on: the loss teaches nothing")
    found = torch.autograd.grad(value.sum(), list(leaves.values()), allow_unused=True)
    for (name, leaf), gradient in zip(leaves.items(), found):
        gradient = torch.zeros_like(leaf) if gradient is None else gradient
        if not torch.isfinite(gradient).all():
            raise _Broken(f"the gradient of {name} is not finite")
        direction = torch.randn(leaf.shape, generator=generator(1, name), dtype=leaf.dtype)
        expected = float((gradient * direction).sum())
        measured = _difference(make, leaf, direction, step)
        if abs(measured - expected) > 1e-4 * max(1.0, abs(measured), abs(expected)):
            raise _Broken(
                f"the gradient of {name} is {expected:.6g} where differences measure {measured:.6g}"
            )


def _difference(make: Make, leaf: Tensor, direction: Tensor, step: Step, size: float = 1e-6) -> float:
    """(f(x + s d) - f(x - s d)) / 2 s, with a fresh plugin each time, for it may keep state."""
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            leaf += sign * size * direction
            # new rows: a layer remembers its maps
            values.append(float(call(make(), step.rows(list(range(len(step.latents))))).sum()))
            leaf -= sign * size * direction
    return (values[0] - values[1]) / (2 * size)


def _deterministic(make: Make) -> None:
    values = []
    for seed in (0, 1):
        plugin = make()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            values.append(call(plugin, random_step(plugin)).detach())
    if not torch.equal(*values):
        raise _Broken(
            "two fresh instances disagree on the same step: draw random numbers from a torch.Generator "
            "seeded with step.number"
        )


def _dtype_safe(make: Make) -> None:
    plugin = make()
    wide = call(plugin, random_step(plugin)).detach().float()
    for dtype, tolerance in ((torch.bfloat16, 0.06), (torch.float16, 0.02)):
        plugin = make()
        narrow = call(plugin, random_step(plugin, dtype=dtype)).detach().float()
        if not torch.isfinite(narrow).all():
            raise _Broken(f"not finite in {dtype}")
        if not torch.allclose(narrow, wide, rtol=tolerance, atol=tolerance * float(wide.abs().max())):
            raise _Broken(
                f"{narrow.flatten()[:4].tolist()} in {dtype}, {wide.flatten()[:4].tolist()} in float32"
            )


def _pure(make: Make) -> None:
    plugin = make()
    step = random_step(plugin)
    before = {name: tensor.detach().clone() for name, tensor in inputs(step).items()}
    call(plugin, step)
    changed = [name for name, tensor in inputs(step).items() if not torch.equal(tensor, before[name])]
    if changed:
        raise _Broken(f"it changes {', '.join(changed)}, which other plugins read")


def _samples_apart(make: Make) -> None:
    plugin = make()
    step = random_step(plugin)
    together = call(plugin, step).detach()
    for sample in range(len(together)):
        alone = call(make(), only(step, sample)).detach()[0]
        if not torch.allclose(alone, together[sample], rtol=1e-4, atol=1e-6):
            raise _Broken(
                f"sample {sample} comes to {alone.flatten()[:4].tolist()} alone and to "
                f"{together[sample].flatten()[:4].tolist()} among others: results depend on the batch"
            )


def _state(make: Make) -> None:
    first = make()
    for seed in range(3):
        call(first, random_step(first, seed=seed))
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    try:
        state = torch.load(buffer, weights_only=True)
    except Exception as error:
        raise _Broken(f"state_dict() holds more than tensors and plain values: {error}") from error
    second = make()
    second.load_state_dict(state)
    next_step = random_step(first, seed=3)
    if not torch.equal(call(first, next_step).detach(), call(second, next_step).detach()):
        raise _Broken(
            "a plugin that was saved and loaded goes on with another value: its state is not complete"
        )


CHECKS: tuple[tuple[str, Callable[[Make], None]], ...] = (
    ("reads only what it declares", _declares),
    ("returns the right shape, finite, a mask in [0, 1]", _shape),
    ("has the right gradient", _gradient),
    ("is deterministic", _deterministic),
    ("works in bfloat16 and float16", _dtype_safe),
    ("leaves the step as it was", _pure),
    ("judges each sample alone", _samples_apart),
    ("goes on from its state_dict", _state),
)
