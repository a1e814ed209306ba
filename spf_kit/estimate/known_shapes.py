"""What operations return, remembered: a model runs the same few hundred over and over, on the same shapes.

torch's FakeTensorMode keeps such a memory too, but asks three times as long for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

from spf_kit.measure.tracker import tensors

PLAIN = (int, float, bool, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, str)


class _Shape(NamedTuple):
    """All that tells one tensor without values from another. `offset`: of a view, in its storage."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    offset: int


class _Known(NamedTuple):
    shapes: tuple[_Shape | None, ...]
    several: bool  # a tuple was returned
    viewed: int | None  # the argument whose storage the one result shares


class KnownShapes:
    """Remembers the results of operations that make new tensors, or views, of arguments without values."""

    def __init__(self, mode: FakeTensorMode) -> None:
        """`mode`: that the tensors are made in."""
        self.mode = mode
        self._known: dict[Any, _Known] = {}
        self._repeats: dict[Any, bool] = {}  # operations: whether their results are told by their arguments

    def answer(self, func: Any, args: Any, kwargs: Any, compute: Callable[[], Any]) -> Any:
        """The result of `func`, from what is known or else by `compute`."""
        if func not in self._repeats:
            self._repeats[func] = _repeats(func)
        key = _key((func, args, kwargs)) if self._repeats[func] else None
        if key is None:
            return compute()
        if known := self._known.get(key):
            return self._make(known, args)
        result = compute()
        if known := _known(result, args):
            self._known[key] = known
        return result

    def _make(self, known: _Known, args: Any) -> Any:
        storage = None if known.viewed is None else args[known.viewed].untyped_storage()
        made = [shape and self._tensor(shape, storage) for shape in known.shapes]
        return tuple(made) if known.several else made[0]

    def _tensor(self, shape: _Shape, storage: Any) -> Tensor:
        with in_kernel_invocation_manager(self.mode):
            bare = torch.empty_strided(shape.size, shape.stride, dtype=shape.dtype, device="meta")
            if storage is not None:
                bare.set_(storage, shape.offset, shape.size, shape.stride)  # type: ignore[call-overload]
        return FakeTensor(self.mode, bare, shape.device)


def _repeats(func: Any) -> bool:
    schema = getattr(func, "_schema", None)
    return schema is not None and not schema.is_mutable and torch.Tag.nondeterministic_seeded not in func.tags


def _key(value: Any) -> Any:
    """Equal for equal arguments alone; None where there is something with a value or of unknown kind."""
    if isinstance(value, Tensor):
        if type(value) is not FakeTensor or value.constant is not None or value.layout is not torch.strided:
            return None
        return (value.shape, value.stride(), value.dtype, value.fake_device, value.storage_offset())
    if isinstance(value, (tuple, list)):
        keys = []
        for part in value:
            key = _key(part)
            if key is None:
                return None
            keys.append(key)
        return tuple(keys)
    if isinstance(value, dict):
        return _key(list(value.items()))
    if isinstance(value, (*PLAIN, torch._ops.OpOverload)):
        return (type(value), value)  # 1, 1.0 and True are equal, and give other types
    return None


def _known(result: Any, args: Any) -> _Known | None:
    """As a result is remembered; None for what is not."""
    several = isinstance(result, tuple)
    storages = [arg.untyped_storage()._cdata if isinstance(arg, Tensor) else None for arg in args]
    viewed: int | None = None
    shapes: list[_Shape | None] = []
    for part in result if several else (result,):
        if part is None:
            shapes.append(None)
            continue
        if not _plain(part):
            return None
        storage = part.untyped_storage()
        if storage._cdata in storages:  # whatever the operation's schema says
            viewed = storages.index(storage._cdata)
        else:
            shared = any(storage._cdata == t.untyped_storage()._cdata for t in tensors(args))  # of a list's
            if shared or storage.nbytes() != _needed(part):  # or a part of what was allocated
                return None
        place = part.storage_offset()
        shapes.append(_Shape(tuple(part.shape), part.stride(), part.dtype, part.fake_device, place))
    return None if several and viewed is not None else _Known(tuple(shapes), several, viewed)


def _plain(value: Any) -> bool:
    """Whether nothing but its size, stride and type describes a tensor."""
    return (
        type(value) is FakeTensor
        and value.constant is None
        and value.layout is torch.strided
        and not (value.requires_grad or value.is_conj() or value.is_neg())
    )


def _needed(tensor: Tensor) -> int:
    """Bytes that a tensor's values reach over."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0
