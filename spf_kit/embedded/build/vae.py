"""Train the AutoencoderKL: 64-pixel pictures to 4 x 16 x 16 latents and back.

    python -m spf_kit.embedded.build.vae --pictures cache/uniform cache/rare --output work/vae --minutes 30

Loss: L1 + 10 L2 on pixels in [-1, 1], ending with L2 alone (what PSNR measures), and a tiny KL term. No
adversarial or perceptual part: flat drawings need none. The latents' scale goes into the config at the end.

`--freeze-encoder` trains the decoder alone, so that a UNet can be trained on the latents at the same time.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from spf_kit.embedded.build.common import Average, Budget, Log, start, to_tensor

HELD_OUT = 512  # the last pictures of the first cache are never trained on


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, x: Tensor, batch: int = 64) -> Tensor:
    """(N, 3, 64, 64) in [-1, 1] to the same through the latents' mean, in float32."""
    return torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in x.split(batch)])


def psnr(x: Tensor, y: Tensor) -> float:
    """Peak signal to noise ratio in dB, mean over pictures in [-1, 1] (peak 2)."""
    error = (x - y.clamp(-1, 1)).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / error)).mean().item()


@torch.no_grad()
def set_scale(vae: AutoencoderKL, x: Tensor) -> None:
    """scaling_factor = 1 / standard deviation of the latents, over all channels as in SD1.5."""
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in x.split(64)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())


def loss_of(vae: AutoencoderKL, x: Tensor, l1: float, freeze_encoder: bool) -> tuple[Tensor, Tensor]:
    """Loss and plain mean squared error of a batch."""
    with torch.set_grad_enabled(not freeze_encoder):
        posterior = vae.encode(x).latent_dist
        z = posterior.sample()
    y = vae.decode(z).sample.float()
    mse = F.mse_loss(y, x)
    loss = 10 * mse + l1 * F.l1_loss(y, x)
    if not freeze_encoder:
        loss = loss + 1e-6 * posterior.kl().mean()
    return loss, mse


def save(vae: AutoencoderKL, average: Average, held_out: Tensor, output: Path, freeze_encoder: bool) -> float:
    """Write the averaged weights; return their held-out PSNR."""
    average.swap()
    vae.eval()
    score = psnr(held_out, reconstruct(vae, held_out))
    if not freeze_encoder:
        set_scale(vae, held_out)
    vae.save_pretrained(output)
    average.swap()
    vae.train()
    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--initial", type=Path, help="start from this folder")
    parser.add_argument("--freeze-encoder", action="store_true")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--steps", type=int, help="instead of minutes: the same weights each time")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start(options.seed, options.threads)
    caches = [np.load(folder / "pictures.npy") for folder in options.pictures]
    held_out = to_tensor(caches[0][-HELD_OUT:])
    pictures = np.concatenate([caches[0][:-HELD_OUT], *caches[1:]])
    vae = AutoencoderKL.from_pretrained(options.initial) if options.initial else new_vae()
    if options.freeze_encoder:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr, betas=(0.9, 0.99), weight_decay=0.0)
    average = Average(vae, 0.998)
    log = Log(options.output / "log.jsonl")
    log(parameters=sum(p.numel() for p in vae.parameters()))
    budget, saved = Budget(options.minutes, options.steps), 0.0
    while budget.share < 1:
        rate = budget.factor() * options.lr
        for group in optimizer.param_groups:
            group["lr"] = rate
        x = to_tensor(pictures[np.random.randint(len(pictures), size=options.batch)])
        l1 = 0.0 if options.freeze_encoder or budget.share > 0.5 else 1.0
        with torch.autocast("cpu", torch.bfloat16):
            loss, mse = loss_of(vae, x, l1, options.freeze_encoder)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        average.update()
        budget.advance()
        step = budget.step
        if step % 100 == 0:
            log(step=step, loss=loss.item(), train_psnr=(10 * torch.log10(4 / mse)).item(), lr=rate)
        if time.time() - saved > 120:
            saved = time.time()
            log(step=step, psnr=save(vae, average, held_out, options.output, options.freeze_encoder))
    log(step=budget.step, psnr=save(vae, average, held_out, options.output, options.freeze_encoder))


if __name__ == "__main__":
    main()
