"""OFT on a live model; the formula is in `spf_kit.adapters.oft`."""

from __future__ import annotations

from typing import Any

import torch
from peft import OFTConfig
from peft.tuners.oft import layer as peft_oft
from torch import Tensor, nn

from spf_kit.adapters.live.base import Wrapped, plain
from spf_kit.adapters.oft import OftLayer
from spf_kit.adapters.parts import block_size
from spf_kit.adapters.spec import Spec
from spf_kit.adapters.update import Update


class _Linear(peft_oft.Linear):  # type: ignore[misc]
    """peft's layer, turned around: it rotates the outputs, as kohya's and LyCORIS' files say, and adds the
    difference, where peft's own changes what earlier adapters see and knows no strength."""

    strength = 1.0
    constraint = 0.0

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        self.in_features = self.out_features
        super().update_layer(*args, **kwargs)

    def rotations(self, name: str) -> Tensor:
        """R (k, n, n), by peft's parameters: R_j = (1 - P_j) (1 + P_j)^-1, P = -Q. Exact, not by a series."""
        held = self.oft_R[name]
        if self.constraint:
            with torch.no_grad():
                held.weight.copy_(constrained(held.weight, self.constraint))
        rotations: Tensor = held._cayley_batch(held.weight, held.block_size, use_cayley_neumann=False)
        return rotations

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output so far, plus s * y (R - 1) with y = W x."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        base = self.get_base_layer()
        for name in self.active_adapters:
            if self.base_layer is base and isinstance(self.input_dropout, nn.Identity):
                plain = result if base.bias is None else result - base.bias
            else:
                plain = nn.functional.linear(self.input_dropout(x).to(base.weight.dtype), base.weight)
            # small rotations would drown in half precision
            with torch.autocast(device_type=x.device.type, enabled=False):
                turn = self.rotations(name)
                turn = turn - torch.eye(turn.shape[-1], device=turn.device)
                blocks = plain.float().unflatten(-1, turn.shape[:2])
                difference = torch.einsum("...kn,knm->...km", blocks, turn).flatten(-2)
            result = (result + self.strength * difference).to(result.dtype)
        return result


def constrained(vectors: Tensor, constraint: float) -> Tensor:
    """The upper triangles (k, n (n - 1) / 2) of k blocks with |P_j|_F at most constraint / sqrt(k).

    What peft does for COFT, but for its rounding: there a second pass moves the weights again, and a pass for
    a preview would change the run.
    """
    norms = (2 * vectors.square().sum(1, keepdim=True)).sqrt()
    limit = constraint / len(vectors) ** 0.5
    return torch.where(norms > limit * (1 + 1e-5), vectors * (limit / norms), vectors)


class OftLive(Wrapped):
    """Parameters: the upper triangles of P, row by row, (k, n (n - 1) / 2)."""

    kind = "oft"

    @classmethod
    def make(cls, module: nn.Module, key: str, spec: Spec) -> Any:
        outputs = plain(module).weight.shape[0]
        config = OFTConfig(r=0, oft_block_size=block_size(outputs, spec.rank), use_cayley_neumann=False)
        tuner = _Linear(module, key, config=config, r=0)
        tuner.constraint = spec.constraint
        return tuner

    def parts(self) -> dict[str, nn.Parameter]:
        return {"oft_R": self.tuner.oft_R[self.key].weight}

    def initialise(self, generator: torch.Generator) -> None:
        self._empty()

    def _empty(self) -> None:
        nn.init.zeros_(self.parts()["oft_R"])

    def act(self, strength: float, on: bool) -> None:
        super().act(strength, on)
        self.tuner.strength = strength

    def load(self, layer: Update) -> None:
        assert isinstance(layer, OftLayer)
        skew = (layer.oft_blocks - layer.oft_blocks.mT).float()
        rows, columns = torch.triu_indices(layer.rank, layer.rank, 1)
        self.parts()["oft_R"].data.copy_(-skew[:, rows, columns])

    def update(self) -> Update:
        held = self.tuner.oft_R[self.key]
        values = held.weight.detach()
        if self.spec.constraint:  # the optimizer's last step may have left it; the next pass would mend that
            values = constrained(values, self.spec.constraint)
        blocks = torch.zeros(len(values), held.block_size, held.block_size)
        rows, columns = torch.triu_indices(held.block_size, held.block_size, 1)
        blocks[:, rows, columns] = -values.cpu()
        return OftLayer(blocks, 0.0)

    def square_norm(self) -> Tensor:
        turn = self.tuner.rotations(self.key)
        turn = turn - torch.eye(turn.shape[-1], device=turn.device)
        blocks = self.weight.float().unflatten(0, turn.shape[:2])
        return (turn.mT @ blocks).square().sum()
