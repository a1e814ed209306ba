"""A CLIPTokenizer with a small vocabulary: all 256 bytes, and merges that make each caption word one token.

python -m spf_kit.embedded.build.tokenizer --output work/tokenizer
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from spf_kit.embedded.build import attributes as at

START, END = "<|startoftext|>", "<|endoftext|>"
EXTRA = [
    "man",
    "woman",
    "person",
    "photo",
    "of",
    "the",
    "in",
    "and",
    "hair",
    "face",
    "head",
    "hat",
    "shirt",
    "no",
    "without",
    "style",
    "picture",
]


def caption_words() -> list[str]:
    """Every word that a caption can hold, in a fixed order."""
    phrases = [*at.OPENINGS, *EXTRA, "skin", "background", "on a", "on an", "wearing a"]
    for table in (at.HAIR_STYLES, at.CLOTHING, at.MOUTHS, at.EYEWEAR, at.FACIAL_HAIR, at.HEADWEAR):
        phrases += [words.replace("{c}", "") for value in table.values() for words in value]
    for colors in (at.SKIN, at.HAIR_COLORS, at.CLOTHING_COLORS, at.BACKGROUNDS):
        phrases += list(colors)
    return sorted({word for phrase in phrases for word in phrase.split()})


def build(output: Path) -> CLIPTokenizer:
    """Learn the merges on the words, write vocab.json and merges.txt and the tokenizer's own files."""
    words = caption_words()
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, min_frequency=1, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(words, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends, merged = [letter + "</w>" for letter in letters], ["".join(pair) for pair in merges]
    tokens = [*letters, *ends, *merged, START, END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    output.mkdir(parents=True, exist_ok=True)
    (output / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (output / "merges.txt").write_text("\n".join(lines) + "\n")
    tokenizer = CLIPTokenizer(
        str(output / "vocab.json"),
        str(output / "merges.txt"),
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=77,
    )
    tokenizer.save_pretrained(output)
    return check(CLIPTokenizer.from_pretrained(output), words)


def check(tokenizer: CLIPTokenizer, words: list[str]) -> CLIPTokenizer:
    """Caption words are single tokens; any other text is spelt out in bytes and comes back."""
    for word in words:
        if len(tokenizer(word).input_ids) != 3:
            raise ValueError(f"{word!r} is not one token: {tokenizer.tokenize(word)}")
    text = "naïve 猫 zebra 42"
    back = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
    if back.replace(" ", "") != text.replace(" ", ""):
        raise ValueError("text outside the vocabulary is lost")
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    tokenizer = build(parser.parse_args().output)
    print(len(tokenizer), tokenizer("a portrait, wearing glasses"))


if __name__ == "__main__":
    main()
