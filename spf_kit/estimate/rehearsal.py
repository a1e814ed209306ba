"""One training step of a preset under a tracker: the trainer's own functions, on stand-ins for its data.

The tensors may be real, or without values (see `bare.py`): the code is the same, and so is what it allocates.

Shapes: B samples, C latent channels, h x w latent size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from spf_kit.adapters.index import index
from spf_kit.adapters.weights import parse
from spf_kit.data.captions import Caption, derive
from spf_kit.data.dataset import Batch
from spf_kit.estimate.counted import Counted, needs_values
from spf_kit.losses import LayerProbe, ModelPass, Plugin, Tools
from spf_kit.measure.tracker import Peak, Tracker
from spf_kit.training import modes, optimizers, session, stages, tools
from spf_kit.training.linear_decoder import LinearDecoder
from spf_kit.training.step import Draws, Model, Noised, noised, run_step
from spf_kit.training.text import Phrases
from spf_kit.training.update import Updater
from spf_kit.training.walks import Walks

if TYPE_CHECKING:
    from spf_kit.adapters.inject import AdapterHandle
    from spf_kit.families.base import Family
    from spf_kit.measure.clip import ClipPair
    from spf_kit.schema import Config

CAPTION = "a portrait of a person, brown hair, a plain background"  # captions of all lengths cost the same
STEPS = 1000  # that the learning rate's schedule counts; no tensor depends on them
WEIGHTS, ADAPTER, GRADIENTS, OPTIMIZER = "weights", "adapter", "gradients", "optimizer"
ACTIVATIONS, REFERENCE, TAPS, DECODE = "activations", "reference path", "taps", "decode"
PARTS = (WEIGHTS, ADAPTER, GRADIENTS, OPTIMIZER, ACTIVATIONS, REFERENCE, TAPS, DECODE)

Size = tuple[int, int]  # (h, w) of latents


@dataclass(frozen=True)
class TrackedProbe(LayerProbe):
    """A probe whose maps are the taps' memory."""

    tracker: Tracker | None = field(default=None, compare=False)

    @cached_property
    def maps(self) -> Tensor:
        assert self.tracker is not None
        with self.tracker.part(TAPS):
            return super().maps


@dataclass(frozen=True)
class TrackedModel(Model):
    """The model of a step, which tells the tracker what it is doing."""

    tracker: Tracker = field(default_factory=Tracker)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        with self.tracker.part(REFERENCE), super().frozen():
            yield

    def run(self, batch: Noised, texts: Sequence[str], patterns: Sequence[str]) -> ModelPass:
        found = super().run(batch, texts, patterns)
        tapped = {name: self._tracked(layer) for name, layer in found.attention.items()}
        return replace(found, attention=tapped)

    def _tracked(self, layer: LayerProbe) -> TrackedProbe:
        self.tracker.hold((layer.queries, layer.keys), TAPS)
        own = (layer.name, layer.factor, layer.size, layer.queries, layer.keys, layer.heads, layer.scale)
        return TrackedProbe(*own, tracker=self.tracker)


