"""The names of a LoRA's tensors, in every dialect that hobbyists' files speak.

    kohya        lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight
      for SDXL   lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight
    diffusers    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight
    older ones   unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight
    peft         base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight

All of them become (component, module, part). Modules have the names of published checkpoints: diffusers' for
the UNet, and for text encoders those that begin with `text_model.`, a level which transformers 5 left out.
kohya replaced every dot by an underscore, and names have underscores of their own; since these come from a
small vocabulary, the dots can be put back without knowing the model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Literal, NamedTuple

from spf_kit.adapters import sai_names
from spf_kit.adapters.parts import FILE_PARTS

Format = Literal["kohya", "diffusers", "peft"]
UNetNames = Literal["diffusers", "sai"]  # whose names of a UNet's layers kohya's files spell
Part = str  # of `parts.PARTS`, "alpha" or "dora_scale"


class Key(NamedTuple):
    """What one tensor's name says."""

    component: str  # "unet", "text_encoder", "text_encoder_2"
    module: str  # as in published checkpoints; kohya's own name where its dots cannot be told
    part: Part
    format: Format


KOHYA_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    # kohya's own OFT
    "oft_unet_": "unet",
    "oft_te_": "text_encoder",
}
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")

_DOTTED_PARTS: dict[str, Part] = {
    "down": "down", "A": "down", "up": "up", "B": "up", "magnitude_vector": "dora_scale"
}  # fmt: skip
_DOTTED = re.compile(
    r"(?P<module>.+?)"
    r"(?:"
    r"[._]lora(?:_linear_layer)?\.(?P<a>down|up)(?:\.default)?\.weight"  # .lora.down.weight, _lora.…
    r"|\.lora_(?P<b>A|B|down|up)(?:\.default)?\.weight"  # .lora_A.weight, .lora_A.default.weight
    r"|\.lora_(?P<c>magnitude_vector)(?:\.default)?(?:\.weight)?"
    r"|\.(?P<d>alpha|dora_scale|(?:hada|lokr|oft)_\w+?|rescale)(?:\.default)?"
    r")"
)

# names with an underscore inside, and the plain ones; together they spell every module of SD 1.x to SDXL
_WORDS = (
    # UNet, diffusers' names
    "down_blocks", "up_blocks", "mid_block", "transformer_blocks", "time_emb_proj", "time_embedding",
    "add_embedding", "linear_1", "linear_2", "conv_shortcut", "conv_in", "conv_out", "proj_in", "proj_out",
    "to_q", "to_k", "to_v", "to_out", "attentions", "resnets", "downsamplers", "upsamplers", "attn1", "attn2",
    "ff", "net", "proj", "conv", "conv1", "conv2",
    # UNet, LDM's names, which kohya uses for SDXL
    "input_blocks", "middle_block", "output_blocks", "in_layers", "out_layers", "emb_layers",
    "skip_connection", "label_emb", "time_embed", "op", "out",
    # text encoders
    "text_model", "text_projection", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "encoder",
    "layers", "mlp", "fc1", "fc2", "token_embedding", "position_embedding", "embeddings",
)  # fmt: skip
_WORD = re.compile("(?:" + "|".join(sorted(_WORDS, key=len, reverse=True)) + r"|\d+)(?=_|$)")

_OLD_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_UNET_HEADS = (
    "down_blocks.", "up_blocks.", "mid_block.", "conv_in", "conv_out", "time_embedding.", "add_embedding.",
    "input_blocks.", "middle_block.", "output_blocks.",
)  # fmt: skip
_TEXT_HEADS = ("text_model.", "encoder.layers.", "text_projection")

# what else calls itself a LoRA, by a mark in its names
_OTHER_KINDS = (
    (".hada_", "a LoHa with parts of its own"),
    (".lokr_", "a LoKr with parts of its own"),
    (".oft_R", "an OFT of peft, which rotates inputs"),
    (".oft_", "an OFT with parts of its own"),
    (".boft_", "a BOFT"),
    (".on_input", "an (IA)3"),
    (".a1.weight", "a GLoRA"),
    (".w_norm", "a difference of normalisation layers"),
    (".lora_embedding_", "a LoRA on embeddings"),
    (".lora_B.bias", "a LoRA with biases"),
)
_OTHER_FAMILIES = (
    ("lora_unet_double_blocks_", "FLUX"),
    ("lora_unet_single_blocks_", "FLUX"),
    ("double_blocks.", "FLUX"),
    ("single_transformer_blocks", "FLUX"),
    ("single_blocks.", "FLUX"),
    ("joint_blocks", "SD3"),
    ("lora_te3_", "SD3 or FLUX"),
    ("lora_prior_", "Stable Cascade"),
    ("transformer.", "a transformer model (SD3, FLUX, ...)"),
    ("lora_transformer_", "a transformer model (SD3, FLUX, ...)"),
    ("diffusion_model.", "a model in ComfyUI's own naming"),
    ("adapter_modules.", "a control model"),
)


