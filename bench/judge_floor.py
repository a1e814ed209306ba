"""What the attribute judge takes for pollution in perfect edits, and for a change in noise that nobody sees.

    pip install -e ".[embedded-build]"
    python bench/judge_floor.py [--count 400] [--drawn 288] [--prompts tune]

Renders portraits twice, without and with a target attribute, by the same random numbers: nothing else differs
but what the attribute covers. Pollution as `bench/pollution.py` counts it, the share of the other attributes
that the judge sees changed, should be 0; what it is instead, no training can be told from.

Then the base model draws prompts, and noise of a mean size of 0.005, white and smooth, is added to
its pictures 20 times: the share of readings that turn, by the probability that the judge gave them before.
Prints Markdown.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter

import numpy as np
import torch
from torch import Tensor

from spf_kit import embedded, families, schema
from spf_kit.embedded.build import attributes, render
from spf_kit.embedded.judge import COVERED, TARGETS, AttributeJudge
from spf_kit.measure.judges import compared
from spf_kit.sampling import generate

RANGES = (0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.9, 1.01)  # ends of ranges of probability
TIMES = 20


def pictures(portraits: list[attributes.Portrait]) -> Tensor:
    """(N, 3, 64, 64) in [0, 1], the n-th by the n-th random numbers."""
    drawn = [render.picture(portrait, random.Random(n)) for n, portrait in enumerate(portraits)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 255


def perfect_edits(judge: AttributeJudge, count: int) -> None:
    rng = random.Random(7)
    portraits = [attributes.draw_common(rng) for _ in range(count)]
    plain = pictures(portraits)
    before = judge.read(plain)
    print("| attribute | response | pollution of a perfect edit | of it |\n| --- | --- | --- | --- |")
    means = []
    for target, (attribute, value) in TARGETS.items():
        edited = pictures([portrait | {attribute: value} for portrait in portraits])
        response = judge.shows(edited, target).float().mean()
        rest = [name for name in judge.attributes if name not in (attribute, *COVERED[target])]
        pairs = [compared(a, b, rest) for a, b in zip(before, judge.read(edited), strict=True)]
        names = Counter(name for _, changed in pairs for name in changed)
        means.append(sum(len(changed) / len(seen) for seen, changed in pairs) / count)
        named = ", ".join(f"{name} {times / count:.3f}" for name, times in names.most_common())
        print(f"| {attribute}: {value} | {response:.3f} | {means[-1]:.4f} | {named} |")
    print(f"| mean | | {sum(means) / len(means):.4f} | |")


def noise(shape: torch.Size, smooth: bool, draw: torch.Generator) -> Tensor:
    """Of a mean size of 0.005."""
    if smooth:
        coarse = torch.randn((*shape[:2], 8, 8), generator=draw)
        found = torch.nn.functional.interpolate(coarse, shape[2:], mode="bilinear")
    else:
        found = torch.randn(shape, generator=draw)
    return found * (0.005 / found.abs().mean())


def turned_by_noise(judge: AttributeJudge, split: str, count: int) -> None:
    texts, family = embedded.prompts(split), families.load(schema.Base())
    prompts = [texts[n % len(texts)] for n in range(count)]
    drawn = generate(family, prompts, range(5000, 5000 + count), steps=10, batch_size=16)
    before, draw = judge.probabilities(drawn), torch.Generator().manual_seed(0)
    print("| noise | probability before | readings | turned |\n| --- | --- | --- | --- |")
    for kind in ("white", "smooth"):
        turned: list[Counter[bool]] = [Counter() for _ in RANGES]
        for _ in range(TIMES):
            noisy = (drawn + noise(drawn.shape, kind == "smooth", draw)).clamp(0, 1)
            for name, after in judge.probabilities(noisy).items():
                chances, values = before[name].max(dim=1)
                for chance, other in zip(chances.tolist(), (after.argmax(dim=1) != values).tolist()):
                    turned[next(n for n, end in enumerate(RANGES) if chance < end)][other] += 1
        for start, end, told in zip((0.0, *RANGES), RANGES, turned):
            share = told[True] / max(1, told.total())
            print(f"| {kind} | {start:g} to {min(end, 1.0):g} | {told.total() // TIMES} | {share:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=400, help="portraits")
    parser.add_argument("--drawn", type=int, default=288, help="pictures of the base")
    parser.add_argument("--prompts", choices=["tune", "evaluate"], default="tune")
    options = parser.parse_args()
    torch.set_num_threads(1)
    judge = AttributeJudge.load()
    perfect_edits(judge, options.count)
    print()
    turned_by_noise(judge, options.prompts, options.drawn)


if __name__ == "__main__":
    main()
