"""Find the shards that a user names: files, globs, brace patterns, folders, URLs, in any mixture."""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec
from braceexpand import braceexpand

from tarsift.operators import storage
from tarsift.operators.errors import UsageError

SUFFIXES = (".tar", ".tar.gz", ".tgz")
MAX_EXPANSION = 1_000_000

_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?=\.\.|\})")
_MAGIC = re.compile(r"[*?\[]")
_LOOKED_FOR = "files ending in " + ", ".join(SUFFIXES[:-1]) + f" or {SUFFIXES[-1]}"
_QUOTE = "If the shell expanded a brace pattern or a glob, put it in quotes: tarsift expands it itself."


@dataclass(frozen=True)
class Shard:
    """A shard: `name` is its identity in a run, `size` its bytes in storage (0 where a server does not tell).

    `stamp` is what a listing tells of the version of the file: its etag, else when it was written, else nothing.
    """

    name: str
    url: str
    size: int
    stamp: str = field(default="", compare=False)


@dataclass(frozen=True)
class _Found:
    fs: fsspec.AbstractFileSystem
    path: str
    info: dict[str, Any]  # what the file system tells of it
    base: str  # the folder that its input names
    given: str


def list_shards(inputs: str | Sequence[str], *, root: str | None = None) -> list[Shard]:
    """Return the shards that `inputs` name, sorted by name.

    A folder stands for all shards below it. A shard's name is its path below the folder that all inputs
    have in common, or below `root`, without `.tar`, `.tar.gz` or `.tgz`.

    Raises:
        UsageError: if an input names nothing or something that is no shard, if two shards have one name, or
            if one lies outside `root`.
    """
    given = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    if not given:
        raise UsageError(f"no input is given; name shards ({_LOOKED_FOR}), folders or patterns")
    found: list[_Found] = []
    explicit: list[tuple[fsspec.AbstractFileSystem, str, str]] = []
    for text in map(os.fspath, given):
        for url in _expand_braces(text):
            with storage.reachable(text):
                fs, path = storage.filesystem(url)
                if _MAGIC.search(path) and _kind(fs, path) is None:
                    found += _glob(fs, path, text)
                elif path.lower().endswith(SUFFIXES):
                    explicit.append((fs, path, text))
                else:
                    found += _folder(fs, path, text)
    with storage.reachable(given[0]):
        found += _files(explicit, many=len(given) > 1)
    stores = {type(item.fs): item.given for item in found}
    if len(stores) > 1:
        raise UsageError(
            f"the inputs lie in different stores: {' and '.join(map(repr, stores.values()))}; run them apart"
        )
    return _name(found, root)


def _expand_braces(text: str) -> list[str]:
    if text.startswith("pipe:"):
        raise UsageError(f"{text!r}: pipes are not run; give the path or URL that the command reads")
    if "{" not in text or (storage.is_local(text) and os.path.exists(text)):
        return [text]
    # Counted first: braceexpand makes every number of a range before it gives the first.
    paths = math.prod(abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(text))
    if paths > MAX_EXPANSION:
        raise UsageError(f"{text!r} stands for {paths} paths, over {MAX_EXPANSION}; give a narrower range or a folder")
    try:
        return list(braceexpand(text, escape=False))
    except ValueError as error:
        raise UsageError(f"{text!r}: braces are not balanced; write for instance {{00000..00331}}") from error


def _glob(fs: fsspec.AbstractFileSystem, path: str, given: str) -> list[_Found]:
    match = _MAGIC.search(path)
    base = path[: match.start() if match else None].rpartition("/")[0]
    fs.invalidate_cache()
    infos: dict[str, dict[str, Any]] = storage.asked(fs, lambda: fs.glob(path, detail=True), f"list {given}")
    found = []
    for name, info in infos.items():
        if info.get("type") == "directory":
            found += [_Found(fs, file, told, base, given) for file, told in storage.find(fs, name, SUFFIXES).items()]
        elif name.lower().endswith(SUFFIXES):
            found.append(_Found(fs, name, info, base, given))
    found = [item for item in found if not _is_hidden(item.path)]
    if not found:
        raise UsageError(f"no shard matches {given!r}; looked for {_LOOKED_FOR}")
    return found


def _folder(fs: fsspec.AbstractFileSystem, path: str, given: str) -> list[_Found]:
    found = [_Found(fs, file, info, path, given) for file, info in storage.find(fs, path, SUFFIXES).items()]
    found = [item for item in found if not _is_hidden(item.path)]
    if found:
        return found
    kind = _kind(fs, path)
    if kind == "file":
        raise UsageError(f"{given!r} is no shard; looked for {_LOOKED_FOR}. {_QUOTE}")
    if kind == "directory":
        raise UsageError(f"no shard lies in the folder {given!r}; looked for {_LOOKED_FOR} at any depth")
    raise UsageError(f"{given!r} does not exist; looked for a folder or for {_LOOKED_FOR}. {_QUOTE}")


