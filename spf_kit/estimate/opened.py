"""A preset opened for rehearsal without weights: modules, adapter and CLIP pair hold no values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from spf_kit import families
from spf_kit.adapters.earlier import Earlier
from spf_kit.adapters.inject import AdapterHandle
from spf_kit.estimate import gpu
from spf_kit.estimate.bare import BareTracker, fill
from spf_kit.estimate.rehearsal import CAPTION, OPTIMIZER, WEIGHTS, Rehearsal, Size
from spf_kit.measure.memory import optimizer_bytes
from spf_kit.measure.tracker import Peak
from spf_kit.sampling.draw import SLICED_ABOVE
from spf_kit.training import modes, session, stages, tools
from spf_kit.training.text import BATCH

if TYPE_CHECKING:
    from spf_kit.config import Resolved
    from spf_kit.families.base import Family
    from spf_kit.schema import Config, Train

PRECISIONS = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Opened:
    """What can be measured of it."""

    rehearsal: Rehearsal
    reading: Peak  # while pictures and captions are encoded, before the first step
    drawing: Peak | None  # while pictures are drawn: previews, and what follows the training; None: none are
    notes: list[str]  # sentences for the user


@contextlib.contextmanager
def opened(resolved: Resolved, largest: Size, *, on_gpu: bool) -> Iterator[Opened]:
    """The run of a preset. Reads configs alone, no weights; steps are taken within the block.

    Args:
        largest: (h, w) of the largest latents.
        on_gpu: account as a GPU allocates, whatever this machine has; else as torch on a CPU.

    Raises:
        UserError: as the training would, of the base, the adapter and the plugins.
    """
    config = resolved.config
    session.check(resolved)
    plugins = [plugin.model_copy(deep=True) for plugin in resolved.plugins]  # they keep state
    family = _family(config)
    plugins, notes = tools.split_by_clip(plugins, config, family)
    stages.check(plugins)
    Earlier.attach(family, config.adapter.on)
    handle = AdapterHandle.inject(family, config.adapter)
    clip = tools.clip_pair(stages.union(plugins), config, family, weights=False)
    family.device = torch.device("cpu")  # where torch takes them to be
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    granule = gpu.GRANULE if on_gpu else 1
    with mode, gpu.as_on_a_gpu() if on_gpu else contextlib.nullcontext():
        for module in [*family.modules(), *([clip.model] if clip else [])]:
            fill(module)
        if clip:
            clip.mean, clip.std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
        reading = _reading(config, family, lambda: BareTracker(mode, granule), largest)
        draws = config.preview.every or config.calibrate.enabled or config.evaluate.enabled
        drawing = _drawing(config, family, handle, lambda: BareTracker(mode, granule)) if draws else None
        rehearsal = Rehearsal(
            config, plugins, family, handle, BareTracker(mode, granule),
            clip=clip, autocast=autocast(config.train), valued=False,
        )  # fmt: skip
        if on_gpu:
            for group in rehearsal.updater.optimizer.param_groups:
                if group.get("foreach", False) is None:  # torch's own choice: all tensors at once on a GPU
                    group["foreach"] = True
        yield Opened(rehearsal, reading, drawing, notes)


def autocast(train: Train) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """`train.mixed_precision` for tensors that torch takes to be on the CPU."""
    dtype = PRECISIONS[train.mixed_precision]
    return contextlib.nullcontext if dtype is None else lambda: torch.autocast("cpu", dtype)


def _family(config: Config) -> Family:
    """On the meta device. xformers' processors are diffusers' own, and need no xformers here."""
    plain = config.base.model_copy(update={"attention": "sdpa"})
    wanted = plain if config.base.attention == "xformers" else config.base
    family = families.load(wanted, device="meta", weights=False)
    if config.base.attention == "xformers":
        for module in (family.unet, family.vae):
            gpu.use_xformers(module)
    return family


@torch.no_grad()
def _reading(config: Config, family: Family, make: Callable[[], BareTracker], largest: Size) -> Peak:
    """Pictures go through the VAE one by one, then captions through the text encoders by the batch: with the
    UNet where earlier LoRAs lie on it (on a GPU it rests meanwhile), else before it is loaded."""
    height, width = (side * family.latent_factor for side in largest)
    pictures, captions = make(), make()
    for module in family.modules():
        if module is not family.unet or config.adapter.on or modes.trains_text(config):
            captions.hold(_tensors(module), WEIGHTS)
        if module is not family.unet or config.data.cache == "none":  # then they are read between steps
            pictures.hold(_tensors(module), WEIGHTS)
    pixels = torch.zeros(1, 3, height, width)
    with pictures:
        family.encode_image(pixels)
    with captions:
        family.encode_text([CAPTION] * BATCH, clip_skip=config.base.clip_skip, chunks=config.data.chunks)
    return max(pictures.peak, captions.peak, key=lambda peak: peak.total)


@torch.no_grad()
def _drawing(config: Config, family: Family, handle: AdapterHandle, make: Callable[[], BareTracker]) -> Peak:
    """Pictures of the base's own size: a call of the UNet, then the VAE. All modules are there, or with
    `base.offload` the one that works; the optimizer keeps its state."""
    batch, side = config.evaluate.batch_size, family.resolution // family.latent_factor
    rows = batch * (2 if config.evaluate.cfg > 1 else 1)
    condition = family.encode_text(
        [CAPTION] * rows, clip_skip=config.base.clip_skip, chunks=config.data.chunks
    )
    latents = torch.zeros(rows, family.latent_channels, side, side)
    one_by_one = config.base.vae_slicing or (side * family.latent_factor) ** 2 > SLICED_ABOVE
    calling, decoding = make(), make()
    for tracker, working in ((calling, family.unet), (decoding, family.vae)):
        for module in family.modules():
            if module is working or not config.base.offload or (module is family.unet and family.quantize):
                tracker.hold(_tensors(module), WEIGHTS)
    with calling:
        family.predict(latents.to(family.dtype), torch.zeros(rows), condition)
    with decoding:
        family.decode(latents[: 1 if one_by_one else batch])
    peak = max(calling.peak, decoding.peak, key=lambda peak: peak.total)
    shapes = [tuple(parameter.shape) for parameter in handle.parameters()]
    state = optimizer_bytes(config.train.optimizer, shapes) or 0
    return Peak(peak.total + state, {**peak.parts, OPTIMIZER: state})


def _tensors(module: nn.Module) -> Sequence[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]
