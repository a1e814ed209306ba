"""Text embeddings: computed once for each string where they cannot change, else at each step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spf_kit.data import entries
from spf_kit.errors import UserError
from spf_kit.probes import Spans

if TYPE_CHECKING:
    from spf_kit.data.captions import Caption
    from spf_kit.families.base import Family

Encoder = Callable[[list[str]], dict[str, Tensor]]
BATCH = 32


class TextCache:
    """Conditions of known strings, kept on the CPU or on disk: `cache(texts)` is the encoder's answer, batch
    first.

    Only for a text encoder that is not trained. A string that was not foreseen raises KeyError.
    """

    def __init__(
        self,
        encoder: Encoder,
        texts: Collection[str],
        device: torch.device,
        progress: Callable[[int, int], None] | None = None,
        keys: Callable[[list[str]], list[str]] | None = None,
    ) -> None:
        """`keys` names what an answer depends on (`Family.text_keys`): with it answers lie on disk, where the
        next run finds them, and take no memory however many there are; without it in memory."""
        self.device = device
        self._keys = keys
        self._rows: dict[str, dict[str, Tensor]] = {}
        if keys:
            texts = [text for text in texts if entries.read(self._file(text)) is None]  # or damaged
        ordered = sorted(texts)
        for start in range(0, len(ordered), BATCH):
            chunk = ordered[start : start + BATCH]
            with torch.no_grad():
                condition = encoder(chunk)
            for i, text in enumerate(chunk):
                # a clone, or each row would keep the whole chunk in memory
                row = {key: value[i].cpu().clone() for key, value in condition.items()}
                if keys:
                    entries.write(self._file(text), row)
                else:
                    self._rows[text] = row
            if progress:
                progress(start + len(chunk), len(ordered))

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Conditions of B texts: each entry (B, ...), on the device."""
        rows = [self._read(text) if self._keys else self._rows[text] for text in texts]
        return {key: torch.stack([row[key] for row in rows]).to(self.device) for key in rows[0]}

    def _file(self, text: str) -> Path:
        assert self._keys is not None
        return entries.place("texts", self._keys([text])[0])

    def _read(self, text: str) -> dict[str, Tensor]:
        """Raises UserError if the entry has been damaged or removed since it was made."""
        found = entries.read(path := self._file(text))
        if found is None:
            raise UserError(
                f"the cached text {str(path)!r} was damaged or removed while training ran: start again with "
                "--resume, which makes it anew"
            )
        return found


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
