"""The model card: README.md with the front matter that the Hugging Face hub reads. Imports no torch."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spf_kit import __version__

# of the model that the family is of: it binds what is derived from it; the embedded base is ours
LICENCES = {
    "sd15": "creativeml-openrail-m",
    "sd2": "openrail++",
    "sdxl": "openrail++",
    "embedded": "apache-2.0",
}
PIPELINES = {
    "sd15": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
}
MEASURED = ("response", "preservation", "leakage", "drift_plain", "drift_target")


@dataclass(frozen=True)
class Picture:
    """One picture of the card; `file` is relative to the folder."""

    file: str
    prompt: str
    seed: int


@dataclass(frozen=True)
class Facts:
    """What a card tells."""

    name: str  # of the attribute
    file: str  # the LoRA's file name
    trigger: str
    family: str
    base: str  # as people know it
    base_id: str | None  # a hub id
    licence: str
    config: Mapping[str, Any]  # the effective preset
    pictures: Sequence[Picture] = ()
    evaluation: Mapping[str, Any] | None = None
    earlier: Sequence[str] = field(default=())  # LoRAs that it was trained on


def card(facts: Facts) -> str:
    """The README.md. Names and prompts are other people's text: they are escaped for YAML and Markdown."""
    sections = [
        f"# {_plain(facts.name)}",
        f"A LoRA for {_plain(facts.base)}. Trigger phrase: {_code(facts.trigger)}.",
        *_earlier(facts),
        *_gallery(facts.pictures),
        *_use(facts),
        *_measured(facts.evaluation),
        *_training(facts.config),
        f"Made with spf-kit {__version__}.",
    ]
    return front_matter(facts) + "\n" + "\n\n".join(sections) + "\n"


def front_matter(facts: Facts) -> str:
    """The YAML block between two lines of dashes."""
    from huggingface_hub import ModelCardData

    tags = ["text-to-image", "lora", "template:sd-lora", "spf-kit"]
    if facts.family in PIPELINES:
        tags += ["diffusers", "stable-diffusion-xl" if facts.family == "sdxl" else "stable-diffusion"]
    data = ModelCardData(
        base_model=facts.base_id,
        license=facts.licence,
        library_name="diffusers" if facts.family in PIPELINES else None,
        pipeline_tag="text-to-image",
        tags=tags,
        instance_prompt=facts.trigger,
        widget=[{"text": p.prompt, "output": {"url": p.file}} for p in facts.pictures] or None,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _earlier(facts: Facts) -> list[str]:
    if not facts.earlier:
        return []
    names = ", ".join(map(_code, facts.earlier))
    return [f"It was trained on top of {names}: use it together with them, at these weights."]


def _gallery(pictures: Sequence[Picture]) -> list[str]:
    if not pictures:
        return []
    rows = [f"| ![]({p.file}) | {_plain(p.prompt)} | {p.seed} |" for p in pictures]
    return ["## Pictures", "\n".join(["| | prompt | seed |", "| --- | --- | --- |", *rows])]


def _use(facts: Facts) -> list[str]:
    stem = Path(facts.file).stem
    lines = [
        "## Use",
        f"ComfyUI: put {_code(facts.file)} into `models/loras`. A1111, Forge: the same under `models/Lora`, "
        f"then {_code(f'<lora:{stem}:1>')} and the trigger phrase in the prompt.",
    ]
    pipeline = PIPELINES.get(facts.family)
    if pipeline is None:
        return [*lines, f"The base ships with spf-kit: `spf-kit sample {facts.file}`."]
    base = facts.base_id or "path/to/the/base"
    load = "from_pretrained" if facts.base_id else "from_single_file"
    return [
        *lines,
        "```python\n"
        f"from diffusers import {pipeline}\n\n"
        f"pipe = {pipeline}.{load}({base!r})\n"
        f'pipe.load_lora_weights(".", weight_name={facts.file!r})\n'
        f"picture = pipe({f'a portrait, {facts.trigger}'!r}).images[0]\n"
        "```",
    ]


def _measured(evaluation: Mapping[str, Any] | None) -> list[str]:
    if evaluation is None:
        return []
    row = next(iter(evaluation["loras"].values()))
    heads = [key.replace("_", " ") for key in MEASURED]
    table = [_row(["", *heads]), _row(["---"] * (1 + len(heads)))]
    for name, values in (("base", evaluation["base"]), ("base + LoRA", row)):
        table.append(_row([name, *(_number(values.get(key)) for key in MEASURED)]))
    how = f"{row['sampler']}, {row['steps']} steps, guidance {row['guidance']:g}; judge: {row['judge']}"
    return [
        "## Measured",
        "\n".join(table),
        f"{len(row['prompts'])} prompts, each drawn with the phrase and without, the same seeds with and "
        f"without the LoRA ({how}). Response: pictures that show the attribute when asked. Preservation: "
        "what else stays as the base drew it. Leakage: pictures that change though nobody asked. Drift: how "
        "far predictions move.",
    ]


def _training(config: Mapping[str, Any]) -> list[str]:
    adapter, train = config.get("adapter", {}), config.get("train", {})
    told = {
        "steps": train.get("steps"), "batch size": train.get("batch_size"),
        "learning rate": train.get("learning_rate"), "optimizer": train.get("optimizer"),
        "rank": adapter.get("rank"), "layers": ", ".join(adapter.get("targets", [])),
        "seed": train.get("seed"), "losses": ", ".join(entry["plugin"] for entry in config.get("loss", [])),
    }  # fmt: skip
    return [
        "## Training",
        "\n".join(f"- {key}: {_plain(str(value))}" for key, value in told.items() if value is not None),
    ]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _plain(text: str) -> str:
    """Somebody's text as Markdown that shows it and does nothing else."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]()#|!~" else letter for letter in escaped)


def _code(text: str) -> str:
    """Somebody's text as a code span: within longer runs of backticks than it has itself, nothing acts."""
    shown = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence} {shown} {fence}" if len(fence) > 1 else f"`{shown}`"
