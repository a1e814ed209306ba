"""Presets into configurations: layers, origins, round trips, and every kind of error with its place."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tomlkit
from hypothesis import given, settings
from hypothesis import strategies as st

from spf_kit import config
from spf_kit.config.lines import key_lines, parse_key
from spf_kit.config.options import command_line
from spf_kit.config.problems import Problems
from spf_kit.errors import UserError

ROOT = Path(__file__).parents[1]
SHIPPED = config.shipped_presets()
PRESETS = [preset.name for preset in SHIPPED if preset.kind == "preset"]
RECIPES = [preset.name for preset in SHIPPED if preset.kind == "recipe"]

HEAD = '[attribute]\nname = "hat"\ntarget = "a hat"\n[data]\npath = "embedded:glasses"\n'
DENOISING = '[[loss]]\nplugin = "denoising"\n'

PLUGINS = '''
from pathlib import Path
from spf_kit.losses import Field, Literal, Loss, Mask, Needs, Prior, Step, Tensor, per_sample, register


@register("cfg_l1")
class L1(Loss):
    """|target - prediction|."""

    power: int = Field(1, ge=1, description="exponent")
    kind: Literal["plain", "smooth"] = Field("plain", description="form")
    betas: tuple[float, float] = Field((0.9, 0.99), description="two numbers")
    either: float | bool = Field(1.0, description="a union")
    path: str = Field("", description="a folder")

    def __call__(self, step: Step) -> Tensor:
        return per_sample((step.target - step.response.prediction).abs() ** self.power, step.mask)


@register("cfg_half")
class Half(Mask):
    """One half everywhere."""

    level: float = Field(0.5, description="its value")

    def __call__(self, step: Step) -> Tensor:
        return step.latents[:, :1] * 0 + self.level


@register("cfg_required")
class Required(Loss):
    """A field without a default."""

    size: int = Field(ge=1, description="how large")


@register("cfg_prior")
class OtherPrior(Loss):
    """Wants five prior pictures."""

    @property
    def needs(self) -> Needs:
        return Needs.of(prior=Prior(count=5))
'''

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a file into an empty working directory: `write("mine.toml", text)`."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    path = tmp_path_factory.mktemp("plugins") / "extra.py"
    path.write_text(PLUGINS)
    return [path]


def sd15(model: str) -> str:
    """Stands for families.detect where the test is not about it."""
    return "embedded" if model == "embedded" else "sd15"


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        config.load(*arguments, **options)
    return str(caught.value)


# --- shipped files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("recipe", [None, *(name.removeprefix("recipes/") for name in RECIPES)])
def test_every_shipped_preset_loads_with_every_recipe(name: str, recipe: str | None) -> None:
    resolved = config.load(name, recipe=recipe)
    assert resolved.family == "embedded"
    assert resolved.config.attribute.name == name
    assert resolved.config.data.path == f"embedded:{name}"
    assert resolved.config.data.resolution == 64
    assert resolved.warnings == []
    assert resolved.plugins[0].name == "denoising"
    if recipe:
        layers = [tomllib.loads((ROOT / f"presets/recipes/{recipe}.toml").read_text())]
        while "extends" in layers[0]:  # a recipe may change entries of another; order is the first one's
            layers.insert(0, tomllib.loads((ROOT / f"presets/{layers[0]['extends']}.toml").read_text()))
        expected: dict[str, dict[str, Any]] = {}
        for entry in (entry for layer in layers for entry in layer["loss"]):
            expected.setdefault(entry.get("id", entry["plugin"]), {}).update(entry)
        assert [plugin.id for plugin in resolved.plugins] == list(expected)
        for plugin in resolved.plugins:
            values = {"plugin": plugin.name, **plugin.model_dump()}
            assert expected[plugin.id].items() <= values.items()


def test_shipped_targets_are_what_the_embedded_judge_knows() -> None:
    from spf_kit.embedded.build.attributes import TARGETS

    assert {preset.target for preset in SHIPPED if preset.kind == "preset"} == set(TARGETS)


@pytest.mark.parametrize("preset", SHIPPED, ids=lambda preset: preset.name)
def test_shipped_files_fit_the_schema_and_say_what_they_are(preset: config.ShippedPreset) -> None:
    jsonschema.validate(tomllib.loads(preset.path.read_text(encoding="utf-8")), config.json_schema())
    assert preset.summary.endswith(".")
    text = preset.path.read_text(encoding="utf-8")
    schema = text.splitlines()[0].removeprefix("#:schema ")
    assert (preset.path.parent / schema).resolve() == ROOT / "presets/preset.schema.json"
    if preset.kind == "preset":
        assert set(tomllib.loads(text)) == {"extends", "attribute", "data"}
    if preset.kind == "base":
        assert "model" not in tomllib.loads(text).get("base", {}), "the base is what chose this file"


def test_the_schema_file_is_current() -> None:
    file = ROOT / "presets/preset.schema.json"
    assert file.read_text(encoding="utf-8") == config.json_schema_text(), "run `python -m spf_kit.config`"
    jsonschema.Draft7Validator.check_schema(json.loads(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "text",
    [
        "[train]\nstpes = 4",
        "[train]\nsteps = '4'",
        "[train]\nsteps = 0",
        "[trian]\nsteps = 4",
        "extends = 3",
        '[adapter]\ntargets = ["nose"]',
        '[[loss]]\nplugin = "denoising"\nwieght = 1',
        '[[loss]]\nplugin = "denoising"\nkind = "l3"',
        "[[loss]]\nweight = 1",
        '[attribute]\nname = "a b"',
    ],
)
def test_the_schema_refuses_what_loading_refuses(text: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tomllib.loads(text), config.json_schema())


@pytest.mark.parametrize(
    "text",
    [
        'extends = ["a", "b"]\n[adapter]\nalpha = 4',
        '[[loss]]\nplugin = "a_third_partys"\nanything = [1]',
        '[[loss]]\nid = "denoising"\nweight = 2',
        "[train]\noptimizer_args = { betas = [0.9, 0.99] }",
    ],
)
def test_the_schema_accepts_partial_presets(text: str) -> None:
    jsonschema.validate(tomllib.loads(text), config.json_schema())


# --- finding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["glasses", "glasses.toml", "presets/glasses.toml", "./presets/glasses.toml", "presets\\glasses.toml"],
)
def test_presets_are_found_away_from_the_checkout(name: str, write: Write) -> None:
    assert config.find_preset(name) == ROOT / "presets/glasses.toml"


def test_a_file_that_exists_wins_over_the_shipped_one(write: Write) -> None:
    mine = write("presets/glasses.toml", HEAD + DENOISING)
    assert config.find_preset("presets/glasses.toml").resolve() == mine
    assert config.find_preset("glasses") == ROOT / "presets/glasses.toml"
    other = write("mine.toml", "")
    assert config.find_preset("mine").resolve() == other


def test_an_unknown_preset_is_refused_with_the_nearest(write: Write) -> None:
    assert "did you mean 'glasses'?" in refused("glases")
    assert "did you mean 'glasses'?" in refused("elsewhere/glasses.toml")
    write("folder/mine.toml", "")
    assert "is a folder" in refused("folder")


# --- layers and origins -----------------------------------------------------------------------------------


def test_layers_in_order_with_origins(write: Write) -> None:
    write(
        "common.toml",
        "[train]\nbatch_size = 3\nwarmup = 5\nsteps = 7\nseed = 1\n" + DENOISING + "weight = 2\n",
    )
    write(
        "mine.toml",
        'extends = "common"\n'
        + HEAD
        + "[train]\nwarmup = 6\nseed = 2\n"
        + DENOISING
        + 'kind = "l1"\nend = 1.0\n',
    )
    resolved = config.load("mine.toml", seed=3, sets=["loss.denoising.kind=huber", "train.ema=0.9"])
    train, origins = resolved.config.train, {key: str(origin) for key, origin in resolved.origins.items()}
    assert (train.max_grad_norm, origins["train.max_grad_norm"]) == (1.0, "default")
    assert train.learning_rate == 2e-3
    assert origins["train.learning_rate"].startswith("presets/bases/embedded.toml:")
    line = int(origins["train.learning_rate"].rsplit(":", 1)[1])
    assert "learning_rate" in (ROOT / "presets/bases/embedded.toml").read_text().splitlines()[line - 1]
    assert (train.batch_size, origins["train.batch_size"]) == (3, "common.toml:2")
    assert (train.steps, origins["train.steps"]) == (7, "common.toml:4")
    assert (train.warmup, origins["train.warmup"]) == (6, "mine.toml:8")
    assert (train.seed, origins["train.seed"]) == (3, "--seed 3")
    assert (train.ema, origins["train.ema"]) == (0.9, "--set train.ema=0.9")
    (loss,) = resolved.plugins
    assert (loss.weight, origins["loss.denoising.weight"]) == (2.0, "common.toml:8")
    assert (loss.kind, origins["loss.denoising.kind"]) == ("huber", "--set loss.denoising.kind=huber")
    assert (loss.end, origins["loss.denoising.end"]) == (1.0, "mine.toml:13")
    assert origins["loss.denoising.start"] == "default"
    rows = {row.key: row for row in resolved.describe()}
    assert rows["train.warmup"] == ("train.warmup", 6, "mine.toml:8")
    assert rows.keys() >= {
        f"{s}.{k}" for s in ("data", "output") for k in getattr(resolved.config, s).model_dump()
    }
    assert rows["loss.denoising.plugin"].value == "denoising"


def test_the_base_brings_its_own_settings(tmp_path: Path) -> None:
    resolved = config.load("glasses", base="owner/model", data=tmp_path, detect=sd15)
    assert resolved.family == "sd15"
    assert resolved.config.data.resolution == 512
    assert resolved.config.train.optimizer == "adamw8bit"
    assert resolved.config.train.gradient_checkpointing
    assert str(resolved.origins["data.resolution"]).startswith("presets/bases/sd15.toml:")
    assert str(resolved.origins["base.model"]) == "--base owner/model"
    assert (
        config.load("glasses", base="x/y", data=tmp_path, detect=lambda model: "novel").config.data.resolution
        == 512
    )


def test_extends_lists_and_your_own_glasses(write: Write) -> None:
    write("a.toml", "[train]\nwarmup = 1\nseed = 1\n")
    write("b.toml", "[train]\nseed = 2\n")
    write("glasses.toml", 'extends = ["glasses", "a.toml", "b"]\n[adapter]\nrank = 3\n')
    resolved = config.load("glasses.toml")
    assert resolved.config.attribute.target == "wearing glasses"  # from the shipped preset of the same name
    assert (resolved.config.train.warmup, resolved.config.train.seed, resolved.config.adapter.rank) == (
        1,
        2,
        3,
    )


def test_losses_merge_by_id_and_keep_their_order(write: Write, plugins: list[Path]) -> None:
    write("recipe.toml", DENOISING + '[[loss]]\nplugin = "cfg_l1"\nid = "late"\nstart = 0.5\n')
    write(
        "mine.toml",
        'extends = "recipe"\n' + HEAD + '[[loss]]\nplugin = "cfg_half"\n'
        '[[loss]]\nid = "late"\nmask = "cfg_half"\nstart = 0.25\n[[loss]]\nplugin = "cfg_l1"\n',
    )
    resolved = config.load("mine.toml", plugin_files=plugins)
    assert [(p.id, p.name) for p in resolved.plugins] == [
        ("denoising", "denoising"), ("cfg_half", "cfg_half"), ("late", "cfg_l1"), ("cfg_l1", "cfg_l1"),
    ]  # fmt: skip
    late = resolved.plugins[2]
    assert (late.mask, late.start) == ("cfg_half", 0.25)
    assert [entry.id for entry in resolved.config.loss] == ["denoising", "cfg_half", "late", "cfg_l1"]


def test_another_plugin_under_an_id_replaces_the_entry(write: Write, plugins: list[Path]) -> None:
    write("recipe.toml", '[[loss]]\nplugin = "denoising"\nid = "main"\nkind = "l1"\nweight = 3\n')
    write(
        "mine.toml", 'extends = "recipe"\n' + HEAD + '[[loss]]\nplugin = "cfg_l1"\nid = "main"\npower = 2\n'
    )
    (main,) = config.load("mine.toml", plugin_files=plugins).plugins
    assert (main.name, main.id, main.weight, main.power) == ("cfg_l1", "main", 1.0, 2)


def test_recipe_replaces_the_losses_and_the_extended_recipe(write: Write, plugins: list[Path]) -> None:
    write("recipes/one.toml", "[train]\nwarmup = 1\nsteps = 11\nseed = 1\n" + DENOISING)
    write("recipes/two.toml", "[train]\nsteps = 12\nseed = 2\n" + '[[loss]]\nplugin = "cfg_l1"\n')
    write("shared.toml", "[adapter]\nrank = 5\n")
    write("mine.toml", 'extends = ["recipes/one", "shared"]\n' + HEAD + "[train]\nseed = 3\n" + DENOISING)
    resolved = config.load("mine.toml", recipe="two", plugin_files=plugins)
    assert [plugin.name for plugin in resolved.plugins] == ["cfg_l1"]
    train = resolved.config.train
    assert (train.steps, train.seed, train.warmup) == (12, 3, 0)
    assert resolved.config.adapter.rank == 5
    assert config.load("mine.toml", recipe="recipes/two.toml", plugin_files=plugins).config == resolved.config
    assert "did you mean 'naive'?" in refused("mine.toml", recipe="niave")
    assert "brings no [[loss]]" in refused(
        "mine.toml", recipe=str(write("shared2.toml", "[adapter]\nrank = 5\n"))
    )


def test_steps_and_epochs_whichever_is_said_last(write: Write) -> None:
    write("mine.toml", HEAD + "[train]\nepochs = 4\n" + DENOISING)
    resolved = config.load("mine.toml")
    assert resolved.config.train.epochs == 4
    assert "epochs" in str(resolved.origins["train.steps"])
    assert config.load("mine.toml", steps=5).config.train.epochs is None
    assert config.load("mine.toml", steps=5).config.train.steps == 5
    text = refused("mine.toml", sets=["train.steps=3", "train.epochs=2"])
    assert (
        text == "--set train.epochs=2: train.epochs = 2: train.steps = 3 is set too (--set train.steps=3); "
        "remove one"
    )


def test_sets_reach_tables_losses_and_new_entries(plugins: list[Path]) -> None:
    sets = [
        "train.optimizer_args.weight_decay=0.1", "train.optimizer_args.betas=[0.9, 0.95]",
        "attribute.target=wearing round glasses", 'adapter.targets=["cross-attention", "text-encoder"]',
        "loss.extra.weight=0.5", "loss.extra.plugin=cfg_l1", "loss.cfg_half.plugin=cfg_half",
        "loss.extra.mask=cfg_half",
    ]  # fmt: skip
    resolved = config.load("glasses", recipe="naive", sets=sets, plugin_files=plugins)
    assert resolved.config.train.optimizer_args == {"weight_decay": 0.1, "betas": [0.9, 0.95]}
    assert resolved.config.attribute.target == "wearing round glasses"
    assert resolved.config.adapter.targets == ["cross-attention", "text-encoder"]
    assert [p.id for p in resolved.plugins] == [
        "cfg_half",
        "denoising",
        "extra",
    ]  # a mask comes before its readers
    assert resolved.plugins[2].weight == 0.5


# --- paths ------------------------------------------------------------------------------------------------


def test_paths_are_relative_to_the_file_that_names_them(
    write: Write, tmp_path: Path, plugins: list[Path]
) -> None:
    for folder in ("sets/pictures", "sets/clip", "here", "sets/prior"):
        (tmp_path / folder).mkdir(parents=True)
    write("sets/base.safetensors", "")
    write("sets/vae.safetensors", "")
    write("sets/old.safetensors", "")
    write("sets/recipe.toml", '[[loss]]\nplugin = "cfg_l1"\npath = "prior"\n')
    write(
        "sets/mine.toml",
        'extends = "recipe"\n[attribute]\nname = "hat"\ntarget = "a hat"\n[data]\npath = "pictures"\n'
        '[base]\nmodel = "base.safetensors"\nvae = "./vae.safetensors"\n[clip]\nmodel = "../sets/clip"\n'
        '[adapter]\nstart_from = "old.safetensors"\n',
    )
    resolved = config.load("sets/mine.toml", detect=sd15, plugin_files=plugins)
    sets = tmp_path / "sets"
    assert resolved.config.base.model == str(sets / "base.safetensors")
    assert resolved.config.base.vae == str(sets / "vae.safetensors")
    assert resolved.config.clip.model == str(sets / "clip")
    assert resolved.config.data.path == str(sets / "pictures")
    assert resolved.config.adapter.start_from == str(sets / "old.safetensors")
    assert resolved.plugins[0].path == str(sets / "prior")
    told = config.load("sets/mine.toml", base="b.safetensors", data="here", detect=sd15, plugin_files=plugins)
    assert told.config.base.model == str(tmp_path / "b.safetensors")
    assert told.config.data.path == str(tmp_path / "here")
    assert (
        config.load("sets/mine.toml", base="a/b", detect=sd15, plugin_files=plugins).config.base.model
        == "a/b"
    )


def test_windows_paths_survive(write: Write, tmp_path: Path) -> None:
    path = r"C:\new\table\model.safetensors"
    write("mine.toml", HEAD + f"[base]\nmodel = '{path}'\n" + DENOISING)
    for options in ({}, {"base": path}, {"sets": [f"base.model={path}"]}, {"sets": [f"base.model='{path}'"]}):
        seen: list[str] = []
        resolved = config.load(
            "mine.toml",
            data=tmp_path,
            detect=lambda model, seen=seen: seen.append(model) or "sd15",
            **options,
        )
        assert resolved.config.base.model == path
        assert seen == [path]
        again = write("again.toml", resolved.to_toml())
        assert config.load(again, detect=sd15).config == resolved.config


@pytest.mark.parametrize(
    ("value", "line"), [(r'"C:\pictures\x"', 5), (r'"C:\Users\me"', 5), (r'"C:\temp\new"', 5)]
)
def test_backslashes_in_double_quotes_name_the_remedy(value: str, line: int, write: Write) -> None:
    write("mine.toml", HEAD.replace('"embedded:glasses"', value) + DENOISING)
    text = refused("mine.toml")
    assert text.startswith(f"mine.toml:{line}: ")
    assert "single quotes" in text
    assert "double quotes" in text


def test_a_quoted_windows_path_on_the_command_line_names_the_remedy() -> None:
    text = refused("glasses", sets=[r'data.path="C:\pictures"'])
    assert text.startswith("--set data.path=")
    assert "inner quotes" in text
    assert "single quotes" in refused("glasses", sets=[r'data.path="C:\temp"'])


def test_paths_that_lead_nowhere(write: Write) -> None:
    write("a-file", "")
    text = refused(
        "glasses",
        data="nowhere",
        sets=["base.vae=vae.safetensors", "adapter.start_from=", "clip.model=a-file"],
    )
    assert "--data nowhere: data.path = " in text
    assert "there is no such folder" in text
    assert 'vae.safetensors": there is no such file' in text
    assert 'adapter.start_from = "": must not be empty' in text
    assert "expected a folder, this is a file" in text
    assert text.startswith("4 things are wrong with the preset 'glasses':\n")


def test_embedded_pictures_are_refused_on_a_real_base(tmp_path: Path) -> None:
    text = refused("glasses", base="x.safetensors", detect=sd15)
    assert text.startswith("--base x.safetensors: base.model = ")
    assert "embedded:glasses" in text
    assert "presets/glasses.toml:" in text
    assert "--data FOLDER" in text
    assert (
        config.load("glasses", data=tmp_path).config.data.resolution == 64
    )  # own pictures on the embedded base
    assert "did you mean 'embedded:glasses'?" in refused("glasses", data="embedded:glases")


# --- round trip -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_the_effective_configuration_loads_as_itself(
    recipe: str | None, write: Write, plugins: list[Path]
) -> None:
    options = {
        "sets": [
            "train.optimizer_args={ betas = [0.9, 0.95], nested = { a = 'x' } }", "train.learning_rate=3",
            "attribute.target=line\t'quote' \"two\"", "adapter.alpha=1e-7", "preview.prompts=['a, b', 'c']",
            "loss.extra.plugin=cfg_l1", "loss.extra.betas=[0.5, 1]", "loss.cfg_half.plugin=cfg_half",
            "loss.extra.mask=cfg_half", "train.text_encoder_learning_rate=1e-5", "preview.every=1",
        ],
        "plugin_files": plugins,
    }  # fmt: skip
    first = config.load("glasses", recipe=recipe, **options)
    text = first.to_toml()
    second = config.load(write("config.toml", text), plugin_files=plugins)
    assert second.config == first.config
    assert [p.model_dump() for p in second.plugins] == [p.model_dump() for p in first.plugins]
    assert second.to_toml() == text
    jsonschema.validate(tomllib.loads(text), config.json_schema())
    data = tomllib.loads(text)
    for section, values in first.config.model_dump(exclude={"loss"}).items():
        assert data[section].keys() == {key for key, value in values.items() if value is not None}
    assert data["loss"][-1] == {
        "plugin": "cfg_l1", "id": "extra", "enabled": True, "start": 0.0, "end": 1.0, "weight": 1.0,
        "mask": "cfg_half", "power": 1, "kind": "plain", "betas": [0.5, 1.0], "either": 1.0, "path": "",
    }  # fmt: skip


def test_epochs_survive_the_round_trip(write: Write) -> None:
    first = config.load("glasses", sets=["train.epochs=3"])
    assert config.load(write("config.toml", first.to_toml())).config == first.config


# --- errors -----------------------------------------------------------------------------------------------

WRONG = [
    # (lines after HEAD, which has 5; expected line, expected parts)
    ("[train]\nstpes = 4\n", 7, ["train.stpes = 4", "unknown key", "did you mean 'steps'?"]),
    ("[train]\nrank = 4\n", 7, ["train.rank = 4", "it belongs in [adapter]"]),
    ("[trian]\nsteps = 4\n", 6, ["[trian]: unknown section", "did you mean 'train'?"]),
    ('[train]\nsteps = "400"\n', 7, ['train.steps = "400"', "expected a whole number", "without quotes"]),
    ("[train]\nsteps = 400.0\n", 7, ["train.steps = 400.0", "expected a whole number", "write 400"]),
    (
        "[train]\nbatch_size = true\n",
        7,
        ["train.batch_size = true", "expected a whole number", "true or false"],
    ),
    ('[train]\nlearning_rate = "1e-4"\n', 7, ["expected a number, not text", "write 1e-4 without quotes"]),
    ("[train]\nlearning_rate = inf\n", 7, ["train.learning_rate = inf", "finite"]),
    ("[train]\nlearning_rate = 0\n", 7, ["train.learning_rate = 0", "nothing would be trained"]),
    ("[train]\nsteps = 0\n", 7, ["train.steps = 0", "at least 1"]),
    ("[train]\nema = 1.0\n", 7, ["train.ema = 1.0", "less than 1"]),
    ("[train]\noptimizer = 2024-01-01\n", 7, ["expected no date"]),
    (
        '[train]\nschedule = "cosin"\n',
        7,
        ['train.schedule = "cosin"', "'constant', 'cosine'", "mean 'cosine'?"],
    ),
    ("[train]\noptimizer_args = 3\n", 7, ["expected a table, not a whole number"]),
    (
        "[train]\nsteps = 4\nepochs = 2\n",
        8,
        ["train.epochs = 2", "train.steps = 4", "mine.toml:7", "remove one"],
    ),
    ('[adapter]\ntargets = "text-encoder"\n', 7, ["expected a list, not text", 'write ["text-encoder"]']),
    (
        '[adapter]\ntargets = [\n  "cross-atention",\n]\n',
        7,
        ['"cross-atention"', "did you mean 'cross-attention'?"],
    ),
    ("[adapter]\ntargets = []\n", 7, ["adapter.targets = []", "at least 1"]),
    ('[adapter]\ntargets = ["convolutions", "convolutions"]\n', 7, ["'convolutions' stands in it twice"]),
    ("[base]\nmodel = 3\n", 7, ["base.model = 3", "expected text in quotes"]),
    ("[base.deep]\nx = 1\n", 6, ["base.deep", "unknown key"]),
    ("[[preview]]\nevery = 1\n", 6, ["expected the section [preview]"]),
    ("[loss]\nplugin = 'denoising'\n", 6, ["[[loss]]", "double brackets"]),
    ("[evaluate]\nenabled = 'true'\n", 7, ["expected true or false", "write true without quotes"]),
    (
        "[[loss]]\nplugin = 'denosing'\n",
        7,
        ["loss.denosing.plugin", "unknown plugin", "did you mean 'denoising'?"],
    ),
    ("[[loss]]\nweight = 2\n", 6, ["[[loss]]: names no plugin"]),
    ("[[loss]]\nplugn = 'denoising'\n", 6, ["names no plugin", "did you mean 'plugin'?"]),
    ("[[loss]]\nid = 'nobody'\nweight = 2\n", 6, ["loss.nobody: names no plugin"]),
    ("[[loss]]\nplugin = 3\n", 7, ["loss.plugin = 3", "expected text in quotes"]),
    (DENOISING + "wieght = 2\n", 8, ["loss.denoising.wieght = 2", "unknown key", "did you mean 'weight'?"]),
    (DENOISING + "weight = 'x'\n", 8, ['loss.denoising.weight = "x"', "expected a number"]),
    (DENOISING + "weight = nan\n", 8, ["loss.denoising.weight = nan", "finite"]),
    (DENOISING + "start = 0.6\nend = 0.5\n", 6, ["loss.denoising: start = 0.6 must be less than end = 0.5"]),
    (DENOISING + "start = 0.3\n", 8, ["loss.denoising.start = 0.3", "no loss acts between 0.0 and 0.3"]),
    (DENOISING + "end = 0.3\n", 8, ["loss.denoising.end = 0.3", "no loss acts from there"]),
    (DENOISING + "weight = 0\n", 8, ["every loss has weight 0"]),
    (DENOISING + DENOISING, 8, ["loss.denoising: this id is taken (line 6)"]),
    (DENOISING + "mask = 'cfg_hlaf'\n[[loss]]\nplugin = 'cfg_half'\n", 8, ["did you mean 'cfg_half'?"]),
    (
        DENOISING + "mask = 'cfg_half'\n[[loss]]\nplugin = 'cfg_half'\n",
        8,
        ["the mask stands after this entry"],
    ),
    (DENOISING + "mask = 'cfg_half'\n", 8, ["expected the id of a mask; the preset has none"]),
    (DENOISING + "[[loss]]\nplugin = 'cfg_l1'\nmask = 'denoising'\n", 10, ["this is the id of a loss"]),
    (
        "[[loss]]\nplugin = 'cfg_half'\nstart = 0.5\n" + DENOISING + "mask = 'cfg_half'\n",
        11,
        ["the mask acts from 0.5 to 1.0", "widen the mask"],
    ),
    (DENOISING + "[[loss]]\nplugin = 'cfg_required'\n", 8, ["loss.cfg_required.size is missing: how large"]),
    (
        DENOISING + "[[loss]]\nplugin = 'cfg_l1'\nbetas = [1]\n",
        10,
        ["loss.cfg_l1.betas = [1]", "too few values"],
    ),
    (
        DENOISING + "[[loss]]\nplugin = 'cfg_l1'\neither = 'x'\n",
        10,
        ["expected a number, not text; or expected true or false, not text"],
    ),
    (
        DENOISING + "[[loss]]\nplugin = 'prior_preservation'\n[[loss]]\nplugin = 'cfg_prior'\n",
        11,
        ["different prior pictures"],
    ),
    (DENOISING + "min_snr_gamma = 5\ndebiased = true\n", 6, ["two weightings"]),
    ("[data2]\nx = 1\n", 6, ["[data2]: unknown section", "did you mean 'data'?"]),
    ("extends = 3\n", 6, ["data.extends"]),
    (DENOISING + "path = 3\n", 8, ["loss.denoising.path", "unknown key"]),
]


@pytest.mark.parametrize(("body", "line", "parts"), WRONG)
def test_one_mistake_is_one_sentence_with_its_line(
    body: str, line: int, parts: list[str], write: Write, plugins: list[Path]
) -> None:
    losses = "" if "[[loss]]" in body or "[loss]" in body else DENOISING
    write("mine.toml", HEAD + body + losses)
    text = refused("mine.toml", plugin_files=plugins)
    assert text.startswith(f"mine.toml:{line}: "), text
    assert "\n" not in text
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("text", "start", "parts"),
    [
        (HEAD[HEAD.index("[data]") :] + DENOISING, "2 things", ["attribute.name is", "attribute.target is"]),
        ('[attribute]\nname = "a b"\ntarget = ""\n' + DENOISING, "3 things", ["letters", "not be empty"]),
        ('[attribute]\nname = "a"\n' + DENOISING, "2 things", ["target is missing", "path is missing"]),
        (HEAD, "mine.toml: ", ["no loss", "recipes/naive"]),
        (HEAD + '[[loss]]\nplugin = "cfg_half"\n', "mine.toml: ", ["no loss"]),
        ("steps = 4\n" + HEAD + DENOISING, "mine.toml:1: ", ["steps = 4", "it belongs in [train]"]),
        ("stpes = 4\n" + HEAD + DENOISING, "mine.toml:1: ", ["did you mean 'steps'?"]),
        ("extends = 3\n" + HEAD + DENOISING, "mine.toml:1: ", ["extends = 3", "the name of a preset"]),
        ('extends = "recipes/niave"\n' + HEAD + DENOISING, "mine.toml:1: ", ["mean 'recipes/naive'?"]),
        ("train = 3\n" + HEAD + DENOISING, "mine.toml:1: ", ["expected the section [train]"]),
        ("loss = [3]\n" + HEAD, "mine.toml:1: ", ["loss = [3]"]),
        (HEAD + "[train]\nsteps = \n", "mine.toml:7: ", ["not valid TOML"]),
        (HEAD + "[train]\nsteps = 4\nsteps = 5\n", "mine.toml:8: ", ["not valid TOML", "overwrite"]),
        (HEAD + "[base]\nmodel = embedded\n", "mine.toml:7: ", ["text stands in quotes"]),
    ],
)  # fmt: skip
def test_whole_files(text: str, start: str, parts: list[str], write: Write, plugins: list[Path]) -> None:
    write("mine.toml", text)
    message = refused("mine.toml", plugin_files=plugins)
    assert message.startswith(start), message
    for part in parts:
        assert part in message


def test_everything_wrong_is_reported_at_once(write: Write) -> None:
    write("common.toml", "[train]\nwarmpu = 1\n" + DENOISING + "wieght = 1\n")
    write("mine.toml", 'extends = "common"\n' + HEAD + "[train]\nsteps = 'x'\n[adaptr]\nrank = 1\n")
    text = refused(
        "mine.toml", base="nobody.safetensors", sets=["train.seed=-1", "loss.denosing.weight=1", "x"]
    )
    head, *lines = text.split("\n")
    assert head == "8 things are wrong with the preset 'mine.toml':"
    places = [line.strip().split(": ")[0] for line in lines]
    assert sorted(places) == sorted(
        ["common.toml:2", "common.toml:5", "mine.toml:8", "mine.toml:9", "--base nobody.safetensors",
         "--set train.seed=-1", "--set loss.denosing.weight=1", "--set x"]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("train.stpes=4", ["train.stpes = 4", "did you mean 'steps'?"]),
        ("steps=4", ["did you mean 'train.steps'?"]),
        ("trian.steps=4", ["unknown section 'trian'", "did you mean 'train.steps'?"]),
        ("train=4", ["train is a section"]),
        ("extends=glasses", ["--recipe NAME"]),
        ("train.steps", ["expected section.key=value"]),
        ("=4", ["expected section.key=value"]),
        ("train.steps=four", ['train.steps = "four"', "expected a whole number"]),
        ("train.steps.deep=4", ["is one value and holds no keys"]),
        ("loss.denoising=4", ["expected loss.ID.KEY=value"]),
        ("loss.denosing.weight=4", ["no [[loss]] has the id 'denosing'", "did you mean 'denoising'?"]),
        (
            "loss.denosing.plugin=denoising",
            ["no [[loss]] has the id 'denosing'", "did you mean 'denoising'?"],
        ),
        ("loss.zzz.weight=4", ["the preset has denoising", "--set loss.zzz.plugin=NAME"]),
        ("loss.zzz.plugin=nothing", ['loss.zzz.plugin = "nothing"', "unknown plugin"]),
        ("loss.denoising.id=x", ["an id is not changed"]),
        ("loss.denoising.weight.x=1", ["loss.denoising.weight"]),
        ("attribute.target=5", ["attribute.target = 5", "expected text in quotes", 'write "5"']),
    ],
)
def test_set_options_are_their_own_place(option: str, parts: list[str]) -> None:
    text = refused("glasses", sets=[option])
    assert text.startswith(f"--set {option}: "), text
    assert "\n" not in text
    for part in parts:
        assert part in text


def test_circles_are_refused(write: Write) -> None:
    write("a.toml", 'extends = "b"\n' + HEAD + DENOISING)
    write("b.toml", '\nextends = "c"\n')
    write("c.toml", 'extends = "a"\n')
    assert refused("a.toml") == 'c.toml:1: extends = "a": goes in a circle: a.toml → b.toml → c.toml → a.toml'
    write("d.toml", 'extends = ["e", "f"]\n' + HEAD + DENOISING)  # a diamond is no circle
    write("e.toml", 'extends = "g"\n')
    write("f.toml", 'extends = "g"\n')
    write("g.toml", "[adapter]\nrank = 2\n")
    assert config.load("d.toml").config.adapter.rank == 2


def test_an_unknown_base_is_refused_by_the_families(write: Write) -> None:
    write("mine.toml", HEAD + '[base]\nmodel = "embeded"\n' + DENOISING)
    text = refused("mine.toml")
    assert text.startswith("mine.toml:7: base.model: ")
    assert "did you mean 'embedded'?" in text


def test_files_that_are_no_text(write: Write, tmp_path: Path) -> None:
    write("bom.toml", "\ufeff" + HEAD + DENOISING)
    assert config.load("bom.toml").config.attribute.name == "hat"
    (tmp_path / "crlf.toml").write_bytes(
        (HEAD + "[train]\nwarmup = 3\n" + DENOISING).replace("\n", "\r\n").encode()
    )
    assert str(config.load("crlf.toml").origins["train.warmup"]) == "crlf.toml:7"
    (tmp_path / "wide.toml").write_bytes(HEAD.encode("utf-16"))
    assert refused("wide.toml") == "wide.toml: is not UTF-8 text; save it as UTF-8"


def test_a_broken_plugin_file_is_reported_with_the_rest(write: Write) -> None:
    write("broken.py", "import nothing_of_this_name")
    text = refused("glasses", steps=0, plugin_files=[Path("broken.py"), Path("absent.py")])
    assert text.startswith("2 things")
    assert "nothing_of_this_name" in text
    assert "train.steps = 0" in text


def test_settings_without_effect_are_warnings(write: Write) -> None:
    sets = [
        "data.keep_tokens=1",
        "train.warmup=5000",
        "train.text_encoder_learning_rate=1e-5",
        "preview.every=0",
    ]
    warnings = config.load("glasses", sets=sets).warnings
    assert len(warnings) == 2
    assert (
        warnings[0]
        == "--set data.keep_tokens=1: data.keep_tokens has no effect without data.shuffle_tags = true"
    )
    assert "text_encoder_learning_rate" in warnings[1]
    rest = ["train.schedule=linear", "train.warmup=5000", "preview.every=0", "preview.prompts=['a']"]
    assert len(config.load("glasses", sets=[*rest, "evaluate.enabled=false"]).warnings) == 2


# --- lines ------------------------------------------------------------------------------------------------

DOCUMENT = '''# a comment with [brackets] and = signs
top = 1
"quoted key" = "a # no comment"
[a.b]   # header
x = [ 1,
      2, # two ]
      [3] ]
text = """
[not.a.header]
y = 2
\\""" still """""
raw = \'\'\'
it's \\ raw\'\'\'
after.dotted.key = 2024-05-27 07:32:00

  [[loss]]
