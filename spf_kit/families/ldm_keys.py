"""Parameter names: diffusers' against those of single-file checkpoints (the LDM layout of CompVis).

The map follows from the configs alone (blocks, layers a block, attention positions), so it serves every model
of the Stable Diffusion 1.x architecture, whatever its sizes. Names on the diffusers side are those in files:
the text encoder's begin with `text_model.`, which transformers 5 leaves out of its module names.

    unet          down_blocks.0.resnets.0.conv1       model.diffusion_model.input_blocks.1.0.in_layers.2
    vae           encoder.mid_block.resnets.0.conv1   first_stage_model.encoder.mid.block_1.conv1
    text_encoder  text_model.encoder.layers.0         cond_stage_model.transformer.text_model.encoder.layers.0
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Config = Mapping[str, Any]
Pairs = Iterator[tuple[str, str]]

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}

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
# diffusers wrote these names before 0.12, and older folders still hold them
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class KeyMap:
    """The names of one component, both ways. A name is translated by its longest known module prefix."""

    def __init__(self, pairs: Iterable[tuple[str, str]], prefix: str = "") -> None:
        self._to_ldm = {diffusers: prefix + ldm for diffusers, ldm in pairs}
        self._to_diffusers = {ldm: diffusers for diffusers, ldm in self._to_ldm.items()}

    def to_ldm(self, name: str) -> str | None:
        """diffusers' name of a parameter or module to the LDM name; None if it has none."""
        return _translate(name, self._to_ldm)

    def to_diffusers(self, name: str) -> str | None:
        """The LDM name of a parameter or module to diffusers'; None if it has none."""
        return _translate(name, self._to_diffusers)


def _translate(name: str, names: Mapping[str, str]) -> str | None:
    head, tail = name, ""
    while head not in names:
        head, dot, last = head.rpartition(".")
        if not dot:
            return None
        tail = f".{last}{tail}"
    return names[head] + tail


def key_map(component: str, config: Config) -> KeyMap:
    """The names of `component` ("unet", "vae" or "text_encoder") for a model of this config."""
    pairs = {"unet": _unet_pairs, "vae": _vae_pairs, "text_encoder": _text_pairs}[component]
    return KeyMap(pairs(config), PREFIXES[component])


def weight_key(configs: Mapping[str, Config], component: str, module: str) -> str:
    """The LDM key of a module's weight, such as of ("unet", "up_blocks.0.resnets.0.conv1").

    `configs` maps components to their configs; text encoder modules come with or without `text_model.`.
    Raises KeyError if the model has no such module.
    """
    name = standard_name(component, f"{module}.weight")
    key = key_map(component, configs[component]).to_ldm(name)
    if key is None:
        raise KeyError(f"{component} has no module {module!r}")
    return key


def merge_targets(keys: Iterable[str], configs: Mapping[str, Config]) -> dict[tuple[str, str], str]:
    """Where a LoRA's update goes in a single file: (component, module) to the file's own weight key.

    `keys` are the file's. Components are "unet" and "text_encoder", modules have their names in files.
    """
    maps = {component: key_map(component, configs[component]) for component in ("unet", "text_encoder")}
    targets = {}
    for key in keys:
        found = locate(key)
        if found is None or found[0] not in maps or not key.endswith(".weight"):
            continue
        name = maps[found[0]].to_diffusers(found[1])
        if name is not None:
            targets[found[0], name.removesuffix(".weight")] = key
    return targets


def locate(key: str) -> tuple[str, str] | None:
    """Component and standard LDM key of a key in a single file; None for what belongs to no component.

    Some early conversions lack the level `text_model.`; the standard key has it.
    """
    for component, prefix in PREFIXES.items():
        if key.startswith(prefix):
            rest = key[len(prefix) :]
            return component, prefix + (
                standard_name(component, rest) if component == "text_encoder" else rest
            )
    return None


def standard_name(component: str, name: str) -> str:
    """A parameter's name in a diffusers folder as all else here expects it.

    Text encoders: files by transformers 5.6 and later lack the level `text_model.`, all others have it. VAEs:
    diffusers before 0.12 named the attention's layers otherwise.
    """
    if component == "text_encoder" and not name.startswith("text_model."):
        return f"text_model.{name}"
    head, _, last = name.rpartition(".")
    parent, _, module = head.rpartition(".")
    if component == "vae" and parent.endswith("mid_block.attentions.0") and module in _OLD_VAE_ATTENTION:
        return f"{parent}.{_OLD_VAE_ATTENTION[module]}.{last}"
    return name


def is_vae_attention_weight(ldm_key: str) -> bool:
    """Is it a weight that is a 1x1 convolution (O, I, 1, 1) in LDM files and a matrix (O, I) in diffusers?"""
    parts = ldm_key.split(".")
    return parts[-1] == "weight" and "attn_1" in parts and parts[-2] in ("q", "k", "v", "proj_out")


# --- how the blocks are counted -----------------------------------------------------------------------------


def _resnet(diffusers: str, ldm: str, inner: Iterable[tuple[str, str]]) -> Pairs:
    for ours, theirs in inner:
        yield f"{diffusers}.{ours}", f"{ldm}.{theirs}"


def _layers(config: Config, levels: int) -> list[int]:
    layers = config["layers_per_block"]
    return [layers] * levels if isinstance(layers, int) else list(layers)


def _unet_pairs(config: Config) -> Pairs:
    yield "conv_in", "input_blocks.0.0"
    yield "time_embedding.linear_1", "time_embed.0"
    yield "time_embedding.linear_2", "time_embed.2"
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


def _vae_pairs(config: Config) -> Pairs:
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


def _text_pairs(config: Config) -> Pairs:
    yield "text_model", "text_model"
