"""How the samples of a batch are shared out: among processes, and within one among passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Pass(NamedTuple):
    """The samples that go through the model together."""

    places: range  # in the whole batch
    share: float  # of the whole batch; 0: nothing is left for this process, and what it runs counts nothing


@dataclass(frozen=True)
class Split:
    """Batches of `whole` samples, shared out among `world` processes.

    `whole` belongs to the run: the processes that began it, times `batch_size`. Another number of processes
    that goes on with it takes the same batches, in more passes or in smaller ones.
    """

    batch_size: int  # samples in one pass, at most
    whole: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.world and 1 <= self.batch_size <= self.whole):
            raise ValueError(f"no share for process {self.rank}/{self.world} in passes of {self.batch_size}")

    @classmethod
    def of(cls, batch_size: int, rank: int, world: int, began: int | None = None) -> Split:
        """The share of one process; `began`: so many processes began the run, if not as many as now."""
        return cls(batch_size, batch_size * (began or world), rank, world)

    def passes(self, count: int) -> list[Pass]:
        """This process's part of a batch of `count` samples (an epoch's last one may be smaller).

        Shares differ by one sample at most, and together they are the batch. A process for which none is
        left takes the batch's first sample all the same, with a share of 0: then every process has
        gradients and takes part in every exchange.
        """
        start, end = (count * rank // self.world for rank in (self.rank, self.rank + 1))
        if start == end:
            return [Pass(range(1), 0.0)]
        places = range(start, end)
        parts = [places[i : i + self.batch_size] for i in range(0, len(places), self.batch_size)]
        return [Pass(part, len(part) / count) for part in parts]

    def advice(self) -> list[str]:
        """What is allowed and hardly meant, one sentence each."""
        if self.whole >= self.world:
            return []
        return [
            f"the run was begun with {self.whole} {'sample' if self.whole == 1 else 'samples'} in a batch, "
            f"which are shared out now among {self.world} processes: {self.world - self.whole} of them have "
            "nothing to do"
        ]
