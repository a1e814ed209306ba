"""Fills `report/` of a run folder while the run goes on, see `records`. A run never fails for want of it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spf_kit import __version__
from spf_kit.discovery import files_of
from spf_kit.files import content_hash
from spf_kit.measure.memory import optimizer_bytes
from spf_kit.training import records
from spf_kit.training.records import DataRecord, Entry, PreviewRecord, RunRecord, Setting

if TYPE_CHECKING:
    from spf_kit.config import Resolved
    from spf_kit.training.session import Session

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")
MOST_PICTURES = 120  # with a thumbnail
PATIENCE = 10.0  # seconds before the first step that thumbnails may take: large PNGs are slow to read
WHAT = "the report's records could not be written"


def begin(s: Session, resolved: Resolved, start: int) -> None:
    """Keep what was decided and what the data are, and say so: from here on the folder is this run's.

    `start`: the step that the run goes on from; previews after it belong to a run that was cut off.
    """
    place = s.folder.path / records.FOLDER
    _attempt(s, lambda: _cut_back(place / records.PREVIEWS, start))
    _attempt(s, lambda: records.save(_run(s, resolved, place / records.RUN), place / records.RUN))
    _attempt(s, lambda: records.save(_data(s), place / records.DATA))
    s.report(0, 0, {"phase": "keeping records", "kept": True})


def preview(s: Session, make: Callable[[], PreviewRecord], progress: Callable[[int, int, str], None]) -> None:
    """Keep a preview; with the first one also what the base draws there.

    `progress` may stop it by raising what is no `Exception`.
    """

    def keep() -> None:
        record, base = make(), records.preview_file(s.folder.path, 0)
        records.save(record, records.preview_file(s.folder.path, record.step))
        if not _of_same(base, record):
            records.save(s.preview.of_base(progress), base)

    _attempt(s, keep)
    s.report(0, 0, {"phase": "keeping records", "kept": True})


def _cut_back(previews: Path, start: int) -> None:
    for file in previews.glob("step-*.json"):
        number = file.stem.removeprefix("step-")
        if number.isdecimal() and int(number) > start:
            file.unlink()


def _attempt(s: Session, act: Callable[[], None]) -> None:
    records.attempt(WHAT, act, s.preview.warn)


def _of_same(file: Path, record: PreviewRecord) -> bool:
    """Whether the base's pictures there are of the same prompts, seeds and settings."""
    try:
        found = records.load(PreviewRecord, file)
    except (OSError, ValueError):
        return False
    return _asked(found) == _asked(record)


def _asked(record: PreviewRecord) -> tuple[Any, ...]:
    cases = tuple((case.prompt, case.seed) for case in record.cases)
    return record.target, record.steps, record.cfg, cases


def _run(s: Session, resolved: Resolved, file: Path) -> RunRecord:
    """`file`: of the run that is resumed, if it is there. It knows the preset and where values came from; the
    run's own config.toml, by which runs are resumed, does not."""
    before = None
    with contextlib.suppress(OSError, ValueError):
        before = records.load(RunRecord, file)
    known = {setting.key: setting for setting in before.settings} if before else {}
    settings = [Setting(key=row.key, value=row.value, origin=row.origin) for row in resolved.describe()]
    same = {new.key for new in settings if new.key in known and known[new.key].value == new.value}
    hashes = {**s.frozen, "the configuration": content_hash({"config": resolved.to_toml()})}
    pictures = {entry.picture.sample_id: entry.picture.content_hash for entry in s.dataset.entries}
    return RunRecord(
        preset=before.preset if before else resolved.preset_path.name,
        family=s.family.name,
        steps=s.total,
        started=s.folder.config.stat().st_mtime,
        samples=len(s.dataset),
        settings=[known[new.key] if new.key in same else new for new in settings],
        versions=_versions(),
        machine=_machine(s),
        hashes=hashes | {f"the {len(pictures)} pictures": content_hash(pictures)},
        memory=_memory(s),
        plugins=[str(file) for file in files_of(resolved.plugins)],
    )


def _versions() -> dict[str, str]:
    found = {"spf-kit": __version__, "Python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _machine(s: Session) -> dict[str, str]:
    import torch

    device = s.family.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "system": f"{platform.system()} {platform.release()}",
        "device": f"{device.type} ({name})",
        "processes": str(s.accelerator.num_processes),
        "threads": f"{s.threads} of {os.cpu_count()}",
    }


def _memory(s: Session) -> dict[str, int]:
    """Bytes of what stays from step to step, by count of the tensors; of an optimizer whose state is not
    known, nothing. `spf-kit estimate` counts a step's activations too."""
    trained = dict(s.handle.named_parameters())
    own = {id(parameter) for parameter in trained.values()}
    found = {
        f"weights of {name}": sum(
            tensor.nbytes for tensor in (*module.parameters(), *module.buffers()) if id(tensor) not in own
        )
        for name, module in s.family.components().items()
    }
    adapter = sum(parameter.nbytes for parameter in trained.values())
    shapes = [tuple(parameter.shape) for parameter in trained.values()]
    state = optimizer_bytes(s.config.train.optimizer, shapes)
    return found | {"adapter": adapter, "gradients": adapter} | ({"optimizer": state} if state else {})


def _data(s: Session) -> DataRecord:
    shown = {id(entry) for entry in records.spread(s.dataset.entries, MOST_PICTURES)}
    until = time.monotonic() + PATIENCE
    entries = [
        Entry(
            file=entry.picture.sample_id,
            text=entry.caption.text,
            base=entry.caption.base,
            width=entry.picture.width,
            height=entry.picture.height,
            bucket=(entry.bucket.width, entry.bucket.height),
            repeats=entry.picture.repeats,
            sha256=entry.picture.content_hash,
            thumbnail=(
                records.thumbnail(entry.picture.path)
                if id(entry) in shown and time.monotonic() < until
                else None
            ),
        )
        for entry in s.dataset.entries
    ]
    return DataRecord(target=s.dataset.target, entries=entries, warnings=dict(s.dataset.report.warnings))
