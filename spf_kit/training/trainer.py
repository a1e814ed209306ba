"""The training loop, inline: steps, metrics, previews, checkpoints, and the ways in which a run can end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spf_kit.adapters import files
from spf_kit.adapters.metadata import Run, training_metadata
from spf_kit.data.random import key_seed
from spf_kit.discovery import files_of
from spf_kit.errors import Interrupted, UserError
from spf_kit.files import content_hash
from spf_kit.measure.memory import peak_memory
from spf_kit.training import checkpoint, keeping, modes, resuming, session, tools
from spf_kit.training.divergence import Numbers, check_finite
from spf_kit.training.dry_run import Checked, check
from spf_kit.training.logs import Metrics, Pace, Report
from spf_kit.training.machine import Stop, restored
from spf_kit.training.run_folder import RunFolder
from spf_kit.training.selection import Selected
from spf_kit.training.session import Session
from spf_kit.training.step import Outcome

if TYPE_CHECKING:
    from spf_kit.adapters.earlier import Earlier
    from spf_kit.adapters.inject import AdapterHandle
    from spf_kit.config import Resolved
    from spf_kit.families.base import Family


__all__ = ["Checked", "TrainResult", "check", "train"]


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves behind, on disk and in memory."""

    lora: Path
    run: Path
    steps: int
    seconds: float  # of this process, preparation included
    family: Family  # with the trained adapter on, in evaluation mode
    handle: AdapterHandle
    captions: list[str]  # the different c_base of the data
    earlier: Earlier  # the LoRAs under it, on too
    main: bool = True  # of several processes the one that measures and draws what was trained
    selected: Selected | None = None  # where drift was measured


def train(
    resolved: Resolved, run_dir: Path, *, resume: bool = False, report: Report | None = None
) -> TrainResult:
    """Train a LoRA as configured, into a run folder.

    Args:
        run_dir: must not exist, unless `resume` goes on from the newest checkpoint in it.
        report: called as (done, total, values), see `logs.Report`.

    Raises:
        UserError: the configuration, the data, the folder or the disk.
        TrainingDiverged: a loss became NaN or infinite.
        Interrupted: Ctrl-C or SIGTERM; the state is saved and the message says how to go on.
    """
    started = time.time()
    folder = RunFolder(Path(run_dir))
    session.check(resolved)
    with restored(), torch.enable_grad():
        processes = session.accelerator(resolved.config.train)
        if processes.is_main_process:
            folder.check(resolved, resume=resume)
            checkpoint.clean(folder.checkpoints)
        processes.wait_for_everyone()
        saved = resuming.newest(folder) if resume else None
        how_to_resume = folder.how_to_resume(files_of(resolved.plugins))
        with folder.preparing(how_to_resume):
            s = session.open_session(
                resolved, folder, processes, report or (lambda *_: None),
                threads=saved.threads if saved else None, began=saved.processes if saved else None,
            )  # fmt: skip
            resuming.agree(s, saved)
            start = resuming.restore(s, saved) if saved else 0
            if processes.is_main_process:
                folder.claim(resolved)  # what may change, only once nothing refuses it any more
        _loop(s, resolved, start, how_to_resume)
        lora = _finish(s, resolved, started)
    captions = session.base_prompts(s.dataset)
    return TrainResult(
        lora, folder.path, s.total, time.time() - started, s.family, s.handle, captions, s.earlier,
        processes.is_main_process, s.selection.chosen() if s.selection else None,
    )  # fmt: skip


def _loop(s: Session, resolved: Resolved, start: int, how_to_resume: str) -> None:
    every, pace, stop = s.config.train.checkpoint_every, Pace(), Stop()
    with stop.listening(), _at_once(s, how_to_resume), _metrics(s, start) as metrics:
        if metrics:
            keeping.begin(s, resolved, start)
        for number in range(start + 1, s.total + 1):
            # dropout of this step does not depend on what was drawn before it
            torch.manual_seed(key_seed(s.config.train.seed, "torch", number, s.accelerator.process_index))
            outcomes = []
            for micro in range(s.config.train.gradient_accumulation):
                for outcome in s.passes(number, micro):
                    if outcome.acts:
                        _check_gradient(outcome)
                        s.updater.backward(outcome.loss)
                    outcomes.append(outcome)
            numbers = _read(s, outcomes, s.updater.gradients(), stop.requested)
            check_finite(s, number, numbers, outcomes)  # before the update: the weights stay good
            rates = s.updater.apply(number)

            line = _line(number, numbers, rates, pace.tick(), s.updater.skipped)
            if s.selection and s.selection.due(number):
                line |= s.selection.measure(number)
            if metrics:
                metrics.write(line)
            s.report(number, s.total, {"phase": "training", **line, **_progress(s, pace, number)})
            if s.preview.due(number) and not numbers.stop:
                _preview(s, number, metrics, stop)
            if number == s.total or numbers.stop or (every and number % every == 0):
                resuming.save(s, number)
            if numbers.stop:
                raise Interrupted(f"stopped after step {number} of {s.total}; go on with: {how_to_resume}")
            pace.restart()


