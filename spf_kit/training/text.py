"""Text embeddings: computed once for each string where they cannot change, else at each step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

Encoder = Callable[[list[str]], dict[str, Tensor]]
BATCH = 32


class TextCache:
    """Conditions of known strings, kept on the CPU: `cache(texts)` is the encoder's answer, batch first.

    Only for a text encoder that is not trained. A string that was not foreseen raises KeyError.
    """

    def __init__(
        self,
        encoder: Encoder,
        texts: Collection[str],
        device: torch.device,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.device = device
        self._rows: dict[str, dict[str, Tensor]] = {}
        ordered = sorted(texts)
        for start in range(0, len(ordered), BATCH):
            chunk = ordered[start : start + BATCH]
            with torch.no_grad():
                condition = encoder(chunk)
            for i, text in enumerate(chunk):
                # a clone, or each row would keep the whole chunk in memory
                self._rows[text] = {key: value[i].cpu().clone() for key, value in condition.items()}
            if progress:
                progress(start + len(chunk), len(ordered))

    def __len__(self) -> int:
        return len(self._rows)

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Conditions of B texts: each entry (B, ...), on the device."""
        rows = [self._rows[text] for text in texts]
        return {key: torch.stack([row[key] for row in rows]).to(self.device) for key in rows[0]}
