"""Parameter names: diffusers' against those of single-file checkpoints (the layouts of CompVis and SAI).

The map follows from the configs alone (blocks, layers a block, attention positions), so it serves every model
of the Stable Diffusion architectures, whatever its sizes. Names on the diffusers side are those in files: the
text encoders' begin with `text_model.`, which transformers 5 leaves out of some module names.

    unet            down_blocks.0.resnets.0.conv1  model.diffusion_model.input_blocks.1.0.in_layers.2
    vae             encoder.conv_in                first_stage_model.encoder.conv_in
    text_encoder    text_model.encoder.layers.0    cond_stage_model.transformer.text_model.encoder… SD 1.x
                                                   cond_stage_model.model.transformer.resblocks.0   SD 2.x
                                                   conditioner.embedders.0.transformer.text_model.… SDXL
    text_encoder_2  text_model.encoder.layers.0    conditioner.embedders.1.model.transformer.resblocks.0
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from spf_kit.families.ldm_blocks import clip_pairs, open_clip_pairs, unet_pairs, vae_pairs

Config = Mapping[str, Any]

# of a component's keys; a text encoder's by the family that the file holds
PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.",),
    "text_encoder": (
        "cond_stage_model.transformer.", "cond_stage_model.model.", "conditioner.embedders.0.transformer.",
    ),
    "text_encoder_2": ("conditioner.embedders.1.model.",),
}  # fmt: skip
OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.1.model.")  # names of OpenCLIP's own

# diffusers wrote these names before 0.12, and older folders still hold them
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_PARTS = ("q_proj", "k_proj", "v_proj")


class Located(NamedTuple):
    """What a key in a single file belongs to."""

    component: str
    key: str  # its standard form
    prefix: str


class KeyMap:
    """The names of one component, both ways. A name is translated by its longest known module prefix."""

    def __init__(self, pairs: Iterable[tuple[str, str]], prefix: str = "") -> None:
        self._to_ldm = {diffusers: prefix + ldm for diffusers, ldm in pairs}
        self._to_diffusers: dict[str, list[str]] = {}
        for diffusers, ldm in self._to_ldm.items():
            self._to_diffusers.setdefault(ldm, []).append(diffusers)

    def to_ldm(self, name: str) -> str | None:
        """diffusers' name of a parameter or module to the LDM name; None if it has none."""
        head, tail = _known(name, self._to_ldm)
        return None if head is None else self._to_ldm[head] + tail

    def to_diffusers(self, name: str) -> str | None:
        """The LDM name of a parameter or module to diffusers'; None if it has none, or stands for several."""
        names = self.all_diffusers(name)
        return names[0] if len(names) == 1 else None

    def all_diffusers(self, name: str) -> list[str]:
        """All of diffusers' names for it: three for a tensor that holds the rows of q, k and v, in order."""
        head, tail = _known(name, self._to_diffusers)
        return [] if head is None else [found + tail for found in self._to_diffusers[head]]


def _known(name: str, names: Mapping[str, Any]) -> tuple[str | None, str]:
    """The longest module prefix of a name that is among `names`, and the rest."""
    head, tail = name, ""
    while head not in names:
        head, dot, last = head.rpartition(".")
        if not dot:
            return None, ""
        tail = f".{last}{tail}"
    return head, tail


def key_map(component: str, config: Config, prefix: str = "") -> KeyMap:
    """The names of `component` for a model of this config.

    `prefix` is one of its `PREFIXES`, by default the first (Stable Diffusion 1.x). It also says whose names
    a text encoder has.
    """
    prefix = prefix or PREFIXES[component][0]
    if prefix in OPEN_CLIP:
        return KeyMap(open_clip_pairs(config, projection=component == "text_encoder_2"), prefix)
    pairs = {"unet": unet_pairs, "vae": vae_pairs}.get(component, clip_pairs)
    return KeyMap(pairs(config), prefix)


def prefix_of(component: str, family: str) -> str:
    """The prefix that a component has in the files of a family."""
    number = {"sd2": 1, "sdxl": 2}.get(family, 0) if component == "text_encoder" else 0
    return PREFIXES[component][number]


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

    `keys` are the file's. Components are "unet" and the text encoders, modules have their names in files.
    Where q, k and v share a tensor, `third_of` tells a module's part.
    """
    maps: dict[str, KeyMap] = {}
    targets = {}
    for key in keys:
        found = locate(key)
        if found is None or found.component == "vae" or found.component not in configs:
            continue
        names = maps.get(found.prefix)
        if names is None:
            config = configs[found.component]
            names = maps[found.prefix] = key_map(found.component, config, found.prefix)
        for name in names.all_diffusers(found.key):
            # the projection is left out: no trainer of LoRAs changes it, and here it lies the other way round
            if name.endswith(".weight") and not is_transposed(found.key):
                targets[found.component, name.removesuffix(".weight")] = key
    return targets


def third_of(key: str, module: str) -> int | None:
    """Which third of the rows of the tensor `key` is this module's; None: all of them are."""
    if not key.endswith(("attn.in_proj_weight", "attn.in_proj_bias")):
        return None
    return _PARTS.index(module.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2])


def is_transposed(key: str) -> bool:
    """Is it OpenCLIP's projection, (in, out) in its files and (out, in) in transformers?"""
    return key.endswith(".text_projection")


def locate(key: str) -> Located | None:
    """What a key in a single file belongs to; None for what belongs to no component.

    Some early conversions lack the level `text_model.`; the standard key has it.
    """
    for component, prefixes in PREFIXES.items():
        for prefix in prefixes:
            if key.startswith(prefix):
                rest = key[len(prefix) :]
                if component.startswith("text_encoder") and prefix not in OPEN_CLIP:
                    rest = standard_name(component, rest)
                return Located(component, prefix + rest, prefix)
    return None


def standard_name(component: str, name: str) -> str:
    """A parameter's name in a diffusers folder as all else here expects it.

    Text encoders: files by transformers 5.6 and later lack the level `text_model.`, all others have it. VAEs:
    diffusers before 0.12 named the attention's layers otherwise.
    """
    if component.startswith("text_encoder"):
        return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"
    head, _, last = name.rpartition(".")
    parent, _, module = head.rpartition(".")
    if component == "vae" and parent.endswith("mid_block.attentions.0") and module in _OLD_VAE_ATTENTION:
        return f"{parent}.{_OLD_VAE_ATTENTION[module]}.{last}"
    return name


def is_vae_attention_weight(ldm_key: str) -> bool:
    """Is it a weight that is a 1x1 convolution (O, I, 1, 1) in LDM files and a matrix (O, I) in diffusers?"""
    parts = ldm_key.split(".")
    return parts[-1] == "weight" and "attn_1" in parts and parts[-2] in ("q", "k", "v", "proj_out")