def _kind(fs: fsspec.AbstractFileSystem, path: str) -> str | None:
    """Return what lies there, "file" or "directory"; unlike for `exists`, a store that fails does not hold nothing."""
    try:
        return _info(fs, path)["type"]
    except (FileNotFoundError, NotADirectoryError):
        return None


def _info(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, Any]:
    return storage.asked(fs, lambda: fs.info(path), f"look for {path}")


def _ls(fs: fsspec.AbstractFileSystem, path: str) -> list[dict[str, Any]]:
    return storage.asked(fs, lambda: fs.ls(path, detail=True), f"list {path}")


def _is_hidden(path: str) -> bool:
    return path.rpartition("/")[2].startswith(".")


def _files(explicit: list[tuple[fsspec.AbstractFileSystem, str, str]], *, many: bool) -> list[_Found]:
    """Return files that are named one by one; a folder whose name ends like a shard's counts as a folder."""
    siblings: dict[str, int] = defaultdict(int)
    for _, path, _ in explicit:
        siblings[path.rpartition("/")[0]] += 1
    listings: dict[str, dict[str, dict[str, Any]]] = {}
    found, missing = [], []
    for fs, path, given in explicit:
        parent = path.rpartition("/")[0]
        try:
            if "file" not in fs.protocol and siblings[parent] > 16:  # one listing in place of a request for each
                if parent not in listings:
                    fs.invalidate_cache()
                    listings[parent] = {info["name"]: info for info in _ls(fs, parent)}
                info = listings[parent].get(path) or _info(fs, path)
            else:
                info = _info(fs, path)
        except FileNotFoundError:
            missing.append(_url(fs, path))
            continue
        if info["type"] == "directory":
            found += _folder(fs, path, given)
        else:
            found.append(_Found(fs, path, info, parent, given))
    if missing:
        shown = ", ".join(repr(path) for path in missing[:5]) + (", ..." if len(missing) > 5 else "")
        hint = f" {_QUOTE}" if many else ""
        raise UsageError(f"{len(missing)} of {len(explicit)} shards do not exist: {shown}.{hint}")
    return found


def _name(found: list[_Found], root: str | None) -> list[Shard]:
    fs = found[0].fs
    if root is None:
        common = _common_folder(sorted({item.base for item in found}))
    else:
        common = storage.filesystem(root)[1].rstrip("/").split("/")
    named: dict[str, _Found] = {}
    shards = []
    for item in found:
        parts = item.path.split("/")
        if parts[: len(common)] != common:
            raise UsageError(f"{item.path!r} lies outside the root {root!r}, below which shards are named")
        name = storage.check_name(_without_suffix("/".join(parts[len(common) :])))
        other = named.setdefault(name, item)
        if other is not item:
            if other.path == item.path:
                raise UsageError(
                    f"{item.path!r} is given twice, by {other.given!r} and by {item.given!r}; give it once"
                )
            raise UsageError(f"two shards have the name {name!r}: {other.path!r} and {item.path!r}; leave one out")
        shards.append(Shard(name, _url(fs, item.path), int(item.info.get("size") or 0), _stamp(item.info)))
    return sorted(shards, key=lambda shard: shard.name)


def root_of(shards: Sequence[Shard]) -> str:
    """Return the folder below which shards are named, as `list_shards` takes it."""
    return _without_suffix(shards[0].url).removesuffix(shards[0].name).rstrip("/") or "/"


def _stamp(info: dict[str, Any]) -> str:
    told = (info.get(name) for name in ("ETag", "etag", "LastModified", "updated", "mtime"))
    return next((str(value) for value in told if value), "")


def _url(fs: fsspec.AbstractFileSystem, path: str) -> str:
    return path if "file" in fs.protocol else fs.unstrip_protocol(path)


def _common_folder(folders: list[str]) -> list[str]:
    first, *others = [folder.rstrip("/").split("/") for folder in folders]
    for parts in others:
        shared = 0
        while shared < min(len(first), len(parts)) and first[shared] == parts[shared]:
            shared += 1
        first = first[:shared]
    return first


def _without_suffix(name: str) -> str:
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def shards_outside(inputs: str | Sequence[str], out: str, *, root: str | None = None) -> list[Shard]:
    """List shards, but for those of the result folder, which may lie below the dump; for `root` see `list_shards`.

    Raises:
        UsageError: if no other is left.
    """
    folder = out.rstrip("/") + "/"
    shards = [shard for shard in list_shards(inputs, root=root) if not shard.url.startswith(folder)]
    if not shards:
        raise UsageError(f"all shards that are given lie in {out}, the folder of the results: give another one.")
    return shards
