"""Portraits: attributes to SVG (python_avatars, MIT) to 64-pixel pictures (resvg).

    python -m spf_kit.embedded.build.render --output cache/uniform --count 24000 --draw uniform

writes `pictures.npy` (N, 64, 64, 3) uint8 and `portraits.jsonl`, one line of attributes a picture.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import python_avatars as pa
import resvg_py
from PIL import Image

from spf_kit.embedded.build import attributes as at
from spf_kit.embedded.build.attributes import Portrait

SIZE = 64
VIEW_BOX = (18, 14, 228)  # left, top, side: head and shoulders, so that eyes and mouth are large
HAIR = {
    "short": "SHORT_FLAT",
    "long": "STRAIGHT_STRAND",
    "half-shaved": "HALF_SHAVED",
    "spiky": "EVIL_SPIKE",
    "afro": "FRO",
    "bob": "BOB",
    "bun": "BUN",
    "mohawk": "MOHAWK",
    "dreadlocks": "DREADS",
}
CLOTHES = {
    "t-shirt": "SHIRT_CREW_NECK",
    "hoodie": "HOODIE",
    "overalls": "OVERALL",
    "blazer": "BLAZER_SHIRT",
}
MOUTHS = {
    "smile": "BIG_SMILE",
    "sad": "SAD",
    "serious": "SERIOUS",
    "scream": "SCREAM_OPEN",
    "tongue": "TONGUE",
    "teeth": "GRIMACE",
}
EYEWEAR = {
    "none": ["NONE"],
    "glasses": ["ROUND", "PRESCRIPTION_2"],
    "sunglasses": ["SUNGLASSES", "WAYFARERS"],
    "eyepatch": ["EYEPATCH"],
}
FACIAL_HAIR = {
    "none": ["NONE"],
    "beard": ["BEARD_MAGESTIC", "BEARD_MEDIUM"],
    "moustache": ["MOUSTACHE_FANCY", "MOUSTACHE_MAGNUM"],
}
HATS = ["WINTER_HAT_1", "WINTER_HAT_2", "WINTER_HAT_3", "WINTER_HAT_4"]
HAT_COLORS = ["#3c4f5c", "#b3323a", "#2c5aa8", "#2e7d4f"]


def jitter(color: str, rng: random.Random, amount: int = 6) -> str:
    """A colour made lighter or darker by up to `amount` (of 255)."""
    shift = rng.randint(-amount, amount)
    channels = [int(color[i : i + 2], 16) + shift for i in (1, 3, 5)]
    return "#" + "".join(f"{min(255, max(0, c)):02x}" for c in channels)


def darker(color: str, factor: float = 0.78) -> str:
    """A colour scaled towards black, for lapels."""
    return "#" + "".join(f"{int(int(color[i : i + 2], 16) * factor):02x}" for i in (1, 3, 5))


def svg(portrait: Portrait, rng: random.Random) -> str:
    """The SVG text of a portrait; `rng` chooses what no caption names (eyes, brows, nose, exact shades)."""
    hair = jitter(at.HAIR_COLORS[portrait["hair_color"]], rng)
    cloth = jitter(at.CLOTHING_COLORS[portrait["clothing_color"]], rng)
    blazer = portrait["clothing"] == "blazer"
    hat = portrait["headwear"] == "winter hat"
    avatar = pa.Avatar(
        style=pa.AvatarStyle.TRANSPARENT,
        top=pa.HatType[rng.choice(HATS)] if hat else pa.HairType[HAIR[portrait["hair_style"]]],
        hat_color=jitter(rng.choice(HAT_COLORS), rng),
        hair_color=hair,
        facial_hair=pa.FacialHairType[rng.choice(FACIAL_HAIR[portrait["facial_hair"]])],
        facial_hair_color=hair,
        skin_color=jitter(at.SKIN[portrait["skin"]], rng),
        accessory=pa.AccessoryType[rng.choice(EYEWEAR[portrait["eyewear"]])],
        clothing=pa.ClothingType[CLOTHES[portrait["clothing"]]],
        clothing_color="#f4f4f4" if blazer else cloth,
        mouth=pa.MouthType[MOUTHS[portrait["mouth"]]],
        eyes=pa.EyeType[rng.choice(["DEFAULT", "DEFAULT", "HAPPY"])],
        eyebrows=pa.EyebrowType[rng.choice(["DEFAULT", "RAISED_EXCITED", "FLAT_NATURAL"])],
        nose=pa.NoseType[rng.choice(["DEFAULT", "SMALL", "WIDE"])],
    )
    text = avatar.render()
    if blazer:  # the part's jacket is always grey: give it the colour, and the shirt white
        text = text.replace("#3A4C5A", cloth).replace("#2F4351", darker(cloth))
    return frame(enlarge(text), jitter(at.BACKGROUNDS[portrait["background"]], rng, 3))


def enlarge(text: str) -> str:
    """Mouth and eyes a little larger than drawn: at 64 pixels they carry most of what is asked for."""
    for part, move, (x, y), scale in (
        ("Mouth", "translate(2.000000, 52.000000)", (54, 20), 1.4),
        ("Eyes", "translate(0.000000, 8.000000)", (56, 22), 1.2),
    ):
        old = f'id="transparent_{part}" transform="{move}"'
        if old not in text:
            raise ValueError(f"the avatar template has no {part} group as expected")
        new = f"{move} translate({x}, {y}) scale({scale}) translate({-x}, {-y})"
        text = text.replace(old, f'id="transparent_{part}" transform="{new}"')
    return text


def frame(text: str, background: str) -> str:
    """The drawing cropped to `VIEW_BOX` on a flat background."""
    left, top, side = VIEW_BOX
    end = text.index(">", text.index("<svg")) + 1
    head = text[:end]  # keeps the name spaces that the parts declare
    for name, value in (("width", side), ("height", side), ("viewBox", f"{left} {top} {side} {side}")):
        head = re.sub(rf'\b{name}="[^"]*"', f'{name}="{value}"', head)
    return f'{head}<rect x="0" y="0" width="300" height="300" fill="{background}"/>{text[end:]}'


def picture(portrait: Portrait, rng: random.Random) -> np.ndarray:
    """A portrait as (64, 64, 3) uint8, drawn at twice the size and box-averaged."""
    data = bytes(resvg_py.svg_to_bytes(svg_string=svg(portrait, rng), width=2 * SIZE, skip_system_fonts=True))
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))


def _one(job: tuple[Portrait, int]) -> np.ndarray:
    return picture(job[0], random.Random(job[1]))


def pictures(portraits: list[Portrait], seed: int, workers: int = 1, together: int = 1) -> np.ndarray:
    """(N, 64, 64, 3) uint8. Each `together` portraits are drawn by the same random numbers."""
    jobs = [(portrait, seed * 1_000_003 + i // together) for i, portrait in enumerate(portraits)]
    if workers == 1:
        return np.stack([_one(job) for job in jobs])
    with ProcessPoolExecutor(workers) as pool:
        return np.stack(list(pool.map(_one, jobs, chunksize=64)))


def load(folder: Path) -> tuple[np.ndarray, list[Portrait]]:
    """A cache written by `save`: pictures (N, 64, 64, 3) uint8 and their attributes."""
    lines = (folder / "portraits.jsonl").read_text().splitlines()
    return np.load(folder / "pictures.npy"), [json.loads(line) for line in lines]


def save(folder: Path, drawn: np.ndarray, portraits: list[Portrait]) -> None:
    """A cache for `load`."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "pictures.npy", drawn)
    (folder / "portraits.jsonl").write_text("".join(json.dumps(p) + "\n" for p in portraits))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=24000)
    parser.add_argument("--draw", choices=["uniform", "rare", "twins"], default="uniform")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    together = 2 if options.draw == "twins" else 1
    draw = {"uniform": at.draw_uniform, "rare": at.draw_rare, "twins": at.draw_twins}[options.draw]
    found = [draw(rng) for _ in range(options.count // together)]
    portraits = [portrait for one in found for portrait in (one if isinstance(one, tuple) else (one,))]
    save(options.output, pictures(portraits, options.seed, options.workers, together), portraits)


if __name__ == "__main__":
    main()
