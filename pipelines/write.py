"""Verdicts to shards: every member goes, byte for byte, to clean/, removed/ or errored/."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from tarsift.operators import storage
from tarsift.operators.errors import ConservationError
from tarsift.operators.flag import HOMES
from tarsift.operators.folds import Count
from tarsift.operators.retry import take_repeated
from tarsift.operators.shards import Shard
from tarsift.operators.stored import ReadStored, Stored
from tarsift.operators.writer import split_shard
from tarsift.pipelines.commit import PassResult
from tarsift.pipelines.folding import run_fold
from tarsift.pipelines.ledger import Ledger
from tarsift.pipelines.progress import Event, Listener, silent
from tarsift.pipelines.stopping import patient
from tarsift.pipelines.tasks import side_by_side

KEEP_SCHEMA = pa.schema([("shard", pa.string()), ("row", pa.int32()), ("uid", pa.string())])
HOME_COUNTS = Count("home")


def write_shard(shard: Shard, out: str, sha256: str) -> dict[str, Any]:
    """Split one shard by its flags and return its ledger record.

    Raises:
        ChangedError: if the shard is not the one that was embedded.
        ConservationError: if a sample has no home or two.
    """
    homes = verdicts_of(shard.name, out)
    result = split_shard(shard, homes, shard_outputs(shard.name, out), expect_sha256=sha256)
    samples = {home: result.homes[home].samples for home in HOMES}
    wanted = {home: homes.count(home) for home in HOMES}
    if samples != wanted:
        raise ConservationError(
            f"{shard.name}: flags give {wanted}, the shard gave {samples}; report this as a defect."
        )
    return {
        "rows": len(homes),
        "repeated_requests": take_repeated(),
        "sha256": result.source_sha256,
        "stray_members": result.stray_members,
        "tail_bytes": result.tail_bytes,
        "problem": result.problem.model_dump() if result.problem else None,
        "homes": {
            home: {"samples": h.samples, "members": h.members, "bytes": h.bytes, "sha256": h.sha256}
            for home, h in result.homes.items()
        },
    }


def verdicts_of(shard: str, out: str) -> list[str]:
    """Return the home of every row of a shard, by its flags."""
    source = ReadStored([Stored(storage.join(out, "flags"), ("row", "home"))], batch_rows=8192)
    return [home for table in source(shard) for home in table["home"].to_pylist()]


def shard_outputs(shard: str, out: str) -> dict[str, str]:
    """Return the URL of the archive of each home."""
    return {home: storage.join(out, home, f"{shard}.tar") for home in HOMES}


def sizes_url(clean: str, folder: str) -> str:
    """Return the URL of the list of how many samples the shards of a folder below clean/ hold."""
    return storage.join(clean, *filter(None, [folder]), "sizes.json")


def write_pass(
    shards: Sequence[Shard],
    out: str,
    embedded: Mapping[str, Mapping[str, Any]],
    fingerprint: str,
    *,
    progress: Listener = silent,
) -> tuple[PassResult, Ledger]:
    """Split all shards that are not committed yet; one task per shard. Asked to stop, it finishes those begun."""
    start = time.monotonic()
    ledger = Ledger(out, "write", fingerprint)
    entries = ledger.begin([s.name for s in shards])
    todo = [s for s in shards if s.name not in entries]
    for folder in {shard.name.rpartition("/")[0] for shard in todo}:
        storage.remove(sizes_url(storage.join(out, "clean"), folder))  # of an export, about shards that are replaced
    done: list[str] = []
    samples = repeated = 0

    def told(**more: Any) -> None:
        progress(Event("write", len(entries), len(shards), samples, repeated=repeated, **more))

    told()
    calls = ((shard.name, (shard, out, embedded[shard.name]["source"]["sha256"])) for shard in todo)
    with patient() as asked:
        for name, (result,) in side_by_side(write_shard, takewhile(lambda _: not asked(), calls)):
            entries[name] = ledger.commit(name, ray.get(result))
            done.append(name)
            samples += entries[name]["rows"]
            repeated += entries[name]["repeated_requests"]
            told()
    told(finished=True, note="" if done else "nothing to do")
    return PassResult("write", done, entries, time.monotonic() - start), ledger


def remove_shards(shards: Sequence[str], out: str, fingerprint: str) -> None:
    """Remove the shards of an earlier pass, for a run that is to write lists only: they hold other verdicts."""
    Ledger(out, "write", fingerprint).begin(shards)
    for home in HOMES:
        storage.remove_tree(storage.join(out, home))


def write_lists(shards: Sequence[str], out: str) -> int:
    """Write `keep.parquet`: (shard, row, uid) of every sample whose home is clean/; returns their number."""
    kept = 0
    with storage.open_write(storage.join(out, "keep.parquet")) as sink:
        writer = pq.ParquetWriter(sink, KEEP_SCHEMA, compression="zstd")
        for table in kept_rows(shards, out):
            kept += len(table)
            writer.write_table(table)
        writer.close()
    return kept


def kept_rows(shards: Sequence[str], out: str) -> Iterator[pa.Table]:
    """Yield what `keep.parquet` lists, by the flags: the rows whose home is clean/, by shard."""
    source = ReadStored([Stored(storage.join(out, "flags"), (*KEEP_SCHEMA.names, "home"))], batch_rows=8192)
    for shard in sorted(shards):
        for table in source(shard):
            yield table.filter(pc.field("home") == "clean").select(KEEP_SCHEMA.names).cast(KEEP_SCHEMA)


def count_homes(shards: Sequence[str], out: str, embedded: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Count read = kept + removed + errored over all flags.

    Raises:
        ConservationError: if they do not agree.
    """
    homes = run_fold(HOME_COUNTS, shards, [storage.join(out, "flags")])
    errors: dict[str, int] = {}
    for entry in embedded.values():
        for reason, n in entry["errors"].items():
            errors[reason] = errors.get(reason, 0) + n
    counts = {
        "read": sum(entry["rows"] for entry in embedded.values()),
        "kept": homes.get("clean", 0),
        "removed": homes.get("removed", 0),
        "errored": homes.get("errored", 0),
        "errors": dict(sorted(errors.items())),
        "shard_problems": {
            n: e["source"]["problems"] for n, e in sorted(embedded.items()) if e["source"].get("problems")
        },
    }
    if counts["read"] != counts["kept"] + counts["removed"] + counts["errored"]:
        raise ConservationError(
            f"read {counts['read']} != kept + removed + errored in {counts}; report this as a defect."
        )
    return counts
