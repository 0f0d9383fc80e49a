"""Which samples of a shard were kept: verdicts read shard by shard, for tables and for the samples of webdataset.

A sample is kept if `clean` copies it to `clean/`: neither flagged nor put aside for an error.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool

from tarsift.operators import storage
from tarsift.operators.errors import ChangedError, UsageError
from tarsift.operators.listing import SUFFIXES, Shard
from tarsift.operators.samples import split_name
from tarsift.operators.schema import as_table
from tarsift.operators.stored import ReadStored, Stored

HELD_SHARDS = 8


@dataclass(frozen=True)
class KeptRows:
    """The verdicts of one shard, in row order."""

    keys: list[str]
    kept: Bool[np.ndarray, " n"]

    @cached_property
    def by_key(self) -> dict[str, list[bool]]:
        """The verdicts by key, in row order, the keys as `lowered`."""
        found: dict[str, list[bool]] = {}
        for key, kept in zip(self.keys, self.kept.tolist(), strict=True):
            found.setdefault(lowered(key), []).append(kept)
        return found

    @cached_property
    def mixed(self) -> frozenset[str]:
        """The keys of which some rows were kept, and others not."""
        return frozenset(key for key, rows in self.by_key.items() if len(set(rows)) > 1)


class Verdicts:
    """The verdicts of a result folder, shard by shard; those of the last few shards are held.

    Args:
        out: the result folder.
        shards: those that it was made from.
    """

    def __init__(self, out: str, shards: Sequence[Shard]) -> None:
        self.out = out
        self.shards = {shard.name: shard for shard in shards}
        self._held: OrderedDict[str, KeptRows] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return Verdicts, (self.out, tuple(self.shards.values()))  # what is held is read anew where it arrives

    def of(self, shard: str) -> KeptRows:
        """Return the verdicts of a shard.

        Raises:
            UsageError: if it is none of the shards that the result was made from.
        """
        if shard not in self.shards:
            raise UsageError(
                f"{self.out} was not made from the shard {shard!r}, but from {', '.join(list(self.shards)[:3])}"
                f"{', ...' if len(self.shards) > 3 else ''}: nothing says which of its samples to keep. Shards are "
                "named by their path below the folder that all inputs have in common."
            )
        if shard not in self._held:
            source = ReadStored([Stored(storage.join(self.out, "flags"), ("row", "key", "home"))], batch_rows=8192)
            tables = list(source(shard))
            keys = [key for table in tables for key in table["key"].to_pylist()]
            homes = [home for table in tables for home in table["home"].to_pylist()]
            self._held[shard] = KeptRows(keys, np.array([home == "clean" for home in homes], bool))
        self._held.move_to_end(shard)
        while len(self._held) > HELD_SHARDS:
            self._held.popitem(last=False)
        return self._held[shard]


def drop_flagged(batch: pa.Table | Mapping[str, Any], *, verdicts: Verdicts) -> pa.Table:
    """Return the rows of a table with `shard` and `row` that were kept, in their order.

    Raises:
        UsageError: for a shard that the result was not made from.
        ChangedError: for a row that the shard did not have, or that had another `key`.
    """
    table = as_table(batch)
    shards, rows = table["shard"].to_pylist(), table["row"].to_pylist()
    keys = table["key"].to_pylist() if "key" in table.column_names else None
    mask = np.zeros(len(table), bool)
    for i, (shard, row) in enumerate(zip(shards, rows, strict=True)):
        known = verdicts.of(shard)
        if not 0 <= row < len(known.keys) or (keys is not None and keys[i] != known.keys[row]):
            raise ChangedError(
                f"{verdicts.out} does not know row {row} of the shard {shard}"
                f"{f' by the key {keys[i]!r}' if keys is not None else ''}: the shard has changed since it was cleaned."
            )
        mask[i] = known.kept[row]
    return table if mask.all() else table.filter(pa.array(mask))


class SkipFlagged:
    """A stage of a webdataset pipeline: passes on the samples that were kept. See `tarsift.skip_flagged`."""

    def __init__(self, verdicts: Verdicts) -> None:
        self.verdicts = verdicts
        self._by_url = {shard.url: name for name, shard in verdicts.shards.items()}

    def __call__(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        url, reading = None, None
        for sample in samples:
            if "__url__" not in sample or "__key__" not in sample:
                raise UsageError(
                    "a sample has no __url__ or __key__, by which its verdict is found: put skip_flagged right behind "
                    "the WebDataset, before stages that leave these out."
                )
            if reading is None or sample["__url__"] != url:
                if reading is not None:
                    reading.end()
                url = sample["__url__"]
                name = self._name_of(url)
                reading = _Reading(name, self.verdicts.of(name))
            kept = reading.kept(sample)
            if kept is not None:
                yield kept
        if reading is not None:
            reading.end()

    def _name_of(self, url: str) -> str:
        """Return the name of the shard at `url`: where the run read it, or the same path below another folder."""
        path = read_by(url)
        name = self._by_url.get(path) or self._by_url.get(storage.absolute(path))
        if name is None:
            parts = _without_suffix(path).split("/")
            tails = ("/".join(parts[i:]) for i in range(len(parts)))  # the longest first
            name = next((tail for tail in tails if tail in self.verdicts.shards), None)
        if name is None:
            shown = storage.without_secrets(url)
            raise UsageError(
                f"{self.verdicts.out} was made from no shard like {shown}: give the shards it was made from."
            )
        if storage.is_local(path) and os.path.isfile(path):
            size, was = os.path.getsize(path), self.verdicts.shards[name].size
            if was and size != was:
                raise ChangedError(
                    f"{path} has {size} bytes, and the shard {name} that {self.verdicts.out} was made from had {was}: "
                    "it is another one, or has changed since."
                )
        return name


class _Reading:
    """One reading of a shard, sample by sample in the order of the archive."""

    def __init__(self, shard: str, known: KeptRows) -> None:
        self._shard, self._known = shard, known
        self._met: Counter[str] = Counter()  # samples by key, of the mixed ones
        self._begin()

    def _begin(self) -> None:
        self._met.clear()
        self._unseen = set(self._known.by_key) - self._known.mixed if self._known.mixed else set()

    def kept(self, sample: dict[str, Any]) -> dict[str, Any] | None:
        """Return the sample, with the members alone that belong to kept rows; None if there is none of them."""
        key = sample["__key__"]
        members = [name for name in sample if not name.startswith("__")]
        owners = {name: owner_of(key, name) for name in members}
        verdicts = {owner: self._verdict(owner) for owner in dict.fromkeys(owners.values())}
        if all(verdicts.values()):
            return sample
        if not any(verdicts.values()):
            return None
        dropped = {name for name in members if not verdicts[owners[name]]}
        return {name: value for name, value in sample.items() if name not in dropped}

    def _verdict(self, owner: str) -> bool:
        if not owner:
            return True  # a member of no sample, which `clean` copies to clean/
        rows = self._known.by_key.get(owner)
        if rows is None:
            raise ChangedError(
                f"the shard {self._shard} had no sample with the key {owner!r} when it was cleaned: it has changed "
                "since, or its members are renamed on the way."
            )
        if owner not in self._known.mixed:
            self._unseen.discard(owner)
            return rows[0]
        if self._met[owner] == len(rows) and not self._unseen:  # the same shard once more, right behind itself
            self._begin()
        if self._met[owner] == len(rows):
            raise UsageError(
                f"{len(rows)} samples of the shard {self._shard} have the key {owner!r}, with different verdicts, and "
                "here comes one more: they cannot be told apart. Train from clean/ instead."
            )
        self._met[owner] += 1
        return rows[self._met[owner] - 1]

    def end(self) -> None:
        """Tell of samples that could not be told apart for sure."""
        for owner, met in self._met.items():
            rows = self._known.by_key[owner]
            if met != len(rows):
                warnings.warn(
                    f"{len(rows)} samples of the shard {self._shard} have the key {owner!r}, with different verdicts, "
                    f"and {met} of them came: the verdict of one may have been taken for that of another.",
                    RuntimeWarning,
                    stacklevel=2,
                )


def owner_of(key: str, name: str) -> str:
    """Return the key, as `lowered`, of the row that a member of webdataset's sample belongs to; "" if to none.

    webdataset ends the key at the first dot of a name, rows at the last one: see `tarsift.operators.samples`.
    """
    return lowered(split_name(f"{key}.{name}")[0])


def lowered(key: str) -> str:
    """Return a key as it can be told from webdataset's samples: what follows a dot of the name in lower case."""
    key = key.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    slash = key.rfind("/") + 1
    stem, dot, rest = key[slash:].partition(".")
    return f"{key[:slash]}{stem}{dot}{rest.lower()}"


def read_by(url: str) -> str:
    """Return the shard that a URL of webdataset stands for: of `pipe:COMMAND`, the last word that looks like one."""
    if url.startswith("file:"):
        path = url.removeprefix("file:")
        return "/" + path.lstrip("/") if path.startswith("//") else path
    if not url.startswith("pipe:"):
        return url
    words = [word.strip("'\"") for word in url.removeprefix("pipe:").split()]
    return next((word for word in reversed(words) if word.lower().endswith(SUFFIXES)), url)


def _without_suffix(path: str) -> str:
    suffix = next((suffix for suffix in SUFFIXES if path.lower().endswith(suffix)), "")
    return path[: len(path) - len(suffix)]
