"""A batch in parts: the passes of one process, and what several processes tell each other after it.

Every random number is keyed by its sample, so the passes of all processes see what one pass over the whole
batch would. What is left is what a run remembers from batch to batch: plugins' `Remembered`, and walks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from spf_kit.data.random import key_seed
from spf_kit.training import stages
from spf_kit.training.step import Draws, Noised, Outcome, plain_texts, run_step
from spf_kit.training.walks import Together

if TYPE_CHECKING:
    from accelerate import Accelerator

    from spf_kit.data.dataset import Batch
    from spf_kit.losses import Needs, Plugin
    from spf_kit.training.session import Session


def passes(s: Session, number: int, micro: int) -> Iterator[Outcome]:
    """This process's part of micro-batch `micro` of step `number`, pass by pass.

    To be read to the end, where the processes meet.
    """
    progress = (number - 1) / s.total
    acting = stages.active(s.plugins, progress)
    needs = stages.union(acting)
    batches = s.batches(s.dataset, s.config.train.seed, number, micro)
    priors: list[Batch] = []
    if s.prior and needs.prior:
        priors = s.batches(s.prior, key_seed(s.config.train.seed, "prior"), number, micro)
    whole = s.accelerator.num_processes == 1 and max(len(batches), len(priors)) == 1
    together = None
    if needs.plain_walk and not whole:
        together = _walk_together(s, needs, number, micro, batches[0])
    for batch, prior in _paired(batches, priors):
        counts = batch.share > 0
        walks = s.walks if whole else together.part(batch.places) if together and counts else None
        yield run_step(
            s.model, s.noised(batch, "noise"), batch.captions, batch.sample_ids,
            s.plugins if counts else [plugin.model_copy(deep=True) for plugin in s.plugins],
            number=number, progress=progress, walks=walks, share=batch.share,
            prior=(s.noised(prior, "prior noise"), prior) if prior else None,
        )  # fmt: skip
    if not whole:
        _meet(s.accelerator, acting, together)


def _paired(batches: Sequence[Batch], priors: Sequence[Batch]) -> Iterator[tuple[Batch, Batch | None]]:
    """Each batch with its prior pictures. Where there are more of one kind, the other's first is run again,
    counts nothing and is not remembered."""
    for batch, prior in itertools.zip_longest(batches, priors):
        if prior is None and priors:
            prior = replace(priors[0], share=0.0)
        yield batch or replace(batches[0], share=0.0), prior


def _walk_together(s: Session, needs: Needs, number: int, micro: int, part: Batch) -> Together:
    """The walks of the whole batch, of which `part` is one: who takes which depends on all of its samples."""
    train = s.config.train
    indices, captions = s.dataset.whole(train.seed, number - 1, s.split, micro, train.gradient_accumulation)
    shape = (len(indices), *part.mean.shape[1:])
    draws = Draws.keyed(shape, train.seed, "noise", indices)
    noise = (draws.noise + train.noise_offset * draws.offset).to(s.family.device)
    timesteps = s.family.noise.sample_timesteps(draws.uniform.to(s.family.device))
    # no latents: of samples that are on a walk they are not looked at, and of the others nothing is
    batch = Noised(noise, noise, noise, timesteps, noise, draws.path)
    assert needs.plain_walk is not None
    return Together(s.walks, batch, plain_texts(batch, captions, needs), needs.plain_walk)


def _meet(accelerator: Accelerator, acting: Sequence[Plugin], together: Together | None) -> None:
    """Every process learns what the others' samples changed.

    Of a picture that stands twice in one batch the later sample's is kept.
    """
    remembered = [one for plugin in acting for one in plugin.remembered_of_pictures()]
    if not remembered and together is None:  # the same in all processes
        return
    mine = [one.take_new() for one in remembered], together.predictions if together else {}
    everything = [mine]
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        everything = gather_object([mine])
        for news, _ in everything:
            for one, new in zip(remembered, news, strict=True):
                one.learn(new)
    if together:
        predictions = [predictions for _, predictions in everything]
        with torch.no_grad():
            together.advance({place: row for found in predictions for place, row in found.items()})
