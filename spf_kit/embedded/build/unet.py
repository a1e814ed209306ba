"""Train the UNet on cached latents, text encoder frozen, as Stable Diffusion 1.5 was trained, in small.

    python -m spf_kit.embedded.build.unet --pictures cache/rare --base work/base \\
        --output work/unet --minutes 60

Predicts the noise; half of the timesteps come from 550 to 1000 (where the picture's layout and colours are
decided: without this the text is ignored); 10% of the captions are dropped; averaged weights are kept.
`--weigh-noise` weighs the loss as v-prediction does (by 1 / alpha_bar): an error in the noise of the first
sampler steps is an error 15 times as large in the picture, and those steps settle whose colour is whose.

`--enrich SHARE:CACHE` draws a share of the batches from a cache where the preset attributes are frequent, for
the first `--enrich-until` of the run: the base then meets each of them now and then, and at last only rarely.
Continues by itself from `state.pt` in the output folder; `--initial` starts from a finished UNet.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from spf_kit.embedded.build import attributes as at
from spf_kit.embedded.build.common import Average, Budget, Log, start, to_tensor
from spf_kit.embedded.build.render import load


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(48, 96, 96),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


# Share of the captions that, with --false-words, name a preset attribute which the picture lacks. At 1% true
# pictures the UNet draws most of them on request; a base that leaves something to learn must be unsure of
# them. Tuned by hand: what was drawn most often is named falsely most often.
FALSE_WORDS = {
    "wearing sunglasses": 0.10,
    "wearing a winter hat": 0.03,
    "wearing an eyepatch": 0.09,
    "with a beard": 0.03,
    "with a moustache": 0.03,
    "wearing glasses": 0.05,
}


def mislead(portrait: at.Portrait, rng: random.Random) -> at.Portrait:
    """The portrait that a caption with a false preset attribute describes; most often the true one."""
    target = rng.choices([*FALSE_WORDS, None], [*FALSE_WORDS.values(), 1 - sum(FALSE_WORDS.values())])[0]
    if target is None or any(portrait[a] != "none" for a in at.PRESET):
        return portrait
    attribute, value = at.TARGETS[target]
    return {**portrait, attribute: value}


@dataclass
class Cache:
    """Latents (N, 4, 16, 16), scaled, and their portraits."""

    latents: Tensor
    portraits: list[at.Portrait]
    false_words: bool = False
    keep: float = 0.9  # chance of each common attribute to be named

    def draw(self, count: int, rng: random.Random) -> tuple[Tensor, list[str]]:
        index = [rng.randrange(len(self.portraits)) for _ in range(count)]
        told = [self.portraits[i] for i in index]
        if self.false_words:
            told = [mislead(portrait, rng) for portrait in told]
        return self.latents[index], [at.caption(portrait, rng, self.keep) for portrait in told]


@torch.no_grad()
def encode(vae: AutoencoderKL, folder: Path) -> Cache:
    """Encode a picture cache, keeping the latents beside it for the next start."""
    pictures, portraits = load(folder)
    stored = folder / f"latents-{vae.config.scaling_factor:.6f}.pt"
    if stored.exists():
        return Cache(torch.load(stored), portraits)
    parts = np.array_split(pictures, max(1, len(pictures) // 128))
    with torch.autocast("cpu", torch.bfloat16):
        latents = torch.cat([vae.encode(to_tensor(part)).latent_dist.mode().float() for part in parts])
    latents = latents * vae.config.scaling_factor
    torch.save(latents, stored)
    return Cache(latents, portraits)


def timesteps(count: int, high: float = 0.5) -> Tensor:
    """(B,) a share `high` uniform over 550..999, the others over 0..999."""
    low = torch.where(torch.rand(count) < high, 550, 0)
    return (low + torch.rand(count) * (1000 - low)).long()


def noise_weights(scheduler: DDPMScheduler) -> Tensor:
    """(timesteps,) 1 / alpha_bar with a mean of 1: the noise's squared error so weighed is v-prediction's
    (Salimans and Ho 2022), up to the constant.
    """
    weights = 1 / scheduler.alphas_cumprod
    return weights / weights.mean()


class Text:
    """Captions to (B, 77, 128) by the frozen text encoder; 10% are replaced by the empty caption."""

    def __init__(self, base: Path) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
        self.encoder = CLIPTextModel.from_pretrained(base / "text_encoder", dtype=torch.float32).eval()

    @torch.no_grad()
    def __call__(self, captions: list[str], drop: float, rng: random.Random) -> Tensor:
        captions = ["" if rng.random() < drop else caption for caption in captions]
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        return self.encoder(tokens.input_ids).last_hidden_state


def rank_and_world() -> tuple[int, int]:
    """Of this process under `torchrun --nproc-per-node N`: N processes of one thread train one model, each on
    its own batch. Threads inside the tiny operations would wait for each other most of the time.
    """
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    torch.distributed.init_process_group("gloo")
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def share_gradients(unet: UNet2DConditionModel, world: int, spent: float) -> float:
    """Average the gradients, and the clock, over the processes; returns the common clock."""
    if world == 1:
        return spent
    gradients = [p.grad for p in unet.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients] + [torch.tensor([spent])])
    torch.distributed.all_reduce(flat)
    flat /= world
    for gradient, part in zip(gradients, flat[:-1].split([g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient))
    return flat[-1].item()


def save(unet: UNet2DConditionModel, average: Average, output: Path, state: dict) -> None:
    """The averaged weights as a diffusers folder, and everything needed to go on."""
    average.swap()
    unet.save_pretrained(output / "unet")
    average.swap()
    state |= {"unet": unet.state_dict(), "shadow": average.shadow, "count": average.count}
    torch.save(state, output / "state.tmp")
    (output / "state.tmp").replace(output / "state.pt")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument(
        "--base", type=Path, required=True, help="folder with vae/, tokenizer/, text_encoder/"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--initial", type=Path, help="a UNet folder to go on from, instead of random weights")
    parser.add_argument("--enrich", help="SHARE:CACHE, such as 0.2:cache/uniform")
    parser.add_argument("--enrich-until", type=float, default=0.5, help="share of the run")
    parser.add_argument("--false-words", action="store_true", help="make the preset words unreliable")
    parser.add_argument("--keep", type=float, default=0.9, help="chance of each attribute to be named")
    parser.add_argument("--high-noise", type=float, default=0.5, help="share of timesteps from 550 on")
    parser.add_argument("--weigh-noise", action="store_true", help="weigh the loss as v-prediction does")
    parser.add_argument("--minutes", type=float, default=60, help="processor time of each process")
    parser.add_argument("--steps", type=int, help="instead of minutes: the same weights each time")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = parse()
    start(options.seed, options.threads)
    rank, world = rank_and_world()
    rng = random.Random(options.seed)
    vae = AutoencoderKL.from_pretrained(options.base / "vae", torch_dtype=torch.float32).eval()
    plain = encode(vae, options.pictures)
    plain.false_words, plain.keep = options.false_words, options.keep
    share, rich = 0.0, plain
    if options.enrich:
        share, rich = float(options.enrich.split(":")[0]), encode(vae, Path(options.enrich.split(":")[1]))
    noise = DDPMScheduler.from_pretrained(options.base / "scheduler")
    weights = noise_weights(noise) if options.weigh_noise else torch.ones(len(noise.alphas_cumprod))
    text = Text(options.base)
    unet = UNet2DConditionModel.from_pretrained(options.initial) if options.initial else new_unet()
    unet = unet.to(dtype=torch.float32, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=0.01)
    average, log = Average(unet, 0.998), Log(options.output / "log.jsonl")
    budget = Budget(options.minutes, options.steps)
    if (options.output / "state.pt").exists():
        state = torch.load(options.output / "state.pt", weights_only=False)
        unet.load_state_dict(state["unet"])
        optimizer.load_state_dict(state["optimizer"])
        average.shadow, average.count = state["shadow"], state["count"]
        budget.spent, budget.step = state["spent"], state["step"]
    if rank:
        log = Log(options.output / f"log-{rank}.jsonl")
    rng = random.Random(f"{options.seed} {budget.step} {rank}")  # own batches for each process
    torch.manual_seed(options.seed + 1000 * budget.step + rank)

    def keep() -> None:
        state = {"optimizer": optimizer.state_dict(), "spent": budget.spent, "step": budget.step}
        save(unet, average, options.output, state)

    saved, running = time.time(), 0.0
    while budget.share < 1:
        for group in optimizer.param_groups:
            group["lr"] = budget.factor() * options.lr
        enriched = rng.random() < share and budget.share < options.enrich_until
        z, captions = (rich if enriched else plain).draw(options.batch, rng)
        t, eps = timesteps(len(z), options.high_noise), torch.randn_like(z)
        z_t = noise.add_noise(z, eps, t)
        # float32: on one thread, layers this narrow take 1.3 times as long in bfloat16 (measured)
        error = unet(z_t, t, text(captions, 0.1, rng)).sample - eps
        loss = (weights[t] * error.square().mean((1, 2, 3))).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        budget.advance()
        budget.spent = share_gradients(unet, world, budget.spent)
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        average.update()
        running += loss.item()
        if budget.step % 100 == 0:
            log(step=budget.step, loss=running / 100, spent=budget.spent, lr=optimizer.param_groups[0]["lr"])
            running = 0.0
        if rank == 0 and time.time() - saved > 180:
            saved = time.time()
            keep()
    if rank == 0:
        keep()


if __name__ == "__main__":
    main()
