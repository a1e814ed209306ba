"""Where an adapter in training changes the prediction, by noise level: what a control map is made of.

    python bench/map_levels.py [--attributes beard,winter-hat] [--output docs/results]

Trains `spf` to its middle and writes map-levels-ATTRIBUTE.webp: the first training pictures, below them N,
the blurred and rescaled difference of response and reference, one row for each timestep, mean of four noises.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import interpolate

from spf_kit import config, embedded
from spf_kit.files import atomic
from spf_kit.plugins.control_map import blurred, rescale
from spf_kit.training import trainer

TIMESTEPS = (950, 850, 700, 550, 400, 250, 100)
NOISES = 4
STEP = 200


def differences(
    family: Any, handle: Any, latents: Tensor, plain: list[str], asked: list[str], t: int
) -> Tensor:
    """N of each picture at one timestep, (B, h, w)."""
    timesteps = torch.full((len(latents),), t)
    base, full = family.encode_text(plain), family.encode_text(asked)
    total = torch.zeros(())
    for seed in range(NOISES):
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
        noisy_latents = family.noise.add_noise(latents, noise, timesteps)
        with handle.disabled():
            reference = family.predict(noisy_latents, timesteps, base)
        response = family.predict(noisy_latents, timesteps, full)
        total = total + blurred((response - reference).abs().mean(dim=1), 1.0)
    return rescale(total)


def sheet(attribute: str, count: int = 8) -> Image.Image:
    """The pictures of the first files and their maps, 128 pixels each."""
    sets = [f"train.checkpoint_every={STEP}", "preview.every=0", "train.threads=1", "evaluate.enabled=false"]
    resolved = config.load(attribute, recipe="spf", base="embedded", seed=0, sets=sets)
    with tempfile.TemporaryDirectory() as folder:
        result = trainer.train(resolved, Path(folder) / "run")
        kept = result.run / "checkpoints" / f"step-{STEP:06d}" / "adapter.safetensors"
        result.handle.load_state_dict(load_file(kept))
    files = sorted(embedded.data_path(attribute).glob("*.png"))[:count]
    arrays = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    pictures = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
    asked = [file.with_suffix(".txt").read_text(encoding="utf-8").strip() for file in files]
    plain = [caption.removesuffix(f", {resolved.config.attribute.target}") for caption in asked]
    with torch.no_grad():
        result.family.reload_encoders()
        latents = result.family.encode_image(pictures * 2 - 1)[0]
        parts = (result.family, result.handle, latents, plain, asked)
        maps = [differences(*parts, t)[:, None].expand(-1, 3, -1, -1) for t in TIMESTEPS]
    rows = [torch.cat(list(interpolate(row, size=128)), dim=2) for row in (pictures, *maps)]
    pixels = (torch.cat(rows, dim=1).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--attributes", default="beard,winter-hat", type=lambda text: text.split(","))
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for attribute in options.attributes:
        with atomic(options.output / f"map-levels-{attribute}.webp") as path:
            sheet(attribute).save(path, format="webp", quality=80)


if __name__ == "__main__":
    main()
