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
    css = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    html = _environment().get_template(name).render(**content, css=Markup(css), css_hash=f"sha256-{digest}")
    return html.encode("utf-8", "backslashreplace")


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
