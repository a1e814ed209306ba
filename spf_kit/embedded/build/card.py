# ruff: noqa: E501 -- the lines of the card
"""Write the model card of a base folder from its scores.json.

python -m spf_kit.embedded.build.card --base spf_kit/embedded/base
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

CARD = """# The embedded base model of spf-kit

A Stable Diffusion 1.5 architecture in small ({size:.1f} MB in half precision), trained from scratch on rendered
portraits, so that LoRA methods can be tried and compared on a laptop's CPU, offline. 64 x 64 pixels, latents
4 x 16 x 16. It draws nothing but these portraits and is of no use beyond tests and demonstrations.

`StableDiffusionPipeline.from_pretrained(folder)` loads it; compute in float32. Beside the pipeline: `clip/` (both
towers; its text tower is the pipeline's text encoder) and `judge/` (reads attributes off a picture, used by no
loss).

## Data and licences
Portraits are rendered from python_avatars (MIT; the drawings are Pablo Stanley's Avataaars, free for personal and
commercial use) with resvg, on flat backgrounds. Captions are generated, comma-separated, in varying order and
wording, sometimes leaving something out. No photograph, no person, no downloaded weight is involved. Model,
pictures and scripts: Apache-2.0, as spf-kit.

Named attributes: skin (4), hair style (9), hair colour (6), clothing (4) and its colour (6), background (6),
mouth (6). The six preset attributes (glasses, sunglasses, eyepatch, beard, moustache, winter hat) are frequent in
what CLIP, VAE and judge saw (20,000 pictures) and about 1% each in what the UNet saw (24,000 pictures). In the
second half of its training some captions named one of them falsely, as captions of the web do: with true captions
alone the UNet drew sunglasses in 94% of the pictures that asked for them, which leaves a LoRA nothing to learn.

## Training
Two CPU cores, shared with other work: VAE 17 minutes, then 21 for the decoder alone; CLIP 15 minutes, then 24
for its image tower and text projection (the text encoder frozen, the last 11 with weight on moustaches, which are
small), then 7 for its text tower, with captions that exchange the colours of hair and clothes and with each phrase
read off the state of its last token; judge 14 minutes, and in the end 1900 steps more on pairs of portraits that
differ in one preset attribute alone and on 2,400 pictures that the base drew, labelled by their prompts (none of
those that spf-kit tunes or reports with); UNet ({unet_steps} steps of 48 pictures) about 135 minutes,
the last 24 on that text tower and with the loss weighed as v-prediction's. The scripts are in
`spf_kit/embedded/build`.

Before those last two, a linear reader found the colour of the clothes in the state of their noun in 89 of 100
captions (now: all), and 8 of 100 pictures had hair, and 8 clothes, in a colour not asked for, mostly the other's.

## Scores
By the judge as it was before those last steps, DDIM {steps} steps, guidance 4, {prompts} prompts that no training used. `scores.json` has them in full.
Scores on these prompts decided how often to name an attribute falsely and when to train on, before the last 24
minutes of the UNet. Those were run once, looked at on half of these prompts a third of the way, and ended early.

| named attribute | drawn as asked | judge's own accuracy | after the VAE |
| --- | --- | --- | --- |
{adherence}

| preset attribute | drawn on request | lowest, highest skin tone | on plain prompts | CLIP zero-shot | after the VAE |
| --- | --- | --- | --- | --- | --- |
{response}

CLIP zero-shot: a picture is nearer to the caption with the target phrase at its end than to the caption without
exactly when it shows the attribute (mean of the two error-free shares, held-out renders). The same comparison,
sim(picture, c_full) > sim(picture, c_base), is how to measure response with this pair.

VAE: held-out PSNR {psnr:.1f} dB. The judge's accuracies are on {held_out} held-out renders, over those where the
attribute can be seen (hair under a hat, a mouth in a beard and dreadlocks over straps or lapels are left out).
On preset attributes the judge's accuracy is {preset}.
"""


def adherence_rows(scores: dict) -> str:
    return "\n".join(
        f"| {name.replace('_', ' ')} | {share:.3f} | {scores['judge'][name]:.3f} | {scores['judge_decoded'][name]:.3f} |"
        for name, share in scores["adherence"].items()
    )


def response_rows(scores: dict) -> str:
    rows = []
    for target, shares in scores["request"].items():
        tones = [share for tone, share in shares.items() if tone != "all"]
        rows.append(
            f"| {target} | {shares['all']:.3f} | {min(tones):.2f}, {max(tones):.2f} "
            f"| {scores['plain'][target]['all']:.3f} | {scores['clip'][target]:.3f} "
            f"| {scores['clip_decoded'][target]:.3f} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--unet-steps", type=int, required=True)
    options = parser.parse_args()
    scores = json.loads((options.base / "scores.json").read_text(encoding="utf-8"))
    size = sum(path.stat().st_size for path in options.base.rglob("*") if path.is_file()) / 1e6
    preset = ", ".join(
        f"{name.replace('_', ' ')} {scores['judge'][name]:.3f}"
        for name in ("eyewear", "facial_hair", "headwear")
    )
    card = CARD.format(
        size=size,
        unet_steps=options.unet_steps,
        steps=scores["steps"],
        prompts=scores["prompts"],
        held_out=scores["held_out"],
        adherence=adherence_rows(scores),
        response=response_rows(scores),
        psnr=scores["vae_psnr"],
        preset=preset,
    )
    (options.base / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
