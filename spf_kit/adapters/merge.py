"""LoRAs into a checkpoint: a single file in its own layout, or a diffusers folder, tensor by tensor.

W' = W + sum over LoRAs of weight * (W_lora - W): linear in the weights, and independent of the LoRAs' order.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spf_kit.adapters.merge_plan import Source, Target, Weighted, open_sources, open_target, plan
from spf_kit.adapters.streaming import Change, Progress, rewrite, room_for
from spf_kit.adapters.weights import parse
from spf_kit.errors import UserError
from spf_kit.files import FolderSort, atomic, refuse_existing, refuse_other_folder, scratch_folder
from spf_kit.headers import LONG_NAMES, read_header, weight_type

if TYPE_CHECKING:
    import torch

MODEL_FOLDER = FolderSort("diffusers folder", ("model_index.json",))
PICKLES = {".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5"}


def run(
    loras: Sequence[str],
    *,
    into: str | None,
    output: Path,
    dtype: str | None = None,
    rank: int | None = None,
    check: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The command: `loras` are the texts `FILE[:WEIGHT]`. With `into`, into that checkpoint ("embedded" too);
    without, several LoRAs into one. The result is JSON-able; its `sentence` is for people."""
    weighted: list[Weighted] = [parse(text) for text in loras]
    if into is None:
        from spf_kit.adapters.merge_loras import merge_loras

        if check:
            raise UserError("--check compares with a base model: give one with --into")
        return merge_loras(weighted, output, rank, dtype=dtype, overwrite=overwrite, progress=progress)
    if rank is not None:
        raise UserError("--rank belongs to a merge without --into: a checkpoint has no rank")
    if check and output.exists() and Path(into).exists() and output.samefile(into):
        raise UserError("--check compares with the checkpoint as it was: choose another --output")
    told = merge(weighted, into, output, dtype, overwrite=overwrite, progress=progress)
    if check:
        from spf_kit.adapters.check import check as compare

        told["check"] = compare(weighted, into, output)
        told["sentence"] += f"; {told['check']['sentence']}"
    return told


