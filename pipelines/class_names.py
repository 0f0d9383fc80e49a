"""The names of classes in a file, one in each line: read where a command begins, so that a wrong file costs no work."""

from __future__ import annotations

import hashlib
from collections import Counter

from tarsift.operators import storage
from tarsift.operators.errors import ChangedError, UsageError
from tarsift.pipelines.config import CleanConfig


def with_class_names(config: CleanConfig) -> CleanConfig:
    """Make the path of a file of class names absolute, and put its digest beside it: verdicts depend on what it says.

    Raises:
        UsageError: as `read_class_names`.
    """
    if config.sift.names_file is None:
        return config.model_copy(update={"sift": config.sift.model_copy(update={"names_sha256": None})})
    file = storage.absolute(config.sift.names_file)
    names = {"route": file, "names_sha256": digest_of(read_class_names(file))}
    return config.model_copy(update={"sift": config.sift.model_copy(update=names)})


def class_names_of(config: CleanConfig) -> list[str]:
    """Return the names that `with_class_names` saw; none where classes are not routed by a file.

    Raises:
        UsageError: as `read_class_names`.
        ChangedError: if the file says something else now.
    """
    file = config.sift.names_file
    if file is None:
        return []
    names = read_class_names(file)
    if digest_of(names) != config.sift.names_sha256:
        raise ChangedError(f"{file} has changed while the run was on: run the same command again.")
    return names


def read_class_names(file: str) -> list[str]:
    """Read a file of class names; empty lines do not count.

    Raises:
        UsageError: if there is none, it is no text, or does not name two classes and each of them once.
    """
    try:
        text = storage.read_bytes(file).decode()
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError(
            f"there is no file of class names at {file}: sift.route takes captions, cls, or a file with a name in "
            "each line."
        ) from None
    except UnicodeDecodeError:
        raise UsageError(f"{file} is no UTF-8 text: it must hold the names of classes, one in each line.") from None
    names = [line.strip() for line in text.splitlines() if line.strip()]
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise UsageError(f"{file} names the class {twice[0]!r} more than once.")
    if len(names) < 2:
        raise UsageError(f"{file} must name two classes at least, one in each line; it names {len(names)}.")
    return names


def digest_of(names: list[str]) -> str:
    """Return the SHA-256 of names, in their order."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()
