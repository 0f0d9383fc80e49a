"""The log as JSON, an object in each line, where TARSIFT_LOG=json asks for it: for clusters that collect logs.

It goes to the standard error. A variable and not an option: so errors in the options are told in it too, and one line
of a manifest does for all commands. What is asked for on the standard output (`--json`, `--dry-run`) is not part of it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

from tarsift.operators.errors import EXIT_CODES, ConfigError
from tarsift.operators.storage import without_secrets

VARIABLE = "TARSIFT_LOG"
FORMATS = ("plain", "json")
LONGEST = 20  # entries of a list or table in a line; of more only their number is told


def asked_for() -> bool:
    """Tell whether the log is to be JSON."""
    return os.environ.get(VARIABLE) == "json"


def refuse_unknown_format() -> None:
    """Refuse a variable that says something else.

    Raises:
        ConfigError: says what it can be.
    """
    given = os.environ.get(VARIABLE)
    if given and given not in FORMATS:
        raise ConfigError(f"{VARIABLE} is {' or '.join(FORMATS)}, got {given!r}.")


def write_line(event: str, *, level: str = "info", stream: TextIO | None = None, **fields: Any) -> None:
    """Write one line: when, how bad, what, and further fields; without the passwords and signatures of URLs.

    Everything but ASCII is escaped, so that no text by strangers can do anything to a terminal or to the line.
    """
    time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    line = json.dumps(_plain({"time": time, "level": level, "event": event, **fields}), allow_nan=False)
    print(line, file=stream or sys.stderr, flush=True)


def write_error(message: str, exit_code: int, **fields: Any) -> None:
    """Write the line of what ends a command; a warning where the same command again goes on."""
    level = "warning" if exit_code == EXIT_CODES["interrupted"] else "error"
    write_line("error", level=level, message=message, exit_code=exit_code, **fields)


def take_warnings() -> None:
    """Have warnings, and what libraries log in this process, written as lines too."""
    logging.captureWarnings(True)
    logging.basicConfig(level=logging.WARNING, handlers=[_Lines()], force=True)


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except Exception:  # of a library that formats its own badly
            message = str(record.msg)
        write_line("log", level=record.levelname.lower(), logger=record.name, message=message.strip())


def _plain(value: Any) -> Any:
    """Return what JSON has a word for."""
    if isinstance(value, Mapping):
        if len(value) > LONGEST:
            return {"entries": len(value)}
        return {without_secrets(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return {"entries": len(value)} if len(value) > LONGEST else [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int) else without_secrets(str(value))
