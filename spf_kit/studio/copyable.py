"""Text to be copied: with the keyboard too, and with a name for a screen reader.

gradio's own box gives its label to the button in it, and cannot be reached by keyboard while it is read-only.
"""

from __future__ import annotations

from typing import Any

from spf_kit.studio.answers import escaped

ON_LOAD = """
element.addEventListener('click', async (event) => {
  const button = event.target.closest('button');
  if (!button) return;
  const text = element.querySelector('textarea');
  text.focus();
  text.select();
  try {
    await navigator.clipboard.writeText(text.value);
    button.textContent = 'Copied';
    setTimeout(() => { button.textContent = 'Copy'; }, 2000);
  } catch {}  // no right to: the text is selected, for Ctrl-C
});
"""


def copyable(label: str, name: str, rows: int) -> Any:
    """A component whose value comes from `text`. `name` is the id of its element."""
    import gradio as gr

    return gr.HTML(
        "",
        elem_classes=["copyable"],
        html_template=(
            f'<label for="{name}">{label}</label>'
            f'<button type="button" aria-label="Copy: {label}">Copy</button>'
            f'<textarea id="{name}" readonly rows="{rows}" spellcheck="false">${{value}}</textarea>'
        ),
        js_on_load=ON_LOAD,
    )


def text(value: str) -> str:
    """What to set a `copyable` to."""
    return escaped(value)
