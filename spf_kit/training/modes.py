"""What of a family is in training mode: the adapter's dropout and gradient checkpointing act there only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spf_kit.training import compiled

if TYPE_CHECKING:
    from spf_kit.families.base import Family
    from spf_kit.schema import Config


def trains_text(config: Config) -> bool:
    return "text-encoder" in config.adapter.targets


def training_mode(config: Config, family: Family) -> None:
    """The UNet, and the text encoders if they are trained."""
    family.unet.train()
    encoders = family.text_encoders().values() if trains_text(config) else ()
    for encoder in encoders:
        encoder.train()
    if config.train.gradient_checkpointing:
        # non-reentrant, so that layers get gradients although their inputs, the frozen embeddings, need none
        family.unet.enable_gradient_checkpointing()
        for encoder in encoders:
            _text_checkpointing(encoder, "enable", {"use_reentrant": False})


def evaluation_mode(config: Config, family: Family) -> None:
    """The inverse: the family as it was loaded, and not compiled."""
    if config.train.compile != "no":
        compiled.take_off(family)
    if config.train.gradient_checkpointing:
        family.unet.disable_gradient_checkpointing()
        for encoder in family.text_encoders().values() if trains_text(config) else ():
            _text_checkpointing(encoder, "disable")
    for module in family.modules():
        module.eval()


def _text_checkpointing(text_encoder: Any, what: str, *arguments: Any) -> None:
    """transformers renamed it in 5.20; the old name warns there."""
    old = f"gradient_checkpointing_{what}"
    getattr(text_encoder, f"activation_checkpointing_{what}", getattr(text_encoder, old))(*arguments)
