"""One training step, as the method's equations.

z_t are noisy latents; c_base, c_tar and c_full a caption without the target, the target, and both.

Shapes: B samples, C latent channels, h x w latent size; B' prior pictures.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spf_kit.data.random import generator
from spf_kit.errors import UserError
from spf_kit.losses import (
    PASSES,
    Loss,
    Mask,
    ModelPass,
    Needs,
    Plugin,
    PriorBatch,
    Spans,
    Step,
    Tools,
)
from spf_kit.needs import Path
from spf_kit.probes import matches
from spf_kit.training.stages import active, union

if TYPE_CHECKING:
    from spf_kit.adapters.inject import AdapterHandle
    from spf_kit.data.captions import Caption
    from spf_kit.data.dataset import Batch
    from spf_kit.families.base import Condition, Family
    from spf_kit.families.noise import NoiseProcess
    from spf_kit.training.walks import Walker


@dataclass(frozen=True)
class Model:
    """The one copy of the weights, with the adapter that is being trained."""

    family: Family
    adapter: AdapterHandle
    encode: Callable[[Sequence[str]], Condition]
    autocast: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    spans: Callable[[Caption], Spans] | None = None  # where a caption's parts stand
    tools: Tools = field(default_factory=Tools)

    def predict(
        self, noisy: Tensor, timesteps: Tensor, texts: Sequence[str], framing: Tensor | None = None
    ) -> Tensor:
        """(B, C, h, w) in float32, whatever precision computed it: losses subtract nearly equal numbers.

        `framing` says how the pictures were cut, (B, 6); None takes them for whole.
        """
        with self.autocast():
            return self.family.predict(noisy, timesteps, self._condition(texts, framing)).float()

    def _condition(self, texts: Sequence[str], framing: Tensor | None) -> Condition:
        condition = self.encode(texts)
        return condition if framing is None else {**condition, "framing": framing}

    def run(self, batch: Noised, texts: Sequence[str], patterns: Sequence[str]) -> ModelPass:
        """One pass, with the attention of the layers that the patterns mean."""
        if not patterns:
            return ModelPass(self.predict(batch.noisy_latents, batch.timesteps, texts, batch.framing))
        layers = [n for n, factor in self.family.attention_layers().items() if matches(n, factor, patterns)]
        with self.autocast():
            condition = self._condition(texts, batch.framing)
            prediction, attention = self.family.probe(batch.noisy_latents, batch.timesteps, condition, layers)
        return ModelPass(prediction.float(), attention)

    @functools.cached_property
    def _random(self) -> list[torch.nn.Module]:
        """What acts at random in training mode. Found once: a walk over all modules is 7% of a small step."""
        found: list[torch.nn.Module] = []
        for name, module in self.family.components().items():
            dropout = [m for m in module.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
            found += dropout if name == "unet" else [module]  # text encoders have dropout inside functions
        return found

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """The base model as it was: adapter off, no gradient, no dropout."""
        training = [module for module in self._random if module.training]
        with torch.no_grad(), self.adapter.disabled():
            try:
                for module in training:
                    module.eval()
                yield
            finally:
                for module in training:
                    module.train()


@dataclass(frozen=True)
class Draws:
    """The random numbers of one batch."""

    latents: Tensor  # (B, C, h, w) standard normal: which latent of the VAE's distribution
    noise: Tensor  # (B, C, h, w) eps
    offset: Tensor  # (B, C, 1, 1) standard normal, for the noise offset
    uniform: Tensor  # (B,) in [0, 1): the timestep
    path: Tensor  # (B,) in [0, 1): whether the adapter is shown c_base or c_full

    @classmethod
    def keyed(cls, shape: Sequence[int], seed: int, kind: str, samples: Sequence[int]) -> Draws:
        """By seed and running number of the sample alone, so that no split into batches changes them."""
        rows = []
        for sample in samples:
            source = generator(seed, kind, sample)
            uniform = torch.rand((), generator=source)
            latents, noise = (torch.randn(tuple(shape[1:]), generator=source) for _ in range(2))
            offset = torch.randn((shape[1], 1, 1), generator=source)
            rows.append((latents, noise, offset, uniform, torch.rand((), generator=source)))
        return cls(*(torch.stack(column) for column in zip(*rows)))


@dataclass(frozen=True)
class Noised:
    """A batch at its timesteps."""

    latents: Tensor
    noise: Tensor
    noisy_latents: Tensor
    timesteps: Tensor
    target: Tensor
    path: Tensor  # see `Draws`
    masks: Tensor | None = None  # (B, 1, h, w), of mask pictures
    framing: Tensor | None = None  # (B, 6), how the pictures were cut


@dataclass(frozen=True)
class Outcome:
    """What a step comes to: the sum to minimise, and each term before its weight."""

    loss: Tensor  # ()
    terms: Mapping[str, Tensor]  # by id, one value for each sample that the loss saw, detached
    timesteps: Tensor  # (B,)
    sample_ids: Sequence[str]
    prior_ids: Sequence[str] = ()
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Sequence[int]] = field(default_factory=dict)  # which samples a term is of; none: all

    @property
    def acts(self) -> bool:
        """Whether a loss saw any of the samples. If none did, all on the other path, there is no gradient."""
        return any(len(term) for term in self.terms.values())


def noised(
    process: NoiseProcess, batch: Batch, draws: Draws, noise_offset: float, device: torch.device
) -> Noised:
    """z_t of a batch. Noise offset: a little noise that is constant over each channel of a picture, so that
    overall brightness is learnt too (https://www.crosslabs.org/blog/diffusion-with-offset-noise)."""
    mean, std = batch.mean.to(device), batch.std.to(device)
    latents = mean + std * draws.latents.to(device)
    noise = (draws.noise + noise_offset * draws.offset).to(device)
    timesteps = process.sample_timesteps(draws.uniform.to(device))
    noisy = process.add_noise(latents, noise, timesteps)
    masks = None if batch.masks is None else batch.masks.to(device)
    target = process.target(latents, noise, timesteps)
    return Noised(latents, noise, noisy, timesteps, target, draws.path, masks, batch.framing)


def run_step(
    model: Model,
    batch: Noised,
    captions: Sequence[Caption],
    sample_ids: Sequence[str],
    plugins: Sequence[Plugin],
    *,
    number: int,
    progress: float,
    prior: tuple[Noised, Batch] | None = None,
    walks: Walker | None = None,
    share: float = 1.0,
) -> Outcome:
    """One forward: every pass that an active plugin needs, once, then masks and losses in their order.

    Passes are not batched together. It would save 5% (measured), and 2B rows need not have the bits of B:
    an adapter without effect must differ from the reference by exactly nothing.

    Args:
        prior: z'_t' of prior pictures, where an active plugin needs them.
        walks: of the samples on the plain path, where an active plugin needs them; they go one step on.
        share: what these samples are of the whole batch. The losses of all its parts add up to the whole's.

    Raises:
        UserError: a plugin returned another shape than it must.
    """
    acting = active(plugins, progress)
    needs = union(acting)
    plain = plain_texts(batch, captions, needs)
    rows = rows_by_path(plain)
    if walks and needs.plain_walk:
        batch, plain = walks.place(batch, plain, needs.plain_walk)
    passes = _run_passes(model, batch, captions, needs, plain)
    if walks and needs.plain_walk:
        walks.advance(passes["reference"].prediction[rows["plain"]])
    whole = Step(
        batch.latents, batch.noise, batch.noisy_latents, batch.timesteps, batch.target, model.family.noise,
        captions, sample_ids, number, progress, passes,
        _run_prior(model, *prior) if prior and needs.prior else None,
        token_spans=[model.spans(caption) for caption in captions] if needs.phrases and model.spans else (),
        given_masks=batch.masks, tools=model.tools,
    )  # fmt: skip
    masks: dict[str, Tensor] = {}
    plain_masks: dict[str, Tensor] = {}
    steps = _by_path(whole, rows, masks, plain_masks)
    read_there = {getattr(p, "mask", None) for p in acting if p.needs.path == "plain"}
    terms: dict[str, Tensor] = {}
    total = torch.zeros((), device=batch.latents.device)
    for plugin in acting:
        step = steps[plugin.needs.path]
        seen, count = step.seen_by(plugin), len(step.captions)
        if isinstance(plugin, Mask):
            masks[plugin.id] = _mask(plugin, plugin, seen)
            if plugin.id in read_there:
                plain_masks[plugin.id] = _mask(plugin, plugin.of_plain, steps["plain"].seen_by(plugin))
        elif isinstance(plugin, Loss):
            value = _checked(plugin, plugin(seen), None) if count else total.new_zeros(0)
            part = prior[1].share if prior and plugin.needs.prior else share
            terms[plugin.id] = (value if part else value[:0]).detach().float()
            if count:  # each sample counts alike, however many of a batch take which path
                factor = plugin.weight * (part * count / len(captions))
                total = total + factor * value.float().mean()
    prior_ids = prior[1].sample_ids if prior else ()
    seen_rows = {p.id: rows[p.needs.path] for p in acting if p.id in terms and not p.needs.prior}
    return Outcome(total, terms, batch.timesteps, sample_ids, prior_ids, masks, seen_rows)


def masks_of(
    model: Model, batch: Noised, captions: Sequence[Caption], sample_ids: Sequence[str], masks: Sequence[Mask]
) -> dict[str, Tensor]:
    """What mask plugins make of a batch, by id, whether or not a loss reads them: (B, 1, h, w) each."""
    needs = union(masks)
    passes = _run_passes(model, batch, captions, needs, [None] * len(captions))
    spans = [model.spans(caption) for caption in captions] if needs.phrases and model.spans else ()
    step = Step(
        batch.latents, batch.noise, batch.noisy_latents, batch.timesteps, batch.target, model.family.noise,
        captions, sample_ids, passes=passes, token_spans=spans, given_masks=batch.masks, tools=model.tools,
    )  # fmt: skip
    return {mask.id: _mask(mask, mask, step.seen_by(mask)) for mask in masks}


# --- the passes -------------------------------------------------------------------------------------------


def plain_texts(batch: Noised, captions: Sequence[Caption], needs: Needs) -> list[str | None]:
    """What the adapter is told in place of c_full where a sample is on the plain path, see `Needs.of`: c_base
    or nothing; None for the others."""
    share, blank = needs.plain_share, needs.blank_share or 0.0
    if share is None:
        return [None] * len(captions)
    if "response" not in needs.passes:  # nobody looks at c_full
        share = 1.0
    return [
        ("" if path < share * blank else caption.base) if path < share else None
        for path, caption in zip(batch.path.tolist(), captions)
    ]


def _run_passes(
    model: Model, batch: Noised, captions: Sequence[Caption], needs: Needs, plain: Sequence[str | None]
) -> dict[str, ModelPass]:
    """All adapter-off passes before the first pass with gradient. "response" holds both paths' samples."""
    passes: dict[str, ModelPass] = {}

    def run(adapter_on: bool) -> None:
        for name, (on, kind) in PASSES.items():
            wanted = name in needs.passes or (name == "response" and needs.plain_share is not None)
            if wanted and on is adapter_on:
                texts = _texts(kind, captions)
                if name in ("response", "reference"):
                    texts = [text if own is None else own for text, own in zip(texts, plain)]
                layers = [pattern for of, pattern in needs.attention if of == name]
                passes[name] = model.run(batch, texts, layers)

    if any(not PASSES[name][0] for name in needs.passes):
        with model.frozen():
            run(adapter_on=False)
    run(adapter_on=True)
    return passes


def rows_by_path(plain: Sequence[str | None]) -> dict[Path, list[int]]:
    """Which samples of a batch the plugins of each path see."""
    return {
        "whole": list(range(len(plain))),
        "asked": [i for i, text in enumerate(plain) if text is None],
        "plain": [i for i, text in enumerate(plain) if text is not None],
    }


def _by_path(
    whole: Step, rows: Mapping[Path, list[int]], masks: dict[str, Tensor], plain_masks: dict[str, Tensor]
) -> dict[Path, Step]:
    """The step as plugins of each path see it. The masks, filled later, are of either's samples."""
    if not rows["plain"]:
        none = replace(whole.rows([]), masks=plain_masks)
        return {"whole": whole, "asked": replace(whole, masks=masks), "plain": none}
    plain = whole.rows(rows["plain"])
    plain = replace(plain, passes={**plain.passes, "plain": plain.passes["response"]}, masks=plain_masks)
    return {"whole": whole, "asked": replace(whole.rows(rows["asked"]), masks=masks), "plain": plain}


def _run_prior(model: Model, batch: Noised, pictures: Batch) -> PriorBatch:
    texts = _texts("base", pictures.captions)
    prediction = model.predict(batch.noisy_latents, batch.timesteps, texts, batch.framing)
    return PriorBatch(prediction, batch.target, batch.timesteps)


def _texts(kind: str, captions: Sequence[Caption]) -> list[str]:
    """What the text encoder reads: c_base, c_full or nothing."""
    return ["" if kind == "blank" else str(getattr(caption, kind)) for caption in captions]


def _mask(plugin: Mask, make: Callable[[Step], Tensor], step: Step) -> Tensor:
    shape = (len(step.captions), 1, *step.noisy_latents.shape[2:])
    return _checked(plugin, make(step).detach(), shape) if shape[0] else step.noisy_latents.new_zeros(shape)


def _checked(plugin: Plugin, value: Tensor, shape: Sequence[int] | None) -> Tensor:
    """`shape` None: one value for each sample, of the batch or of the prior's."""
    if tuple(value.shape) != tuple(shape or value.shape[:1]) or not value.ndim:
        expected = f"a mask of shape {tuple(shape)}" if shape else "one value for each sample, (B,)"
        raise UserError(
            f"the plugin {plugin.name!r} returned shape {tuple(value.shape)}, expected {expected}"
        )
    return value
