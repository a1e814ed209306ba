"""The pictures of `spf-kit sample`: drawn, named, written one by one, and put on a sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spf_kit.errors import UserError
from spf_kit.files import refuse_existing
from spf_kit.sampling.contact_sheet import sheet
from spf_kit.sampling.draw import Progress, draw, save_png, to_pil
from spf_kit.sampling.png_info import LoraUse, PictureInfo, file_hash, lora_hash, lora_name
from spf_kit.sampling.settings import GridSettings, SampleLora, file_name, strength_names

if TYPE_CHECKING:
    from PIL.Image import Image

    from spf_kit.adapters.inject import AdapterHandle
    from spf_kit.families.base import Family


@dataclass
class Grid:
    """The pictures of one call of `sample_loras`, written as they come and kept for the sheet."""

    settings: GridSettings
    strengths: Sequence[float]
    loras: Sequence[LoraUse]  # at strength 1
    model: str
    model_hash: str
    output: Path
    names: Mapping[float, str] = field(init=False)  # of the strengths, in names of files
    pictures: dict[float, list[Image]] = field(default_factory=dict)
    entries: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.names = strength_names(self.strengths, [use.strength for use in self.loras])

    @classmethod
    def prepare(
        cls,
        family: Family,
        settings: GridSettings,
        strengths: Sequence[float],
        loras: Sequence[SampleLora],
        metadata: Sequence[Mapping[str, str]],
        output: Path,
    ) -> Grid:
        """Names and hashes of the base and of the LoRAs, whose `metadata` is given."""
        uses = [
            LoraUse(lora_name(lora.path), lora.weight, lora_hash(lora.path, known))
            for lora, known in zip(loras, metadata, strict=True)
        ]
        return cls(settings, strengths, uses, *model_identity(family), output)

    def draw(self, family: Family, strength: float, progress: Progress | None) -> None:
        """Every prompt and seed at one strength, to which the adapters have been set."""
        of, cells = self.settings, self.settings.cells
        batches = draw(
            family, [of.prompts[index] for index, _ in cells], [seed for _, seed in cells],
            negative=of.negative, steps=of.steps, cfg=of.cfg, scheduler=of.scheduler, width=of.width,
            height=of.height, clip_skip=of.clip_skip, chunks=1, batch_size=of.batch_size, progress=progress,
        )  # fmt: skip
        for batch, pictures in batches:
            for number, picture in zip(batch, to_pil(pictures), strict=True):
                self.keep(*cells[number], strength, picture)

    def keep(self, index: int, seed: int, strength: float, picture: Image) -> None:
        """Write one picture with its parameters."""
        of = self.settings
        info = PictureInfo(
            prompt=of.prompts[index], seed=seed, steps=of.steps, cfg=of.cfg, scheduler=of.scheduler,
            width=picture.width, height=picture.height, negative=of.negative, clip_skip=of.clip_skip,
            model=self.model, model_hash=self.model_hash,
            loras=[LoraUse(use.name, use.strength * strength, use.hash) for use in self.loras],
        )  # fmt: skip
        name = file_name(index, info.prompt, self.names[strength] if self.loras else None, seed)
        path = self.output / name
        save_png(picture, path, info)
        self.pictures.setdefault(strength, []).append(picture)
        entry = {"file": str(path), "prompt": info.prompt, "strength": strength, "seed": seed}
        self.entries.append(entry)

    def save(self) -> Path:
        """The sheet: a row for each prompt and seed, a column for each strength."""
        of, names = self.settings, " + ".join(use.name for use in self.loras)
        note = f"{self.model}; {of.scheduler}, {of.steps} steps, guidance {of.cfg:g}"
        columns = [self.pictures[strength] for strength in self.strengths]
        page = sheet(
            [list(row) for row in zip(*columns, strict=True)],
            row_labels=[f"{of.prompts[index]} (seed {seed})" for index, seed in of.cells],
            column_labels=[f"strength {s:g}" if names else self.model for s in self.strengths],
            title=names or self.model,
            note=note + (f"; negative: {of.negative}" if of.negative else ""),
        )
        save_png(page, self.output / "grid.png")
        return self.output / "grid.png"


def model_identity(family: Family) -> tuple[str, str]:
    """A base's name and A1111's ten digits: of the file's sha256, or for a folder of its weights' hash."""
    path = Path(family.base_id)
    if path.is_file():
        return path.stem, file_hash(path)
    return path.name or family.name, family.base_hash()[:10]


def sample_loras(
    family: Family,
    loras: Sequence[SampleLora],
    settings: GridSettings,
    output: Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Draw prompts x strengths x seeds; write a PNG each and a labelled `grid.png` into the folder `output`.

    The same prompt and seed start from the same noise at every strength. Strength 0, or no LoRA, is the base
    model itself. Every file name says what it holds, so that the same call gives the same names. A picture is
    written as soon as it is drawn.

    Returns:
        {"output": folder, "grid": file, "pictures": [{"file", "prompt", "strength", "seed"}, ...]}

    Raises:
        UserError: settings that cannot be drawn, `output` exists, or a LoRA does not fit the base.
    """
    from spf_kit.adapters import files
    from spf_kit.adapters.inject import AdapterHandle

    settings.check()
    refuse_existing(output, overwrite)
    if output.is_file():
        raise UserError(f"the output {str(output)!r} is a file: give a folder for the pictures")
    read = [files.read(lora.path) for lora in loras]
    for file in read:
        files.check_family(file, family)
    strengths = list(settings.strengths) if loras else [0.0]
    grid = Grid.prepare(family, settings, strengths, loras, [file.metadata for file in read], output)
    handles: list[AdapterHandle] = []
    try:
        for number, file in enumerate(read):
            handles.append(AdapterHandle.attach(family, file, name=f"sample_{number}"))
        for number, strength in enumerate(strengths):
            for handle, lora in zip(handles, loras, strict=True):
                handle.set_strength(lora.weight * strength)
                (handle.on if strength else handle.off)()  # strength 0 is the base, to the last bit
            grid.draw(family, strength, _part(progress, number, len(strengths)))
    finally:
        for handle in reversed(handles):
            handle.remove()
    return {"output": str(output), "grid": str(grid.save()), "pictures": grid.entries}


def _part(progress: Progress | None, number: int, parts: int) -> Progress | None:
    """Progress of part `number` of `parts` equal ones, reported as progress of the whole."""
    if progress is None:
        return None
    return lambda done, total, text: progress(number * total + done, parts * total, text)