def merge(
    loras: Sequence[Weighted],
    into: str | Path,
    output: str | Path,
    dtype: str | torch.dtype | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Merge LoRAs into the checkpoint `into`, a .safetensors file or a diffusers folder, and write `output`.

    Args:
        loras: (path, weight); a weight is a number or `Weights` by component, and may be negative.
        dtype: of all floating tensors; None keeps each tensor's own.

    Raises:
        UserError: something is missing, damaged or of another family, or `output` exists without `overwrite`.
    """
    output, kept = Path(output), weight_type(str(dtype)) if dtype else None
    refuse_existing(output, overwrite)
    sources = open_sources(loras)
    target = open_target(into)
    _check_output(output, sources, target)
    changes = plan(sources, target)
    if output.suffix == ".safetensors" and target.path.is_dir():
        return _merge_flattened(loras, into, target, output, dtype, overwrite, progress)
    _check_room(output, sum(room_for(header, kept) for header in target.headers.values()))
    total = sum(len(header.tensors) for path, header in target.headers.items() if changes[path] or kept)
    write = _merge_folder if target.path.is_dir() else _merge_file
    write(target, changes, sources, output, kept, _counter(progress, total))
    changed = sum(len(own) for own in changes.values())
    tensors = sum(len(header.tensors) for header in target.headers.values())
    return {
        "output": str(output),
        "into": str(into),
        "family": target.family,
        "loras": [{"file": str(s.lora.path), "weight": str(s.weights)} for s in sources],
        "weights_changed": changed,
        "tensors": tensors,
        "dtype": LONG_NAMES[kept] if kept else "as before",
        "sentence": f"{output}: {changed} of {tensors} tensors changed by {_list(sources)}",
    }


def _check_output(output: Path, sources: Sequence[Source], target: Target) -> None:
    """Raises UserError where the result would take the place of a LoRA, or of a folder of other things."""
    for source in sources:
        if output.exists() and output.samefile(source.lora.path):
            raise UserError(f"the output {str(output)!r} is one of the LoRAs: choose another --output")
    if target.path.is_dir() and output.suffix != ".safetensors":
        refuse_other_folder(output, MODEL_FOLDER)


def _check_room(output: Path, needed: int) -> None:
    """A full disk is better told before gigabytes are written."""
    place = next(folder for folder in output.absolute().parents if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"cannot write {str(output)!r}: the result needs {needed / 1e6:,.0f} MB, the disk has "
            f"{free / 1e6:,.0f} MB left: free some space or choose another place"
        )


# --- writing ----------------------------------------------------------------------------------------------


def _merge_flattened(
    loras: Sequence[Weighted],
    into: str | Path,
    target: Target,
    output: Path,
    dtype: str | torch.dtype | None,
    overwrite: bool,
    progress: Progress | None,
) -> dict[str, Any]:
    """A folder into one file: the folder as a file in the LDM layout first, and the merge into that."""
    from spf_kit.families.single_file import write_single_file

    with scratch_folder(output) as scratch:
        flat = scratch / output.name
        try:
            write_single_file(target.path, flat)
        except UserError as error:  # the user knows the output, not the file on the way to it
            raise UserError(str(error).replace(str(flat), str(output))) from error
        told = merge(loras, flat, output, dtype, overwrite=overwrite, progress=progress)
    return {**told, "into": str(into), "family": target.family}


def _merge_file(
    target: Target,
    changes: Mapping[Path, Mapping[str, Sequence[Change]]],
    sources: Sequence[Source],
    output: Path,
    dtype: str | None,
    progress: Callable[[str], None] | None,
) -> None:
    if output.suffix != ".safetensors":
        raise UserError(f"the output {str(output)!r} must end in .safetensors, as {target.path.name!r} does")
    header = target.headers[target.path]
    with atomic(output) as temporary:
        metadata = merged_metadata(header.metadata, sources)
        rewrite(header, changes[target.path], temporary, metadata=metadata, dtype=dtype, progress=progress)


def _merge_folder(
    target: Target,
    changes: Mapping[Path, Mapping[str, Sequence[Change]]],
    sources: Sequence[Source],
    output: Path,
    dtype: str | None,
    progress: Callable[[str], None] | None,
) -> None:
    """Copy the folder; weight files that change are written anew, and their stale pickles stay behind."""
    if output.resolve().is_relative_to(target.path.resolve()):
        raise UserError(
            f"the output {str(output)!r} lies within the folder that is merged: choose another place"
        )
    rewritten = {path for path in target.headers if changes[path] or dtype}
    stale = {path.parent for path in rewritten}

    def skip(folder: str, names: list[str]) -> set[str]:
        here = Path(folder)
        pickles = {n for n in names if here in stale and Path(n).suffix in PICKLES}
        return pickles | {name for name in names if here / name in rewritten}

    with atomic(output, folder=True) as temporary:
        shutil.copytree(target.path, temporary, ignore=skip, dirs_exist_ok=True)
        for path, header in target.headers.items():
            if path in rewritten:
                place = temporary / path.relative_to(target.path)
                metadata = merged_metadata(header.metadata, sources) if changes[path] else header.metadata
                rewrite(header, changes[path], place, metadata=metadata, dtype=dtype, progress=progress)
        if dtype:
            for folder in stale:
                _state_dtype(temporary / folder.relative_to(target.path), dtype)


def _state_dtype(folder: Path, dtype: str) -> None:
    """The configs name the weights' type, by which transformers loads them; shard indices count the bytes."""
    name = LONG_NAMES[dtype]
    for file in folder.glob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        before = dict(content)
        if file.name == "config.json":
            content |= {key: name for key in ("dtype", "torch_dtype") if key in content}
        elif "weight_map" in content:
            files = {folder / part for part in content["weight_map"].values()}
            infos = [info for part in files for info in read_header(part).tensors.values()]
            content["metadata"] = {"total_size": sum(info.nbytes for info in infos)}
        if content != before:
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def merged_metadata(metadata: Mapping[str, str], sources: Sequence[Source]) -> dict[str, str]:
    """The checkpoint's own, without the hash that no longer holds, and what was merged."""
    kept = {key: value for key, value in metadata.items() if key != "modelspec.hash_sha256"}
    before = kept.get("modelspec.merged_from")
    kept["modelspec.merged_from"] = ", ".join(filter(None, [before, _list(sources)]))
    entries = [
        {
            "file": source.lora.path.name,
            "weight": str(source.weights),
            "sshs_model_hash": source.lora.metadata.get("sshs_model_hash", ""),
            "trigger": source.lora.metadata.get("modelspec.trigger_phrase", ""),
        }
        for source in sources
    ]
    try:
        earlier = json.loads(kept.get("spf_kit.merged", "[]"))
    except ValueError:
        earlier = []
    kept["spf_kit.merged"] = json.dumps([*earlier, *entries] if isinstance(earlier, list) else entries)
    return kept


def _list(sources: Sequence[Source]) -> str:
    return ", ".join(f"{source.lora.path.name} ({source.weights})" for source in sources)


def _counter(progress: Progress | None, total: int) -> Callable[[str], None] | None:
    if progress is None:
        return None
    done = 0

    def count(name: str) -> None:
        nonlocal done
        done += 1
        progress(done, total, name)

    return count
