"""A training step of random numbers, as the trainer would make it: what plugins are checked on.

Shapes: B samples, C latent channels, h x w latent size, L token positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spf_kit.data.captions import derive
from spf_kit.data.random import generator
from spf_kit.families.noise import NoiseProcess
from spf_kit.losses import PASSES, ModelPass, Plugin, PriorBatch, Step, Tools
from spf_kit.probes import LayerProbe, Spans

CHANNELS, HEIGHT, WIDTH = 4, 12, 8  # not square: height and width are easily swapped
TOKENS, FEATURES = 24, 8  # of a text condition, and of attention and embeddings
TEXTS = ("a portrait, red hair, blue background", "", "a woman on a beach", "a man, a hat, a (long) coat")


def random_step(
    plugin: Plugin,
    *,
    seed: int = 0,
    kind: str = "epsilon",
    batch: int = 4,
    dtype: torch.dtype = torch.float32,
) -> Step:
    """A step as the trainer would make it, of random numbers: only what the plugin declares is there.

    Predictions with the adapter on require a gradient; those with it off do not.
    """
    source = generator(seed, "plugin check", kind)

    def randn(count: int = batch, channels: int = CHANNELS) -> Tensor:
        return torch.randn((count, channels, HEIGHT, WIDTH), generator=source).to(dtype)

    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
    process = NoiseProcess(kind, None if kind == "flow" else abar)  # type: ignore[arg-type]
    latents, noise = randn(), randn()
    timesteps = process.sample_timesteps(torch.rand(batch, generator=source))
    target = process.target(latents, noise, timesteps)
    spans = [random_spans(TEXTS[i % len(TEXTS)]) for i in range(batch)]
    passes: dict[str, ModelPass] = {
        name: ModelPass(
            (target + 0.3 * randn()).requires_grad_(on), random_layers(source, batch, dtype, gradient=on)
        )
        for name, (on, _) in PASSES.items()
    }
    prior_target = randn()
    prior = PriorBatch((prior_target + 0.3 * randn()).requires_grad_(), prior_target, timesteps)
    wanted = getattr(plugin, "mask", None)
    step = Step(
        latents, noise, process.add_noise(latents, noise, timesteps), timesteps, target, process,
        [derive(TEXTS[i % len(TEXTS)], "wearing glasses") for i in range(batch)],
        [f"{i}.png" for i in range(batch)], 7 + seed, 0.5, passes, prior,
        {wanted: torch.rand((batch, 1, HEIGHT, WIDTH), generator=source).to(dtype)} if wanted else {},
        token_spans=spans, given_masks=torch.rand((batch, 1, HEIGHT, WIDTH), generator=source).to(dtype),
        tools=random_tools(dtype),
    )  # fmt: skip
    return step.seen_by(plugin)


def random_layers(
    source: torch.Generator, batch: int, dtype: torch.dtype, *, gradient: bool
) -> dict[str, LayerProbe]:
    """Three cross-attention layers, at the size of the latents and at half of it."""
    layers = {}
    for name, factor in (("down_blocks.0.attn2", 1), ("mid_block.attn2", 2), ("up_blocks.1.attn2", 1)):
        size = (HEIGHT // factor, WIDTH // factor)
        queries, keys = (
            torch.randn((batch, length, FEATURES), generator=source).to(dtype).requires_grad_(gradient)
            for length in (size[0] * size[1], TOKENS)
        )
        layers[name] = LayerProbe(name, factor, size, queries, keys, 2, (FEATURES / 2) ** -0.5)
    return layers


def random_spans(text: str) -> Spans:
    """As if each word were a token, a comma too."""
    phrases, place = [], 1
    caption = derive(text, "wearing glasses")
    for phrase in caption.phrases:
        phrases.append(tuple(range(place, place + len(phrase.split()))))
        place += len(phrase.split()) + 1
    base = tuple(range(1, place - 1)) if phrases else ()
    return Spans(base, tuple(phrases), (place, place + 1))


def random_tools(dtype: torch.dtype) -> Tools:
    """An embedding that is a function of the text, a linear decoder and CLIP, two adapted layers."""
    mix = torch.randn((CHANNELS, 3), generator=generator(0, "decoder")).to(dtype)
    factors = torch.rand(2, generator=generator(0, "norms")).to(dtype).requires_grad_()

    def embed(texts: Sequence[str]) -> Tensor:
        rows = [torch.randn(FEATURES, generator=generator(0, "text", text)) for text in texts]
        return torch.nn.functional.normalize(torch.stack(rows), dim=-1).to(dtype)

    class RandomClip:
        text = staticmethod(embed)

        def image(self, pictures: Tensor) -> Tensor:
            project = torch.randn((3, FEATURES), generator=generator(0, "clip")).to(pictures.dtype)
            return torch.nn.functional.normalize(pictures.mean((2, 3)) @ project, dim=-1)

    def decode(latents: Tensor, decoder: str) -> Tensor:
        return torch.einsum("bchw,cd->bdhw", latents, mix.to(latents.dtype)).sigmoid()

    return Tools(embed, decode, RandomClip(), lambda: factors)
