"""Generation parameters in a picture's PNG text chunk, as AUTOMATIC1111's web UI writes and reads them.

One tEXt (or iTXt, beyond Latin-1) chunk named "parameters":

    a portrait, red hair <lora:glasses:0.8>
    Negative prompt: blurry
    Steps: 20, Sampler: DDIM, CFG scale: 5, Seed: 1, Size: 64x64, Model hash: 0123456789, Model: embedded,
    Lora hashes: "glasses: 0123456789ab", Version: spf-kit 0.1.0

(the last two lines are one). A1111 and Forge read it under "PNG Info", ComfyUI users through common nodes,
and Civitai finds the base and the LoRA by their hashes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spf_kit import __version__
from spf_kit.files import sha256

if TYPE_CHECKING:
    from PIL.PngImagePlugin import PngInfo

KEY = "parameters"

# our scheduler names in A1111's words: (Sampler, Schedule type or None)
SAMPLERS: Mapping[str, tuple[str, str | None]] = {
    "ddim": ("DDIM", None),
    "ddpm": ("DDPM", None),
    "pndm": ("PLMS", None),
    "euler": ("Euler", None),
    "euler_a": ("Euler a", None),
    "heun": ("Heun", None),
    "lms": ("LMS", None),
    "dpm++2m": ("DPM++ 2M", None),
    "dpm++2m_karras": ("DPM++ 2M", "Karras"),
    "unipc": ("UniPC", None),
}


@dataclass(frozen=True)
class LoraUse:
    """One LoRA of a picture: the name in `<lora:name:strength>`, and the 12 digits that Civitai looks up."""

    name: str
    strength: float
    hash: str = ""

    @property
    def tag(self) -> str:
        return f"<lora:{self.name}:{self.strength:g}>"


@dataclass(frozen=True)
class PictureInfo:
    """How one picture was made."""

    prompt: str
    seed: int
    steps: int
    cfg: float
    scheduler: str
    width: int
    height: int
    negative: str = ""
    clip_skip: int = 1
    model: str = ""
    model_hash: str = ""
    loras: Sequence[LoraUse] = ()

    def text(self) -> str:
        """The value of the "parameters" chunk."""
        sampler, schedule = SAMPLERS.get(self.scheduler, (self.scheduler, None))
        used = [lora for lora in self.loras if lora.strength != 0]
        hashes = ", ".join(f"{lora.name}: {lora.hash}" for lora in used if lora.hash)
        fields = {
            "Steps": self.steps,
            "Sampler": sampler,
            "Schedule type": schedule,
            "CFG scale": f"{self.cfg:g}",
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model hash": self.model_hash or None,
            "Model": self.model or None,
            "Clip skip": self.clip_skip if self.clip_skip > 1 else None,
            "Lora hashes": hashes or None,
            "Version": f"spf-kit {__version__}",
        }
        lines = [" ".join([_one_line(self.prompt), *(lora.tag for lora in used)])]
        if self.negative:
            lines.append(f"Negative prompt: {_one_line(self.negative)}")
        said = [f"{key}: {_quoted(value)}" for key, value in fields.items() if value is not None]
        lines.append(", ".join(said))
        return "\n".join(lines)

    def chunk(self) -> PngInfo:
        """The text chunk, for `Image.save(path, pnginfo=...)`."""
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_text(KEY, self.text())
        return info


def _one_line(text: str) -> str:
    """Readers split at line ends: a prompt of several lines becomes one."""
    return " ".join(text.split())


def _quoted(value: object) -> str:
    """Quoted as JSON where a comma, colon or line end would split it; A1111's rule."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text) else text


_FIELD = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def parse(text: str) -> dict[str, str]:
    """The fields of a "parameters" text, with "Prompt" and "Negative prompt"; what A1111's reader finds."""
    *lines, last = text.strip().split("\n")
    if not _FIELD.match(last) or not last.startswith("Steps: "):
        lines, last = [*lines, last], ""
    prompt, negative = "\n".join(lines), ""
    if "Negative prompt:" in prompt:
        prompt, negative = prompt.split("Negative prompt:", 1)
    found = {"Prompt": prompt.strip(), "Negative prompt": negative.strip()}
    for key, value in _FIELD.findall(last):
        found[key] = json.loads(value) if value.startswith('"') else value.strip()
    return found


def lora_name(path: Path | str) -> str:
    """What stands in `<lora:NAME:1>`: the stem of the file name, without the tag's own characters."""
    return re.sub(r"[<>:,\r\n]", "_", Path(path).stem)


def lora_hash(path: Path | str, metadata: Mapping[str, str] | None = None) -> str:
    """First 12 digits of a LoRA's `sshs_model_hash` (sha256 of a safetensors file beyond its header; of
    a folder with several, of all of them).

    That hash is the same whatever the metadata says; A1111 and Civitai ("AutoV3") identify LoRAs by it.
    """
    if metadata and metadata.get("sshs_model_hash"):
        return metadata["sshs_model_hash"][:12]
    from spf_kit.adapters.earlier import tensors_hash
    from spf_kit.adapters.index import index

    return tensors_hash(index(path))[:12]


def file_hash(path: Path | str) -> str:
    """First 10 digits of a checkpoint file's sha256: A1111's "Model hash"."""
    return sha256(path)[:10]
