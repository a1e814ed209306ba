"""Templates to one file of HTML. Every value is escaped; the policy forbids what the page does not hold."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from spf_kit import __version__
from spf_kit.report.plots import Chart, short

CUT = 400  # letters of somebody's text that the page shows


def render(template: str, title: str, context: Mapping[str, Any]) -> str:
    """A page. `template` is a file of the package; its style and script are allowed by their hashes."""
    css, script = _file("page.css"), _file("page.js")
    return _environment().get_template(template).render(
        title=title, css=Markup(css), script=Markup(script), policy=policy(css, script),
        version=__version__, written=time.strftime("%Y-%m-%d %H:%M:%S"), **context,
    )  # fmt: skip


def piece(macro: str, *values: Any) -> str:
    """A part of the pages, as HTML for another page that has `style()`: a macro of parts.html."""
    return str(getattr(_environment().get_template("parts.html").module, macro)(*values))


def style() -> str:
    """The pages' style sheet, to stand within the rule of an element that holds pieces."""
    return _file("page.css").replace(":root {", "& {")  # the colours are that element's


def policy(css: str, script: str) -> str:
    """Pictures from data URLs, this very style and this very script, and nothing else from anywhere."""
    return (
        f"default-src 'none'; img-src data:; style-src '{_sha(css)}'; script-src '{_sha(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def cut(text: str, most: int = CUT) -> str:
    """Somebody's text, shortened."""
    return text if len(text) <= most else text[: most - 1] + "…"


def _sha(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@lru_cache(maxsize=1)
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("spf_kit.report", "template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["percent"] = lambda value: f"{value:.2f}%"
    made.filters["spoken"] = _spoken
    return made


def _spoken(chart: Chart) -> str:
    """A plot for those who cannot see it."""
    said = [
        f"{line.label} from {short(line.values[0][1])} at step {line.values[0][0]:.0f} "
        f"to {short(line.values[-1][1])} at step {line.values[-1][0]:.0f}"
        for line in chart.lines
    ]
    marked = [f"marked: {dot.text}" for dot in chart.dots]
    return f"{chart.title}: {'; '.join([*said, *marked])}"


def _file(name: str) -> str:
    return resources.files("spf_kit.report").joinpath("template", name).read_text(encoding="utf-8")
