"""Tensors without values in the place of weights, and the modes in which code runs on them.

They are torch's FakeTensors: tensors on the meta device that say they are elsewhere, so that code that moves
them between host and device runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from spf_kit.estimate.known_shapes import KnownShapes
from spf_kit.measure.tracker import Tracker

READ = torch.ops.aten._local_scalar_dense.default
DEVICE = torch.ops.prim.device.default
COPY = torch.ops.aten._to_copy.default
NORMS = {  # and where their weights stand among the arguments
    torch.ops.aten.native_group_norm.default: 1,
    torch.ops.aten.native_layer_norm.default: 2,
}


class BareTracker(Tracker):
    """Follows tensors without values, and answers where a step reads one (`item`, `tolist`): 1, or True.

    So whatever a loss does for some of the samples it does for all, which is the most that it can need.
    """

    def __init__(self, mode: FakeTensorMode, granule: int = 1) -> None:
        """`mode`: that the tensors were made in. Within this tracker it need not be entered."""
        super().__init__(granule)
        self.mode = mode
        self._known = KnownShapes(mode)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:  # two calls of three
            return args[0].fake_device
        if func is READ:
            kind = args[0].dtype
            return True if kind == torch.bool else 1.0 if kind.is_floating_point else 1
        return super().__torch_dispatch__(func, types, args, kwargs)

    def compute(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """The operation's shapes and types, as remembered or from the mode at once: a third of the time of
        going by torch."""
        return self._known.answer(func, args, kwargs, lambda: self._dispatch(func, types, args, kwargs))

    def _dispatch(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        result = self.mode.dispatch(func, types, args, kwargs)
        weight = args[NORMS[func]] if func in NORMS else None
        if weight is not None and weight.dtype == torch.float32 != args[0].dtype:
            # kernels keep the statistics as wide as the weights, torch's shapes without values do not
            return result[0], *(
                self.mode.dispatch(COPY, (), (t,), {"dtype": weight.dtype}) for t in result[1:]
            )
        return result


def fill(module: nn.Module, made: Callable[..., torch.Tensor] = torch.empty) -> None:
    """Put tensors in the place of a module's parameters and buffers, on the CPU; shared ones stay shared."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in memo:
                    new = made(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if tensor.dim() == 4 and not tensor.is_contiguous():
                        new = new.to(memory_format=torch.channels_last)
                    parameter = isinstance(tensor, nn.Parameter)
                    memo[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if parameter else new
                held[name] = memo[id(tensor)]
