"""Numbers, durations and text that strangers wrote, as text for people."""

from __future__ import annotations

import shlex
import unicodedata
from typing import Any

from tarsift.operators.storage import without_secrets

SHOWN_CHARS = 280
MARKS_IN_A_ROW = 2
# Format characters that ordinary text needs: joiners of scripts and emoji, the soft hyphen is not one of them.
JOINERS = "\u200c\u200d"


def visible(text: Any, limit: int = SHOWN_CHARS) -> str:
    """Return text by strangers so that it can neither hide nor rearrange anything: one line, bounded.

    Control, format (bidirectional marks, zero widths, tags), private and unassigned characters
    become `⟨U+202E⟩`, stacked accents are cut to two, all white space becomes single spaces, and
    what is over `limit` characters is counted. Escaping for HTML is left to the template.
    """
    if text is None:
        return ""
    text = str(text)
    out: list[str] = []
    marks = 0
    for position, char in enumerate(text):
        if len(out) >= limit:
            return "".join(out).rstrip() + f" … (+{len(text) - position:,} characters)"
        kind = unicodedata.category(char)
        marks = marks + 1 if kind in ("Mn", "Me") else 0
        if char.isspace() and char not in "\x1c\x1d\x1e\x1f\x85":
            if out and out[-1] != " ":
                out.append(" ")
        elif kind in ("Cc", "Cs", "Co", "Cn") or (kind == "Cf" and char not in JOINERS):
            out.append(f"⟨U+{ord(char):04X}⟩")
        elif marks <= MARKS_IN_A_ROW:
            out.append(char)
    return "".join(out).strip()


def blanked(value: Any) -> Any:
    """Return a value of lists, dicts and text with passwords and signatures in its URLs replaced by `***`."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return {key: blanked(item) for key, item in value.items()}
    return [blanked(item) for item in value] if isinstance(value, list | tuple) else value


def percent(share: float | int | None, digits: int = 1) -> str:
    """Write a fraction as per cent; small ones keep two significant digits."""
    if share is None:
        return "–"
    value = 100 * share  # a space that does not break keeps number and sign together
    if 0 < abs(value) < 0.1:
        return f"{value:.2g}\u00a0%"
    text = f"{value:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + "\u00a0%"


def count(number: Any, one: str = "", many: str = "") -> str:
    """Write a whole number with separators and its noun: `1 shard`, `3,318 shards`."""
    text = f"{int(number):,}"
    return f"{text} {one if int(number) == 1 else many or one + 's'}" if one else text


def duration(seconds: float | int | None) -> str:
    """Write seconds for people: `0.8 s`, `41 s`, `3 min 5 s`, `2 h 10 min`."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(number: float | int | None) -> str:
    """Write bytes with a binary unit."""
    if not number:
        return "–"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(number) < 1024 or unit == "TiB":
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return ""


def command(*words: str) -> str:
    """Write a command line that can be pasted into a shell."""
    return shlex.join(words)
