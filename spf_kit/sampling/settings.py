"""What `spf-kit sample` is asked to draw: prompts, strengths, seeds, sizes, file names. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spf_kit.errors import UserError
from spf_kit.schema import MAX_SAMPLER_STEPS

MAX_SEED = 2**32 - 1  # what A1111 and ComfyUI accept


@dataclass(frozen=True)
class GridSettings:
    """What is drawn: every prompt at every strength from every seed."""

    prompts: Sequence[str]
    strengths: Sequence[float] = (1.0,)
    seed: int = 0
    count: int = 1
    negative: str = ""
    steps: int = 25
    cfg: float = 5.0
    scheduler: str = "ddim"
    width: int | None = None
    height: int | None = None
    clip_skip: int = 1
    batch_size: int = 16

    @property
    def seeds(self) -> list[int]:
        return [self.seed + i for i in range(self.count)]

    @property
    def cells(self) -> list[tuple[int, int]]:
        """(index of the prompt, seed) of each picture at one strength."""
        return [(index, seed) for index in range(len(self.prompts)) for seed in self.seeds]

    def check(self) -> None:
        """Raises UserError for what cannot be drawn, before any model is loaded."""
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise UserError('a prompt is empty or missing: give one with --prompt "..." or --prompts FILE')
        if not self.strengths:
            raise UserError("no strength was given: --strength 1")
        if self.count < 1:
            raise UserError(f"--count must be at least 1, not {self.count}")
        if self.steps < 1:
            raise UserError(f"--steps must be at least 1, not {self.steps}")
        if self.steps > MAX_SAMPLER_STEPS:
            raise UserError(
                f"--steps must be at most {MAX_SAMPLER_STEPS}, not {self.steps}: 20 to 50 are usual"
            )
        if not (math.isfinite(self.cfg) and self.cfg >= 0):
            raise UserError(f"--cfg must be a number of at least 0, not {self.cfg}")
        if not 0 <= self.seed <= MAX_SEED - self.count + 1:
            raise UserError(f"--seed must be between 0 and {MAX_SEED - self.count + 1}, not {self.seed}")


@dataclass(frozen=True)
class SampleLora:
    """A LoRA of the grid: its file, and its weight, by which every strength is multiplied."""

    path: Path
    weight: float = 1.0


def read_prompts(path: Path | str) -> list[str]:
    """A prompts file: one a line, in UTF-8; empty lines and lines that begin with # are left out.

    Raises UserError if the file is missing, is no text, or holds no prompt.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"the prompts file {str(path)!r} does not exist") from None
    except UnicodeDecodeError:
        raise UserError(f"the prompts file {str(path)!r} is not UTF-8 text: save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"the prompts file {str(path)!r} cannot be read: {error.strerror}") from None
    lines = [line.strip() for line in text.splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UserError(f"the prompts file {str(path)!r} holds no prompt: write one a line")
    return prompts


def parse_strengths(text: str) -> list[float]:
    """The list "0,0.5,1" as numbers, in the order given, each once. Raises UserError."""
    strengths: list[float] = []
    for part in text.split(","):
        try:
            strength = float(part)
        except ValueError:
            strength = math.nan
        if not math.isfinite(strength):
            raise UserError(f"--strength {text!r}: {part.strip()!r} is no number; write for example 0,0.5,1")
        if strength not in strengths:
            strengths.append(strength)
    return strengths


def parse_size(text: str) -> tuple[int, int]:
    """The size "512x768" as (width, height). Raises UserError."""
    match = re.fullmatch(r"\s*(\d+)\s*[x×,]\s*(\d+)\s*", text.lower())
    if match is None:
        raise UserError(f"--size {text!r} is not a size: write WIDTHxHEIGHT, for example 512x768")
    return int(match[1]), int(match[2])


def file_name(index: int, prompt: str, strength: str | None, seed: int) -> str:
    """Name of a picture: lower-case ASCII letters, digits, dot and hyphen, fit for every file system.

    The number in front tells prompts apart that begin alike, and keeps names off those that Windows reserves.

    Args:
        strength: one of `strength_names`; None where there is no LoRA.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].strip("-") or "prompt"
    middle = "" if strength is None else f"-strength-{strength}"
    return f"{index + 1:03d}-{slug}{middle}-seed-{seed}.png"


def strength_names(strengths: Sequence[float], weights: Sequence[float]) -> dict[float, str]:
    """For names of files: how strong the LoRAs are at each strength, as "0.75", or "0.75-and-0.4" where they
    differ. Where weights of 0 leave nothing to tell apart, the strengths themselves."""
    names = {}
    for strength in strengths:
        real = [_short(round(weight * strength, 10) + 0.0) for weight in weights]  # + 0.0: no "-0"
        names[strength] = "-and-".join(real if len(set(real)) > 1 else real[:1])
    if len(set(names.values())) < len(names):
        return {strength: _short(strength) for strength in strengths}
    return names


def _short(number: float) -> str:
    return str(float(number)).removesuffix(".0")
