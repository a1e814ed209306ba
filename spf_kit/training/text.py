"""Text embeddings: computed once for each string where they cannot change, else at each step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spf_kit.probes import Spans

if TYPE_CHECKING:
    from spf_kit.data.captions import Caption
    from spf_kit.families.base import Family

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


class Phrases:
    """Captions taken apart: embeddings of their phrases by the encoder as it was before the training, and
    the places of their tokens. The encoder may go afterwards."""

    def __init__(self, family: Family, captions: Iterable[Caption], chunks: int) -> None:
        self._family, self._chunks = family, chunks
        self._spans: dict[tuple[tuple[str, ...], str], Spans] = {}
        self._rows: dict[str, Tensor] = {}
        self.embed(sorted({part for caption in captions for part in (*caption.phrases, caption.target)}))

    def embed(self, texts: Sequence[str]) -> Tensor:
        """(N, D), L2-normalised, on the device. Only what is new goes through the encoder."""
        new = [text for text in dict.fromkeys(texts) if text not in self._rows]
        for start in range(0, len(new), BATCH):
            chunk = new[start : start + BATCH]
            self._rows |= dict(zip(chunk, self._family.embed_text(chunk).cpu().clone().unbind()))
        return torch.stack([self._rows[text] for text in texts]).to(self._family.device)

    def spans(self, caption: Caption) -> Spans:
        """Where the parts of a caption stand; a dropped caption has no parts."""
        if not caption.full:
            return Spans((), (), ())
        key = caption.phrases, caption.target
        if key not in self._spans:
            self._spans[key] = self._family.spans(*key, self._chunks)
        return self._spans[key]
