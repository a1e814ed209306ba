"""Whether the first attribute still answers after a second LoRA was trained on it, and both together.

    python bench/incremental.py glasses beard [--recipe spf] [--count 384] [--output runs/incremental]

Trains FIRST, then SECOND with `--on` FIRST, both by their presets, and draws pairs: each prompt and seed with
base + FIRST and with base + FIRST + SECOND. Prints and writes FIRST.SECOND.json:

    first      share that shows FIRST when asked for it, before and after SECOND came on, and the difference
    second     share that shows SECOND when asked for it, with both on
    both       share that shows both when asked for both, with both on
    plain      share of plain prompts in which SECOND changed anything judged

LoRA files that are there already are used again. Prompts: the evaluation prompts, each with several seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def train(preset: str, run: Path, options: argparse.Namespace, on: list[Path]) -> Path:
    """The LoRA file of a finished run."""
    from spf_kit import config
    from spf_kit.training import trainer

    sets = ["preview.every=0", "train.log_tensorboard=false", "evaluate.enabled=false", *options.sets]
    resolved = config.load(
        preset, recipe=options.recipe, base="embedded", seed=options.seed, sets=sets, on=[str(p) for p in on]
    )
    file = run / f"{resolved.config.attribute.name}.safetensors"
    if not file.is_file():
        print(f"training {preset}" + (f" on {on[0].stem}" if on else ""), file=sys.stderr, flush=True)
        result = trainer.train(resolved, run)
        assert result.lora == file
    return file


def measured(first: Path, second: Path, targets: tuple[str, str], options: argparse.Namespace) -> Any:
    """The shares, from pictures of the same prompts and seeds."""
    from spf_kit import embedded, families, schema
    from spf_kit.adapters.earlier import attached
    from spf_kit.embedded.judge import AttributeJudge
    from spf_kit.sampling import generate

    family = families.load(schema.Base(model="embedded"))
    judge = AttributeJudge.load()
    known = embedded.prompts("evaluate")
    prompts = [known[n % len(known)] for n in range(options.count)]
    seeds = [20_000 + n for n in range(options.count)]

    def pictures(*words: str) -> Any:
        texts = [", ".join((prompt, *words)) for prompt in prompts]
        print(f"drawing {words or 'plain'}", file=sys.stderr, flush=True)
        return generate(family, texts, seeds, steps=options.steps, cfg=5.0, scheduler="ddim")

    def share(shown: Any) -> float:
        return float(shown.float().mean())

    with attached(family, [str(first)]):
        alone, plain = judge.shows(pictures(targets[0]), targets[0]), judge(pictures())
    with attached(family, [str(first), str(second)]):
        after, plain_after = judge.shows(pictures(targets[0]), targets[0]), judge(pictures())
        other, both = judge.shows(pictures(targets[1]), targets[1]), pictures(*targets)
    changed = [any(plain[a][n] != plain_after[a][n] for a in judge.attributes) for n in range(options.count)]
    return {
        "count": options.count,
        "first": {
            "before": share(alone), "after": share(after), "difference": share(after) - share(alone),
            "lost": int((alone & ~after).sum()), "won": int((after & ~alone).sum()),
        },
        "second": share(other),
        "both": share(judge.shows(both, targets[0]) & judge.shows(both, targets[1])),
        "plain": sum(changed) / options.count,
    }  # fmt: skip


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("first")
    parser.add_argument("second")
    parser.add_argument("--recipe", default="spf")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=384)
    parser.add_argument("--steps", type=int, default=10, help="of the sampler, DDIM")
    parser.add_argument("--output", type=Path, default=Path("runs/incremental"))
    parser.add_argument("--set", dest="sets", action="append", default=[], help="a key, in both trainings")
    options = parser.parse_args()

    from spf_kit import config
    from spf_kit.files import atomic

    names = (options.first, options.second)
    targets = tuple(config.load(name).config.attribute.target for name in names)
    first = train(options.first, options.output / options.first, options, [])
    second = train(options.second, options.output / "-on-".join(reversed(names)), options, [first])
    found = {"attributes": names, "recipe": options.recipe, "seed": options.seed}
    found |= measured(first, second, (targets[0], targets[1]), options)
    with atomic(options.output / f"{'.'.join(names)}.json") as path:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
