"""Train the CLIP pair on portraits with every attribute, the six of the presets included; then it is frozen.

    python -m spf_kit.embedded.build.clip --pictures cache/uniform \\
        --tokenizer work/tokenizer --output work/clip

Loss: the symmetric contrastive loss, where each picture also meets a hard negative for every caption of the
batch (the caption of a portrait that differs in one attribute, has one preset attribute more or less, or
wears the colours of hair and clothes the other way round). A linear head on both towers' embeddings, shared
and thrown away afterwards, predicts the attributes: it only makes the small towers learn faster. A second
one reads each phrase's attributes off the state of its last token, which is what the UNet is given: from
the pooled embedding alone the text tower learns to tell captions apart, but not which colour belongs to
what. Pictures are blurred, shifted, noised and passed through the VAE, so that the scores hold on decoded
and on generated pictures.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

from spf_kit.embedded.build import attributes as at
from spf_kit.embedded.build.attributes import Portrait
from spf_kit.embedded.build.augment import augment
from spf_kit.embedded.build.common import Average, Budget, Log, start, to_tensor
from spf_kit.embedded.build.render import load

HELD_OUT = 1024
CLASSES = [(a, v) for a, values in at.ATTRIBUTES.items() for v in values]
UNNAMED = -100  # cross_entropy leaves it out


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Ids are set from the tokenizer: the default eos_token_id pools every caption at the wrong place."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "projection_dim": 128,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "image_size": 64,
        "patch_size": 8,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "projection_dim": 128,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def captions(
    portraits: list[Portrait], rng: random.Random, focus: str | None = None
) -> tuple[list[str], Tensor, list[list[str]]]:
    """B captions, then B hard negatives; which attributes the first B tell, (B, attributes) bool; and the
    groups that each of these names, in its order.

    With `focus`, half of the negatives differ in that preset attribute's presence.
    """
    positive, negative, told, order = [], [], [], []
    for portrait in portraits:
        groups = at.kept_groups(portrait, rng)
        positive.append(at.caption_of(portrait, groups, rng))
        order.append(groups)
        other, named = at.edited(portrait, groups, rng)
        if focus and rng.random() < 0.5:
            other, named = at.toggled(portrait, groups, focus, rng)
        negative.append(at.caption_of(other, named, rng))
        told.append([at.GROUP_OF.get(a, a) in groups or a in at.PRESET for a in at.ATTRIBUTES])
    return positive + negative, torch.tensor(told), order


def labels(portraits: list[Portrait]) -> Tensor:
    """(B, attributes) class indices; 0 where a portrait does not say."""
    return torch.tensor([[v.index(p.get(a, v[0])) for a, v in at.ATTRIBUTES.items()] for p in portraits])


def head_loss(logits: Tensor, label: Tensor, told: Tensor) -> Tensor:
    """Mean cross-entropy over the told attributes; logits (B, all classes)."""
    parts = logits.split([len(v) for v in at.ATTRIBUTES.values()], dim=1)
    loss = torch.stack([F.cross_entropy(x, label[:, i], reduction="none") for i, x in enumerate(parts)], 1)
    return (loss * told).sum() / told.sum()


def phrase_ends(input_ids: Tensor, comma: int, eos: int) -> list[list[int]]:
    """Positions of the last token of each phrase but the first ("a portrait"), caption by caption."""
    ends = []
    for ids in input_ids.tolist():
        stops = [i for i, token in enumerate(ids) if token == comma]
        ends.append([i - 1 for i in [*stops[1:], ids.index(eos)]] if stops else [])
    return ends


def phrase_loss(
    states: Tensor, reader: nn.Linear, ends: list[list[int]], order: list, label: Tensor
) -> Tensor:
    """Mean cross-entropy of the attributes that each phrase names, read off its last token.

    States (B, tokens, 128); `order` names the group of each phrase, `label` (B, attributes) the classes.
    """
    where = [(b, i) for b, positions in enumerate(ends) for i in positions]
    groups = [group for named in order for group in named]
    rows = torch.tensor([b for b, _ in where])
    named = torch.tensor([[at.GROUP_OF.get(a, a) == group for a in at.ATTRIBUTES] for group in groups])
    logits = reader(states[rows, torch.tensor([i for _, i in where])]).float()
    parts = logits.split([len(v) for v in at.ATTRIBUTES.values()], dim=1)
    target = label[rows].masked_fill(~named, UNNAMED)
    losses = [F.cross_entropy(x, target[:, i], reduction="sum") for i, x in enumerate(parts)]
    return torch.stack(losses).sum() / named.sum()


def loss_of(
    clip: CLIPModel, heads: nn.ModuleList, batch: tuple, told: Tensor, label: Tensor, ends: list, order: list
) -> tuple[Tensor, Tensor, Tensor]:
    """Contrastive loss, the two heads' loss on the embeddings, and the reader's loss on the token states."""
    head, reader = heads
    tokens, x = batch
    output = clip.text_model(**tokens)
    text = clip.text_projection(output.pooler_output).float()
    image = clip.visual_projection(clip.vision_model(pixel_values=x).pooler_output).float()
    t, i = F.normalize(text, dim=1), F.normalize(image, dim=1)
    logits = clip.logit_scale.exp() * i @ t.T  # (B, 2B)
    target = torch.arange(len(i))
    contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, : len(i)].T, target)) / 2
    seen = head_loss(head(image), label, torch.ones_like(told))
    read = head_loss(head(text[: len(i)]), label, told)
    phrase = phrase_loss(output.last_hidden_state[: len(i)], reader, ends, order, label)
    return contrast, seen + read, phrase


@torch.no_grad()
def scores(
    clip: CLIPModel, tokenizer: CLIPTokenizer, x: Tensor, portraits: list[Portrait]
) -> dict[str, float]:
    """Zero-shot: is a picture nearer to c_full than to c_base exactly when it shows the target?"""
    image = torch.cat([clip.get_image_features(pixel_values=p).pooler_output for p in x.split(128)])
    image = F.normalize(image, dim=1)
    result = {}
    for target, (attribute, value) in at.TARGETS.items():
        chosen = [i for i, p in enumerate(portraits) if p[attribute] in ("none", value)]
        base = [at.caption({**portraits[i], attribute: "none"}) for i in chosen]
        full = [f"{caption}, {target}" for caption in base]
        tokens = tokenizer(base + full, padding=True, return_tensors="pt")
        text = F.normalize(clip.get_text_features(**tokens).pooler_output, dim=1)
        b, f = text.chunk(2)
        says = (image[chosen] * f).sum(1) > (image[chosen] * b).sum(1)
        shows = torch.tensor([portraits[i][attribute] == value for i in chosen])
        result[target] = ((says[shows]).float().mean().item() + (~says[~shows]).float().mean().item()) / 2
    return result


def save(clip: CLIPModel, tokenizer: CLIPTokenizer, output: Path) -> None:
    """`clip/` (both towers and the preprocessor) and `text_encoder/` (the text tower alone)."""
    half = CLIPModel(clip.config).half()
    half.load_state_dict(clip.state_dict())
    half.save_pretrained(output / "clip")
    CLIPImageProcessor(
        size={"shortest_edge": 64},
        crop_size={"height": 64, "width": 64},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(output / "clip")
    tokenizer.save_pretrained(output / "clip")
    text = CLIPTextModel(clip.config.text_config)
    text.load_state_dict(clip.text_model.state_dict())
    text.half().save_pretrained(output / "text_encoder")


def models(options: argparse.Namespace, tokenizer: CLIPTokenizer) -> tuple[CLIPModel, nn.ModuleList]:
    """The pair, new or gone on with, its frozen tower without gradients; and the two heads."""
    clip = new_clip(tokenizer)
    heads = nn.ModuleList([nn.Linear(128, len(CLASSES)), nn.Linear(128, len(CLASSES))])
    clip.logit_scale.data.fill_(2.3)
    if options.initial:
        clip = CLIPModel.from_pretrained(options.initial, dtype=torch.float32)
    clip.text_model.requires_grad_(not options.freeze_text)
    for module in (clip.vision_model, clip.visual_projection):
        module.requires_grad_(not options.freeze_image)
    return clip, heads


def chances(portraits: list[Portrait], focus: str | None) -> np.ndarray:
    """How often each picture is drawn, summing to 1; those that show `focus` four times as often."""
    chance = np.ones(len(portraits))
    if focus:
        attribute, value = at.TARGETS[focus]
        chance *= [4.0 if p[attribute] == value else 1.0 for p in portraits]
    return chance / chance.sum()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--initial", type=Path, help="go on from this clip/ folder")
    parser.add_argument(
        "--freeze-text", action="store_true", help="keep what the text encoder gives the UNet"
    )
    parser.add_argument("--freeze-image", action="store_true", help="train the text tower alone")
    parser.add_argument("--vae", type=Path, help="also train on its reconstructions, once it is there")
    parser.add_argument("--focus", choices=list(at.TARGETS), help="see and contrast this one more often")
    parser.add_argument("--vae-from", type=float, default=0.6, help="share of the run")
    parser.add_argument("--minutes", type=float, default=18)
    parser.add_argument("--steps", type=int, help="instead of minutes: the same weights each time")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = parse()
    start(options.seed, options.threads)
    pictures, portraits = load(options.pictures)
    tokenizer = CLIPTokenizer.from_pretrained(options.tokenizer)
    clip, heads = models(options, tokenizer)
    comma = tokenizer.convert_tokens_to_ids(",</w>")
    trained = [p for p in nn.ModuleList([clip, heads]).parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr, betas=(0.9, 0.98), weight_decay=0.05)
    average, log = Average(clip, 0.995), Log(options.output / "log.jsonl")
    held = to_tensor(pictures[-HELD_OUT:]), portraits[-HELD_OUT:]
    chance = chances(portraits[:-HELD_OUT], options.focus)
    rng, vae = random.Random(options.seed), None
    budget, saved = Budget(options.minutes, options.steps), time.time()

    def keep() -> None:
        average.swap()
        log(step=budget.step, scores=scores(clip, tokenizer, *held))
        save(clip, tokenizer, options.output)
        average.swap()

    while budget.share < 1:
        for group in optimizer.param_groups:
            group["lr"] = budget.factor() * options.lr
        late = budget.share >= options.vae_from
        if vae is None and options.vae and late and (options.vae / "config.json").exists():
            vae = AutoencoderKL.from_pretrained(options.vae).eval()
        index = np.random.choice(len(chance), size=options.batch, p=chance)
        chosen = [portraits[i] for i in index]
        texts, told, order = captions(chosen, rng, options.focus)
        tokens = dict(tokenizer(texts, padding=True, return_tensors="pt"))
        ends = phrase_ends(tokens["input_ids"][: len(chosen)], comma, tokenizer.eos_token_id)
        with torch.autocast("cpu", torch.bfloat16):
            x = augment(to_tensor(pictures[index]), vae)
            parts = loss_of(clip, heads, (tokens, x), told, labels(chosen), ends, order)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(parts).sum().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        clip.logit_scale.data.clamp_(max=4.6)
        average.update()
        budget.advance()
        if budget.step % 25 == 0:
            named = zip(("contrast", "heads", "phrases"), parts, strict=True)
            log(step=budget.step, scale=clip.logit_scale.item(), **{k: v.item() for k, v in named})
        if time.time() - saved > 150 or budget.step == 20:
            saved = time.time()
            keep()
    keep()


if __name__ == "__main__":
    main()
