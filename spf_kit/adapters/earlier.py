"""Earlier LoRAs under a new one: frozen, on, each at its weight. They are part of what it is compared with.

Only the newest adapter is ever switched off: base + earlier LoRAs is the reference path.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spf_kit.adapters.index import LoraIndex, index
from spf_kit.adapters.metadata import parse_json
from spf_kit.adapters.weights import Weights, parse
from spf_kit.errors import UserError
from spf_kit.files import content_hash, sha256

if TYPE_CHECKING:
    from spf_kit.adapters.files import LoraFile
    from spf_kit.adapters.inject import AdapterHandle
    from spf_kit.families.base import Family


@dataclass(frozen=True)
class Entry:
    """One earlier LoRA: where it lies, how much of it acts, and what is in it."""

    path: Path
    weights: Weights
    sha256: str

    @property
    def row(self) -> dict[str, Any]:
        """For evaluations: the file as it was given, its weight as a number or by component."""
        uniform = self.weights.uniform
        return {"path": str(self.path), "weight": str(self.weights) if uniform is None else uniform}

    @property
    def noted(self) -> dict[str, Any]:
        """For the new LoRA's metadata: the name without folders, and the hash that finds the file again."""
        return {"file": self.path.name, "sha256": self.sha256, "weight": self.row["weight"]}


@dataclass(frozen=True)
class Earlier:
    """Earlier LoRAs on a base. Whoever attached them removes them."""

    entries: Sequence[Entry] = ()
    handles: Sequence[AdapterHandle] = field(default=(), repr=False)

    @classmethod
    def attach(cls, family: Family, texts: Sequence[str]) -> Earlier:
        """Put `FILE[:WEIGHT]`s on a base whose text encoder is loaded, in this order.

        Raises UserError if one cannot be read or does not fit the base; then none is on.
        """
        from spf_kit.adapters import files

        entries: list[Entry] = []
        handles: list[AdapterHandle] = []
        try:
            for number, text in enumerate(texts):
                path, weights = parse(text)
                handles += attach_weighted(family, files.read(path), weights, f"on_{number}")
                entries.append(Entry(path, weights, tensors_hash(index(path))))
        except BaseException:
            cls((), handles).remove()
            raise
        return cls(entries, handles)

    def remove(self) -> None:
        """Take them off, the last one first."""
        for handle in reversed(self.handles):
            handle.remove()

    @property
    def change_text(self) -> bool:
        """Whether one sits on a text encoder: loaded anew from its file, that encoder would lack it."""
        return any(part.startswith("text_encoder") for handle in self.handles for part in handle.components)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [entry.row for entry in self.entries]

    @property
    def metadata(self) -> dict[str, str]:
        """For the new LoRA's file; nothing where there are none."""
        return {"spf_kit.on": json.dumps([entry.noted for entry in self.entries])} if self.entries else {}


@contextmanager
def attached(family: Family, texts: Sequence[str]) -> Iterator[Earlier]:
    """`Earlier.attach` for the while of a block."""
    earlier = Earlier.attach(family, texts)
    try:
        yield earlier
    finally:
        earlier.remove()


def attach_weighted(family: Family, lora: LoraFile, weights: Weights, name: str) -> list[AdapterHandle]:
    """A LoRA on a base, frozen and on: one adapter, or one for each component where they weigh differently.

    Raises UserError, naming both families, if it does not fit; then nothing of it is on.
    """
    from spf_kit.adapters.files import check_family
    from spf_kit.adapters.inject import AdapterHandle

    check_family(lora, family)
    if (uniform := weights.uniform) is not None:
        return [AdapterHandle.attach(family, lora, name=name, strength=uniform)]
    handles = []
    for component in lora.components:
        own = {key: layer for key, layer in lora.layers.items() if key[0] == component}
        part, strength = replace(lora, layers=own), weights.of(component)
        handles.append(AdapterHandle.attach(family, part, name=f"{name}_{component}", strength=strength))
    return handles


def faults(texts: Sequence[str], name: str) -> list[str]:
    """What is wrong with a list of `FILE[:WEIGHT]`, before anything is read; `name` is the key or option."""
    found: list[str] = []
    seen: set[Path] = set()
    for text in texts:
        if not text:
            found.append(f"{name}: an entry is empty: write FILE or FILE:0.8, or remove it")
            continue
        try:
            path, _ = parse(text)
        except UserError as error:
            found.append(f"{name}: {error}")
            continue
        if not path.exists():
            found.append(f"{name}: {text!r}: there is no file {str(path)!r}: give the LoRA that comes first")
        elif path.resolve() in seen:
            found.append(f"{name}: {text!r}: this LoRA stands there twice: name each once, with one weight")
        seen.add(path.resolve())
    return found


def same_file(texts: Sequence[str], other: str | Path) -> str | None:
    """The entry that means the file `other`, if one does."""
    wanted = Path(other).resolve()
    return next((text for text in texts if parse(text)[0].resolve() == wanted), None)


def check_earlier(texts: Sequence[str], loras: Sequence[Path]) -> None:
    """The `--on` of LoRAs that are measured. Raises UserError for a wrong list, or one with these in it."""
    found = faults(texts, "--on")
    if not found:
        twins = [(lora, same_file(texts, lora)) for lora in loras]
        found = [
            f"--on {text}: {str(lora)!r} is measured too and would act twice: take it out of one of them"
            for lora, text in twins
            if text is not None
        ]
    if found:
        raise UserError("; ".join(found))


def unlike_training(name: str, lora: LoraFile, texts: Sequence[str]) -> str:
    """A word of warning if a LoRA was trained on earlier ones and is measured on others; "" if not."""
    noted = parse_json(lora.metadata, "spf_kit.on")
    trained = [entry for entry in noted if isinstance(entry, dict)] if isinstance(noted, list) else []
    given = [Entry(path, weights, tensors_hash(index(path))) for path, weights in map(parse, texts)]
    if not trained or _identities(trained) == _identities([entry.noted for entry in given]):
        return ""
    wanted = " ".join(f"--on {entry.get('file')}:{entry.get('weight')}" for entry in trained)
    return f"{name} was trained on earlier LoRAs that it is not measured on here: {wanted}"


def _identities(noted: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Content and weight of each, whatever the order: it does not matter to the sum."""
    return sorted((str(entry.get("sha256")), str(entry.get("weight"))) for entry in noted)


def tensors_hash(lora: LoraIndex) -> str:
    """SHA-256 of a LoRA's tensors, whatever its metadata says: of a file, kohya's `sshs_model_hash`."""
    headers = {layer.header.path: layer.header for layer in lora.layers.values()}
    hashes = {
        path.parent.name: sha256(path, start=header.data_start) for path, header in sorted(headers.items())
    }
    return next(iter(hashes.values())) if len(hashes) == 1 else content_hash(dict(hashes))
