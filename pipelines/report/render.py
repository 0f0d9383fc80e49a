"""Fill a template with values: one HTML file that works offline and in which strangers' text can do nothing.

Such a page runs no script and loads nothing: its content security policy allows its own style sheet
(by digest) and pictures inside the page, so that a hostile caption that slipped through would still
do nothing.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tarsift.pipelines.report.charts import short_number
from tarsift.pipelines.text import count, duration, percent, size, visible

TEMPLATES = Path(__file__).parent / "templates"


def render(name: str, content: dict[str, Any]) -> bytes:
    """Fill the template `name`; everything in `content` that is not made by us as markup is escaped."""
    css = _style()
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    html = _environment().get_template(name).render(**content, css=Markup(css), css_hash=f"sha256-{digest}")
    return html.encode("utf-8", "backslashreplace")


def render_piece(name: str, content: dict[str, Any]) -> str:
    """Fill the template `name` of a piece that stands in a page of others, as the output of a notebook's cell does.

    The style sheet is that of the report, for the piece alone; there, pictures are shown while the mouse is over them.
    """
    css = ".tarsift {\n" + _style().replace(":root", "&") + _PIECE + "}\n"
    return _environment().get_template(name).render(**content, css=Markup(css))


_PIECE = """
& { background: var(--page); color: var(--ink); padding: 2px 12px; border-radius: 10px;
    font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
.pic:hover img { filter: none; }
"""


def _style() -> str:
    return (TEMPLATES / "report.css").read_text(encoding="utf-8")


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.ChainableUndefined
    )
    environment.filters |= {
        "count": count,
        "duration": duration,
        "percent": percent,
        "short": short_number,
        "size": size,
        "visible": visible,
    }
    return environment
