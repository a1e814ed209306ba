"""The tables at the end of a page: settings with their origins, versions, hashes, seconds, memory."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spf_kit.files import sha256
from spf_kit.report.reader import RunFiles, loss_id, losses_of, section
from spf_kit.report.render import cut


def facts(run: RunFiles) -> list[dict[str, Any]]:
    """Small tables, each with a title, rows of two texts, and whether the second are numbers."""
    kept = run.run
    seed = str(section(run.config, "train").get("seed", "–"))
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(kept.started)) if kept else "–"
    found = [
        ("Made with", {**(kept.versions if kept else {}), **(kept.machine if kept else {})}, False),
        ("Seed, hashes", {"seed": seed, "started": started, **_hashes(run)}, False),
        ("Seconds by part", _seconds(run), True),
        ("Memory by part", _memory(run), True),
    ]
    return [
        {"title": title, "rows": [(cut(k), cut(v)) for k, v in rows.items()], "numbers": numbers}
        for title, rows, numbers in found
        if rows
    ]


def _hashes(run: RunFiles) -> dict[str, str]:
    found = dict(run.run.hashes) if run.run else {}
    if run.lora is not None and run.lora.is_file():
        found[f"the LoRA {run.lora.name}"] = sha256(run.lora)
    return found


def _seconds(run: RunFiles) -> dict[str, str]:
    steps = sum(value for _, value in run.series("seconds"))
    parts = {"the training steps": steps} if steps else {}
    if run.seconds:
        others = {name: value for name, value in run.seconds.seconds.items() if name != "training"}
        saving = run.seconds.seconds.get("training", 0.0) - steps
        if saving > 0.05 * steps:
            others["between the steps, and steps done again"] = saving
        parts |= others
    found = {name: f"{value:.1f} s" for name, value in parts.items() if value >= 0.05}
    return {**found, "together": f"{sum(parts.values()):.1f} s"} if found else {}


def _memory(run: RunFiles) -> dict[str, str]:
    from spf_kit.measure.memory import human

    counted = {f"{name} (counted)": human(size) for name, size in (run.run.memory if run.run else {}).items()}
    seen = run.seconds.memory if run.seconds else {}
    return counted | {f"peak up to the end of: {name}": human(size) for name, size in seen.items()}


# --- settings ---------------------------------------------------------------------------------------------


def settings(run: RunFiles) -> list[dict[str, Any]]:
    """Every effective setting, those that somebody set first."""
    rows = list(_rows(run))
    given = [row for row in rows if row[2] not in ("default", "")]
    groups = {"What was set": given} if given else {}
    for key, value, origin in rows:
        name = key.partition(".")[0]
        groups.setdefault(f"All of [{name}]", []).append((key, value, origin))
    return [{"title": title, "rows": found} for title, found in groups.items()]


def _rows(run: RunFiles) -> Iterator[tuple[str, str, str]]:
    if run.run and run.run.settings:
        for setting in run.run.settings:
            yield cut(setting.key), shown(setting.value), cut(setting.origin)
    else:
        for key, value in flat(run.config).items():
            yield cut(key), shown(value), ""


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """`train.seed`, `loss.<id>.weight` -> value, of a config.toml."""
    found: dict[str, Any] = {}
    for name, values in config.items():
        if name == "loss":
            for entry in losses_of(config):
                found |= {
                    f"loss.{loss_id(entry)}.{key}": value for key, value in entry.items() if key != "id"
                }
        elif isinstance(values, dict):
            found |= {f"{name}.{key}": value for key, value in values.items()}
        else:
            found[name] = values
    return found


def shown(value: Any) -> str:
    """A setting's value for people."""
    return "unset" if value is None else cut(json.dumps(value, ensure_ascii=False, default=str), 600)


def differences(runs: list[RunFiles]) -> list[tuple[str, list[str]]]:
    """The settings that are not the same in all of the runs."""
    flats = [flat(run.config) for run in runs]
    keys = dict.fromkeys(key for values in flats for key in values)
    rows = [(key, [shown(values.get(key)) for values in flats]) for key in keys]
    found = [(cut(key), values) for key, values in rows if len(set(values)) > 1]
    return found[:200]


def name_of(path: Path) -> str:
    """A folder's name, also of `.`."""
    return path.resolve().name or str(path)