plugin = 'one' # "
table = { inner = 1, deep.er = { z = "}" }, list = ["]"] }
[loss.sub]
s = 1
[[loss]]
plugin = "two \\" ] }"
[loss.sub]
s = 2
[[loss.many]]
m = +1_000.5e-3
[[loss.many]]
m = inf
[ a . "c d" ]
last = true'''


def flatten(value: Any, path: tuple[str | int, ...] = ()) -> set[tuple[str | int, ...]]:
    """Every key path of parsed TOML: the independent reference for the scanner."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = {path} if path else set()
    return found.union(*(flatten(inner, (*path, key)) for key, inner in items))


def test_lines_of_every_kind_of_key() -> None:
    lines = key_lines(DOCUMENT)
    assert set(lines) == flatten(tomllib.loads(DOCUMENT))
    expected = {
        ("top",): 2, ("quoted key",): 3, ("a",): 4, ("a", "b"): 4, ("a", "b", "x"): 5, ("a", "b", "x", 0): 5,
        ("a", "b", "x", 1): 6, ("a", "b", "x", 2, 0): 7, ("a", "b", "text"): 8, ("a", "b", "raw"): 12,
        ("a", "b", "after", "dotted", "key"): 14, ("loss", 0): 16, ("loss", 0, "plugin"): 17,
        ("loss", 0, "table", "deep", "er", "z"): 18, ("loss", 0, "sub", "s"): 20, ("loss", 1): 21,
        ("loss", 1, "sub", "s"): 24, ("loss", 1, "many", 0, "m"): 26, ("loss", 1, "many", 1, "m"): 28,
        ("a", "c d"): 29, ("a", "c d", "last"): 30,
    }  # fmt: skip
    assert {path: lines[path] for path in expected} == expected
    assert key_lines("") == {}


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=8)
leaves = st.one_of(
    st.booleans(), st.integers(-(2**40), 2**40), st.floats(allow_nan=False), words, st.datetimes(), st.dates()
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(words, values, max_size=4))
def test_the_scanner_finds_the_keys_that_tomllib_finds(data: dict[str, Any]) -> None:
    text = tomlkit.dumps(data)
    try:
        parsed = tomllib.loads(text)
    except tomllib.TOMLDecodeError:  # tomlkit writes a few strings that tomllib does not read
        return
    lines = key_lines(text)
    assert set(lines) == flatten(parsed)
    rows = text.split("\n")
    for path, line in lines.items():
        key = path[-1]
        if isinstance(key, str) and key.isalnum() and key.isascii():
            assert key in rows[line - 1]


def test_keys_of_options() -> None:
    assert parse_key('loss."my id".weight') == ("loss", "my id", "weight")
    assert parse_key("a . b") == ("a", "b")
    for wrong in ("", "a b", "a=b", "a..b", "[a]", "a\nb", "# x"):
        with pytest.raises(ValueError, match="is not a key"):
            parse_key(wrong)


# --- what is there, and start-up --------------------------------------------------------------------------


def test_every_parameter_is_described() -> None:
    found = {parameter.key: parameter for parameter in config.parameters()}
    resolved = config.load("glasses").config
    assert list(found) == [f"{s}.{k}" for s, v in resolved.model_dump(exclude={"loss"}).items() for k in v]
    assert all(parameter.description and parameter.type != "any value" for parameter in found.values())
    rate = found["train.learning_rate"]
    assert (rate.type, rate.default, rate.bases) == (
        "number, at least 0",
        1e-4,
        {"embedded": 2e-3, "sd15": 1e-4, "sd2": 1e-4, "sdxl": 1e-4},
    )
    assert found["attribute.target"].required
    assert found["adapter.alpha"].type == "number, more than 0"
    assert found["adapter.targets"].type.startswith("list of one of 'cross-attention'")
    described = config.describe()
    assert {preset["name"] for preset in described["presets"]} == {preset.name for preset in SHIPPED}
    assert json.loads(json.dumps(described)) == described


def test_parameters_of_a_plugin(plugins: list[Path]) -> None:
    from spf_kit.discovery import available

    found = {p.key: p for p in config.model_parameters(available(plugins)["cfg_l1"], "extra.py")}
    assert found["power"].type == "whole number, at least 1"
    assert found["kind"].type == "one of 'plain', 'smooth'"
    assert found["weight"].source == "extra.py"


def test_importing_config_loads_no_torch() -> None:
    code = (
        "import sys, spf_kit.config as c; c.shipped_presets(); c.parameters(); print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"


def test_a_preset_leaves_a_loss_of_its_recipe_out(tmp_path: Path) -> None:
    """`enabled = false` drops it, `mask = ""` unties a loss from its mask; what is left must be sound."""
    both = config.load("glasses", recipe="output-preservation")
    assert [plugin.id for plugin in both.plugins] == ["denoising", "output_preservation"]
    without = ["loss.output_preservation.enabled=false"]
    one = config.load("glasses", recipe="output-preservation", sets=without)
    assert [plugin.id for plugin in one.plugins] == ["denoising"]
    assert [entry.id for entry in one.config.loss] == ["denoising"]
    with pytest.raises(UserError, match="no loss"):
        config.load("glasses", recipe="naive", sets=["loss.denoising.enabled=false"])

    masked = ['loss.where.plugin="control_map"', 'loss.denoising.mask="where"']
    assert config.load("glasses", recipe="naive", sets=masked).plugins[-1].mask == "where"
    untied = config.load("glasses", recipe="naive", sets=[*masked, 'loss.denoising.mask=""'])
    assert untied.plugins[-1].mask is None
    with pytest.raises(UserError, match="where"):
        config.load("glasses", recipe="naive", sets=[*masked, "loss.where.enabled=false"])


PLAIN = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12
)  # no command line holds a zero byte
VALUES = st.recursive(
    st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False) | PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PLAIN, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(PLAIN.filter(lambda name: name and "=" not in name), VALUES)
def test_what_set_takes_is_read_as_the_same_value(name: str, value: Any) -> None:
    problems = Problems("")
    line = command_line({}, [config.set_option(("train", "optimizer_args", name), value)], problems)
    assert not problems.found
    (deep,) = line.tables
    assert deep.path == ("train", "optimizer_args", name)
    assert deep.value == value
    assert type(deep.value) is type(value)


def test_plain_text_stands_without_quotes() -> None:
    assert config.set_option(("attribute", "target"), "wearing glasses") == "attribute.target=wearing glasses"
    assert config.set_option(("attribute", "name"), "400") == 'attribute.name="400"'


def test_what_is_wrong_is_told_key_by_key() -> None:
    with pytest.raises(config.ConfigError) as caught:
        config.load(
            "glasses",
            sets=["train.steps=0", "train.ema=2", "loss.target.weight=x", "adapter.rnk=3", "train.select=x"],
        )
    told = caught.value.by_key()
    assert told["train.steps"] == "train.steps = 0: must be at least 1"
    assert told["train.ema"] == "train.ema = 2: must be less than 1.0"
    assert told["loss.target.weight"].startswith('loss.target.weight = "x": expected')
    assert told["adapter.rnk"].startswith("adapter.rnk = 3: unknown key")
    assert set(told) == {"train.steps", "train.ema", "loss.target.weight", "adapter.rnk", "train.select"}
