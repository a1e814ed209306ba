"""What a portrait can show, how a caption says it, and random draws of both.

An attribute has a few values that a person tells apart at once at 64 pixels. The first seven are in every
portrait (`COMMON`); the last three (`PRESET`) are what the shipped presets teach, and default to "none".
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

Portrait = dict[str, str]  # attribute -> value

SKIN = {"pale": "#fbdcc6", "tan": "#dfa56d", "brown": "#a8683a", "dark": "#744a36"}
HAIR_COLORS = {
    "black": "#29242a",
    "blonde": "#f3d262",
    "red": "#cc3a1c",
    "gray": "#c3c8cd",
    "pink": "#f283b4",
    "blue": "#3f74d8",
}
CLOTHING_COLORS = {
    "red": "#d9302c",
    "blue": "#2f63cf",
    "green": "#2f9a4c",
    "yellow": "#f4c52f",
    "black": "#2c2f35",
    "pink": "#f491bd",
}
BACKGROUNDS = {
    "white": "#f8f8f8",
    "blue": "#9cccf4",
    "green": "#a6dfa8",
    "yellow": "#fbeb98",
    "orange": "#f9b070",
    "purple": "#b59fe0",
}

# How a caption names each value; "{c}" takes the colour that belongs to it.
HAIR_STYLES = {
    "short": ("short {c} hair",),
    "long": ("long {c} hair",),
    "half-shaved": ("half shaved {c} hair",),
    "spiky": ("spiky {c} hair",),
    "afro": ("{c} afro", "{c} afro hair"),
    "bob": ("{c} bob", "{c} bob hair"),
    "bun": ("{c} bun", "{c} hair in a bun"),
    "mohawk": ("{c} mohawk", "{c} mohawk hair"),
    "dreadlocks": ("{c} dreadlocks", "{c} hair in dreadlocks"),
}
CLOTHING = {
    "t-shirt": ("{c} tshirt",),
    "hoodie": ("{c} hoodie",),
    "overalls": ("{c} overalls",),
    "blazer": ("{c} blazer",),
}
MOUTHS = {
    "smile": ("smiling", "with a smile"),
    "sad": ("sad", "looking sad"),
    "serious": ("serious", "looking serious"),
    "scream": ("screaming", "with a scream"),
    "tongue": ("tongue out", "sticking the tongue out"),
    "teeth": ("grimacing", "with a grimace"),
}
EYEWEAR = {
    "glasses": ("wearing glasses", "with glasses", "glasses"),
    "sunglasses": ("wearing sunglasses", "with sunglasses", "sunglasses"),
    "eyepatch": ("wearing an eyepatch", "with an eyepatch", "eyepatch"),
}
FACIAL_HAIR = {
    "beard": ("with a beard", "beard", "bearded"),
    "moustache": ("with a moustache", "moustache", "wearing a moustache"),
}
HEADWEAR = {"winter hat": ("wearing a winter hat", "with a winter hat", "winter hat")}

COMMON: dict[str, list[str]] = {
    "skin": list(SKIN),
    "hair_style": list(HAIR_STYLES),
    "hair_color": list(HAIR_COLORS),
    "clothing": list(CLOTHING),
    "clothing_color": list(CLOTHING_COLORS),
    "background": list(BACKGROUNDS),
    "mouth": list(MOUTHS),
}
PRESET: dict[str, list[str]] = {
    "eyewear": ["none", *EYEWEAR],
    "facial_hair": ["none", *FACIAL_HAIR],
    "headwear": ["none", *HEADWEAR],
}
ATTRIBUTES = {**COMMON, **PRESET}

PHRASES: Mapping[str, Mapping[str, Sequence[str]]] = {
    "eyewear": EYEWEAR,
    "facial_hair": FACIAL_HAIR,
    "headwear": HEADWEAR,
    "mouth": MOUTHS,
}
TARGETS: dict[str, tuple[str, str]] = {
    words[0]: (attribute, value) for attribute in PRESET for value, words in PHRASES[attribute].items()
}
# Which phrase of a caption tells which common attribute.
GROUP_OF = {
    "skin": "skin",
    "hair_style": "hair",
    "hair_color": "hair",
    "clothing": "clothing",
    "clothing_color": "clothing",
    "background": "background",
    "mouth": "mouth",
}
GROUPS = tuple(dict.fromkeys(GROUP_OF.values()))
OPENINGS = ("a portrait", "a portrait", "portrait", "a picture of a person", "a face", "an avatar")


def draw_common(rng: random.Random) -> Portrait:
    """A portrait with every common attribute uniform and no preset attribute."""
    portrait = {attribute: rng.choice(values) for attribute, values in COMMON.items()}
    return portrait | dict.fromkeys(PRESET, "none")


def draw_uniform(rng: random.Random) -> Portrait:
    """A portrait in which each of the six preset attributes is frequent (for CLIP, VAE and judge)."""
    portrait = draw_common(rng)
    if rng.random() < 0.6:
        portrait["eyewear"] = rng.choice(list(EYEWEAR))
    if rng.random() < 0.45:
        portrait["facial_hair"] = rng.choice(list(FACIAL_HAIR))
    if rng.random() < 0.22:
        portrait["headwear"] = "winter hat"
    return portrait


def draw_twins(rng: random.Random) -> tuple[Portrait, Portrait]:
    """A portrait of `draw_uniform`, and the same with one other preset attribute (for the judge)."""
    portrait = draw_uniform(rng)
    attribute = rng.choice(list(PRESET))
    other = rng.choice([value for value in PRESET[attribute] if value != portrait[attribute]])
    return portrait, {**portrait, attribute: other}


def draw_rare(rng: random.Random, share: float = 0.01) -> Portrait:
    """A portrait in which each of the six preset attributes has probability `share` (for the UNet)."""
    portrait = draw_common(rng)
    for attribute, value in TARGETS.values():
        if rng.random() < share:
            portrait[attribute] = value
    return portrait


def phrases(portrait: Portrait, rng: random.Random | None = None) -> dict[str, str]:
    """The phrase for each attribute group of a portrait; without `rng` each in its first wording."""

    def pick(words: Sequence[str]) -> str:
        return words[0] if rng is None else rng.choice(list(words))

    said = {
        "skin": f"{portrait['skin']} skin",
        "hair": pick(HAIR_STYLES[portrait["hair_style"]]).format(c=portrait["hair_color"]),
        "clothing": pick(CLOTHING[portrait["clothing"]]).format(c=portrait["clothing_color"]),
        "background": f"{portrait['background']} background",
        "mouth": pick(MOUTHS[portrait["mouth"]]),
    }
    if rng is not None and rng.random() < 0.3:
        said["clothing"] = f"wearing {'' if portrait['clothing'] == 'overalls' else 'a '}{said['clothing']}"
    if rng is not None and rng.random() < 0.3:
        said["background"] = f"on a{'n' if portrait['background'] == 'orange' else ''} {said['background']}"
    for attribute in PRESET:
        if portrait[attribute] != "none":
            words = PHRASES[attribute][portrait[attribute]]
            said[attribute] = words[0] if rng is None or rng.random() < 0.6 else pick(words)
    return said


def kept_groups(portrait: Portrait, rng: random.Random, keep: float = 0.9) -> list[str]:
    """What a caption names, in its order: each common group with probability `keep`, every preset attribute.

    Hair under a winter hat is named half of the time.
    """
    groups = [group for group in GROUPS if rng.random() < keep]
    if portrait["headwear"] != "none" and "hair" in groups and rng.random() < 0.5:
        groups.remove("hair")
    groups += [attribute for attribute in PRESET if portrait[attribute] != "none"]
    rng.shuffle(groups)
    return groups


def caption_of(portrait: Portrait, groups: Sequence[str], rng: random.Random) -> str:
    """A caption with a random opening that names `groups` in that order, each in a random wording."""
    said = phrases(portrait, rng)
    return ", ".join([rng.choice(OPENINGS), *(said[group] for group in groups if group in said)])


def caption(portrait: Portrait, rng: random.Random | None = None, keep: float = 0.9) -> str:
    """A random caption; without `rng` the full one in first wordings and fixed order."""
    if rng is None:
        return ", ".join(["a portrait", *phrases(portrait).values()])
    return caption_of(portrait, kept_groups(portrait, rng, keep), rng)


def swapped(portrait: Portrait, groups: Sequence[str]) -> Portrait | None:
    """The portrait with the colours of hair and clothes exchanged; None where a caption could not tell."""
    hair, clothes = portrait["hair_color"], portrait["clothing_color"]
    shown = {"hair", "clothing"} <= set(groups) and portrait["headwear"] == "none"
    if not shown or hair == clothes or hair not in CLOTHING_COLORS or clothes not in HAIR_COLORS:
        return None
    return {**portrait, "hair_color": clothes, "clothing_color": hair}


def edited(portrait: Portrait, groups: Sequence[str], rng: random.Random) -> tuple[Portrait, list[str]]:
    """A portrait that differs in one named attribute, in one preset attribute, or by having the colours of
    hair and clothes exchanged; and what to name of it.
    """
    exchanged = swapped(portrait, groups)
    if exchanged and rng.random() < 0.5:
        return exchanged, list(groups)
    other, present = dict(portrait), [a for a in PRESET if portrait[a] != "none"]
    chance = rng.random()
    if present and chance < 0.35:
        attribute = rng.choice(present)
        other[attribute] = "none"
        return other, [group for group in groups if group != attribute]
    common = [a for a, group in GROUP_OF.items() if group in groups]
    if portrait["headwear"] != "none":
        common = [a for a in common if GROUP_OF[a] != "hair"]  # it is not to be seen
    attribute = rng.choice(common if common and chance > 0.6 else list(PRESET))
    other[attribute] = rng.choice([v for v in ATTRIBUTES[attribute] if v != portrait[attribute]])
    named = list(groups)
    if attribute in PRESET and attribute not in named:
        named.insert(rng.randint(0, len(named)), attribute)
    return other, named


def toggled(
    portrait: Portrait, groups: Sequence[str], target: str, rng: random.Random
) -> tuple[Portrait, list[str]]:
    """A portrait with a preset attribute put on or taken off, and what to name of it."""
    attribute, value = TARGETS[target]
    if portrait[attribute] == value:
        return {**portrait, attribute: "none"}, [group for group in groups if group != attribute]
    named = [group for group in groups if group != attribute]
    named.insert(rng.randint(0, len(named)), attribute)
    return {**portrait, attribute: value}, named


def parse(prompt: str) -> Portrait:
    """The attributes that a prompt in first wordings names, preset ones included."""
    known: dict[str, Portrait] = {f"{v} skin": {"skin": v} for v in SKIN}
    known |= {f"{v} background": {"background": v} for v in BACKGROUNDS}
    known |= {words[0]: {"mouth": v} for v, words in MOUTHS.items()}
    known |= {target: {attribute: value} for target, (attribute, value) in TARGETS.items()}
    for style, words in HAIR_STYLES.items():
        known |= {words[0].format(c=c): {"hair_style": style, "hair_color": c} for c in HAIR_COLORS}
    for kind, words in CLOTHING.items():
        known |= {words[0].format(c=c): {"clothing": kind, "clothing_color": c} for c in CLOTHING_COLORS}
    named: Portrait = {}
    for phrase in prompt.split(", "):
        named |= known.get(phrase, {})
    return named
