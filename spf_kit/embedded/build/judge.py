"""Train the judge on rendered portraits with faults added, so that faults are not read as attributes.

    python -m spf_kit.embedded.build.judge --twins cache/twins --drawn cache/drawn --vae work/vae \\
        --output work/judge

It is there to compare pictures, so two things make it steady. `--twins` are portraits that differ in a preset
attribute alone, drawn by the same random numbers, and it is held to say the same of all else of both.
`--drawn` are pictures of the base that it is to read, labelled by their prompts, a fifth of each batch.

`--generated FILE` adds pictures that the base drew for prompts without any preset attribute, in which a
person found none: hard negatives for the last three heads only.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
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
DECODED = 0.125  # share of the twins that went through the VAE; the base's own pictures all did
TOGETHER = 1.0  # weight of saying the same of twins, beside cross-entropy
SIZES = [len(values) for values in at.ATTRIBUTES.values()]
PRESET_COLUMNS = [i for i, name in enumerate(at.ATTRIBUTES) if name in at.PRESET]


def mask_of(portraits: list[at.Portrait]) -> Tensor:
    """(B, attributes): what cannot be seen or is not known is not asked for."""
    return torch.tensor([[float(a in p and a not in hidden(p)) for a in at.ATTRIBUTES] for p in portraits])


def loss_of(logits: Tensor, label: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy with some label smoothing, mean over what the mask asks for."""
    parts = logits.split(SIZES, dim=1)
    losses = [
        F.cross_entropy(x, label[:, i], reduction="none", label_smoothing=0.02) for i, x in enumerate(parts)
    ]
    return (torch.stack(losses, 1) * mask).sum() / mask.sum()


def apart(logits: Tensor, label: Tensor, mask: Tensor) -> Tensor:
    """How differently twins are read, rows 0 and 1, 2 and 3, ...: the symmetric Kullback-Leibler divergence,
    mean over the attributes that both show and have in common."""
    same = mask[::2] * mask[1::2] * (label[::2] == label[1::2])
    parts = [part.log_softmax(1) for part in logits.split(SIZES, dim=1)]
    found = [((x[::2].exp() - x[1::2].exp()) * (x[::2] - x[1::2])).sum(1) / 2 for x in parts]
    return (torch.stack(found, 1) * same).sum() / same.sum().clamp(min=1)


def twice(x: Tensor, vae: AutoencoderKL | None) -> Tensor:
    """Twins with the same faults, (B, 3, 64, 64): those of the first are drawn again for the second."""
    state = torch.get_rng_state()
    first = augment(x[::2], vae, DECODED)
    torch.set_rng_state(state)
    return torch.stack([first, augment(x[1::2], vae, DECODED)], 1).flatten(0, 1)


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
    parser.add_argument("--twins", type=Path, required=True)
    parser.add_argument("--drawn", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--vae", type=Path)
    parser.add_argument("--generated", type=Path, help="pictures of generated portraits, .npy")
    parser.add_argument("--initial", type=Path)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--steps", type=int, help="instead of minutes: the same weights each time")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start(options.seed, options.threads)
    twins = Labelled.read(options.twins)
    held = min(HELD_OUT, len(twins.pictures) // 4 // 2 * 2)
    network = JudgeNetwork(sum(SIZES), WIDTHS)
    if options.initial:
        network = AttributeJudge.load(options.initial).network
    log = Log(options.output / "log.jsonl")
    train(network, twins, held, options, log)
    last = twins[torch.arange(len(twins.pictures) - held, len(twins.pictures))]
    log(accuracy=accuracy(network, *last))
    names = {name: list(values) for name, values in at.ATTRIBUTES.items()}
    AttributeJudge(network, names).save(options.output, WIDTHS)


@dataclass(frozen=True)
class Labelled:
    """Pictures of a cache with what is known of them."""

    pictures: np.ndarray  # (N, 64, 64, 3) uint8
    label: Tensor  # (N, attributes)
    mask: Tensor

    @classmethod
    def read(cls, folder: Path) -> Labelled:
        pictures, portraits = load(folder)
        return cls(pictures, labels(portraits), mask_of(portraits))

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, 64, 64) in [-1, 1], labels and masks."""
        return to_tensor(self.pictures[index.numpy()]), self.label[index], self.mask[index]


def train(network: JudgeNetwork, twins: Labelled, held: int, options: argparse.Namespace, log: Log) -> None:
    """By cross-entropy on all pictures and `apart` on twins; leaves the average of the weights."""
    vae = AutoencoderKL.from_pretrained(options.vae).eval() if options.vae else None
    also = Labelled.read(options.drawn) if options.drawn else None
    extra = np.load(options.generated) if options.generated else None
    network.requires_grad_(True).train().to(memory_format=torch.channels_last)  # a third faster
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.lr, weight_decay=0.02)
    average, budget = Average(network, 0.995), Budget(options.minutes, options.steps)
    while budget.share < 1:
        for group in optimizer.param_groups:
            group["lr"] = budget.factor() * options.lr
        pair = torch.randint((len(twins.pictures) - held) // 2, (options.batch // 2,))
        x, y, m = twins[torch.stack([2 * pair, 2 * pair + 1], 1).flatten()]
        parts, count = [(twice(x, vae), y, m)], options.batch // 4
        if also is not None:
            x, y, m = also[torch.randint(len(also.pictures), (count,))]
            parts.append((augment(x), y, m))
        if extra is not None:
            x = augment(to_tensor(extra[np.random.randint(len(extra), size=count)]))
            m = torch.zeros(count, len(SIZES)).index_fill_(1, torch.tensor(PRESET_COLUMNS), 1.0)
            parts.append((x, torch.zeros(count, len(SIZES), dtype=y.dtype), m))
        x, y, m = map(torch.cat, zip(*parts))
        logits, pairs = network(x), slice(0, 2 * len(pair))
        difference = apart(logits[pairs], y[pairs], m[pairs])
        loss = loss_of(logits, y, m) + TOGETHER * difference
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        average.update()
        budget.advance()
        if budget.step % 100 == 0:
            log(step=budget.step, loss=loss.item(), apart=difference.item())
    average.swap()


if __name__ == "__main__":
    main()
