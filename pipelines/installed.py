"""What is installed under the names that tarsift imports, and what would be imported in its place."""

from __future__ import annotations

import json
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import distribution, packages_distributions
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Packages whose names somebody's own file or folder is likely to have.
MODULES = (
    "tarsift", "ray", "torch", "numpy", "pyarrow", "open_clip", "faiss", "webdataset", "fsspec", "PIL",
)  # fmt: skip


@cache
def _distributions() -> dict[str, list[str]]:
    return {module: sorted(set(names)) for module, names in packages_distributions().items()}


def providers(module: str) -> dict[str, str]:
    """Return the distributions that provide a module, with their versions; two overwrite each other's files."""
    return {name: distribution(name).version for name in _distributions().get(module, ())}


def shadows(modules: Sequence[str] = MODULES) -> Iterator[tuple[str, Path]]:
    """Yield modules that are found elsewhere than where they are installed: (name, file that is imported).

    Looked along are the folder of this process, which Ray puts on the path of its workers, and `sys.path`, with
    PYTHONPATH in it.
    """
    path = [str(Path.cwd()), *sys.path]
    for module in modules:
        spec = PathFinder.find_spec(module, path)  # a folder without `__init__.py` counts only where nothing else does
        if spec is None or spec.origin is None:
            continue
        origin = Path(spec.origin).resolve()
        if not any(origin.is_relative_to(home) for home in _homes(module)):
            yield module, origin


def _homes(module: str) -> Iterator[Path]:
    """Yield the folders in which a module may rightly lie: those of installed packages, and checkouts of its own."""
    for key in ("purelib", "platlib"):
        yield Path(sysconfig.get_path(key)).resolve()
    for name in _distributions().get(module, ()):
        found = distribution(name)
        yield Path(str(found.locate_file(""))).resolve()
        url = json.loads(found.read_text("direct_url.json") or "{}")
        if url.get("dir_info", {}).get("editable"):
            yield Path(unquote(urlsplit(url["url"]).path)).resolve()
