"""From a run folder to the folder that is shared, and to the hub."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from spf_kit.adapters import thumbnail as thumbnails
from spf_kit.adapters.metadata import amend
from spf_kit.adapters.weights import parse
from spf_kit.errors import UserError
from spf_kit.files import FolderSort, atomic, refuse_existing, refuse_other_folder
from spf_kit.sampling import GridSettings, Progress, SampleLora, sample_loras
from spf_kit.sharing.card import LICENCES, Facts, Picture, card
from spf_kit.training.run_folder import RunFolder

PICTURES = "images"
SHARED = FolderSort(
    "folder that was shared", ("README.md", "*.safetensors"), ("README.md", "*.safetensors", PICTURES)
)
FIRST = "first"  # the first picture that is drawn, as the thumbnail


@dataclass(frozen=True)
class Run:
    """A finished run: what it trained and what it measured."""

    folder: Path
    config: Mapping[str, Any]
    lora: Path
    evaluation: Mapping[str, Any] | None

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Raises UserError if the folder is no run, or holds no LoRA yet."""
        file = folder / "config.toml"
        try:
            config = tomllib.loads(file.read_text(encoding="utf-8"))
            name, _ = config["attribute"]["name"], config["attribute"]["target"]
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
            raise UserError(
                f"{str(folder)!r} is not a run folder: it has no readable config.toml; give the folder that "
                "spf-kit train wrote, such as runs/glasses"
            ) from error
        lora = RunFolder(folder).lora(name, config.get("output", {}).get("format", "kohya"))
        if not lora.exists():
            raise UserError(
                f"the run {str(folder)!r} holds no {lora.name}: it has not ended; continue it with "
                "spf-kit train ... --resume"
            )
        return cls(folder, config, lora, _evaluation(folder / "evaluation.json"))

    @property
    def file(self) -> str:
        """The LoRA's name in the folder."""
        return f"{self.config['attribute']['name']}.safetensors"

    @property
    def target(self) -> str:
        return str(self.config["attribute"]["target"])

    def cases(self, count: int) -> list[tuple[str, int]]:
        """The first evaluated prompts, asked for the target, with their seeds."""
        if self.evaluation is None:
            return []
        rows = next(iter(self.evaluation["loras"].values()))["per_prompt"]
        return [(f"{row['prompt']}, {self.target}", int(row["seed"])) for row in rows[:count]]


class _Prompt(BaseModel):
    prompt: str
    seed: int


class _Row(BaseModel):
    """What a card reads of a LoRA's measurement."""

    prompts: list[str]
    sampler: str
    steps: int
    guidance: float
    judge: str
    per_prompt: list[_Prompt]


class _Measured(BaseModel):
    base: dict[str, Any]
    loras: dict[str, _Row] = Field(min_length=1)


def _evaluation(file: Path) -> Mapping[str, Any] | None:
    """What was measured; None where evaluate.enabled was false. Raises UserError if the file is damaged."""
    try:
        text = file.read_text(encoding="utf-8")
        _Measured.model_validate_json(text)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{str(file)!r} is damaged: remove it, and the card has no table") from error
    return dict(json.loads(text))


def check_output(output: Path, overwrite: bool) -> None:
    """Raises UserError if `output` exists without `overwrite`, or is a folder of other things."""
    refuse_existing(output, overwrite)
    refuse_other_folder(output, SHARED)


def check_base(base_id: str | None) -> None:
    """Raises UserError for what is no id of a model: the hub refuses a card with another."""
    from spf_kit.families.hub import is_hub_id

    if base_id is not None and not is_hub_id(base_id):
        raise UserError(f"--base-id {base_id!r} is no model of the hub: give OWNER/NAME")


