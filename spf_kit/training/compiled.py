"""`torch.compile` for the UNet in training.

Regional: each transformer block by itself, so that blocks of one kind share their code (diffusers' regional
compilation); whole: the UNet at once. Either way the parameters, their names and the modules stay the same.

Compiled code runs in training mode alone: previews, the evaluation and measurements of drift take other
batches, which would be compiled anew, and an adapter without effect must score exactly nothing there. A
cross-attention layer that losses look into is left out, and the compiled code stops before it and goes on
behind: hooks inside compiled code would be of the pass that was compiled. What an adapter does at the moment
(on, off, its strength) are attributes that the compiler guards, so that each path has its own code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spf_kit.errors import UserError
from spf_kit.probes import matches

if TYPE_CHECKING:
    from spf_kit.families.base import Family
    from spf_kit.losses import Plugin
    from spf_kit.schema import Train

BACKEND = "inductor"
# kinds of code that one block may have: widths of the model, adapter on and off, sizes of pictures. Beyond
# them torch goes on without compiled code; its own limit of 8 is below what one model needs
VARIANTS = 64


def check(train: Train, device: str) -> None:
    """Raises UserError if nothing can be compiled on this device."""
    if train.compile == "no":
        return
    try:
        if device == "cpu":
            from torch._inductor.cpp_builder import get_cpp_compiler

            get_cpp_compiler()
        else:
            torch.compile(torch.sin, backend=BACKEND)(torch.ones(8, device=device))
    except Exception as error:  # of the compilers' many kinds
        raise UserError(
            f"train.compile = {train.compile!r} finds no compiler that works here ({_reason(error)}): "
            f"install {'g++' if device == 'cpu' else 'g++ and triton'}, or set train.compile = 'no'"
        ) from error


def put_on(how: str, family: Family, plugins: Sequence[Plugin]) -> None:
    """Compile the family's UNet, "regional" or "whole"; nothing is compiled before it is first run.

    `plugins`: all of the run. The cross-attention layers that they look into are left out.
    """
    unet = family.unet
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    patterns = [pattern for plugin in plugins for _, pattern in plugin.needs.attention]
    for name, factor in family.attention_layers().items():
        if matches(name, factor, patterns):
            layer = unet.get_submodule(name)
            layer.forward = torch.compiler.disable(layer.forward)
    for module in _compiled(unet, how):
        module._compiled_call_impl = functools.partial(_call, module, _code(module), how)


def take_off(family: Family) -> None:
    """The inverse."""
    for layer in (family.unet.get_submodule(name) for name in family.attention_layers()):
        layer.__dict__.pop("forward", None)
    for module in family.unet.modules():
        module._compiled_call_impl = None


def _compiled(unet: Any, how: str) -> list[nn.Module]:
    kinds = unet._repeated_blocks if how == "regional" else [type(unet).__name__]
    return [module for module in unet.modules() if type(module).__name__ in kinds]


def _code(module: nn.Module) -> Callable[..., Any]:
    code: Callable[..., Any] = torch.compile(module._call_impl, backend=BACKEND)
    return code


def _call(module: nn.Module, code: Callable[..., Any], how: str, *arguments: Any, **named: Any) -> Any:
    """What `nn.Module.__call__` does with a module that is compiled."""
    if not module.training:
        return module._call_impl(*arguments, **named)
    try:
        return code(*arguments, **named)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise UserError(
            f"train.compile = {how!r}: torch {torch.__version__} cannot compile this model here "
            f"({_reason(error)}): set train.compile = 'no'"
        ) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
