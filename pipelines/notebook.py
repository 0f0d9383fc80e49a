"""In a notebook: one display of progress that is brought up to date, and results as small tables."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tarsift.operators.storage import without_secrets
from tarsift.pipelines.progress import Event, Listener, Paces, PlainLines
from tarsift.pipelines.text import duration, visible

SHOWN_CHARS, LONGEST_PATH = 400, 4096
OF_URLS = "%/:?#[]@!$&'()*+,;=~"


def html_table(title: str, rows: Iterable[Sequence[Any]], links: Mapping[str, str | None] | None = None) -> str:
    """Return rows of cells as an HTML table in which strangers' text does nothing, and shows no password of a URL.

    Args:
        rows: the first cell of each names it.
        links: words to what they lead to, below the table: a path or URL, which is shown too; None is left out.
    """
    parts = [f"<b>{_text(title)}</b>", "<table>"]
    for name, *cells in rows:
        right = "".join(f'<td style="text-align:left">{_text(cell)}</td>' for cell in cells)
        parts.append(f'<tr><th style="text-align:left">{_text(name)}</th>{right}</tr>')
    parts.append("</table>")
    parts += [f"<div>{_text(words)}: {_link(target)}</div>" for words, target in (links or {}).items() if target]
    return "".join(parts)


def notebook_progress(every_s: float = 0.5) -> Listener:
    """Return a listener that shows all passes in one table below the cell, as they go on.

    Where no notebook is running it writes plain lines, at most one in ten seconds.

    Args:
        every_s: seconds between two updates; the end of a pass is shown at once.

    Example:
        >>> clean("dump", "out", encoder="enc.pt", progress=notebook_progress())  # doctest: +SKIP
    """
    ipython = sys.modules.get("IPython")  # a notebook has loaded it
    shell = ipython.get_ipython() if ipython else None
    return PassTable(every_s) if hasattr(shell, "kernel") else PlainLines()


class PassTable:
    """A table with a row per pass, made when the first one is heard of; for notebooks."""

    def __init__(self, every_s: float = 0.5):
        self.every_s = every_s
        self._rows: dict[str, tuple[str, ...]] = {}
        self._pace = Paces()
        self._shown = 0.0
        self._display: Any = None

    def __call__(self, event: Event) -> None:
        elapsed, pace = self._pace(event)
        done = f"{event.done:,} of {event.total:,} {event.unit}"
        samples = f"{event.samples:,} samples" if event.samples else ""
        rate = f"{pace:,.0f}/s" if pace else ""
        state = "done" if event.finished else f"{event.done / event.total:.0%}" if event.total else "..."
        errors = f"{sum(event.errors.values()):,} with an error" if event.errors else ""
        self._rows[event.name] = (event.name, state, done, samples, rate, duration(elapsed), errors, event.note)
        now = time.monotonic()
        if event.finished or self._display is None or now - self._shown >= self.every_s:
            self._shown = now
            self._show()

    def _show(self) -> None:
        from IPython.display import display  # pyright: ignore[reportMissingImports]

        plain = "\n".join("  ".join(filter(None, row)) for row in self._rows.values())
        shown = {"text/html": html_table("tarsift", self._rows.values()), "text/plain": without_secrets(plain)}
        if self._display is None:
            self._display = display(shown, raw=True, display_id=True)
        else:
            self._display.update(shown, raw=True)


def _text(value: Any, limit: int = SHOWN_CHARS) -> str:
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return html.escape(visible(without_secrets(text), limit))


def _link(target: str) -> str:
    """Return a link to a file on this machine or on the web, and the bare address of anything else.

    Notebooks open files below their own folder; a link to another one may have to be copied.
    """
    shown = _text(target, LONGEST_PATH)
    if "://" not in target:
        path = Path(target).absolute()
        url = quote(path.relative_to(Path.cwd()).as_posix()) if path.is_relative_to(Path.cwd()) else path.as_uri()
    elif target.startswith(("http://", "https://")):
        url = quote(without_secrets(target), safe=OF_URLS)
    else:
        return f"<code>{shown}</code>"
    return f'<a href="{html.escape(url)}" target="_blank">{shown}</a>'