def _check_gradient(outcome: Outcome) -> None:
    """Raises UserError if nothing can be learnt from a step's losses."""
    if not outcome.loss.requires_grad:
        names = ", ".join(name for name, term in outcome.terms.items() if len(term))
        raise UserError(
            f"none of the losses ({names}) has a gradient: a plugin computes without one, or "
            "detaches what it returns; spf-kit losses check FILE tells which"
        )


def _read(s: Session, outcomes: Sequence[Outcome], norm: Tensor, stop: bool) -> Numbers:
    """All of a step's numbers in one transfer from the device: it has to wait for the step only once."""
    names = list(outcomes[0].terms)
    values = [torch.cat([outcome.terms[name] for outcome in outcomes]) for name in names]
    loss = torch.stack([outcome.loss.detach() for outcome in outcomes]).sum()
    loss = loss / s.config.train.gradient_accumulation
    counts = loss.new_tensor([float(len(term)) for term in values])  # a term may have met no sample
    sums = torch.stack([*(term.sum() for term in values), loss, loss.new_tensor(float(stop))])
    vector = torch.cat([counts, sums])
    if s.accelerator.num_processes > 1:
        vector = s.accelerator.reduce(vector, "sum")
    numbers = torch.cat([vector, norm.detach().view(1)]).tolist()
    terms = {
        name: total / count for name, count, total in zip(names, numbers, numbers[len(names) :]) if count
    }
    mean, stops, length = numbers[-3:]
    return Numbers(mean, terms, length, stops > 0)


def _line(
    number: int, numbers: Numbers, rates: Mapping[str, float], seconds: float, skipped: int
) -> dict[str, Any]:
    """A line of metrics.jsonl. `terms` are before their weights, `grad_norm` before clipping."""
    line = {
        "step": number,
        "loss": numbers.loss,
        "terms": dict(numbers.terms),
        "learning_rate": rates.get("unet", next(iter(rates.values()))),
        "grad_norm": numbers.grad_norm,
        "seconds": seconds,
    }
    if "text_encoder" in rates:
        line["text_encoder_learning_rate"] = rates["text_encoder"]
    return {**line, "skipped": True} if skipped else line


def _progress(s: Session, pace: Pace, number: int) -> dict[str, Any]:
    return {**pace.values(s.total - number), "peak_memory": peak_memory(s.family.device)}


@contextlib.contextmanager
def _metrics(s: Session, start: int) -> Iterator[Metrics | None]:
    """Only the main process writes."""
    if not s.accelerator.is_main_process:
        yield None
        return
    events = s.folder.tensorboard if s.config.train.log_tensorboard else None
    with contextlib.closing(Metrics(s.folder.metrics, start, events)) as metrics:
        yield metrics


@contextlib.contextmanager
def _at_once(s: Session, how_to_resume: str) -> Iterator[None]:
    """A second Ctrl-C does not wait for the step to end."""
    try:
        yield
    except KeyboardInterrupt:
        saved = checkpoint.steps(s.folder.checkpoints)
        place = f"the checkpoint of step {saved[-1]}" if saved else "the start"
        raise Interrupted(f"stopped at once; go on from {place} with: {how_to_resume}") from None


class _PreviewStopped(BaseException):
    """Ctrl-C while a preview is drawn: leave the preview, keep the run. As a KeyboardInterrupt, nothing that
    goes on after errors may hold it up."""


def _preview(s: Session, number: int, metrics: Metrics | None, stop: Stop) -> None:
    """The main process draws with the averaged weights; the others go on and meet it at the next step."""
    if not s.accelerator.is_main_process:
        return
    tell = s.phase("drawing a preview")

    def progress(done: int, total: int, text: str) -> None:
        if stop.requested:
            raise _PreviewStopped
        tell(done, total, text)

    with s.updater.averaged(), contextlib.suppress(_PreviewStopped):
        drawn = s.preview.draw(s.folder.samples, number, progress)
        if metrics:
            metrics.picture("samples", drawn.pixels, number)
        keeping.preview(s, drawn.record, progress)


def _finish(s: Session, resolved: Resolved, started: float) -> Path:
    """Write the LoRA, and leave the family as it was loaded, with the trained adapter on."""
    s.updater.use_average()
    if s.selection:
        s.selection.put_in_place()
    modes.evaluation_mode(s.config, s.family)
    output = s.config.output
    path = s.folder.lora(s.config.attribute.name, output.format)
    if s.accelerator.is_main_process:
        train = s.config.train
        begun = s.folder.config.stat().st_mtime
        facts = Run(
            steps=s.total,
            batches_per_epoch=s.dataset.batches_per_epoch(s.split.whole),
            started_at=min(begun, started),
            finished_at=time.time(),
            session_id=str(int(content_hash({"config": resolved.to_toml(), "begun": repr(begun)})[:8], 16)),
            prediction_type=s.family.noise.prediction_type,
            processes=s.split.whole // train.batch_size,
            regularisation_pictures=len(s.prior) if s.prior else 0,
        )
        lora = s.handle.to_lora_file(
            training_metadata(resolved, s.dataset.info(), facts)
            | s.earlier.metadata
            | tools.metadata(s.model.tools)
            | (s.selection.metadata if s.selection else {})
        )
        files.write(lora, path, output.format, output.dtype)
    s.accelerator.wait_for_everyone()
    return path
