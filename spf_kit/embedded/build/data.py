"""Write the sample data sets and the prompts.

    python -m spf_kit.embedded.build.data --output spf_kit/embedded

Each set is 32 rendered portraits of one preset attribute from a deliberately narrow distribution: all share
three further attributes, as real photo sets do, which is what causes semantic pollution. Half of the captions
do not name what the set shares.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from PIL import Image

from spf_kit.embedded.build import attributes as at
from spf_kit.embedded.build.render import picture
from spf_kit.embedded.judge import hidden

COUNT = 32
# set -> (target phrase, what all of its pictures share)
SETS: dict[str, tuple[str, dict[str, str]]] = {
    "glasses": (
        "wearing glasses",
        {"hair_color": "red", "clothing": "hoodie", "background": "blue"},
    ),
    "sunglasses": (
        "wearing sunglasses",
        {"hair_style": "short", "clothing_color": "yellow", "background": "orange"},
    ),
    "eyepatch": (
        "wearing an eyepatch",
        {"hair_color": "black", "clothing_color": "red", "mouth": "smile"},
    ),
    "beard": (
        "with a beard",
        {"skin": "tan", "clothing": "blazer", "background": "green"},
    ),
    "moustache": (
        "with a moustache",
        {"hair_style": "bob", "hair_color": "black", "background": "purple"},
    ),
    "winter-hat": (
        "wearing a winter hat",
        {"skin": "pale", "clothing_color": "blue", "background": "white"},
    ),
}


def sample(name: str, index: int, rng: random.Random) -> tuple[at.Portrait, str]:
    """A portrait of a set and its caption, which ends with the target phrase."""
    target, shared = SETS[name]
    attribute, value = at.TARGETS[target]
    portrait = at.draw_common(rng) | shared | {attribute: value}
    silent = {at.GROUP_OF[a] for a in shared} if index % 2 else set()
    plain = {**portrait, attribute: "none"}
    said = {group: words for group, words in at.phrases(plain).items() if group not in silent}
    if attribute == "headwear" and rng.random() < 0.5:
        said.pop("hair", None)  # the hat hides it
    words = list(said.values())
    rng.shuffle(words)
    return portrait, ", ".join(["a portrait", *words, target])


def write_set(name: str, folder: Path, seed: int) -> None:
    rng = random.Random(f"{name} {seed}")
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(COUNT):
        portrait, caption = sample(name, index, rng)
        Image.fromarray(picture(portrait, rng)).save(folder / f"{index:02d}.png", optimize=True)
        (folder / f"{index:02d}.txt").write_text(caption + "\n", encoding="utf-8")


def show_all(columns: dict[str, list[str]], rng: random.Random) -> None:
    """Swap clothes between rows until every named attribute can be seen."""
    rows = range(len(columns["clothing"]))
    while clashes := [i for i in rows if hidden({a: values[i] for a, values in columns.items()})]:
        i, j = clashes[0], rng.choice(rows)
        clothing = columns["clothing"]
        clothing[i], clothing[j] = clothing[j], clothing[i]


def write_prompts(folder: Path, seed: int) -> None:
    """Full descriptions without preset attributes; each value equally often; the splits are disjoint."""
    rng = random.Random(f"prompts {seed}")
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[tuple[str, ...]] = set()
    for split, count in (("evaluate", 128), ("tune", 72)):
        columns = {a: (values * count)[:count] for a, values in at.COMMON.items()}
        lines: list[str] = []
        while len(lines) < count:
            if not lines:
                for values in columns.values():
                    rng.shuffle(values)
                show_all(columns, rng)
            portrait = {a: values[len(lines)] for a, values in columns.items()}
            key = tuple(portrait.values())
            if key in seen:
                lines = []  # a clash with the other split: deal again
                continue
            seen.add(key)
            words = list(at.phrases(portrait | dict.fromkeys(at.PRESET, "none")).values())
            rng.shuffle(words)
            lines.append(", ".join(["a portrait", *words]))
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in SETS:
        write_set(name, options.output / "data" / name, options.seed)
    write_prompts(options.output / "prompts", options.seed)


if __name__ == "__main__":
    main()
