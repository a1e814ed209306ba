"""What a LoRA's file says about the data it was trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spf_kit.data.dataset import Dataset, Entry


def facts(data: Dataset) -> dict[str, Any]:
    """Counts, buckets, tags, hashes and warnings, as JSON. Reads no file: it may be another by now."""
    entries = data.entries
    return {
        "pictures": len(entries),
        "samples": len(data),
        "target": data.target,
        "captions_with_target": sum(entry.caption.names_target for entry in entries),
        "resolution": data.cfg.resolution,
        "folders": _folders(entries),
        "buckets": _buckets(entries),
        "tag_frequencies": _tag_frequencies(entries, data.target),
        "content_hashes": {entry.picture.sample_id: entry.picture.content_hash for entry in entries},
        "mask_hashes": dict(data.mask_hashes),
        "warnings": {kind: len(items) for kind, items in data.report.warnings.items()},
    }


def _folders(entries: Iterable[Entry]) -> dict[str, dict[str, int]]:
    folders: dict[str, dict[str, int]] = {}
    for entry in entries:
        counts = folders.setdefault(entry.picture.folder, {"pictures": 0, "repeats": entry.picture.repeats})
        counts["pictures"] += 1
    return folders


def _buckets(entries: Sequence[Entry]) -> list[dict[str, int]]:
    pictures = Counter(entry.bucket for entry in entries)
    samples: Counter[Any] = Counter()
    for entry in entries:
        samples[entry.bucket] += entry.picture.repeats
    return [
        {"width": b.width, "height": b.height, "pictures": pictures[b], "samples": samples[b]}
        for b in sorted(pictures)
    ]


def _tag_frequencies(entries: Iterable[Entry], target: str) -> dict[str, dict[str, int]]:
    """For each folder, how many captions hold a tag. The target counts for every picture."""
    counts: dict[str, Counter[str]] = {}
    for entry in entries:
        counts.setdefault(entry.picture.folder, Counter()).update({*entry.caption.phrases, target})
    return {
        folder: dict(sorted(tags.items(), key=lambda item: (-item[1], item[0])))
        for folder, tags in counts.items()
    }
