"""What the page Train chooses is a command line, and reaches nothing outside the studio's folders."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from spf_kit import config
from spf_kit.errors import UserError
from spf_kit.studio.folders import Folders
from spf_kit.studio.settings import Choice, command_line
from spf_kit.studio.state import Studio

OUTSIDE = "is outside the studio's folders"


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("inside", "secret"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    return tmp_path / "inside"


@pytest.fixture
def folders(inside: Path) -> Folders:
    return Folders([inside])


@pytest.mark.parametrize(
    "path", ["../secret", "../secret/a.txt", "/etc/passwd", "link/a.txt", "a\0b", "../inside2", "~"]
)
def test_paths_that_lead_outside_are_refused(folders: Folders, inside: Path, path: str) -> None:
    (inside / "link").symlink_to(inside.parent / "secret")
    (inside.parent / "inside2").mkdir()
    assert not folders.allows(path)
    with pytest.raises(UserError, match=OUTSIDE):
        folders.check(path)


def test_paths_inside_are_made_absolute(folders: Folders, inside: Path) -> None:
    (inside / "sub").mkdir()
    (inside / "link").symlink_to(inside / "sub")
    assert folders.check("link/../sub/new.txt") == inside / "sub/new.txt"
    assert folders.check("") == inside
    for name in ("embedded", "embedded:glasses", "owner/name"):
        assert folders.model(name) == name
    for outside in ("../secret/model.safetensors", str(inside.parent / "secret"), "secret/../../x"):
        with pytest.raises(UserError, match=OUTSIDE):
            folders.model(outside)
    with pytest.raises(UserError, match="does not exist"):
        Folders([inside / "missing"])


def test_the_command_line_gives_the_configuration_that_was_shown(folders: Folders, inside: Path) -> None:
    """Read back by the program's own parser, and the TOML by loading it."""
    from typer.main import get_command

    from spf_kit.cli import app

    (inside / "my pictures").mkdir()
    choice = Choice(
        "glasses",
        recipe="naive",
        data="my pictures",
        sets={
            "train.steps": 20,
            "attribute.target": 'with "round" glasses',
            "adapter.targets": ["cross-attention", "text-encoder"],
            "train.optimizer_args": {"weight_decay": 0.1},
            "loss.denoising.weight": 0.5,
            "data.flip": True,
        },
    )
    resolved = choice.resolve(folders)
    shown = command_line(choice.arguments(inside / "runs/a run"))
    program, name, *rest = shlex.split(shown)
    assert program == "spf-kit"
    given = get_command(app).commands[name].make_context(name, rest).params
    assert given["output"] == inside / "runs/a run"
    again = config.load(
        given["preset"], recipe=given["recipe"], base=given["base"], data=given["data"], sets=given["set_"]
    )
    assert again.config == resolved.config
    assert resolved.config.train.steps == 20
    assert resolved.config.attribute.target == 'with "round" glasses'
    (inside / "kept.toml").write_text(resolved.to_toml())
    assert config.load("kept.toml").config == resolved.config


@pytest.mark.parametrize(
    "options",
    [
        {"data": "../secret"},
        {"base": "../secret/model.safetensors"},
        {"sets": {"base.vae": "/etc/passwd"}},
        {"sets": {"adapter.on": ["../secret/a.safetensors:0.5"]}},
        {"sets": {"adapter.start_from": "../secret/a.safetensors"}},
        {"recipe": "../secret/recipe.toml"},
        {"preset": "../secret/preset.toml"},
        {"preset": "leads-out.toml"},
        {"preset": "extends-out.toml"},
        {"preset": "names-data-outside.toml"},
    ],
)
def test_no_setting_leads_outside(folders: Folders, inside: Path, options: dict) -> None:
    secret = inside.parent / "secret"
    text = 'extends = "glasses"\n'
    (secret / "preset.toml").write_text(text)
    (secret / "recipe.toml").write_text('[[loss]]\nplugin = "denoising"\n')
    os.symlink(secret / "preset.toml", inside / "leads-out.toml")
    (inside / "extends-out.toml").write_text('extends = "../secret/preset.toml"\n')
    (inside / "names-data-outside.toml").write_text(text + '[data]\npath = "../secret"\n')
    with pytest.raises(UserError, match=OUTSIDE):
        Choice(**{"preset": "glasses", **options}).resolve(folders)


def test_what_is_wrong_is_told_by_its_key(folders: Folders) -> None:
    with pytest.raises(config.ConfigError) as caught:
        Choice("glasses", sets={"train.steps": 0, "train.batch_size": 2.5}).resolve(folders)
    assert caught.value.by_key() == {
        "train.steps": "train.steps = 0: must be at least 1",
        "train.batch_size": "train.batch_size = 2.5: expected a whole number, not a decimal number",
    }
    with pytest.raises(config.ConfigError) as caught:
        Choice("glasses", data="/etc").resolve(folders)
    assert set(caught.value.by_key()) == {"data.path"}


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "/etc"])
def test_a_runs_name_is_the_plain_name_of_a_folder(folders: Folders, inside: Path, name: str) -> None:
    studio = Studio(folders, inside / "runs")
    resolved = Choice("glasses").resolve(folders)
    assert Choice("glasses").run(studio, resolved) == inside / "runs/glasses"
    with pytest.raises(UserError, match="plain name"):
        Choice("glasses", output=name).run(studio, resolved)
