"""Train the judge on rendered portraits with faults added, so that faults are not read as attributes.

    python -m spf_kit.embedded.build.judge --pictures cache/uniform --vae work/vae --output work/judge

`--generated FILE` adds pictures that the base drew for prompts without any preset attribute, in which a
person found none: hard negatives for the last three heads only.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from spf_kit.embedded.build import attributes as at
from spf_kit.embedded.build.augment import augment
from spf_kit.embedded.build.clip import labels
from spf_kit.embedded.build.common import Average, Budget, Log, start, to_tensor
from spf_kit.embedded.build.render import load
from spf_kit.embedded.judge import AttributeJudge, JudgeNetwork, hidden

HELD_OUT = 1024
WIDTHS = (24, 48, 80, 32)
SIZES = [len(values) for values in at.ATTRIBUTES.values()]
PRESET_COLUMNS = [i for i, name in enumerate(at.ATTRIBUTES) if name in at.PRESET]


def mask_of(portraits: list[at.Portrait]) -> Tensor:
    """(B, attributes): what cannot be seen is not asked for."""
    return torch.tensor([[float(a not in hidden(p)) for a in at.ATTRIBUTES] for p in portraits])


def loss_of(logits: Tensor, label: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy with some label smoothing, mean over what the mask asks for."""
    parts = logits.split(SIZES, dim=1)
    losses = [
        F.cross_entropy(x, label[:, i], reduction="none", label_smoothing=0.02) for i, x in enumerate(parts)
    ]
    return (torch.stack(losses, 1) * mask).sum() / mask.sum()


@torch.no_grad()
def accuracy(network: JudgeNetwork, x: Tensor, label: Tensor, mask: Tensor) -> dict[str, float]:
    """Per attribute, over the pictures where it can be seen."""
    network.eval()
    logits = torch.cat([network(part) for part in x.split(256)])
    network.train()
    parts = logits.split(SIZES, dim=1)
    right = torch.stack([p.argmax(1) == label[:, i] for i, p in enumerate(parts)], 1).float() * mask
    return dict(zip(at.ATTRIBUTES, (right.sum(0) / mask.sum(0)).tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--vae", type=Path)
    parser.add_argument("--generated", type=Path, help="pictures of generated portraits, .npy")
    parser.add_argument("--initial", type=Path)
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--steps", type=int, help="instead of minutes: the same weights each time")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start(options.seed, options.threads)
    pictures, portraits = load(options.pictures)
    label, mask = labels(portraits), mask_of(portraits)
    vae = AutoencoderKL.from_pretrained(options.vae).eval() if options.vae else None
    extra = np.load(options.generated) if options.generated else None
    network = JudgeNetwork(sum(SIZES), WIDTHS)
    if options.initial:
        network = AttributeJudge.load(options.initial).network
    network.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.lr, weight_decay=0.02)
    average, log = Average(network, 0.995), Log(options.output / "log.jsonl")
    held = slice(len(pictures) - HELD_OUT, None)
    budget = Budget(options.minutes, options.steps)
    while budget.share < 1:
        for group in optimizer.param_groups:
            group["lr"] = budget.factor() * options.lr
        index = torch.randint(len(pictures) - HELD_OUT, (options.batch,))
        x, y, m = to_tensor(pictures[index.numpy()]), label[index], mask[index]
        x = augment(x, vae)
        if extra is not None:
            count = options.batch // 4
            more = to_tensor(extra[np.random.randint(len(extra), size=count)])
            only = torch.zeros(count, len(SIZES))
            only[:, PRESET_COLUMNS] = 1
            x = torch.cat([x, augment(more)])
            y, m = torch.cat([y, torch.zeros(count, len(SIZES), dtype=y.dtype)]), torch.cat([m, only])
        loss = loss_of(network(x), y, m)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        average.update()
        budget.advance()
        if budget.step % 100 == 0:
            log(step=budget.step, loss=loss.item())
    average.swap()
    log(step=budget.step, accuracy=accuracy(network, to_tensor(pictures[held]), label[held], mask[held]))
    names = {name: list(values) for name, values in at.ATTRIBUTES.items()}
    AttributeJudge(network, names).save(options.output, WIDTHS)


if __name__ == "__main__":
    main()
