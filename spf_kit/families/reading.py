"""How a base model reads text and sees pictures, without its modules: for checks that need no weights."""

from __future__ import annotations

from spf_kit.families.sources import Source
from spf_kit.families.text import token_ids


class Reading:
    """The tokenizers of a base and the scale of its latents, from configs alone; half a second, not ten."""

    def __init__(self, source: Source) -> None:
        blocks = source.configs["vae"].get("block_out_channels", (0,) * 4)
        self.latent_factor = 2 ** (len(blocks) - 1)
        components = [name for name in source.configs if name.startswith("text_encoder")]
        self._tokenizers = [source.tokenizer(name) for name in components]

    def count_tokens(self, text_: str) -> int:
        """As `Family.count_tokens`."""
        return max(len(token_ids(tokenizer, text_)) for tokenizer in self._tokenizers)
