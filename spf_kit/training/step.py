"""One training step, as the method's equations. METHOD.md's names: z_t noisy latents, c_base, c_tar, c_full.

Shapes: B samples, C latent channels, h x w latent size; B' prior pictures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spf_kit.data.random import generator
from spf_kit.errors import UserError
from spf_kit.losses import PASSES, Loss, Mask, ModelPass, Plugin, PriorBatch, Step
from spf_kit.training.stages import active, union

if TYPE_CHECKING:
    from spf_kit.adapters.inject import AdapterHandle
    from spf_kit.data.captions import Caption
    from spf_kit.data.dataset import Batch
    from spf_kit.families.base import Condition, Family
    from spf_kit.families.noise import NoiseProcess


@dataclass(frozen=True)
class Model:
    """The one copy of the weights, with the adapter that is being trained."""

    family: Family
    adapter: AdapterHandle
    encode: Callable[[Sequence[str]], Condition]
    autocast: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    def predict(self, noisy: Tensor, timesteps: Tensor, texts: Sequence[str]) -> Tensor:
        """(B, C, h, w) in float32, whatever precision computed it: losses subtract nearly equal numbers."""
        with self.autocast():
            return self.family.predict(noisy, timesteps, self.encode(texts)).float()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """The base model as it was: adapter off, no gradient, no dropout."""
        training = [module for module in self.family.components().values() if module.training]
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

    @classmethod
    def keyed(cls, shape: Sequence[int], seed: int, kind: str, samples: Sequence[int]) -> Draws:
        """By seed and running number of the sample alone, so that no split into batches changes them."""
        rows = []
        for sample in samples:
            source = generator(seed, kind, sample)
            uniform = torch.rand((), generator=source)
            latents, noise = (torch.randn(tuple(shape[1:]), generator=source) for _ in range(2))
            rows.append((latents, noise, torch.randn((shape[1], 1, 1), generator=source), uniform))
        return cls(*(torch.stack(column) for column in zip(*rows)))


@dataclass(frozen=True)
class Noised:
    """A batch at its timesteps."""

    latents: Tensor
    noise: Tensor
    noisy_latents: Tensor
    timesteps: Tensor
    target: Tensor


@dataclass(frozen=True)
class Outcome:
    """What a step comes to: the sum to minimise, and each term before its weight."""

    loss: Tensor  # ()
    terms: Mapping[str, Tensor]  # by id, (B,), detached
    timesteps: Tensor  # (B,)
    sample_ids: Sequence[str]
    prior_ids: Sequence[str] = ()
    masks: Mapping[str, Tensor] = field(default_factory=dict)


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
    return Noised(latents, noise, noisy, timesteps, process.target(latents, noise, timesteps))


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
) -> Outcome:
    """One forward: every pass that an active plugin needs, once, then masks and losses in their order.

    Passes are not batched together. It would save 5% (measured), and 2B rows need not have the bits of B:
    an adapter without effect must differ from the reference by exactly nothing.

    Args:
        prior: z'_t' of prior pictures, where an active plugin needs them.

    Raises:
        UserError: a plugin returned another shape than it must.
    """
    acting = active(plugins, progress)
    needs = union(acting)
    texts = {kind: _texts(kind, captions) for _, kind in PASSES.values()}
    passes: dict[str, ModelPass] = {}

    def run(adapter_on: bool) -> None:
        for name, (on, kind) in PASSES.items():
            if name in needs.passes and on is adapter_on:
                passes[name] = ModelPass(model.predict(batch.noisy_latents, batch.timesteps, texts[kind]))

    if any(not PASSES[name][0] for name in needs.passes):
        with model.frozen():  # all of them before the first pass with gradient
            run(adapter_on=False)
    run(adapter_on=True)
    prior_batch = _run_prior(model, *prior) if prior and needs.prior else None

    masks: dict[str, Tensor] = {}
    terms: dict[str, Tensor] = {}
    step = Step(
        batch.latents, batch.noise, batch.noisy_latents, batch.timesteps, batch.target, model.family.noise,
        captions, sample_ids, number, progress, passes, prior_batch, masks,
    )  # fmt: skip
    total = torch.zeros((), device=batch.latents.device)
    for plugin in acting:
        seen = step.seen_by(plugin)
        if isinstance(plugin, Mask):
            shape = (len(captions), 1, *batch.latents.shape[2:])
            masks[plugin.id] = _checked(plugin, plugin(seen).detach(), shape)
        elif isinstance(plugin, Loss):
            value = plugin(seen)
            terms[plugin.id] = _checked(plugin, value, None)
            total = total + plugin.weight * value.float().mean()
    detached = {name: term.detach().float() for name, term in terms.items()}
    prior_ids = prior[1].sample_ids if prior else ()
    return Outcome(total, detached, batch.timesteps, sample_ids, prior_ids, masks)


def _run_prior(model: Model, batch: Noised, pictures: Batch) -> PriorBatch:
    prediction = model.predict(batch.noisy_latents, batch.timesteps, _texts("base", pictures.captions))
    return PriorBatch(prediction, batch.target, batch.timesteps)


def _texts(kind: str, captions: Sequence[Caption]) -> list[str]:
    """What the text encoder reads: c_base, c_full or nothing."""
    return ["" if kind == "blank" else str(getattr(caption, kind)) for caption in captions]


def _checked(plugin: Plugin, value: Tensor, shape: Sequence[int] | None) -> Tensor:
    """`shape` None: one value for each sample, of the batch or of the prior's."""
    if tuple(value.shape) != tuple(shape or value.shape[:1]) or not value.ndim:
        expected = f"a mask of shape {tuple(shape)}" if shape else "one value for each sample, (B,)"
        raise UserError(
            f"the plugin {plugin.name!r} returned shape {tuple(value.shape)}, expected {expected}"
        )
    return value
