"""The pictures behind an evaluation's numbers, kept in the run folder once they are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from spf_kit.training.records import ProofCase, ProofRecord, StrengthRecord, StrengthRow, data_url

if TYPE_CHECKING:
    from spf_kit.config import Resolved
    from spf_kit.families.base import Family
    from spf_kit.measure.evaluate import Evaluation

FIRST = 4  # prompts that nobody chose
WORST = 4
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


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
    """One prompt over the strengths, asked and not: the first that the base does not answer by itself, or a
    strip would show nothing growing. 0 and 1 were drawn by the evaluation."""
    import torch

    from spf_kit.adapters import files
    from spf_kit.adapters.earlier import attached
    from spf_kit.adapters.inject import AdapterHandle
    from spf_kit.sampling import generate, to_pil

    config, settings = resolved.config, evaluation.data["settings"]
    answers = [row["responds"] for row in evaluation.data["base"]["per_prompt"]]
    n = answers.index(False) if False in answers else 0
    caption, seed = evaluation.captions[n], int(settings["seeds"][n])
    known = {0.0: evaluation.base, 1.0: evaluation.pictures[name]}
    drawn = {s: torch.stack([pictures.asked[n], pictures.plain[n]]) for s, pictures in known.items()}
    with attached(family, config.adapter.on):
        handle = AdapterHandle.attach(family, files.read(lora), name="strengths")
        try:
            missing = [strength for strength in STRENGTHS if strength not in drawn]
            for number, strength in enumerate(missing):
                handle.set_strength(strength)
                drawn[strength] = generate(
                    family, [caption.full, caption.base], [seed, seed],
                    steps=config.evaluate.steps, cfg=config.evaluate.cfg, scheduler=settings["sampler"],
                    clip_skip=config.base.clip_skip, chunks=config.data.chunks,
                )  # fmt: skip
                if progress:
                    progress(number + 1, len(missing), f"strength {strength:g}")
        finally:
            handle.remove()
    rows = [
        StrengthRow(
            prompt=caption.base,
            seed=seed,
            asked=asked,
            pictures=[
                data_url(picture) for picture in to_pil(torch.stack([drawn[s][place] for s in STRENGTHS]))
            ],
        )
        for place, asked in enumerate((True, False))
    ]
    return StrengthRecord(target=caption.target, strengths=list(STRENGTHS), rows=rows)
