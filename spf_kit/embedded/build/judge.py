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
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from spf_kit.embedded.build import attributes as at
from spf_kit.embedded.build.augment import augment
from spf_kit.embedded.build.common import Average, Budget, Log, start, to_tensor
from spf_kit.embedded.build.render import load
from spf_kit.embedded.judge import AttributeJudge, JudgeNetwork, hidden

HELD_OUT = 1024
WIDTHS = (24, 48, 80, 32)
DECODED = 0.125  # share of the twins that went through the VAE; the base's own pictures all did
TOGETHER = 1.0  # weight of saying the same of twins, beside cross-entropy
SIZES = [len(values) for values in at.ATTRIBUTES.values()]
PRESET_COLUMNS = [i for i, name in enumerate(at.ATTRIBUTES) if name in at.PRESET]


def labels(portraits: list[at.Portrait]) -> Tensor:
    """(B, attributes) class indices; 0 for what is not known, see `mask_of`."""
    return torch.tensor([[v.index(p.get(a, v[0])) for a, v in at.ATTRIBUTES.items()] for p in portraits])


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
    pictures, portraits = load(options.twins)
    label, mask = labels(portraits), mask_of(portraits)
    held = min(HELD_OUT, len(pictures) // 4 // 2 * 2)
    vae = AutoencoderKL.from_pretrained(options.vae).eval() if options.vae else None
    also = _drawn(options.drawn) if options.drawn else None
    extra = np.load(options.generated) if options.generated else None
    network = JudgeNetwork(sum(SIZES), WIDTHS)
    if options.initial:
        network = AttributeJudge.load(options.initial).network
    network.requires_grad_(True).train().to(memory_format=torch.channels_last)  # a third faster
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.lr, weight_decay=0.02)
    average, log = Average(network, 0.995), Log(options.output / "log.jsonl")
    budget = Budget(options.minutes, options.steps)
    while budget.share < 1:
        for group in optimizer.param_groups:
            group["lr"] = budget.factor() * options.lr
        pair = torch.randint((len(pictures) - held) // 2, (options.batch // 2,))
        index = torch.stack([2 * pair, 2 * pair + 1], 1).flatten()
        x, y, m = [twice(to_tensor(pictures[index.numpy()]), vae)], [label[index]], [mask[index]]
        if also is not None:
            drawn, its_label, its_mask = also
            index = torch.randint(len(drawn), (options.batch // 4,))
            x.append(augment(to_tensor(drawn[index.numpy()])))
            y.append(its_label[index])
            m.append(its_mask[index])
        if extra is not None:
            count = options.batch // 4
            x.append(augment(to_tensor(extra[np.random.randint(len(extra), size=count)])))
            y.append(torch.zeros(count, len(SIZES), dtype=label.dtype))
            m.append(torch.zeros(count, len(SIZES)).index_fill_(1, torch.tensor(PRESET_COLUMNS), 1.0))
        logits, y_all, m_all = network(torch.cat(x)), torch.cat(y), torch.cat(m)
        twins = slice(0, len(y[0]))
        difference = apart(logits[twins], y_all[twins], m_all[twins])
        loss = loss_of(logits, y_all, m_all) + TOGETHER * difference
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        average.update()
        budget.advance()
        if budget.step % 100 == 0:
            log(step=budget.step, loss=loss.item(), apart=difference.item())
    average.swap()
    last = slice(len(pictures) - held, None)
    log(step=budget.step, accuracy=accuracy(network, to_tensor(pictures[last]), label[last], mask[last]))
    names = {name: list(values) for name, values in at.ATTRIBUTES.items()}
    AttributeJudge(network, names).save(options.output, WIDTHS)


def _drawn(folder: Path) -> tuple[np.ndarray, Tensor, Tensor]:
    """Pictures, labels and masks of a cache."""
    pictures, portraits = load(folder)
    return pictures, labels(portraits), mask_of(portraits)


if __name__ == "__main__":
    main()
