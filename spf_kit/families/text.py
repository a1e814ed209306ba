"""Captions to the text encoder's hidden states: windows of 77 tokens, longer captions in chunks, clip skip.

Shapes: B captions, n chunks, L = 77 tokens of a window, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spf_kit.errors import UserError
from spf_kit.probes import Spans


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text, without begin and end tokens, of any length."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
    return ids


def windows(tokenizer: Any, captions: list[str], *, chunks: int, length: int) -> Tensor:
    """Token ids, (B, n, L) int64. Each window is begin + up to L - 2 tokens + end, then padding.

    What exceeds n windows is cut. Unused windows hold the empty text, as A1111 fills them.
    """
    room = length - 2
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = []
    for caption in captions:
        ids = token_ids(tokenizer, caption)
        for chunk in range(chunks):
            part = ids[chunk * room : (chunk + 1) * room]
            rows.append([begin, *part, end] + [pad] * (room - len(part)))
    return torch.tensor(rows, dtype=torch.int64).reshape(len(captions), chunks, length)


def spans(tokenizer: Any, phrases: Sequence[str], target: str, *, chunks: int, length: int) -> Spans:
    """Where `windows` puts the tokens of ", ".join([*phrases, target]).

    By the tokenizer's own offsets into the text, so that words of several tokens, repeated phrases and
    merged punctuation need no search. A token belongs to the part in which it begins; a comma between two
    parts to none, but to c_base where both are of c_base.
    """
    caption = ", ".join([*phrases, target])
    found = tokenizer(
        caption, add_special_tokens=False, truncation=False, verbose=False, return_offsets_mapping=True
    )
    room, starts = length - 2, [start for start, _ in found.offset_mapping]
    places = [  # windows of begin + room + end
        (number // room * length + 1 + number % room, start)
        for number, start in enumerate(starts)
        if number < chunks * room
    ]

    def within(first: int, end: int) -> tuple[int, ...]:
        return tuple(place for place, start in places if first <= start < end)

    parts, at = [], 0
    for phrase in phrases:
        parts.append(within(at, at + len(phrase)))
        at += len(phrase) + len(", ")
    return Spans(within(0, at - len(", ")), tuple(parts), within(at, len(caption)))


def hidden_states(text_encoder: Any, ids: Tensor, *, clip_skip: int) -> Tensor:
    """The text encoder's states for windows of ids, (B, n, L) to (B, n L, D).

    `clip_skip` counts layers from the end, 1 is the last; the final layer norm is applied to whichever layer
    it names, as A1111 and diffusers do. Raises UserError if the encoder has fewer layers.
    """
    layers = text_encoder.config.num_hidden_layers
    if not 1 <= clip_skip <= layers:
        raise UserError(f"clip_skip = {clip_skip} does not fit this text encoder: it has {layers} layers")
    flat = ids.flatten(0, 1).to(text_encoder.device)
    if clip_skip == 1:
        states = text_encoder(flat).last_hidden_state
    else:
        outputs = text_encoder(flat, output_hidden_states=True)
        inner = getattr(text_encoder, "text_model", text_encoder)
        states = outputs.hidden_states[-clip_skip]
        states = inner.final_layer_norm.to(states.device)(states)  # the encoder may have gone, see `offload`
    return states.reshape(len(ids), -1, states.shape[-1])


def penultimate(text_encoder: Any, ids: Tensor, *, clip_skip: int) -> tuple[Tensor, Tensor]:
    """SDXL's reading of a text encoder: states of windows of ids (B, n, L) as (B, n L, D), and the encoder's
    first output for each caption's first window: the projected embedding (B, P), if it has a projection.

    `clip_skip` counts from the layer before the last, 1, as SDXL was trained; no final layer norm follows.
    Raises UserError if the encoder has fewer layers.
    """
    layers = text_encoder.config.num_hidden_layers
    if not 1 <= clip_skip < layers:
        raise UserError(
            f"clip_skip = {clip_skip} does not fit this text encoder: it has {layers} layers, and 1 is the "
            "last but one"
        )
    flat = ids.flatten(0, 1).to(text_encoder.device)
    outputs = text_encoder(flat, output_hidden_states=True)
    states = outputs.hidden_states[-(clip_skip + 1)]
    return states.reshape(len(ids), -1, states.shape[-1]), outputs[0][:: ids.shape[1]]


def cut_words(tokenizer: Any, text: str, room: int) -> list[str]:
    """The words of `text` that do not fit into `room` tokens, from the first that does not fit whole."""
    if len(token_ids(tokenizer, text)) <= room:
        return []
    words = text.split()
    used = 0
    for number, word in enumerate(words):
        # CLIP splits at white space before it merges, so that words count separately
        used += len(token_ids(tokenizer, word))
        if used > room:
            return words[number:]
    return []
