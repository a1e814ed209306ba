"""Pictures that the base draws, labelled by what their prompts name: what the judge is to read.

    python -m spf_kit.embedded.build.drawn --base spf_kit/embedded/base --output cache/drawn --count 3000

The base draws what a prompt names in 99 of 100 pictures, so that the label is nearly always right. Half of
the prompts ask for a preset attribute, which the base seldom draws: the label leaves that open, and what it
would cover. No prompt that spf-kit tunes or reports with is among them.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from spf_kit import embedded
from spf_kit.embedded.build import attributes as at
from spf_kit.embedded.build.common import start
from spf_kit.embedded.build.render import save
from spf_kit.embedded.build.scores import pipeline
from spf_kit.embedded.judge import COVERED

BATCH = 32
HOW = ((10, 5.0), (25, 4.0))  # sampler steps and guidance, in turn


def prompts(count: int, rng: random.Random) -> Iterator[tuple[str, at.Portrait]]:
    """Prompts and the attributes that they tell."""
    reported = {
        frozenset(prompt.split(", ")) for name in ("tune", "evaluate") for prompt in embedded.prompts(name)
    }
    while count:
        portrait = at.draw_common(rng)
        said = list(at.phrases(portrait).values())
        rng.shuffle(said)
        words = ["a portrait", *said]
        if frozenset(words) in reported:
            continue
        count -= 1
        if count % 2:
            target = rng.choice(list(at.TARGETS))
            words.append(target)
            for unknown in (at.TARGETS[target][0], *COVERED[target]):
                portrait.pop(unknown)
        yield ", ".join(words), portrait


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start(options.seed, options.threads)
    texts, portraits = zip(*prompts(options.count, random.Random(options.seed)))
    pipe, drawn = pipeline(options.base), []
    for number, first in enumerate(range(0, options.count, BATCH)):
        part = list(texts[first : first + BATCH])
        seeds = [torch.Generator().manual_seed(10**6 + first + i) for i in range(len(part))]
        steps, guidance = HOW[number % len(HOW)]
        images = pipe(
            part, generator=seeds, num_inference_steps=steps, guidance_scale=guidance, output_type="np"
        ).images
        drawn.append((images * 255).round().astype(np.uint8))
        print(first + len(part), flush=True)
    save(options.output, np.concatenate(drawn), list(portraits))


if __name__ == "__main__":
    main()
