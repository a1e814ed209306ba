"""The pictures behind an evaluation's numbers, kept in the run folder once they are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spf_kit.training.records import ProofCase, ProofRecord, StrengthRecord, StrengthRow, data_url

if TYPE_CHECKING:
    from torch import Tensor

    from spf_kit.config import Resolved
    from spf_kit.families.base import Family
    from spf_kit.measure.evaluate import Evaluation

FIRST = 4  # prompts that nobody chose
WORST = 4
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
IN_STRIP = 2  # prompts, each asked and not asked


def proof(evaluation: Evaluation, name: str) -> ProofRecord:
    """The first prompts, and the worst of the others: those that a page of successes would hide."""
    from spf_kit.sampling import to_pil

    rows = evaluation.data["loras"][name]["per_prompt"]
    faults = {n: _fault(row) for n, row in enumerate(rows)}
    worst = sorted(
        (n for n in range(FIRST, len(rows)) if faults[n][0]), key=lambda n: faults[n][0], reverse=True
    )[:WORST]
    shown = [*range(min(FIRST, len(rows))), *worst]
    lora = evaluation.pictures[name]
    drawn = [
        to_pil(pictures[shown])
        for pictures in (evaluation.base.plain, evaluation.base.asked, lora.asked, lora.plain)
    ]
    cases = [
        ProofCase(
            prompt=rows[n]["prompt"],
            seed=rows[n]["seed"],
            why=faults[n][1] if n in worst else "",
            responds=rows[n]["responds"],
            changed=rows[n]["changed"],
            leaked=rows[n]["leaked"],
            base_plain=data_url(drawn[0][place]),
            base_asked=data_url(drawn[1][place]),
            asked=data_url(drawn[2][place]),
            plain=data_url(drawn[3][place]),
        )
        for place, n in enumerate(shown)
    ]
    return ProofRecord(target=evaluation.captions[0].target, cases=cases)


def _fault(row: dict[str, Any]) -> tuple[float, str]:
    """How much is wrong with a prompt's pictures, and what. A leak counts most: nobody asked for it."""
    leaked, changed, misses = list(row["leaked"]), list(row["changed"]), row["responds"] is False
    words = [
        *([f"not asked, it changes: {', '.join(leaked)}"] if leaked else []),
        *(["asked, it does not show the target"] if misses else []),
        *([f"asked, it also changes: {', '.join(changed)}"] if changed else []),
    ]
    return 4.0 * len(leaked) + 2.0 * misses + len(changed), "; ".join(words)


def strengths(
    resolved: Resolved, family: Family, lora: Path, evaluation: Evaluation, name: str, progress: Any = None
) -> StrengthRecord:
    """The first prompts over the strengths, asked and not. 0 and 1 were drawn by the evaluation."""
    from spf_kit.adapters import files
    from spf_kit.adapters.earlier import attached
    from spf_kit.adapters.inject import AdapterHandle
    from spf_kit.sampling import generate

    config, captions = resolved.config, evaluation.captions[:IN_STRIP]
    count, settings = len(captions), evaluation.data["settings"]
    seeds = [int(seed) for seed in settings["seeds"][:count]]
    texts = [caption.full for caption in captions] + [caption.base for caption in captions]
    known = {0.0: evaluation.base, 1.0: evaluation.pictures[name]}
    drawn: dict[float, Tensor] = {
        s: _both(pictures.asked[:count], pictures.plain[:count]) for s, pictures in known.items()
    }
    with attached(family, config.adapter.on):
        handle = AdapterHandle.attach(family, files.read(lora), name="strengths")
        try:
            for strength in STRENGTHS:
                if strength not in drawn:
                    handle.set_strength(strength)
                    drawn[strength] = generate(
                        family, texts, seeds * 2, steps=config.evaluate.steps, cfg=config.evaluate.cfg,
                        scheduler=settings["sampler"], clip_skip=config.base.clip_skip,
                        chunks=config.data.chunks, batch_size=config.evaluate.batch_size, progress=progress,
                    )  # fmt: skip
        finally:
            handle.remove()
    rows = [
        StrengthRow(
            prompt=captions[n % count].base,
            seed=seeds[n % count],
            asked=n < count,
            pictures=_urls([drawn[strength][n] for strength in STRENGTHS]),
        )
        for pair in range(count)
        for n in (pair, count + pair)
    ]
    return StrengthRecord(target=captions[0].target, strengths=list(STRENGTHS), rows=rows)


def _both(asked: Tensor, plain: Tensor) -> Tensor:
    import torch

    return torch.cat([asked, plain])


def _urls(pictures: Sequence[Tensor]) -> list[str]:
    from spf_kit.sampling import to_pil

    return [data_url(to_pil(picture[None])[0]) for picture in pictures]
