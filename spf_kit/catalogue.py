"""What is there: presets and their keys, loss plugins and their parameters, and what this machine can do."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spf_kit.errors import UserError

if TYPE_CHECKING:
    from spf_kit.config import Parameter
    from spf_kit.console import Console


def presets(name: str | None, *, schema: bool, console: Console) -> None:
    """List presets, recipes, bases and keys; or print one preset, or the JSON Schema."""
    from spf_kit import config
    from spf_kit.config.shipped import shipped_name

    if schema:
        console.finish(config.json_schema())
        return
    if name is not None:
        known = shipped_name(name)
        path = config.find_preset(name) if known is None else config.shipped_files()[known]
        text = path.read_text(encoding="utf-8")
        console.show(text.rstrip())
        console.finish({"path": str(path), "text": text})
        return
    described = config.describe()
    console.finish(described)
    for kind, title in (("preset", "Presets"), ("recipe", "Recipes"), ("base", "Settings for a base")):
        found = [(p.name, p.summary) for p in config.shipped_presets() if p.kind == kind]
        console.show(_table(title, ("name", "what it is"), found))
    keys = [_parameter_row(p) for p in config.parameters()]
    console.show(_table("Keys", ("key", "type", "default", "meaning"), keys))


def losses(files: Sequence[Path], *, console: Console) -> None:
    """List the loss and mask plugins with every parameter, default and source."""
    from spf_kit import config, discovery
    from spf_kit.losses import Mask

    listed = []
    for name, plugin in sorted(discovery.available(files).items()):
        source = f"{plugin.__module__}"
        kind = "mask" if issubclass(plugin, Mask) else "loss"
        text = inspect.cleandoc(plugin.__doc__ or "")
        rows = config.model_parameters(plugin, source)
        listed.append(
            {
                "name": name,
                "kind": kind,
                "source": source,
                "description": text,
                "parameters": [
                    {"key": p.key, "type": p.type, "default": p.default, "description": p.description}
                    for p in rows
                ],
            }
        )
        console.show(f"\n{name} ({kind}, {source})")
        console.show("  " + text.replace("\n", "\n  "))
        console.show(_table("", ("key", "type", "default", "meaning"), [_parameter_row(p) for p in rows]))
    console.finish({"losses": listed})


def check_losses(file: Path, *, console: Console) -> None:
    """Run a file's plugins on random steps. Raises UserError naming each check that failed."""
    from spf_kit.plugin_check import check_file

    results = check_file(file)
    for result in results:
        mark = "ok  " if result.passed else "FAIL"
        console.show(
            f"{mark} {result.plugin}: {result.check}" + (f": {result.detail}" if result.detail else "")
        )
    failed = [result for result in results if not result.passed]
    if failed:
        sentences = "; ".join(f"{r.plugin}: {r.check}: {r.detail}" for r in failed)
        raise UserError(f"{str(file)!r} fails {len(failed)} of {len(results)} checks: {sentences}")
    console.finish({"file": str(file), "checks": len(results), "failed": 0})


def doctor(console: Console) -> None:
    """Say what this machine can do, and one sentence on each thing that is off."""
    from spf_kit.doctor import examine

    found = examine()
    console.finish(found)
    facts = [(key, _words(value)) for key, value in found.items() if key != "problems"]
    console.show(_table("", ("", ""), facts))
    for problem in found["problems"]:
        console.show(f"- {problem}")
    if not found["problems"]:
        console.show("Everything works.")


def _parameter_row(p: Parameter) -> tuple[str, str, str, str]:
    default = "" if p.default is None else json.dumps(p.default)
    return p.key, p.type, default, p.description


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_words(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    return str(value)


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> Any:
    """A plain table: keys keep their length, the last column wraps."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title or None, box=None, title_justify="left", pad_edge=False, show_header=any(head))
    for index, name in enumerate(head):
        table.add_column(name, no_wrap=index == 0, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table
