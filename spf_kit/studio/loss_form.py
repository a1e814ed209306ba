"""The losses of a preset as a form. Which there are depends on the recipe, so it is one piece of HTML.

Gradio compares new HTML with what stands there and changes only what differs: a field that is typed in keeps
its focus while the error beside it comes and goes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spf_kit.studio.answers import escaped
from spf_kit.studio.form import Field, read_toml

ON_LOAD = """
element.addEventListener('input', (event) => {
  const field = event.target.closest('[data-key]');
  if (field) {
    const value = field.type === 'checkbox' ? field.checked : field.value;
    trigger('input', {key: field.dataset.key, value});
  }
});
element.dataset.listens = 'true';
"""


@dataclass(frozen=True)
class Loss:
    """One `[[loss]]` of the preset, with its values there."""

    id: str
    plugin: str
    about: str
    fields: list[Field]
    values: Mapping[str, Any]  # by key


def given(field: Field, shown: Any) -> Any:
    """The value of the preset that a field's text stands for; None where it is empty."""
    if field.kind == "number":
        return read_toml(str(shown).strip()) if str(shown).strip() else None
    if field.kind == "choices":
        return read_toml(str(shown)) if str(shown).strip() else None
    return field.given(shown)


def form(losses: Sequence[Loss], changed: Mapping[str, Any], wrong: Mapping[str, str]) -> str:
    """All losses, in order. `changed` are values by key that differ, `wrong` are errors by key."""
    # other losses are another element: of one that stays, gradio would keep what was typed
    mark = hashlib.sha256(repr([(loss.id, dict(loss.values)) for loss in losses]).encode()).hexdigest()[:8]
    return f"<losses-{mark}>{''.join(_loss(loss, changed, wrong) for loss in losses)}</losses-{mark}>"


def _loss(loss: Loss, changed: Mapping[str, Any], wrong: Mapping[str, str]) -> str:
    title = loss.id if loss.id == loss.plugin else f"{loss.id} ({loss.plugin})"
    fields = "".join(
        _field(field, changed.get(field.key, loss.values[field.key]), wrong.get(field.key, ""))
        for field in loss.fields
    )
    return (
        f'<fieldset class="loss"><legend>{escaped(title)}</legend><p>{escaped(loss.about)}</p>'
        f'<div class="fields">{fields}</div></fieldset>'
    )


def _field(field: Field, value: Any, wrong: str) -> str:
    name = escaped(field.key)
    help_ = f"<b>error:</b> {escaped(wrong)}" if wrong else escaped(field.about)
    attributes = (
        f'data-key="{name}" aria-describedby="about-{name}" aria-invalid="{str(bool(wrong)).lower()}"'
    )
    return (
        f'<div class="{"setting wrong" if wrong else "setting"}"><label>{name}'
        f"{_control(field, field.shown(value), attributes)}</label>"
        f'<small id="about-{name}">{help_}</small></div>'
    )


def _control(field: Field, shown: Any, attributes: str) -> str:
    if field.kind == "flag":
        return f'<input type="checkbox" {attributes}{" checked" if shown else ""}>'
    if field.kind == "choice":
        options = "".join(
            f"<option{' selected' if choice == shown else ''}>{escaped(choice)}</option>"
            for choice in field.choices
        )
        return f"<select {attributes}>{options}</select>"
    if field.kind == "lines":
        return f'<textarea rows="2" {attributes}>{escaped(shown)}</textarea>'
    kind = 'number" step="any' if field.kind == "number" else "text"
    return f'<input type="{kind}" {attributes} value="{"" if shown is None else escaped(str(shown))}">'