def parse(name: str) -> Key | None:
    """Read one tensor's name; None if it is no part of a LoRA that this package knows."""
    for prefix, component in KOHYA_PREFIXES.items():
        if name.startswith(prefix):
            flat, _, part = name.removeprefix(prefix).partition(".")
            if part not in FILE_PARTS or not flat:
                return None
            return Key(component, _modern(component, restore_dots(flat)), FILE_PARTS[part], "kohya")
    return _parse_dotted(name)


def _parse_dotted(name: str) -> Key | None:
    bare = name.removeprefix("base_model.model.")
    layout: Format = "diffusers" if bare == name else "peft"
    match = _DOTTED.fullmatch(bare)
    if match is None:
        return None
    found = next(text for text in match.group("a", "b", "c", "d") if text)
    part = _DOTTED_PARTS.get(found, found)
    if part not in FILE_PARTS.values():
        return None
    module = match["module"].replace(".processor.", ".")
    component, _, rest = module.partition(".")
    if component in COMPONENTS and rest:
        module = rest
    elif module.startswith(_UNET_HEADS):
        component = "unet"
    elif module.startswith(_TEXT_HEADS):
        component = "text_encoder"
    else:
        return None
    return Key(component, _modern(component, module), part, layout)


def _modern(component: str, module: str) -> str:
    """Today's name of a module from any dotted one; files made with transformers 5 may lack `text_model.`."""
    head, _, last = module.rpartition(".")
    if component == "unet":
        module = f"{module}.0" if last == "to_out" else module
        return sai_names.to_diffusers(module) or module
    if head.endswith("self_attn"):
        module = f"{head}.{_OLD_TEXT_NAMES.get(last, last)}"
    if module.startswith(("encoder.", "embeddings.", "final_layer_norm")):
        module = f"text_model.{module}"
    return module


def restore_dots(flat: str) -> str:
    """`down_blocks_0_attentions_0_proj_in` to `down_blocks.0.attentions.0.proj_in`.

    A name with a word that no Stable Diffusion model has comes back as it was.
    """
    words, position = [], 0
    while position < len(flat):
        match = _WORD.match(flat, position)
        if match is None:
            return flat
        words.append(match[0])
        position = match.end() + 1  # over the underscore
    return ".".join(words)


def flatten(module: str) -> str:
    """The module's name as kohya writes it; equal for two names exactly if kohya cannot tell them apart."""
    return module.replace(".", "_")


OUTSIDE = ("conv_in", "conv_out", "time_embedding", "add_embedding")


def is_outside(component: str, module: str) -> bool:
    """Whether a layer lies outside the UNet's blocks, where kohya's own networks have none: its scripts leave
    such layers out, older diffusers refuse a file of SAI's names that has one."""
    return component == "unet" and module.partition(".")[0] in OUTSIDE


_WIDE = re.compile(
    r"(?:resnets\.\d+\.conv[12]|samplers\.\d+\.conv|conv_in|conv_out|in_layers\.2|out_layers\.3|\.op)$"
)


def kernel(module: str) -> tuple[int, ...]:
    """Of a convolution wider than one pixel, which from SD 1.x to SDXL is 3 x 3; () for other layers."""
    return (3, 3) if _WIDE.search(module) else ()


def is_adapter(names: Iterable[str]) -> bool:
    """Whether a file with such tensors is an adapter of any kind, one that can be read here or not."""
    marks = ("lora_", ".lora.", ".hada_", ".lokr_", *(mark for mark, _ in _OTHER_KINDS))
    return any(name.endswith((".diff", ".diff_b")) or any(mark in name for mark in marks) for name in names)


def other_kind(names: Collection[str]) -> str:
    """What a file is, if it is an adapter of another kind or for another family; '' if nothing is known."""
    for name in names:
        if name.endswith((".diff", ".diff_b")):
            return f"a full difference of weights (it holds {name!r})"
    for mark, kind in _OTHER_KINDS:
        for name in names:
            if mark in name:
                return f"{kind} (it holds {name!r})"
    for mark, family in _OTHER_FAMILIES:
        for name in names:
            if name.removeprefix("base_model.model.").startswith(mark) or f".{mark}" in name:
                return f"a LoRA for {family} (it holds {name!r})"
    return ""


# --- writing ----------------------------------------------------------------------------------------------


def kohya_prefix(component: str, *, two_text_encoders: bool) -> str:
    """`lora_unet`, `lora_te`; with two text encoders (SDXL) `lora_te1` and `lora_te2`."""
    if component == "text_encoder":
        return "lora_te1" if two_text_encoders else "lora_te"
    return {"unet": "lora_unet", "text_encoder_2": "lora_te2"}[component]


def target_group(component: str, module: str) -> str:
    """The group of `[adapter] targets` that a module belongs to, for people to read."""
    if component != "unet":
        return "text-encoder"
    for mark, group in (
        (".attn2.", "cross-attention"),
        (".attn1.", "self-attention"),
        (".ff.", "feed-forward"),
    ):
        if mark in module:
            return group
    if module.endswith((".proj_in", ".proj_out")):
        return "feed-forward"
    return "convolutions" if ".resnets." in module or "samplers." in module else "other"
