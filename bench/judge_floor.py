"""What the attribute judge takes for pollution in perfect edits.

    pip install -e ".[embedded-build]"
    python bench/judge_floor.py [--count 400]

Renders portraits twice, without and with a target attribute, by the same random numbers: nothing else differs
but what the attribute covers. Pollution as `bench/pollution.py` counts it, the share of the other attributes
that the judge sees changed, should be 0; what it is instead, no training can be told from. Prints Markdown.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter

import numpy as np
import torch
from torch import Tensor

from spf_kit.embedded.build import attributes, render
from spf_kit.embedded.judge import COVERED, TARGETS, AttributeJudge
from spf_kit.measure.judges import compared


def pictures(portraits: list[attributes.Portrait]) -> Tensor:
    """(N, 3, 64, 64) in [0, 1], the n-th by the n-th random numbers."""
    drawn = [render.picture(portrait, random.Random(n)) for n, portrait in enumerate(portraits)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=400, help="portraits")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng, judge = random.Random(7), AttributeJudge.load()
    portraits = [attributes.draw_common(rng) for _ in range(options.count)]
    before = judge.read(pictures(portraits))
    print("| attribute | response | pollution of a perfect edit | of it |\n| --- | --- | --- | --- |")
    means = []
    for target, (attribute, value) in TARGETS.items():
        edited = pictures([portrait | {attribute: value} for portrait in portraits])
        response = judge.shows(edited, target).float().mean()
        rest = [name for name in judge.attributes if name not in (attribute, *COVERED[target])]
        pairs = [compared(a, b, rest) for a, b in zip(before, judge.read(edited))]
        names = Counter(name for _, changed in pairs for name in changed)
        means.append(sum(len(changed) / len(seen) for seen, changed in pairs) / options.count)
        named = ", ".join(f"{name} {times / options.count:.3f}" for name, times in names.most_common())
        print(f"| {attribute}: {value} | {response:.3f} | {means[-1]:.4f} | {named} |")
    print(f"| mean | | {sum(means) / len(means):.4f} | |")


if __name__ == "__main__":
    main()
