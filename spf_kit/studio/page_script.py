"""Script of the whole page: names that gradio leaves out, and a form that is closed while it is filled."""

from __future__ import annotations

SETTINGS = "settings"  # id of the element with the fields of the page Train

# gradio's groups of radios and boxes, and its opened lists, have no name that a screen reader could say,
# though it stands beside them; and its arrows and crosses are told as pictures
NAMES = """
() => {
  const name = () => {
    due = false;
    for (const group of document.querySelectorAll('fieldset:not([aria-label])')) {
      const label = group.querySelector('[data-testid="block-info"]');
      if (label) group.setAttribute('aria-label', label.textContent.trim());
    }
    for (const list of document.querySelectorAll('[role="listbox"]:not([aria-label])')) {
      const field = document.querySelector(`[aria-controls="${list.id}"]`);
      if (field) list.setAttribute('aria-label', field.getAttribute('aria-label') || '');
    }
    for (const sign of document.querySelectorAll('svg:not([role]):not([aria-label]):not([aria-hidden])')) {
      sign.setAttribute('aria-hidden', 'true');
    }
  };
  let due = false;
  new MutationObserver(() => {
    if (!due) requestAnimationFrame(name);
    due = true;
  }).observe(document.body, {childList: true, subtree: true});
  name();
}
"""


def closing(inputs: int) -> str:
    """For the `js` of an event with so many inputs, whose answer fills the form: what is typed meanwhile
    would be lost, so nobody can, from the very moment. Events may overlap: the last one opens it."""
    return f"""(...given) => {{
      const form = document.getElementById('{SETTINGS}');
      form.filling = (form.filling || 0) + 1;
      form.inert = true;
      return given.slice(0, {inputs});
    }}"""


OPENING = f"""() => {{
  const form = document.getElementById('{SETTINGS}');
  form.filling -= 1;
  form.inert = form.filling > 0;
}}"""


def focus_on(element: str) -> str:
    """Give the keyboard to a button where that which had it was closed."""
    return f"""() => {{
      setTimeout(() => {{  // once it is open itself
        if (document.activeElement === document.body) document.getElementById('{element}').focus();
      }}, 100);
    }}"""
