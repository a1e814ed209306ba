"""The files of a run in order: the base's settings, what a preset extends or `--recipe` names, itself."""

from __future__ import annotations

from pathlib import Path

from spf_kit.config.layers import Layer, Setting
from spf_kit.config.problems import Origin, Problems, show
from spf_kit.config.reading import read_layer
from spf_kit.config.shipped import display, find_extended, find_recipe, shipped_files
from spf_kit.errors import UserError, nearest


def preset_layers(path: Path, recipe: str | None, problems: Problems) -> list[Layer]:
    """The preset's layers, weakest first. With `--recipe` that recipe takes the place of the extended ones,
    and its losses that of all losses."""
    layers = chain(path, problems, without_recipes=recipe is not None)
    if recipe is None:
        return layers
    origin = Origin(f"--recipe {recipe}")
    try:
        file = find_recipe(recipe, path)
    except UserError as error:
        problems.add(origin, str(error))
        layers[-1].complete = False
        return layers
    brought = chain(file, problems)
    if not any(layer.losses for layer in brought):
        problems.add(origin, f"{display(file)} brings no [[loss]], so it is no recipe")
        layers[-1].complete = False
    for layer in layers:
        layer.losses = []
    return [*layers[:-1], *brought, layers[-1]]


def chain(
    path: Path, problems: Problems, *, without_recipes: bool = False, above: tuple[Path, ...] = ()
) -> list[Layer]:
    """A preset and everything it extends as layers, the weakest first and the preset itself last.

    `without_recipes` leaves out extended recipes, with what they extend (`--recipe` brings another).
    Circles are reported; `above` holds the files that led here.
    """
    layer, extends = read_layer(path, problems)
    if without_recipes and above and layer.is_recipe:
        return []
    layers: list[Layer] = []
    here = (*above, path.resolve())
    for name, origin in extends:
        parent = find_extended(name, path)
        if parent is None:
            hint = nearest(name, shipped_files())
            problems.add(
                origin,
                f"extends = {show(name)}: no such file beside this one, and no such shipped preset;{hint}",
            )
        elif parent.resolve() in here:
            circle = [*here[here.index(parent.resolve()) :], parent]
            problems.add(
                origin, f"extends = {show(name)}: goes in a circle: {' → '.join(map(display, circle))}"
            )
        else:
            layers += chain(parent, problems, without_recipes=without_recipes, above=here)
    return [*layers, layer]


def base_layers(family: str | None, profile: Setting | None, problems: Problems) -> list[Layer]:
    """The settings that suit a family, if the package has any, and over them those of a profile."""
    path = shipped_files().get(f"bases/{family}")
    if path is None:
        return []
    layer = read_layer(path, problems)[0]
    if profile is None or not isinstance(profile.value, str):
        return [layer]  # a wrong type is reported by the schema
    if profile.value not in layer.profiles:
        there = ", ".join(layer.profiles) or "none"
        problems.add(
            profile.origin,
            f"base.profile = {show(profile.value)}: {display(path)} has no such profile; there are: {there}",
        )
        return [layer]
    return [layer, layer.profiles[profile.value]]
