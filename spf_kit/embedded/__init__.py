"""The embedded base model, its sample pictures and its prompts, as paths and lists. Imports no torch.

Layout: `base/` (a diffusers StableDiffusionPipeline folder with `clip/` and `judge/` beside), `data/<name>/`
(32 captioned pictures each), `prompts/<split>.txt`, `judge.py` (reads attributes off a picture), `build/`.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def base_path() -> Path:
    """The folder that `StableDiffusionPipeline.from_pretrained` loads."""
    return FOLDER / "base"


def data_names() -> list[str]:
    """The embedded sample data sets."""
    root = FOLDER / "data"
    return sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []


def data_path(name: str) -> Path:
    """The folder of one sample data set, such as "glasses"."""
    if name not in data_names():
        raise ValueError(f"no embedded data {name!r}; there are: {', '.join(data_names())}")
    return FOLDER / "data" / name


def prompt_splits() -> list[str]:
    """The names that `prompts` takes."""
    return sorted(p.stem for p in (FOLDER / "prompts").glob("*.txt"))


def prompts(split: str) -> list[str]:
    """Captions without any preset attribute: "evaluate" to judge with, "tune" to choose settings with.

    The splits are disjoint.
    """
    path = FOLDER / "prompts" / f"{split}.txt"
    if split not in prompt_splits():
        raise ValueError(f"no embedded prompts {split!r}; there are: {', '.join(prompt_splits())}")
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line]
