"""CLIP's tokenizer from the vocabulary in the package, and tokenizers that travel inside a single file."""

from __future__ import annotations

import gzip
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

VOCABULARY = Path(__file__).parent / "clip_vocab" / "bpe_simple_vocab_16e6.txt.gz"
WINDOW = 77  # tokens of one window, the begin and the end token included
_MERGES = 49152 - 256 - 2  # of the file's merges, as many as CLIP uses
END = "<|endoftext|>"  # pads for OpenAI's CLIP
OPEN_CLIP_PAD = "!"  # token 0, pads for OpenCLIP (Stable Diffusion 2.x, SDXL's second text encoder)
SHIPPED = {"clip": END, "open_clip": OPEN_CLIP_PAD}  # names in metadata


def clip_tokenizer(pad: str = END) -> Any:
    """CLIP's own tokenizer (that of Stable Diffusion), without a download."""
    from transformers import CLIPTokenizer

    vocabulary, merges = _clip_vocabulary()
    return CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), model_max_length=WINDOW, pad_token=pad)


def pad_of(family: str, component: str) -> str:
    """What pads a text encoder's windows, where no tokenizer of its own says so."""
    return OPEN_CLIP_PAD if family == "sd2" or component == "text_encoder_2" else END


@cache
def _clip_vocabulary() -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    """Token ids and merges, in OpenAI's order: 256 bytes, 256 bytes at a word's end, merges, two special."""
    lines = gzip.decompress(VOCABULARY.read_bytes()).decode("utf-8").split("\n")
    merges = tuple((first, second) for first, second in (line.split() for line in lines[1 : _MERGES + 1]))
    letters = _byte_letters()
    tokens = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *(first + second for first, second in merges),
    ]
    tokens += ["<|startoftext|>", END]
    return {token: number for number, token in enumerate(tokens)}, merges


def _byte_letters() -> list[str]:
    """One printable letter for each byte: itself if printable, else the next free one from 256 on (GPT-2)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + number) for number in range(others)]


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a diffusers folder."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def pack(tokenizer: Any) -> str:
    """A tokenizer as text for a file's metadata: a name for CLIP's own, else its files as JSON."""
    names = [name for name, pad in SHIPPED.items() if pad == tokenizer.pad_token]
    if names and tokenizer.get_vocab() == _clip_vocabulary()[0]:
        return names[0]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return json.dumps({file.name: file.read_text("utf-8") for file in sorted(Path(folder).iterdir())})


def unpack(packed: str) -> Any:
    """The inverse of `pack`. Raises ValueError if the text is damaged."""
    if packed in SHIPPED:
        return clip_tokenizer(SHIPPED[packed])
    files = json.loads(packed)
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            if Path(name).name != name or not name.endswith((".json", ".txt")):
                raise ValueError(f"a tokenizer has no file {name!r}")
            (Path(folder) / name).write_text(text, "utf-8")
        return load_tokenizer(Path(folder))
