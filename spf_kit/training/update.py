"""From a loss to new weights: backward, averaging over processes, clipping, scaling, the optimizer, EMA."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer

from spf_kit.errors import UserError
from spf_kit.training.optimizers import Schedule

MAX_SKIPPED = 50  # fp16 steps in a row without an update; a scaler finds its scale within 20


class Updater:
    """Owns the optimizer and everything that follows a backward pass.

    A step is `backward` for each micro-batch, then `gradients`, then `apply`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Schedule,
        accelerator: Accelerator,
        *,
        max_grad_norm: float = 0.0,
        ema_decay: float | None = None,
        accumulation: int = 1,
    ) -> None:
        self.optimizer, self.schedule, self.accelerator = optimizer, schedule, accelerator
        self.scaler: torch.amp.GradScaler | None = accelerator.scaler  # fp16 only
        self.max_grad_norm = max_grad_norm or math.inf
        self.accumulation = accumulation
        self.parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self.ema = None if ema_decay is None else Ema(self.parameters, ema_decay)
        self.skipped = 0  # steps in a row
        self._switch("train")

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch."""
        loss = loss / self.accumulation
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def gradients(self) -> Tensor:
        """Add up over processes, undo the loss scale, clip. Returns the norm before, still on the device."""
        if self.accelerator.num_processes > 1:
            self._add_up()
        if not self._are_there():
            return self.parameters[0].new_zeros(())
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        return torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)

    def _are_there(self) -> bool:
        """No batch of a step may have one, where no loss saw any of its samples."""
        return any(p.grad is not None for p in self.parameters)

    def _add_up(self) -> None:
        """The gradient of the whole batch, of which each process has that of its share.

        DistributedDataParallel would do it inside `backward`, once for each forward pass that went through
        its wrapper; a step has several, some without gradient, and its passes go around any wrapper (taps,
        the pipeline of a preview). An adapter is small: one flat message at the end costs less than buckets.
        """
        here = [p.grad is not None for p in self.parameters]
        for p in self.parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        flat = torch.cat([*(g.flatten() for g in gradients), gradients[0].new_tensor(here)])
        flat = self.accelerator.reduce(flat, "sum")
        *sums, counts = flat.split([*(g.numel() for g in gradients), len(here)])
        # where no process has one there is none, so that an optimizer leaves the parameter alone
        there = here if all(here) else (counts > 0).tolist()
        for p, gradient, total, found in zip(self.parameters, gradients, sums, there):
            gradient.copy_(total.view_as(gradient))
            p.grad = gradient if found else None

    def apply(self, number: int) -> dict[str, float]:
        """The update of step `number`. Returns the learning rates by component.

        Without any gradient nothing changes, here or in the optimizer's state. An fp16 gradient that
        overflowed changes nothing and lowers the scale.
        Raises UserError if that goes on.
        """
        rates = self.schedule.apply(self.optimizer, number)
        if not self._are_there():  # a scaler takes it for a mistake, and some optimizers would count it
            return rates
        if self.scaler:
            before = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.skipped = self.skipped + 1 if self.scaler.get_scale() < before else 0
            if self.skipped >= MAX_SKIPPED:
                raise UserError(
                    f"train.mixed_precision = 'fp16' overflowed in {self.skipped} steps in a row, the last "
                    f"was {number}: use 'bf16' or 'no', or a smaller train.learning_rate"
                )
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema and not self.skipped:
            self.ema.update(self.parameters)
        return rates

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Meanwhile the weights that the run stands for: the EMA or the optimizer's own average, where there
        is one. Afterwards the training goes on with exactly the bits that it had."""
        kept = [parameter.detach().clone() for parameter in self.parameters]
        self.use_average()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, kept)
            for group in self.optimizer.param_groups:
                if "train_mode" in group:  # .train() would compute the weights back, up to rounding
                    group["train_mode"] = True

    def use_average(self) -> None:
        """For good, at the end of a run."""
        self._switch("eval")
        if self.ema:
            self.ema.copy_to(self.parameters)

    def _switch(self, mode: str) -> None:
        """Schedule-free optimizers keep training weights and average in the same place."""
        getattr(self.optimizer, mode, lambda: None)()

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "ema": self.ema.state_dict() if self.ema else {},
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        self.skipped = state["skipped"]


class Ema:
    """e <- d e + (1 - d) p after each update, with d = min(decay, (1 + n) / (10 + n)) at update n.

    The smaller decay at first lets the average forget the start of the run.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.values = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor]) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.values, [p.detach() for p in parameters], 1 - decay)

    @torch.no_grad()
    def copy_to(self, parameters: Sequence[Tensor]) -> None:
        torch._foreach_copy_([p.detach() for p in parameters], self.values)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "values": [value.cpu() for value in self.values]}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates = state["updates"]
        for value, saved in zip(self.values, state["values"], strict=True):
            value.copy_(saved)