def share(
    run: Run,
    family: Any,
    output: Path,
    *,
    prompts: Sequence[str] = (),
    count: int = 4,
    base_id: str | None = None,
    licence: str | None = None,
    thumbnail: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the folder: the LoRA, README.md, and `images/` with each picture's parameters in its PNG.

    Args:
        family: the loaded base, for the pictures.
        prompts: what to draw; without any, the first `count` evaluated prompts with the target.
        base_id: the hub id of the base, where it was trained on a local file.
        licence: an identifier of the hub's; without one that of the family's original model.
        thumbnail: a data URL for the LoRA's metadata, or `FIRST`.

    Raises:
        UserError: `output` exists, there is nothing to draw, or something cannot be written.
    """
    check_output(output, overwrite)
    cases = [(text, number) for number, text in enumerate(prompts)] or run.cases(count)
    if count and not cases:
        raise UserError(
            f"the run {str(run.folder)!r} was not evaluated, so it has no prompts to draw: give --prompt, or "
            "--count 0 for a card without pictures"
        )
    with atomic(output, folder=True) as folder:
        _copy(run.lora, folder / run.file)
        pictures = _draw(run, family, cases, folder, progress)
        if thumbnail is not None:
            url = thumbnails.make(folder / pictures[0].file) if thumbnail == FIRST else thumbnail
            amend(folder / run.file, {thumbnails.KEY: url})
        facts = _facts(run, family, pictures, base_id, licence)
        (folder / "README.md").write_text(card(facts), encoding="utf-8")
    return output


def _copy(lora: Path, file: Path) -> None:
    """A file as it is; peft's folder, which only few programs read, in kohya's format."""
    if lora.is_dir():
        from spf_kit.adapters import files

        read = files.read(lora)
        files.write(read, file, "kohya", read.dtype)
    else:
        shutil.copyfile(lora, file)


def _draw(
    run: Run, family: Any, cases: Sequence[tuple[str, int]], folder: Path, progress: Progress | None
) -> list[Picture]:
    """Each case as a picture of its own, as it was evaluated where it was."""
    from spf_kit.adapters.earlier import attached

    evaluation, drawn = run.config.get("evaluate", {}), []
    used, acting = _earlier(run)
    with attached(family, acting):
        for number, (prompt, seed) in enumerate(cases):
            grid = GridSettings(
                [prompt], (1.0,), seed=seed, steps=evaluation.get("steps", 25),
                cfg=evaluation.get("cfg", 5.0),
                clip_skip=run.config.get("base", {}).get("clip_skip", 1),
            )  # fmt: skip
            loras = [SampleLora(run.lora, 1.0), *used]
            made = sample_loras(family, loras, grid, folder / "drawn", overwrite=True)
            file = folder / PICTURES / f"{number + 1}.png"
            file.parent.mkdir(exist_ok=True)
            Path(made["pictures"][0]["file"]).replace(file)
            drawn.append(Picture(f"{PICTURES}/{file.name}", prompt, seed))
            if progress:
                progress(number + 1, len(cases), "drawing")
    shutil.rmtree(folder / "drawn", ignore_errors=True)
    return drawn


def _earlier(run: Run) -> tuple[list[SampleLora], list[str]]:
    """The LoRAs under this one: those that a picture's parameters can name, with one weight, and the rest."""
    texts = run.config.get("adapter", {}).get("on", [])
    parsed = [(text, *parse(text)) for text in texts]
    used = [SampleLora(path, weights.uniform) for _, path, weights in parsed if weights.uniform is not None]
    return used, [text for text, _, weights in parsed if weights.uniform is None]


def _facts(
    run: Run, family: Any, pictures: Sequence[Picture], base_id: str | None, licence: str | None
) -> Facts:
    from spf_kit.families.hub import is_hub_id

    base = str(run.config.get("base", {}).get("model", family.base_id))
    on = run.config.get("adapter", {}).get("on", [])
    known = base_id or (base if is_hub_id(base) and not Path(base).exists() and base != "embedded" else None)
    return Facts(
        name=run.config["attribute"]["name"], file=run.file, trigger=run.target, family=family.name,
        base=known or ("the base model in spf-kit" if base == "embedded" else Path(base).name), base_id=known,
        licence=licence or LICENCES.get(family.name, "other"), config=run.config, pictures=pictures,
        evaluation=run.evaluation, earlier=[f"{path.name}:{weights}" for path, weights in map(parse, on)],
    )  # fmt: skip


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Upload the folder to a model repository of the hub, made if it is not there; the page's address.

    Raises UserError without a token, without a network, or if the hub refuses; the folder stays.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        made = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=made.repo_id, commit_message="Upload LoRA")
    except Exception as error:  # the hub's client raises its own, its transport's and the system's errors
        kinds = {kind.__name__ for kind in type(error).__mro__}
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        if "HFValidationError" in kinds:
            reason = f"{repo!r} is no repository name: give OWNER/NAME"
        elif "LocalTokenNotFoundError" in kinds:
            reason = "it needs a token: log in with `hf auth login`"
        raise UserError(f"--push: the hub could not be written to: {reason}; {_ready(folder)}") from error
    return str(made)


def _ready(folder: Path) -> str:
    return f"the folder {str(folder)!r} is ready: upload it later with `hf upload OWNER/NAME {folder}`"
