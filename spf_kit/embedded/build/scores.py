"""Score a base model folder, write scores.json beside its card, and sheets of what it draws.

    python -m spf_kit.embedded.build.scores --pictures cache/uniform --sheets work/sheets

Adherence: share of pictures for the "evaluate" prompts in which the judge sees what the prompt names.
Response: share that show a preset attribute when the prompt asks for it (`request`) and when it does not
(`plain`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from spf_kit import embedded
from spf_kit.embedded.build import attributes as at
from spf_kit.embedded.build import clip as clip_build
from spf_kit.embedded.build import judge as judge_build
from spf_kit.embedded.build.common import to_tensor
from spf_kit.embedded.build.render import load
from spf_kit.embedded.build.vae import HELD_OUT, psnr, reconstruct
from spf_kit.embedded.judge import TARGETS, AttributeJudge

STEPS, GUIDANCE = 25, 4.0


def pipeline(base: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(
    pipe: StableDiffusionPipeline, prompts: list[str], steps: int = STEPS, cfg: float = GUIDANCE
) -> Tensor:
    """One picture a prompt, seeds 0, 1, ...; (N, 3, 64, 64) in [0, 1]."""
    pictures = []
    for first in range(0, len(prompts), 32):
        part = prompts[first : first + 32]
        seeds = [torch.Generator().manual_seed(first + i) for i in range(len(part))]
        how = {"num_inference_steps": steps, "guidance_scale": cfg, "output_type": "pt"}
        pictures.append(pipe(part, generator=seeds, **how).images)
    return torch.cat(pictures)


def sheet(images: Tensor, path: Path, columns: int = 16, scale: int = 2) -> None:
    """(N, 3, 64, 64) in [0, 1] as one PNG."""
    rows = [torch.cat(list(row), dim=2) for row in images.split(columns) if len(row) == columns]
    grid = (torch.cat(rows, dim=1).permute(1, 2, 0) * 255).round().byte().numpy()
    image = Image.fromarray(grid)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path)


def adherence(judge: AttributeJudge, images: Tensor, wanted: list[at.Portrait]) -> dict[str, float]:
    seen = judge(images)
    return {
        a: float(np.mean([values[int(k)] == p[a] for k, p in zip(seen[a], wanted, strict=True)]))
        for a, values in at.COMMON.items()
    }


def by_skin(shows: Tensor, wanted: list[at.Portrait]) -> dict[str, float]:
    result = {"all": shows.float().mean().item()}
    for tone in at.SKIN:
        result[tone] = shows[[i for i, p in enumerate(wanted) if p["skin"] == tone]].float().mean().item()
    return result


def drawn(base: Path, judge: AttributeJudge, sheets: Path | None, count: int) -> dict:
    """What the base draws: adherence, and response on plain and on asking prompts."""
    pipe = pipeline(base)
    prompts = embedded.prompts("evaluate")[:count]
    wanted = [at.parse(prompt) for prompt in prompts]
    plain = draw(pipe, prompts)
    result: dict = {"adherence": adherence(judge, plain, wanted), "request": {}, "plain": {}}
    if sheets:
        sheet(plain, sheets / "plain.png")
    for target in TARGETS:
        asked = draw(pipe, [f"{prompt}, {target}" for prompt in prompts])
        result["request"][target] = by_skin(judge.shows(asked, target), wanted)
        result["plain"][target] = by_skin(judge.shows(plain, target), wanted)
        if sheets:
            sheet(asked, sheets / f"{target.replace(' ', '-')}.png")
    return result


@torch.no_grad()
def held_out(base: Path, judge: AttributeJudge, cache: Path) -> dict:
    """VAE, CLIP and judge on rendered portraits that nothing was trained on, also after the VAE."""
    pictures, portraits = load(cache)
    x, chosen = to_tensor(pictures[-HELD_OUT:]), portraits[-HELD_OUT:]
    vae = AutoencoderKL.from_pretrained(base / "vae", torch_dtype=torch.float32).eval()
    y = reconstruct(vae, x).clamp(-1, 1)
    clip = CLIPModel.from_pretrained(base / "clip", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    label, mask = judge_build.labels(chosen), judge_build.mask_of(chosen)
    return {
        "vae_psnr": psnr(x, y),
        "clip": clip_build.scores(clip, tokenizer, x, chosen),
        "clip_decoded": clip_build.scores(clip, tokenizer, y, chosen),
        "judge": judge_build.accuracy(judge.network, x, label, mask),
        "judge_decoded": judge_build.accuracy(judge.network, y, label, mask),
    }


def rounded(value: dict | float) -> dict | float:
    """Every number with four decimals."""
    return {k: rounded(v) for k, v in value.items()} if isinstance(value, dict) else round(value, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=embedded.base_path())
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--sheets", type=Path)
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    judge = AttributeJudge.load(options.base / "judge")
    result = {"prompts": options.count, "steps": STEPS, "guidance": GUIDANCE, "held_out": HELD_OUT}
    result |= drawn(options.base, judge, options.sheets, options.count)
    if options.pictures:
        result |= held_out(options.base, judge, options.pictures)
        judge.network.eval()
    text = json.dumps(rounded(result), indent=2) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
