"""What losses may call in a step beside the passes, made ready before the encoders are freed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from spf_kit.errors import UserError
from spf_kit.losses import Decoder, Needs, Plugin, Tools
from spf_kit.measure.clip import CLIP_KEY, ClipPair, folder_of
from spf_kit.probes import matches
from spf_kit.training.linear_decoder import LinearDecoder
from spf_kit.training.text import Phrases

if TYPE_CHECKING:
    from spf_kit.adapters.inject import AdapterHandle
    from spf_kit.data.dataset import Dataset
    from spf_kit.families.base import Family
    from spf_kit.schema import Config

FITTED = 16  # pictures that the linear decoder is fitted to, at most


def check_layers(plugins: Sequence[Plugin], family: Family) -> None:
    """Raises UserError if a plugin's `layers` mean none of this base's cross-attention layers."""
    there = family.attention_layers()
    for plugin in plugins:
        for pattern in sorted({pattern for _, pattern in plugin.needs.attention}):
            if not any(matches(name, factor, [pattern]) for name, factor in there.items()):
                raise UserError(
                    f"loss.{plugin.id}.layers holds {pattern!r}, which means none of this base's "
                    "cross-attention layers: use 'all', 'down', 'mid', 'up', a size such as '1/2', or a name "
                    f"such as {next(iter(there))!r}"
                )


def phrases_of(needs: Needs, config: Config, family: Family, dataset: Dataset) -> Phrases | None:
    """The captions' phrases, embedded before the adapter is there; None if no loss reads them."""
    if not needs.phrases:
        return None
    return Phrases(family, [entry.caption for entry in dataset.entries], config.data.chunks)


def split_by_clip(
    plugins: Iterable[Plugin], config: Config, family: Family
) -> tuple[list[Plugin], list[str]]:
    """The plugins that can act, and a sentence about those that cannot, for want of a CLIP pair."""
    plugins = list(plugins)
    idle = [plugin.id for plugin in plugins if plugin.needs.clip]
    if not idle or folder_of(family, config.clip.model):
        return plugins, []
    sentence = (
        f"left out, for there is no CLIP pair: {', '.join(idle)}; give clip.model the folder of a CLIPModel"
    )
    return [plugin for plugin in plugins if not plugin.needs.clip], [sentence]


def clip_pair(needs: Needs, config: Config, family: Family, *, weights: bool = True) -> ClipPair | None:
    """The CLIP pair, if a loss uses it; without `weights` on the meta device.

    Raises UserError if it cannot be loaded.
    """
    folder = folder_of(family, config.clip.model) if needs.clip else None
    return ClipPair.load(folder, device=family.device, weights=weights) if folder else None


def linear_decoder(needs: Needs, family: Family, dataset: Dataset) -> LinearDecoder | None:
    """Fitted to some of the pictures, spread over all of them; None if no loss decodes with it."""
    if "linear" not in needs.decode:
        return None
    some = dataset.entries[:: -(-len(dataset.entries) // FITTED)]
    return LinearDecoder.fit(family, [dataset.still(entry).mean for entry in some])


def build(
    needs: Needs,
    family: Family,
    handle: AdapterHandle,
    phrases: Phrases | None,
    clip: ClipPair | None,
    linear: LinearDecoder | None,
) -> Tools:
    """The tools that the plugins of a run need, in whatever stage."""
    decoders: dict[Decoder, Callable[[Tensor], Tensor]] = {}
    if linear:
        decoders["linear"] = linear
    if "vae" in needs.decode:
        decoders["vae"] = family.decode
    return Tools(
        embed=phrases.embed if phrases else None,
        decode=functools.partial(_decode, decoders) if decoders else None,
        clip=clip,
        update_norms=functools.partial(update_norms, handle) if needs.weights else None,
    )


def metadata(tools: Tools) -> dict[str, str]:
    """For the LoRA file: which CLIP pair must not judge it."""
    return {CLIP_KEY: tools.clip.fingerprint} if isinstance(tools.clip, ClipPair) else {}


def _decode(
    decoders: Mapping[Decoder, Callable[[Tensor], Tensor]], latents: Tensor, decoder: Decoder
) -> Tensor:
    if decoder not in decoders:
        raise RuntimeError(f"a plugin decodes by {decoder!r}, which its needs do not declare")
    return decoders[decoder](latents)


def update_norms(handle: AdapterHandle) -> Tensor:
    """|W' - W|_F^2 of each adapted layer, (layers,). A DoRA layer's magnitude is left out."""
    return handle.update_norms()
