"""How diffusers and single-file checkpoints count a model's blocks: pairs of module names, from a config.

Each generator yields (diffusers' name, the name in the file without the component's prefix), of modules or of
single parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Config = Mapping[str, Any]
Pairs = Iterator[tuple[str, str]]

_UNET_RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
_VAE_RESNET = (
    ("norm1", "norm1"),
    ("conv1", "conv1"),
    ("norm2", "norm2"),
    ("conv2", "conv2"),
    ("conv_shortcut", "nin_shortcut"),
)
_VAE_ATTENTION = (
    ("group_norm", "norm"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "proj_out"),
)
_OPEN_CLIP_LAYER = (
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
)


def _resnet(diffusers: str, ldm: str, inner: Iterable[tuple[str, str]]) -> Pairs:
    for ours, theirs in inner:
        yield f"{diffusers}.{ours}", f"{ldm}.{theirs}"


def _layers(config: Config, levels: int) -> list[int]:
    layers = config["layers_per_block"]
    return [layers] * levels if isinstance(layers, int) else list(layers)


def unet_pairs(config: Config) -> Pairs:
    yield "conv_in", "input_blocks.0.0"
    yield "time_embedding.linear_1", "time_embed.0"
    yield "time_embedding.linear_2", "time_embed.2"
    if config.get("addition_embed_type"):  # SDXL's pooled text, sizes and crop
        yield "add_embedding.linear_1", "label_emb.0.0"
        yield "add_embedding.linear_2", "label_emb.0.2"
    yield "conv_norm_out", "out.0"
    yield "conv_out", "out.2"
    yield from _resnet("mid_block.resnets.0", "middle_block.0", _UNET_RESNET)
    yield "mid_block.attentions.0", "middle_block.1"
    yield from _resnet("mid_block.resnets.1", "middle_block.2", _UNET_RESNET)
    levels = len(config["block_out_channels"])
    layers = _layers(config, levels)
    yield from _unet_down_pairs(config["down_block_types"], layers)
    yield from _unet_up_pairs(config["up_block_types"], layers[::-1])


def _unet_down_pairs(kinds: list[str], layers: list[int]) -> Pairs:
    """LDM counts the residual layers and the downsamplers through, from 1 (0 is the first convolution)."""
    block = 0
    for level, kind in enumerate(kinds):
        for layer in range(layers[level]):
            block += 1
            ours = f"down_blocks.{level}"
            yield from _resnet(f"{ours}.resnets.{layer}", f"input_blocks.{block}.0", _UNET_RESNET)
            if "CrossAttn" in kind:
                yield f"{ours}.attentions.{layer}", f"input_blocks.{block}.1"
        if level < len(kinds) - 1:
            block += 1
            yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{block}.0.op"


def _unet_up_pairs(kinds: list[str], layers: list[int]) -> Pairs:
    """On the way up each level has one layer more, and its upsampler stands in its last layer's block."""
    block = 0
    for level, kind in enumerate(kinds):
        attends = "CrossAttn" in kind
        for layer in range(layers[level] + 1):
            ours = f"up_blocks.{level}"
            yield from _resnet(f"{ours}.resnets.{layer}", f"output_blocks.{block}.0", _UNET_RESNET)
            if attends:
                yield f"{ours}.attentions.{layer}", f"output_blocks.{block}.1"
            block += 1
        if level < len(kinds) - 1:
            yield f"{ours}.upsamplers.0.conv", f"output_blocks.{block - 1}.{2 if attends else 1}.conv"


def vae_pairs(config: Config) -> Pairs:
    levels = len(config["block_out_channels"])
    layers = _layers(config, levels)
    for half in ("encoder", "decoder"):
        yield f"{half}.conv_in", f"{half}.conv_in"
        yield f"{half}.conv_out", f"{half}.conv_out"
        yield f"{half}.conv_norm_out", f"{half}.norm_out"
        for number in (0, 1):
            ours, theirs = f"{half}.mid_block.resnets.{number}", f"{half}.mid.block_{number + 1}"
            yield from _resnet(ours, theirs, _VAE_RESNET)
        yield from _resnet(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", _VAE_ATTENTION)
    for level in range(levels):
        # the decoder's levels are counted from the picture's side in LDM, from the latent's side in diffusers
        sides = (
            (f"encoder.down_blocks.{level}", f"encoder.down.{level}", "downsample", layers[level]),
            (f"decoder.up_blocks.{level}", f"decoder.up.{levels - 1 - level}", "upsample", layers[level] + 1),
        )
        for ours, theirs, sampler, count in sides:
            for layer in range(count):
                yield from _resnet(f"{ours}.resnets.{layer}", f"{theirs}.block.{layer}", _VAE_RESNET)
            if level < levels - 1:
                yield f"{ours}.{sampler}rs.0.conv", f"{theirs}.{sampler}.conv"
    yield "quant_conv", "quant_conv"
    yield "post_quant_conv", "post_quant_conv"


def clip_pairs(config: Config) -> Pairs:
    """transformers' own names."""
    yield "text_model", "text_model"


def open_clip_pairs(config: Config, *, projection: bool) -> Pairs:
    """OpenCLIP's names. One tensor of theirs holds the rows of q, k and v, so three names here mean one
    there, in the tensor's order; the projection is a bare matrix, for multiplying from the other side."""
    embeddings = "text_model.embeddings"
    yield f"{embeddings}.token_embedding", "token_embedding"
    yield f"{embeddings}.position_embedding.weight", "positional_embedding"
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            for part in ("q_proj", "k_proj", "v_proj"):
                yield f"{ours}.self_attn.{part}.{kind}", f"{theirs}.attn.in_proj_{kind}"
        yield f"{ours}.self_attn.out_proj", f"{theirs}.attn.out_proj"
        yield from ((f"{ours}.{a}", f"{theirs}.{b}") for a, b in _OPEN_CLIP_LAYER)
    yield "text_model.final_layer_norm", "ln_final"
    if projection:
        yield "text_projection.weight", "text_projection"
