"""The judge: what a picture of the embedded base model shows, attribute by attribute.

A small convolutional classifier with one head an attribute. No loss ever uses it: it only measures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spf_kit.embedded import base_path

# The attribute and class that show that a target phrase was drawn.
TARGETS: dict[str, tuple[str, str]] = {
    "wearing glasses": ("eyewear", "glasses"),
    "wearing sunglasses": ("eyewear", "sunglasses"),
    "wearing an eyepatch": ("eyewear", "eyepatch"),
    "with a beard": ("facial_hair", "beard"),
    "with a moustache": ("facial_hair", "moustache"),
    "wearing a winter hat": ("headwear", "winter hat"),
}

# The other attributes that a target can hide; they do not count as kept or lost.
COVERED: dict[str, tuple[str, ...]] = {
    "wearing glasses": (),
    "wearing sunglasses": (),
    "wearing an eyepatch": (),
    "with a beard": ("mouth",),
    "with a moustache": ("mouth",),
    "wearing a winter hat": ("hair_style", "hair_color"),
}


def hidden(seen: Mapping[str, str]) -> set[str]:
    """The attributes of a picture (attribute -> value) that cannot be seen in it. What the judge says of them
    means nothing: it was not taught."""
    covered: set[str] = set()
    if seen.get("headwear", "none") != "none":
        covered |= {"hair_style", "hair_color"}
    elif seen.get("hair_style") == "dreadlocks" and seen.get("clothing") in ("overalls", "blazer"):
        covered |= {"clothing_color"}  # they fall over the straps and the lapels
    if seen.get("facial_hair", "none") != "none":
        covered |= {"mouth"}
    return covered


def block(inside: int, outside: int, stride: int) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(inplace=True)
    )


class JudgeNetwork(nn.Module):
    """(B, 3, 64, 64) in [-1, 1] to logits (B, all classes), heads side by side.

    Where a thing is matters (eyes or mouth), so the last map is pooled to 4 x 4, not to one value.
    """

    def __init__(self, classes: int, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        a, b, c, d = widths
        self.features = nn.Sequential(
            block(3, a, 1), block(a, a, 2), block(a, b, 2), block(b, b, 1), block(b, c, 2), block(c, c, 1)
        )
        self.squeeze = block(c, d, 1)
        self.head = nn.Sequential(
            nn.Flatten(), nn.Dropout(0.2), nn.Linear(16 * d, 128), nn.ReLU(), nn.Linear(128, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        maps = self.squeeze(self.features(x))  # (B, d, 8, 8)
        return self.head(F.max_pool2d(maps, 2))


class AttributeJudge:
    """Reads the attributes off pictures.

    judge = AttributeJudge.load()
    judge(images)["eyewear"]  # (B,) class indices into judge.attributes["eyewear"]
    """

    def __init__(self, network: JudgeNetwork, attributes: dict[str, list[str]]) -> None:
        self.network = network.eval().requires_grad_(False)
        self.attributes = attributes

    @classmethod
    def load(cls, path: Path | str | None = None) -> AttributeJudge:
        """From `path`, a folder with config.json and model.safetensors; the embedded judge by default."""
        folder = Path(path) if path is not None else base_path() / "judge"
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        attributes = {name: list(values) for name, values in config["attributes"].items()}
        network = JudgeNetwork(sum(map(len, attributes.values())), tuple(config["widths"]))
        weights = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
        network.load_state_dict(weights, strict=False)  # batch counters are not stored
        return cls(network, attributes)

    def save(self, folder: Path, widths: tuple[int, ...]) -> None:
        """Write config.json and model.safetensors in half precision."""
        folder.mkdir(parents=True, exist_ok=True)
        state = self.network.state_dict()
        weights = {k: v.half().contiguous() for k, v in state.items() if v.is_floating_point()}
        save_file(weights, folder / "model.safetensors")
        config = {"attributes": self.attributes, "widths": list(widths), "image_size": 64}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) in [0, 1] to attribute -> (B, classes)."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"the judge takes (B, 3, H, W) in [0, 1], not {tuple(images.shape)}")
        x = images.detach().float().cpu()
        if x.shape[-2:] != (64, 64):
            x = F.interpolate(x, (64, 64), mode="bilinear", antialias=True, align_corners=False)
        logits = torch.cat([self.network(part * 2 - 1) for part in x.split(256)])
        parts = logits.split([len(values) for values in self.attributes.values()], dim=1)
        return {name: part.softmax(1) for name, part in zip(self.attributes, parts, strict=True)}

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) in [0, 1] to attribute -> (B,) class indices."""
        return {name: p.argmax(1) for name, p in self.probabilities(images).items()}

    def read(self, images: Tensor) -> list[dict[str, str]]:
        """(B, 3, H, W) in [0, 1] to each picture's attribute -> value."""
        columns = {
            name: [self.attributes[name][i] for i in found.tolist()] for name, found in self(images).items()
        }
        return [dict(zip(columns, row)) for row in zip(*columns.values())]

    def shows(self, images: Tensor, target: str) -> Tensor:
        """(B,) bool: whether each picture shows `target`, a key of TARGETS."""
        attribute, value = TARGETS[target]
        return self(images)[attribute] == self.attributes[attribute].index(value)
