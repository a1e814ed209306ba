"""Checkpoints of a session: what goes in, and how a run goes on from one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spf_kit.errors import UserError
from spf_kit.files import content_hash
from spf_kit.training import checkpoint
from spf_kit.training.checkpoint import Checkpoint
from spf_kit.training.run_folder import RunFolder

if TYPE_CHECKING:
    from spf_kit.training.session import Session


def save(s: Session, number: int) -> None:
    """Write the state after step `number`. It is the same in all processes; the main one writes."""
    if s.accelerator.is_main_process:
        train = s.config.train
        saved = Checkpoint(
            number,
            s.threads,
            s.split.whole // train.batch_size,
            s.handle.state_dict(),
            s.updater.state_dict(),
            {plugin.id: plugin.state_dict() for plugin in s.plugins},
            s.walks.state_dict(),
            s.selection.state_dict() if s.selection else {},
            s.frozen,
        )
        checkpoint.save(s.folder.checkpoints, saved, keep=train.keep_checkpoints)
    s.accelerator.wait_for_everyone()


def newest(folder: RunFolder) -> Checkpoint | None:
    """The newest checkpoint; None where the run was killed before the first.

    Raises UserError if it cannot be read.
    """
    found = checkpoint.steps(folder.checkpoints)
    return checkpoint.load(checkpoint.path_of(folder.checkpoints, found[-1])) if found else None


def agree(s: Session, saved: Checkpoint | None) -> None:
    """Raises UserError where processes, as on several machines, see other files."""
    if s.accelerator.num_processes == 1:
        return
    from accelerate.utils import gather_object

    pictures = {entry.picture.sample_id: entry.picture.content_hash for entry in s.dataset.entries}
    mine = {
        **s.frozen,
        "the configuration": s.config.model_dump_json(),
        "the pictures": content_hash(pictures),
        "the newest checkpoint": str(saved and saved.step),
    }
    for theirs in gather_object([mine]):
        differing = [name for name, value in theirs.items() if mine.get(name) != value]
        if differing:
            raise UserError(
                f"the processes of this run do not see the same: {' and '.join(differing)}; give all "
                "machines the same files, and the run folder on a disk that they share"
            )


def restore(s: Session, saved: Checkpoint) -> int:
    """Put a checkpoint's state in place. Returns its step.

    Raises UserError if the run has passed its end, or if what lies under the adapter is no longer the same.
    """
    if saved.step > s.total:
        raise UserError(
            f"the run is to have {s.total} steps but has done {saved.step} already: raise train.steps"
        )
    changed = [name for name, value in s.frozen.items() if saved.frozen.get(name, value) != value]
    if changed:
        raise UserError(
            f"{' and '.join(changed)} changed since the run in {str(s.folder.path)!r} began, and what it has "
            "learnt belongs to the old: put that back, or train anew into another folder"
        )
    s.handle.load_state_dict(saved.adapter)
    s.updater.load_state_dict(saved.updater)
    if s.selection:
        s.selection.load_state_dict(saved.selection)
    for plugin in s.plugins:
        plugin.load_state_dict(saved.plugins.get(plugin.id, {}))
    s.walks.load_state_dict(saved.walks, s.family.device)
    return saved.step
