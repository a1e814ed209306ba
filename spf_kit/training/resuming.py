"""Checkpoints of a session: what goes in, and how a run goes on from one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spf_kit.errors import UserError
from spf_kit.training import checkpoint
from spf_kit.training.checkpoint import Checkpoint
from spf_kit.training.run_folder import RunFolder

if TYPE_CHECKING:
    from spf_kit.training.session import Session


def save(s: Session, number: int) -> None:
    """Write the state after step `number`; each process adds its plugins' state, the main one writes."""
    states = [({plugin.id: plugin.state_dict() for plugin in s.plugins}, s.walks.state_dict())]
    if s.accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        states = gather_object(states)
    if s.accelerator.is_main_process:
        saved = Checkpoint(
            number,
            s.threads,
            s.accelerator.num_processes,
            s.handle.state_dict(),
            s.updater.state_dict(),
            [plugins for plugins, _ in states],
            [walks for _, walks in states],
            s.selection.state_dict() if s.selection else {},
            s.frozen,
        )
        checkpoint.save(s.folder.checkpoints, saved, keep=s.config.train.keep_checkpoints)
    s.accelerator.wait_for_everyone()


def newest(folder: RunFolder, processes: int) -> Checkpoint | None:
    """The newest checkpoint; None where the run was killed before the first.

    Raises UserError if it cannot be read or is of another number of processes.
    """
    found = checkpoint.steps(folder.checkpoints)
    if not found:
        return None
    saved = checkpoint.load(checkpoint.path_of(folder.checkpoints, found[-1]))
    if saved.processes != processes:
        raise UserError(
            f"the run in {str(folder.path)!r} was started with {saved.processes} processes, not {processes}: "
            "resume it with as many"
        )
    return saved


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
    states = saved.plugins[s.accelerator.process_index]
    for plugin in s.plugins:
        plugin.load_state_dict(states.get(plugin.id, {}))
    if saved.walks:
        s.walks.load_state_dict(saved.walks[s.accelerator.process_index], s.family.device)
    return saved.step
