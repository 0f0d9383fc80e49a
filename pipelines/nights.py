"""What `tarsift ingest` keeps from night to night: which shards came in, and what each night was like.

    STATE/state.json         root, key and kind of the state, put once
    STATE/nights/<n>/        the result folder of a night, with `night.json`: which shards it takes, and
                             `encoder.pt`: the one that was trained further in it
    STATE/reference/<n>/     the standing reference after it
    STATE/records/<n>.json   the commit of the night: what came in, what was found; nothing of a night counts before it

A night that was interrupted has a `night.json` and no record; it is gone on with, and what has come in since waits.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tarsift.operators import storage
from tarsift.operators.errors import ChangedError, TarsiftError, UsageError
from tarsift.operators.listing import Shard
from tarsift.pipelines.lock import fence

VERSION = 1
_AT_ONCE = 16  # requests to the store
ENCODER = "encoder.pt"
INTERMEDIATE = ("embeddings", "density", "reference", "standing")  # what older nights do without, beside the encoder
REFERENCES_KEPT = 2


@dataclass
class State:
    """The standing state of an ingestion.

    Attributes:
        content: `state.json`: version, root, key (hex), train, created.
        records: those of the nights, in their order.
    """

    folder: str
    content: dict[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def load(cls, folder: str) -> State | None:
        """Read a state; None where there is none.

        Raises:
            UsageError: if it is of a later version.
        """
        with storage.reachable(folder):
            try:
                content = json.loads(storage.read_bytes(storage.join(folder, "state.json")))
            except (FileNotFoundError, ValueError):
                return None
        if content["version"] > VERSION:
            raise UsageError(f"{folder} was made by a later tarsift (state version {content['version']}): upgrade.")
        names = storage.list_files(storage.join(folder, "records"), ".json")
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            stored = list(pool.map(lambda name: storage.read_bytes(storage.join(folder, "records", name)), names))
        records = [json.loads(record) for record in stored]
        for i, record in enumerate(records):
            if record["night"] != i + 1:
                raise TarsiftError(
                    f"{folder}/records has no night {i + 1}: the state is not whole; restore the record."
                )
        return cls(folder, content, records)

    @classmethod
    def begin(cls, folder: str, *, root: str, train: bool) -> State:
        """Make a new state, with a key of its own."""
        content = {
            "version": VERSION,
            "root": root,
            "key": secrets.token_hex(32),
            "train": train,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        fence(folder)
        storage.put_bytes(storage.join(folder, "state.json"), json.dumps(content, indent=1).encode())
        return cls(folder, content)

    @property
    def root(self) -> str:
        return self.content["root"]

    @property
    def last(self) -> dict[str, Any] | None:
        """The record of the last night."""
        return self.records[-1] if self.records else None

    @property
    def next(self) -> int:
        """Number of the night to come."""
        return len(self.records) + 1

    def place(self, kind: str, night: int, suffix: str = "") -> str:
        """Return where something of a night is: `nights`, `reference` or `records`."""
        return storage.join(self.folder, kind, f"{night:04d}{suffix}")

    def encoder(self, night: int) -> str:
        """Return where the encoder of a night is."""
        return storage.join(self.place("nights", night), ENCODER)

    def seen(self) -> dict[str, dict[str, Any]]:
        """Return what is known of every shard that came in: size, stamp, sha256 and night."""
        known: dict[str, dict[str, Any]] = {}
        for record in self.records:
            for name, told in record["shards"].items():
                known[name] = {**told, "night": record["night"]}
            for name, stamp in record.get("touched", {}).items():
                known[name] = {**known[name], "stamp": stamp}
        return known

    def opened(self) -> dict[str, Any] | None:
        """Return what the next night was begun with; None if it was not."""
        try:
            return json.loads(storage.read_bytes(storage.join(self.place("nights", self.next), "night.json")))
        except (FileNotFoundError, ValueError):
            return None

    def open(self, shards: Sequence[Shard], **about: Any) -> dict[str, Any]:
        """Begin the next night with these shards: they are its, whatever happens."""
        fence(self.folder)
        listed = [{"name": s.name, "url": s.url, "size": s.size, "stamp": s.stamp} for s in shards]
        content = {"night": self.next, "shards": listed, **about}
        url = storage.join(self.place("nights", self.next), "night.json")
        storage.put_bytes(url, json.dumps(content, indent=1).encode())
        return content

    def abandon(self) -> None:
        """Forget that the next night was begun, with all that was done of it."""
        fence(self.folder)
        storage.remove_tree(self.place("nights", self.next))

    def commit(self, record: Mapping[str, Any]) -> None:
        """Put the record of the next night, which makes it count.

        Raises:
            FencedError: if another ingestion has taken over.
        """
        fence(self.folder)
        url = self.place("records", self.next, ".json")
        if not storage.create(url, json.dumps(record, indent=1).encode()):
            raise ChangedError(f"{url} is there already: another ingestion has worked on {self.folder}.")
        self.records.append(dict(record))

    def clear(self, keep: int) -> list[str]:
        """Remove what nights before the last `keep` do without; return what of them was removed."""
        fence(self.folder)
        removed = []
        for night in range(1, self.next - keep):
            removed += [
                storage.join(self.place("nights", night), name)
                for name in INTERMEDIATE
                if storage.list_files(storage.join(self.place("nights", night), name))
            ]
            if storage.exists(self.encoder(night)):
                removed.append(self.encoder(night))
        for night in range(1, self.next - REFERENCES_KEPT):
            if storage.list_files(self.place("reference", night)):
                removed.append(self.place("reference", night))
        for url in removed:
            storage.remove(url) if url.endswith(".pt") else storage.remove_tree(url)
        return removed


@dataclass(frozen=True)
class Arrivals:
    """What a listing holds that the state does not.

    Attributes:
        new: shards that were never seen; changed: those that were, with other bytes.
        doubtful: those with another stamp and the same size, whose bytes decide.
        gone: names of shards that are not there any more, of the folders that are listed.
    """

    new: list[Shard]
    changed: list[Shard]
    doubtful: list[Shard]
    gone: list[str]

    def any_to_read(self) -> bool:
        """Tell whether there is a shard that may be new."""
        return bool(self.new or self.changed or self.doubtful)


def compare(listed: Sequence[Shard], seen: Mapping[str, Mapping[str, Any]]) -> Arrivals:
    """Compare a listing with what is known."""
    found = Arrivals([], [], [], [])
    for shard in listed:
        known = seen.get(shard.name)
        if known is None:
            found.new.append(shard)
        elif known["size"] != shard.size:
            found.changed.append(shard)
        elif known["stamp"] != shard.stamp:
            found.doubtful.append(shard)
    names = {shard.name for shard in listed}
    folders = {_folder(name) for name in names}  # of the night before others may be listed, or all
    found.gone.extend(sorted(name for name in seen.keys() - names if _folder(name) in folders))
    return found


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def latest(records: Sequence[Mapping[str, Any]], *path: str) -> Iterator[Any]:
    """Yield a value of every record that has it."""
    for record in records:
        value: Any = record
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is not None:
            yield value
