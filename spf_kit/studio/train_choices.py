"""What can be chosen at the head of the page Train, and the texts beside it."""

from __future__ import annotations

from pathlib import Path

from spf_kit.config import shipped_presets
from spf_kit.config.layers import SECTIONS
from spf_kit.embedded import data_names
from spf_kit.studio.state import Studio

PROFILES = ("6gb", "8gb", "12gb", "24gb")
MOST = 200  # entries of a folder that are looked at


def head(studio: Studio) -> dict[str, tuple[str, str, list[str] | list[tuple[str, str]]]]:
    """Label, help and choices, by the name of the option."""
    shipped = shipped_presets()
    presets = [preset.name for preset in shipped if preset.kind == "preset"]
    recipes = [preset.name.removeprefix("recipes/") for preset in shipped if preset.kind == "recipe"]
    own = [str(path) for root in studio.folders.roots for path in sorted(root.glob("*.toml"))[:MOST]]
    own_choice = ("the preset's own", "")
    return {
        "preset": ("Preset", "a shipped one, or your file", [*presets, *own]),
        "recipe": ("Recipe", "losses and stages", [own_choice, *((name, name) for name in recipes)]),
        "base": (
            "Base model",
            "'embedded', a .safetensors file, a diffusers folder or a hub id",
            [own_choice, ("embedded", "embedded"), *((str(path), str(path)) for path in models(studio))],
        ),
        "profile": ("Profile", "settings for a card", [own_choice, *((name, name) for name in PROFILES)]),
        "data": (
            "Pictures",
            "a folder with captions",
            [
                own_choice,
                *((str(path), str(path)) for path in folders(studio)),
                *((f"embedded:{name}", f"embedded:{name}") for name in data_names()),
            ],
        ),
    }


def about(section: str) -> str:
    """What a section of the preset is about, in a sentence."""
    return (SECTIONS[section].__doc__ or "").strip().splitlines()[0]


def card() -> str:
    """The memory of this machine's card, or that of a common one."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.1f}gb"
    return "8gb"


def models(studio: Studio) -> list[Path]:
    """Files and folders at the top of the studio's folders that may be base models."""
    found = []
    for root in studio.folders.roots:
        found += sorted(root.glob("*.safetensors"))[:MOST]
        found += [path.parent for path in sorted(root.glob("*/model_index.json"))[:MOST]]
    return found


def folders(studio: Studio) -> list[Path]:
    """The studio's folders and those at their top, as far as they may hold pictures."""
    found = []
    for root in studio.folders.roots:
        if root == studio.runs:
            continue
        inside = sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")[:MOST]
        found += [root, *(path for path in inside if path.resolve() != studio.runs)]
    return found
