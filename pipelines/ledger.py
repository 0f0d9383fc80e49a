"""What is committed: one small JSON per pass and shard, and `run.json` for the whole run.

Putting `ledger/<pass>/<shard>.json` is the commit of a pass for a shard. Everything else in the
result folder is garbage until such an entry names it. Nothing is ever renamed, so that a local
disk and an object store behave alike; an entry cut short by a crash is no JSON and so no entry.

An entry counts only under the *fingerprint* it was made with: a digest of the settings of its
pass and of all passes before it. Settings that change nothing in the result (workers, batch
sizes) are left out of it. A pass that starts removes the entries of other fingerprints, whose
outputs it is about to replace.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tarsift.operators import storage
from tarsift.operators.errors import UsageError
from tarsift.operators.retry import take_repeated
from tarsift.pipelines.lock import fence
from tarsift.pipelines.stopping import stop_if_asked

_AT_ONCE = 16  # requests to the store


def fingerprint(*parts: Any) -> str:
    """Digest JSON-able parts to 16 hex digits; equal parts, equal digest."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Ledger:
    """The commit records of one pass under one fingerprint."""

    out: str
    name: str
    fingerprint: str

    @property
    def folder(self) -> str:
        return storage.join(self.out, "ledger", self.name)

    def commit(self, shard: str, entry: dict[str, Any]) -> dict[str, Any]:
        """Put the record that makes this pass's work on `shard` count.

        Raises:
            FencedError: if another run has taken over the result folder.
        """
        fence(self.out)
        record = {"pass": self.name, "shard": shard, "fingerprint": self.fingerprint, **entry}
        storage.put_bytes(storage.join(self.folder, f"{shard}.json"), json.dumps(record, indent=1).encode())
        return record

    def begin(self, shards: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Return the records that count, by shard, and remove those of other fingerprints, for a pass that starts.

        It replaces outputs before it puts its own records: a record of other settings would vouch for them should
        it be stopped in between and those settings come back.

        Raises:
            FencedError: if another run has taken over the result folder.
        """
        fence(self.out)
        wanted, found = set(shards), {}
        void = []
        for record in records_of(self.out, self.name):
            if record["shard"] in wanted and record["fingerprint"] == self.fingerprint:
                found[record["shard"]] = record
            elif record["shard"] in wanted:
                void.append(storage.join(self.folder, f"{record['shard']}.json"))
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(storage.remove, void))
        return found

    def entries(self, shards: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
        """Read the records that count, by shard; those of other fingerprints are passed over."""
        wanted = None if shards is None else set(shards)
        return {
            record["shard"]: record
            for record in records_of(self.out, self.name)
            if record["fingerprint"] == self.fingerprint and (wanted is None or record["shard"] in wanted)
        }


def records_of(out: str, name: str) -> list[dict[str, Any]]:
    """Read all records of a pass, whatever their fingerprints."""
    folder = storage.join(out, "ledger", name)
    urls = [storage.join(folder, file) for file in storage.list_files(folder, ".json")]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return [record for record in pool.map(_read_record, urls) if record]


def _read_record(url: str) -> dict[str, Any] | None:
    try:
        record = json.loads(storage.read_bytes(url))
    except (ValueError, FileNotFoundError):
        return None
    return record if isinstance(record, dict) and {"shard", "fingerprint"} <= record.keys() else None


@dataclass
class RunFile:
    """`run.json`: what was asked, of what, with which result so far; written whole after every pass."""

    out: str
    content: dict[str, Any] = field(default_factory=dict)
    stored: bytes = b""  # as it was last read or written here

    @classmethod
    def load(cls, out: str) -> RunFile | None:
        """Read OUT/run.json; None where there is none (or only a cut-off one)."""
        stored = _stored(out)
        try:
            return cls(out, json.loads(stored), stored)
        except ValueError:
            return None

    @classmethod
    def begin(cls, out: str, content: dict[str, Any]) -> RunFile:
        """Make the one of a new result folder, not saved yet."""
        return cls(out, content, _stored(out))

    def changed(self) -> bool:
        """Tell whether another run has written it since."""
        return _stored(self.out) != self.stored

    @classmethod
    def load_or_refuse(cls, out: str) -> RunFile:
        """Read OUT/run.json.

        Raises:
            UsageError: if OUT is no result folder.
        """
        run = cls.load(out)
        if run is None:
            raise UsageError(
                f"{out} holds no run.json: run `tarsift clean` or `tarsift embed` with `--out {out}` first."
            )
        return run

    def save(self) -> None:
        """Write it whole.

        Raises:
            FencedError: if another run has taken over the result folder.
        """
        fence(self.out)
        self.stored = json.dumps(self.content, indent=1).encode()
        storage.put_bytes(storage.join(self.out, "run.json"), self.stored)

    def record_pass(self, name: str, figures: dict[str, Any]) -> None:
        """Keep the figures of a pass; what a resumed pass did not do again keeps its earlier time.

        Requests to the store that this process repeated since the last pass are counted for this one.
        """
        passes = self.content.setdefault("passes", {})
        before = passes.get(name) or {}
        figures = {**figures, "repeated_requests": figures.get("repeated_requests", 0) + take_repeated()}
        if before and before.get("fingerprint") == figures.get("fingerprint"):
            for total in ("elapsed_s", "repeated_requests"):
                figures[total] = round(before.get(total, 0) + figures.get(total, 0), 3)
        if figures.get("elapsed_s") and figures.get("samples"):
            figures["samples_per_s"] = round(figures["samples"] / figures["elapsed_s"], 1)
        passes[name] = figures
        self.save()
        stop_if_asked()


def _stored(out: str) -> bytes:
    try:
        return storage.read_bytes(storage.join(out, "run.json"))
    except FileNotFoundError:
        return b""
