"""What peft says of an adapter beside its tensors: `adapter_config.json`, or the copy that diffusers keeps in
a file's metadata. It is another's text: all that is read of it is checked. Imports no torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spf_kit.errors import UserError
from spf_kit.headers import Header

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
DIFFUSERS_CONFIG_KEY = "lora_adapter_metadata"  # where diffusers keeps peft's config in a file's metadata
MAX_CONFIG = 16 * 2**20  # bytes; real ones, with a name for each layer of SDXL, have a tenth of a megabyte
KINDS: Mapping[str, str] = {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr"}

_ALPHA: Mapping[str, str] = {"lora": "lora_alpha", "loha": "alpha", "lokr": "alpha"}
# LoRA initialisations that change the base's weights too: the tensors alone are not what was trained
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class PeftConfig:
    """One component's configuration, checked."""

    path: Path
    kind: str  # of `parts.PARTS`
    values: Mapping[str, Any]
    alphas: Mapping[str, tuple[int, Any]] = field(default_factory=dict)  # by name: place in the file, value
    ranks: Mapping[str, tuple[int, Any]] = field(default_factory=dict)

    @classmethod
    def check(cls, path: Path, config: Mapping[str, Any], *, complete: bool = True) -> PeftConfig:
        """Raises UserError for what is missing or wrong; diffusers' copies, not `complete`, may lack keys."""
        told = config.get("peft_type", None if complete else "LORA")
        kind = KINDS.get(told) if isinstance(told, str) else None
        if kind is None:
            raise UserError(
                f"{str(path)!r} has peft_type = {told!r}, which spf-kit does not read; of peft's kinds it "
                f"reads {', '.join(KINDS)}"
            )
        if complete and _ALPHA[kind] not in config:
            raise UserError(
                f"{str(path)!r} has no {_ALPHA[kind]}, by which peft scales the update: add the value that "
                "it was trained with"
            )
        for key in ("bias", "modules_to_save", "target_parameters", "trainable_token_indices"):
            if config.get(key) not in (None, "none", [], {}):
                raise UserError(
                    f"{str(path)!r} trained whole parameters beside the adapter ({key} = {config[key]!r}), "
                    "which spf-kit does not read"
                )
        start = config.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
            raise UserError(
                f"{str(path)!r} has init_lora_weights = {start!r}, which changes the base too: save it with "
                "peft's path_initial_model_for_weight_conversion first"
            )
        if config.get("use_rslora") not in (None, False, True):
            raise UserError(f"{str(path)!r} has use_rslora = {config['use_rslora']!r}: write true or false")
        patterns = (_patterns(path, config, key) for key in ("alpha_pattern", "rank_pattern"))
        return cls(path, kind, config, *patterns)

    def alpha(self, module: str, rank: int) -> float:
        """alpha as kohya means it: the update is scaled by alpha / rank.

        Raises UserError if it is no number.
        """
        key = _ALPHA[self.kind]
        value = self._number(key, _matching(self.alphas, module, self.values.get(key, rank)))
        return value * (math.sqrt(rank) if self.values.get("use_rslora") else 1.0)

    def whole_factor(self, module: str) -> float:
        """What peft multiplies a LoKr of two whole matrices with, alpha / r, where LyCORIS has 1.

        Raises UserError if one is no number, or r is not positive.
        """
        rank = self._number("r", _matching(self.ranks, module, self.values.get("r")))
        if rank <= 0:
            raise UserError(f"{str(self.path)!r} has r = {rank:g}, a rank is at least 1")
        return self.alpha(module, 1) / rank

    def _number(self, key: str, value: Any) -> float:
        try:
            number = float(value) if type(value) in (int, float) else math.nan
        except OverflowError:  # Python's whole numbers have no bounds
            number = math.inf
        if not math.isfinite(number):
            told = repr(value)
            told = told if len(told) < 40 else f"{told[:20]}..."
            raise UserError(f"{str(self.path)!r} has {key} = {told}, which is no number")
        return number


# --- finding it -------------------------------------------------------------------------------------------


def of_folder(path: Path, weights: Path) -> PeftConfig:
    """The configuration beside a folder's weights. Raises UserError if it is missing or wrong."""
    if not path.is_file():
        raise UserError(f"{str(weights)!r} needs the {PEFT_CONFIG} beside it, which holds its alpha")
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CONFIG + 1)
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    if len(data) > MAX_CONFIG:
        raise UserError(f"{str(path)!r} is longer than {MAX_CONFIG} bytes: it is no peft configuration")
    return PeftConfig.check(path, _object(path, data))


def of_metadata(header: Header) -> dict[str, PeftConfig]:
    """By component, what diffusers wrote into a file's metadata: `"unet.lora_alpha": 8`. {} without any."""
    if DIFFUSERS_CONFIG_KEY not in header.metadata:
        return {}
    flat = _object(header.path, header.metadata[DIFFUSERS_CONFIG_KEY].encode())
    configs: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        component, dot, key = name.partition(".")
        if dot:
            configs.setdefault(component, {})[key] = value
    return {name: PeftConfig.check(header.path, own, complete=False) for name, own in configs.items()}


def _object(path: Path, data: bytes) -> dict[str, Any]:
    try:
        config = json.loads(data.decode())
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise UserError(
            f"{str(path)!r} holds a peft configuration that is not a JSON object: copy it again from where "
            "the adapter was trained"
        )
    return config


# --- patterns ---------------------------------------------------------------------------------------------


def _patterns(path: Path, config: Mapping[str, Any], key: str) -> dict[str, tuple[int, Any]]:
    """Values by name; one that begins with `^` means the whole name, others also its end.

    peft has regular expressions there. Files hold plain names, at most with `^`, and running a stranger's
    expression could take forever: others are refused.
    """
    given = config.get(key) or {}
    if not isinstance(given, dict):
        raise UserError(f"{str(path)!r} has {key} = {repr(given)[:40]}, which is no table of names")
    found: dict[str, tuple[int, Any]] = {}
    for place, (pattern, value) in enumerate(given.items()):
        plain = pattern.replace("\\.", ".")
        if not re.fullmatch(r"\^?[\w.]+", plain):
            raise UserError(f"{str(path)!r} has the {key} {pattern[:80]!r}, which is more than a name")
        found.setdefault(plain, (place, value))
    return found


def _matching(patterns: Mapping[str, tuple[int, Any]], module: str, default: Any) -> Any:
    """The value of the first pattern that means the module, as peft takes it."""
    if not patterns:
        return default
    words = module.split(".")
    ends = [".".join(words[start:]) for start in range(len(words))]
    # transformers 5 has no level text_model, which all files' names have here
    whole = (f"^{module}", f"^{module.removeprefix('text_model.')}")
    hits = [patterns[name] for name in (*ends, *whole) if name in patterns]
    return min(hits)[1] if hits else default
