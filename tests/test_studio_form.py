"""The form that is made of the preset format: every key has a field that shows and gives its value."""

from __future__ import annotations

from typing import Any

import pytest

from spf_kit import config
from spf_kit.discovery import available
from spf_kit.studio import form, loss_form

FIELDS = [field for fields in form.section_fields().values() for field in fields]
OTHERS: dict[str, Any] = {"number": 3, "text": "x y", "lines": ["a, b", "c"], "toml": {"mid": 4}}


def test_every_key_of_the_format_has_one_field() -> None:
    keys = {parameter.key for parameter in config.parameters()}
    assert {field.key for field in FIELDS} == keys - form.ELSEWHERE
    assert len(FIELDS) == len(keys - form.ELSEWHERE)
    assert set(form.FIRST) <= keys


@pytest.mark.parametrize("recipe", ["spf", "naive", "prior-preservation"])
def test_the_values_of_a_preset_are_shown_and_change_nothing(recipe: str) -> None:
    resolved = config.load("glasses", recipe=recipe)
    values = {row.key: row.value for row in resolved.describe()}
    fields = list(FIELDS)
    for plugin in resolved.plugins:
        fields += form.model_fields(type(plugin), f"loss.{plugin.id}", without=("id",))
    shown = [field.shown(values[field.key]) for field in fields]
    assert form.changes(fields, shown, values) == {}


def test_a_change_of_any_key_arrives_typed() -> None:
    """Each field, set to something else, is given as that value, of that type, and nothing else is."""
    values = {row.key: row.value for row in config.load("glasses").describe()}
    for field in FIELDS:
        if field.kind == "flag":
            other: Any = not values[field.key]
        elif field.kind in ("choice", "choices"):
            last = field.choices[-1] if values[field.key] != field.choices[-1] else field.choices[-2]
            other = [last] if field.kind == "choices" else {"true": True, "false": False}.get(last, last)
        else:
            other = OTHERS[field.kind]
        assert form.changes([field], [field.shown(other)], values) == {field.key: other}, field


@pytest.mark.parametrize("kind", ["number", "choice", "text", "toml"])
def test_an_empty_field_leaves_the_presets_own(kind: str) -> None:
    for field in (field for field in FIELDS if field.kind == kind):
        empty = "" if kind in ("text", "toml") else None
        assert form.changes([field], [empty], {field.key: 7}) == {}


def test_kinds() -> None:
    kinds = {field.key: field.kind for field in FIELDS}
    assert kinds["train.ema"] == kinds["train.steps"] == "number"
    assert kinds["base.quantize"] == kinds["base.zero_terminal_snr"] == "choice"
    assert kinds["adapter.targets"] == "choices"
    assert kinds["adapter.ranks"] == "toml"
    assert kinds["preview.prompts"] == "lines"
    assert kinds["data.flip"] == "flag"


def test_every_plugin_has_a_form() -> None:
    for name, cls in available([]).items():
        fields = form.model_fields(cls, f"loss.{name}", without=("id",))
        assert {field.key for field in fields} == {f"loss.{name}.{key}" for key in cls.model_fields} - {
            f"loss.{name}.id"
        }


def test_losses_are_a_form_that_says_what_is_wrong_beside_the_field() -> None:
    fields = form.model_fields(available([])["denoising"], "loss.a", without=("id",))
    values = {field.key: None for field in fields} | {"loss.a.weight": 1.0, "loss.a.enabled": True}
    loss = loss_form.Loss("a", "denoising", "<learn>", fields, values)
    plain = loss_form.form([loss], {}, {})
    shown = loss_form.form([loss], {"loss.a.weight": -1}, {"loss.a.weight": "must be at least 0"})
    assert "&lt;learn&gt;" in plain
    assert 'aria-invalid="true"' not in plain
    assert shown.count('aria-invalid="true"') == 1
    assert "<b>error:</b> must be at least 0" in shown
    assert 'data-key="loss.a.weight"' in shown
    assert 'value="-1"' in shown
    other = loss_form.form(
        [loss_form.Loss("a", "denoising", "", fields, values | {"loss.a.weight": 2})], {}, {}
    )
    assert plain.split(">")[0] == shown.split(">")[0] != other.split(">")[0]
    by_key = {field.key: field for field in fields}
    assert loss_form.given(by_key["loss.a.weight"], "0.5") == 0.5
    assert loss_form.given(by_key["loss.a.weight"], " ") is None
    assert loss_form.given(by_key["loss.a.enabled"], False) is False
