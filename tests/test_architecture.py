"""The layers stay layers: who may import whom, walked on the syntax tree."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# folder or module -> prefixes within spf_kit that it must not import, at any depth of nesting
FORBIDDEN = {
    "spf_kit/families": (
        "training",
        "measure",
        "adapters",
        "data",
        "cli",
        "workflow",
        "config",
        "sampling",
        "plugins",
    ),
    "spf_kit/adapters": ("training", "measure", "data", "cli", "workflow", "sampling", "plugins"),
    "spf_kit/data": ("training", "measure", "adapters", "cli", "workflow", "sampling", "plugins"),
    "spf_kit/training": ("cli", "workflow", "plugins", "report", "measure.evaluate"),
    "spf_kit/measure": ("cli", "workflow", "training", "plugins", "report"),
    "spf_kit/report": ("cli", "workflow", "plugins", "training.trainer", "training.session"),
    "spf_kit/losses.py": ("training", "measure", "adapters", "config", "cli", "plugins"),
    "spf_kit/schema.py": ("losses", "training", "families", "adapters", "data", "measure"),
    "spf_kit/errors.py": ("",),
}
HEAVY = {
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "matplotlib",
    "numpy",
    "PIL",
}
LIGHT = (
    "adapters/merge.py",  # which copies what it can before torch is there
    "adapters/streaming.py",
    "cli.py",
    "cli_files.py",
    "cli_about.py",
    "cli_studio.py",
    "cli_options.py",
    "console.py",
    "errors.py",
    "schema.py",
    "files.py",
    "config.py",
    "config/__init__.py",
)


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Names of the modules that a file imports; those under TYPE_CHECKING do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(place: str) -> list[Path]:
    path = ROOT / place
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("place", FORBIDDEN)
def test_import_directions(place: str) -> None:
    assert files(place)
    for file in files(place):
        for name in imports(file):
            if not name.startswith("spf_kit"):
                continue
            inner = name.removeprefix("spf_kit").removeprefix(".")
            bad = [p for p in FORBIDDEN[place] if p == "" or inner == p or inner.startswith(p + ".")]
            assert not bad, f"{file.relative_to(ROOT)} imports {name}"


def test_plugins_import_only_the_api_and_torch() -> None:
    for file in files("plugins"):
        allowed = {"__future__", "math", "typing", "collections", "dataclasses", "torch", "spf_kit.losses"}
        for name in imports(file):
            assert any(name == a or name.startswith(a + ".") for a in allowed), f"{file.name} imports {name}"


def test_nobody_imports_a_plugin_by_name() -> None:
    plugins = {p.stem for p in files("plugins")} - {"__init__"}
    for file in files("spf_kit"):
        for name in imports(file):
            if name.startswith("spf_kit.plugins."):
                assert name.split(".")[2] not in plugins, f"{file} imports {name}"


@pytest.mark.parametrize("name", LIGHT)
def test_the_command_line_starts_without_torch(name: str) -> None:
    path = ROOT / "spf_kit" / name
    if not path.exists():
        assert name.startswith("config"), f"{name} is gone"
        return
    heavy = {
        n for n in imports(path, top_level_only=True) if n.split(".")[0] in HEAVY or n == "spf_kit.losses"
    }
    assert not heavy, f"{name} imports {heavy} when it is imported"


def test_only_its_command_knows_the_studio() -> None:
    for file in files("spf_kit"):
        if "studio" not in file.parts and file.name != "cli_studio.py":
            assert not [name for name in imports(file) if name.startswith("spf_kit.studio")], file


def test_is_sdxl_lives_in_families_only() -> None:
    for file in files("spf_kit"):
        if "families" not in file.parts:
            assert "is_sdxl" not in file.read_text(encoding="utf-8"), f"{file} asks for the family"