class Rehearsal:
    """A run's model, adapter and optimizer, made as `session.open_session` makes them, and its steps."""

    def __init__(
        self,
        config: Config,
        plugins: Sequence[Plugin],
        family: Family,
        handle: AdapterHandle,
        tracker: Tracker,
        *,
        clip: ClipPair | None = None,
        autocast: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        valued: bool = True,
    ) -> None:
        """Frees the encoders of `family` that training frees; `plugins` can all act.

        Args:
            handle: the adapter on it, over the earlier LoRAs.
            clip: the pair that losses ask for.
            autocast: the computation's precision, as `Model` takes it.
            valued: the tensors are real ones.

        Raises:
            UserError: of the plugins' layers and the optimizer.
        """
        self.config, self.plugins, self.family = config, plugins, family
        self.handle, self.tracker = handle, tracker
        needs = stages.union(plugins)
        self.caption = derive(CAPTION, config.attribute.target)
        tools.check_layers(plugins, family)
        phrases = Phrases(family, [self.caption], config.data.chunks) if needs.phrases else None
        linear = _linear_decoder(family) if "linear" in needs.decode else None
        encode = session.encoding(
            config, family, _Texts(self.caption, config.data.shuffle_tags), None,
            lambda *_: None, keep=changes_text(config),
        )  # fmt: skip
        if not ("vae" in needs.decode or config.data.cache == "none"):
            family.free_encoders(["vae"])
        modes.training_mode(config, family)
        self._hold(clip)
        self.model = TrackedModel(
            family, self.handle, encode, autocast,
            spans=phrases.spans if phrases else None,
            tools=self._tools(tools.build(needs, family, self.handle, phrases, clip, linear)),
            tracker=tracker,
        )  # fmt: skip
        self.updater = self._updater(valued=valued)

    # --- one step -----------------------------------------------------------------------------------------

    def step(self, size: Size, progress: float) -> Peak:
        """The peak of one optimizer step on latents of this size, at this share of the run.

        Where gradients are accumulated, those of the micro-batches before are there; the optimizer has its
        state.
        """
        tracker, train = self.tracker, self.config.train
        self.settle()
        if train.gradient_accumulation > 1:
            self._empty_gradients()
        batch, prior, path = self._batch(size), self._prior(progress), _path(train.batch_size)
        tracker.reset_peak()
        with tracker:
            outcome = run_step(
                self.model, self._noised(batch, path), batch.captions, batch.sample_ids, self.plugins,
                number=2, progress=progress, walks=Walks(self.family.noise),
                prior=None if prior is None else (self._noised(prior, path), prior),
            )  # fmt: skip
            self.updater.backward(outcome.loss)
            with tracker.part(GRADIENTS):
                self.updater.gradients()
            with tracker.part(OPTIMIZER):
                self.updater.apply(2)
        return tracker.peak

    def moments(self) -> list[float]:
        """One share of the run for each set of plugins that act together."""
        found: dict[tuple[str, ...], float] = {}
        for moment in sorted({0.0, *(p.start for p in self.plugins), *(p.end for p in self.plugins)} - {1.0}):
            found.setdefault(tuple(p.id for p in stages.active(self.plugins, moment)), moment)
        return [moment for acting, moment in found.items() if acting]

    def demanding(self) -> list[float]:
        """Those of the moments that can need most: without those whose plugins all act at another one too."""
        acting = {
            moment: {plugin.name for plugin in stages.active(self.plugins, moment)}
            for moment in self.moments()
        }
        found: list[float] = []
        for moment, names in sorted(acting.items(), key=lambda item: -len(item[1])):
            if not any(names <= acting[other] for other in found):
                found.append(moment)
        return found

    def settle(self) -> None:
        """An optimizer makes its state in the first step and keeps it."""
        if not self.updater.optimizer.state:
            self._empty_gradients()
            with self.tracker, self.tracker.part(OPTIMIZER):
                self.updater.apply(1)

    def _empty_gradients(self) -> None:
        with self.tracker, self.tracker.part(GRADIENTS):
            for parameter in self.updater.parameters:
                parameter.grad = torch.zeros_like(parameter)

    # --- stand-ins for the data ---------------------------------------------------------------------------

    def _batch(self, size: Size) -> Batch:
        """On the host, as the data's are."""
        count, family = self.config.train.batch_size, self.family
        shape = (count, family.latent_channels, *size)
        height, width = (side * family.latent_factor for side in size)
        masked = stages.union(self.plugins).picture_masks is not None
        return Batch(
            [self.caption] * count, torch.zeros(shape), torch.ones(shape),
            [f"{n}.png" for n in range(count)], list(range(count)), [False] * count, 0,
            torch.ones(count, 1, *size) if masked else None,
            torch.tensor([[height, width, 0, 0, height, width]] * count),
        )  # fmt: skip

    def _noised(self, batch: Batch, path: Tensor) -> Noised:
        """At a timestep at which every loss acts."""
        shape = batch.mean.shape
        offset, uniform = torch.zeros(len(batch), shape[1], 1, 1), torch.full((len(batch),), self._level())
        draws = Draws(torch.zeros(shape), torch.zeros(shape), offset, uniform, path)
        return noised(self.family.noise, batch, draws, self.config.train.noise_offset, self.family.device)

    def _level(self) -> float:
        """A share of the noise schedule that lies in the ranges of all plugins, or, if none does, of most."""
        least = max((getattr(plugin, "min_timestep", 0.0) for plugin in self.plugins), default=0.0)
        most = min((getattr(plugin, "max_timestep", 1.0) for plugin in self.plugins), default=1.0)
        return (least + most) / 2 if 0 < least < most else 0.1

    def _prior(self, progress: float) -> Batch | None:
        if not stages.union(stages.active(self.plugins, progress)).prior:
            return None
        data = self.config.data
        side = data.resolution // data.bucket_step * data.bucket_step // self.family.latent_factor
        return self._batch((side, side))

    # --- what a run holds ---------------------------------------------------------------------------------

    def _hold(self, clip: ClipPair | None) -> None:
        own = {id(parameter) for parameter in self.handle.parameters()}
        idle = [] if modes.trains_text(self.config) else list(self.family.text_encoders().values())
        there = [m for m in self.family.modules() if not (self.config.base.offload and m in idle)]
        modules = [*there, *([clip.model] if clip else [])]
        for module in modules:
            tensors = [*module.parameters(), *module.buffers()]
            self.tracker.hold((tensor for tensor in tensors if id(tensor) not in own), WEIGHTS)
        self.tracker.hold(self.handle.parameters(), ADAPTER)

    def _tools(self, made: Tools) -> Tools:
        """The same tools, with what they allocate under "decode"."""
        tracker = self.tracker

        def marked(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def call(*arguments: Any) -> Tensor:
                with tracker.part(DECODE):
                    return function(*arguments)

            return call

        clip = made.clip and SimpleNamespace(image=marked(made.clip.image), text=marked(made.clip.text))
        return replace(made, decode=made.decode and marked(made.decode), clip=clip)

    def _updater(self, *, valued: bool) -> Updater:
        """The trainer's; without values, an optimizer that needs some is counted instead."""
        train = self.config.train
        processes: Any = SimpleNamespace(scaler=None, num_processes=1)  # of an accelerator in float32
        counted = not valued and needs_values(train)
        build = Counted.build if counted else optimizers.build
        with self.tracker, self.tracker.part(OPTIMIZER):
            made = session.updater(self.config, self.handle, STEPS, processes, build=build)
        for parameter in made.parameters:
            parameter.register_post_accumulate_grad_hook(lambda p: self.tracker.hold([p.grad], GRADIENTS))
        return made


@dataclass(frozen=True)
class _Texts:
    """As much of a data set as the encoding of texts looks at."""

    caption: Caption
    shuffled: bool

    def texts(self) -> set[str] | None:
        return None if self.shuffled else {"", self.caption.base, self.caption.full}


def _path(count: int) -> Tensor:
    """(B,) in [0, 1), evenly spread, the first sample asked. The step reads these on the host, so that they
    have values whatever the others have."""
    with unset_fake_temporarily():
        return 0.999 - torch.arange(count) / count


def changes_text(config: Config) -> bool:
    """Whether an earlier LoRA changes a text encoder, which is kept then."""
    files = [index(path) for path, _ in map(parse, config.adapter.on)]
    return any(component != "unet" for file in files for component, _ in file.layers)


def _linear_decoder(family: Family) -> LinearDecoder:
    return LinearDecoder(torch.zeros(3, family.latent_channels), torch.zeros(3), 1.0)
