"""How the rows of a stream become one file per shard, each committed once.

Ray re-batches: a batch mixes shards, and batches differ between runs. So the sink splits its batch
by shard, writes each run of rows as a part and returns a receipt. When the receipts of a shard
cover rows 0 to n-1, n told by the reader's end-of-shard row, a task merges exactly those parts in
row order into the pass's file and the driver commits it. A part that no receipt names is garbage.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data.exceptions import ExecutionTimeoutError

from tarsift.operators import storage
from tarsift.operators.errors import TarsiftError
from tarsift.operators.retry import take_repeated
from tarsift.operators.schema import as_table
from tarsift.operators.shards import Shard
from tarsift.operators.stored import parquet_options
from tarsift.pipelines.failures import stalled
from tarsift.pipelines.ledger import Ledger
from tarsift.pipelines.progress import Event, Listener, silent
from tarsift.pipelines.session import TASK_OPTIONS, map_tables
from tarsift.pipelines.stopping import patient, stop_if_asked
from tarsift.pipelines.tasks import leave, next_done

RECEIPT_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("first", pa.int32()),
        ("last", pa.int32()),
        ("part", pa.string()),
        ("end", pa.string()),
        ("repeated", pa.int32()),  # requests to the store that the sink had to repeat
    ]
)
ROW_GROUP_ROWS = 4096
PARTS = ".parts"  # folder below that of a pass; what lies in it of a shard is cleared when that is committed
CPUS_PER_MERGE = 4  # merges wait for storage too; each at once is one more worker process
CPUS_PER_SINK = 2
SINK_CPUS = 0.2  # a sink waits for storage more than it computes


def write_parts(batch: pa.Table, *, folder: str, drop: Sequence[str] = ("image", "pixels")) -> pa.Table:
    """Write a batch as one part per run of rows of a shard, and return their receipts (the sink).

    Parts are Arrow streams, which cost a fraction of Parquet to write and are read back once. A part
    lies at `<folder>/.parts/<shard>/<first>-<last>-<attempt>.arrow`, slashes in the shard's name quoted.
    """
    table = as_table(batch)
    table = table.drop_columns([name for name in drop if name in table.column_names])
    receipts = []
    for shard, first, last, rows in runs(table):
        end, part = rows["key"][0].as_py() if first < 0 else "", ""
        if end:
            rows = rows.slice(0, 0)
        if not end or not json.loads(end)["rows"]:  # the only part of an empty shard tells its columns
            part = storage.join(parts_of(folder, shard), f"{first:08d}-{last:08d}-{uuid.uuid4().hex[:8]}.arrow")
            storage.put_bytes(part, ipc_bytes(rows))
        receipts.append((shard, first, last, part, end, take_repeated()))
    columns = list(zip(*receipts, strict=True)) if receipts else [[]] * len(RECEIPT_SCHEMA)
    return pa.table([pa.array(list(c), f.type) for c, f in zip(columns, RECEIPT_SCHEMA, strict=True)], RECEIPT_SCHEMA)


def parts_of(folder: str, shard: str) -> str:
    """Return the folder of a shard's parts; never below that of another shard, such as `train` and `train/00000`."""
    return storage.join(folder, PARTS, quote(shard, safe=""))


def runs(table: pa.Table) -> Iterator[tuple[str, int, int, pa.Table]]:
    """Yield (shard, first row, last row, slice) for every run of consecutive rows of one shard."""
    shards, rows = table["shard"].to_pylist(), table["row"].to_pylist()
    start = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or shards[i] != shards[start] or rows[i] != rows[i - 1] + 1 or rows[i - 1] < 0:
            yield shards[start], rows[start], rows[i - 1], table.slice(start, i - start)
            start = i


def ipc_bytes(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


@dataclass
class Coverage:
    """Which rows of one shard have arrived, the parts that hold them, and how many requests were repeated for it."""

    parts: dict[int, tuple[int, str]] = field(default_factory=dict)  # first -> (last, part)
    end: dict[str, Any] | None = None
    repeated: int = 0

    def add(self, first: int, last: int, part: str, end: str, repeated: int = 0) -> None:
        self.repeated += repeated
        if end:
            said: dict[str, Any] = json.loads(end)
            self.end = said
            self.repeated += said.get("repeated", 0)
        if part and (first not in self.parts or self.parts[first][0] < last):
            self.parts[first] = (last, part)

    def complete(self) -> list[str] | None:
        """Return the parts that cover every row once, in order; None while rows are missing.

        A part wholly inside what is covered already (a retried task's) is left out; the merge drops
        rows that a part repeats.
        """
        if self.end is None:
            return None
        covered, chosen = -1, []
        for first in sorted(self.parts):
            last, part = self.parts[first]
            if first > covered + 1:
                return None
            if last > covered or not self.end["rows"]:
                chosen.append(part)
                covered = last
        return chosen if covered == self.end["rows"] - 1 else None


def merge_parts(parts: Sequence[str], target: str, rows: int, metadata: dict[str, str]) -> dict[str, Any]:
    """Merge parts in row order into one Parquet file; memory is bounded by a row group and a part.

    There is a part even for a shard without rows: it tells the columns.

    Raises:
        TarsiftError: if the parts do not hold rows 0 to `rows` - 1.
    """
    errors: dict[str, int] = {}
    next_row, pending = 0, None
    with storage.open_write(target) as raw:
        sink = _Digesting(raw)
        schema = _with_metadata(_read_part(parts[0]).schema, metadata)
        with pq.ParquetWriter(sink, schema, **parquet_options(schema)) as writer:
            for part in parts:
                table = _read_part(part)
                if not len(table):
                    continue
                first, last = table["row"][0].as_py(), table["row"][-1].as_py()
                if first > next_row:
                    raise TarsiftError(f"{target}: row {next_row} is missing; run the same command again.")
                table = table.slice(next_row - first)  # a retried task may have repeated rows
                next_row = last + 1
                for reason in table["error"].drop_null().to_pylist():
                    errors[reason] = errors.get(reason, 0) + 1
                pending = table if pending is None else pa.concat_tables([pending, table])
                while len(pending) >= ROW_GROUP_ROWS:
                    writer.write_table(pending.slice(0, ROW_GROUP_ROWS), row_group_size=ROW_GROUP_ROWS)
                    pending = pending.slice(ROW_GROUP_ROWS)
            if pending is not None and len(pending):
                writer.write_table(pending, row_group_size=ROW_GROUP_ROWS)
            if next_row != rows:
                raise TarsiftError(f"{target}: {next_row} rows arrived of {rows}; run the same command again.")
    return {"rows": rows, "errors": errors, "output_bytes": sink.size, "output_sha256": sink.digest.hexdigest()}


class _Digesting:
    """A binary file that hashes and counts what is written through it."""

    closed = False

    def __init__(self, raw: BinaryIO):
        self._raw, self.digest, self.size = raw, hashlib.sha256(), 0

    def write(self, data) -> int:
        data = memoryview(data)
        self.digest.update(data)
        self.size += data.nbytes
        self._raw.write(data)
        return data.nbytes

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def _read_part(part: str) -> pa.Table:
    return pa.ipc.open_stream(storage.read_bytes(part)).read_all()


def _with_metadata(schema: pa.Schema, metadata: dict[str, str]) -> pa.Schema:
    return schema.with_metadata({f"tarsift.{name}": value for name, value in metadata.items()})


@dataclass(frozen=True)
class PassResult:
    """What a pass did now (`done`), the records of all its shards, and what else is to be known of it."""

    name: str
    done: list[str]
    entries: dict[str, dict[str, Any]]
    elapsed_s: float
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        return sum(entry["rows"] for entry in self.entries.values())

    def figures(self, fingerprint: str) -> dict[str, Any]:
        """What `run.json` keeps of the pass."""
        done = sum(self.entries[name]["rows"] for name in self.done)
        repeated = sum(self.entries[name].get("repeated_requests", 0) for name in self.done)
        return {
            "fingerprint": fingerprint,
            "shards": len(self.entries),
            "samples": self.samples,
            "samples_done_last": done,
            "repeated_requests": repeated,
            "elapsed_s": round(self.elapsed_s, 3),
            **self.about,
        }


def run_whole(
    ledger: Ledger, work: Callable[[], dict[str, Any] | None], *, shards: int, samples: int, progress: Listener = silent
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Do a piece of work that concerns all shards at once, unless its record is there.

    Args:
        work: returns what is to be known of it later, as plain values.
        shards, samples: of the dump, for the figures.

    Returns:
        What the work returned, and what `run.json` keeps of the pass.
    """
    record = ledger.begin(["all"]).get("all")
    progress(Event(ledger.name, 0, 1, unit="sample"))
    if record is None:
        start = time.monotonic()
        about = work() or {}
        record = ledger.commit("all", {"rows": samples, "about": about, "elapsed_s": time.monotonic() - start})
    progress(Event(ledger.name, 1, 1, unit="sample", finished=True))
    figures = {"shards": shards, "samples": samples, "elapsed_s": round(record["elapsed_s"], 3)}
    return record["about"], {**figures, "fingerprint": ledger.fingerprint, "whole": True}


def run_pass(
    ledger: Ledger,
    shards: Sequence[Shard],
    stream: Callable[[list[Shard]], ray.data.Dataset],
    *,
    folder: str,
    metadata: dict[str, str] | None = None,
    wave_shards: int = 256,
    progress: Listener = silent,
    fused_cpus: float | None = None,
) -> PassResult:
    """Run a pass over the shards it has not committed yet, wave by wave, and commit each.

    Args:
        ledger: where commits go; what it holds already is not done again.
        shards: all shards of the run.
        stream: from a wave of shards to a Dataset of rows that ends each shard with its
            end-of-shard row; the sink is added here.
        folder: folder of the pass below the result folder, `embeddings/detect`.
        metadata: file metadata of the merged Parquet files.
        wave_shards: shards handed to Ray at once.
        progress: told after every commit.
        fused_cpus: CPUs of the tasks of the stream's last stage, if the sink is to run inside them; else it runs in
            tasks of its own.

    Raises:
        TarsiftError: if the stream ends and a shard's rows are not all there.
        KeyboardInterrupt: when asked to stop, after shards whose rows had all arrived were committed.
    """
    start = time.monotonic()
    entries = ledger.begin([s.name for s in shards])
    todo = [s for s in shards if s.name not in entries]
    done: list[str] = []
    samples = repeated = 0
    errors: Counter[str] = Counter()
    out_folder = storage.join(ledger.out, folder)

    def told(**more: Any) -> None:
        progress(Event(ledger.name, len(entries), len(shards), samples, errors=dict(errors), repeated=repeated, **more))

    def committed(shard: str, entry: dict[str, Any]) -> None:
        nonlocal samples, repeated
        entries[shard] = ledger.commit(shard, entry)
        done.append(shard)
        samples += entry["rows"]
        repeated += entry["repeated_requests"]
        errors.update(entry["errors"])
        told()

    told()
    for at in range(0, len(todo), wave_shards):
        wave = todo[at : at + wave_shards]
        _run_wave(wave, stream(wave), out_folder, metadata or {}, committed, fused_cpus)
    if done:
        storage.remove_tree(storage.join(out_folder, PARTS))  # of attempts that came too late, there may be some left
    told(finished=True, note="" if done else "nothing to do")
    return PassResult(ledger.name, done, entries, time.monotonic() - start)


def _per_cpus(cpus: int) -> int:
    """Return how many are to run at once where one is meant for so many CPUs of the cluster."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)) // cpus)


def _run_wave(
    wave: list[Shard],
    rows: ray.data.Dataset,
    folder: str,
    metadata: dict[str, str],
    committed: Callable[[str, dict[str, Any]], None],
    fused_cpus: float | None,
) -> None:
    sources = {shard.name: shard for shard in wave}
    waiting = {name: Coverage() for name in sources}
    merging: dict[ray.ObjectRef, str] = {}
    merge = ray.remote(num_cpus=0, **TASK_OPTIONS)(_merge_and_tidy)
    merges_at_once = _per_cpus(CPUS_PER_MERGE)

    def collect(limit: int) -> None:
        while len(merging) > limit:
            merged = next_done(merging, _merge_and_tidy)
            committed(merging.pop(merged), ray.get(merged))

    context = rows.context
    if fused_cpus is None:  # no more at once than keep up: each is one more worker process
        sink = {"num_cpus": SINK_CPUS, "compute": ray.data.TaskPoolStrategy(_per_cpus(CPUS_PER_SINK))}
    else:  # Ray fuses neighbours that ask for the same
        sink = {"num_cpus": fused_cpus}
    receipts = map_tables(rows, write_parts, {"folder": folder}, **sink)
    try:
        for batch in receipts.iter_batches(batch_size=None, batch_format="pyarrow"):
            stop_if_asked()
            for receipt in pa.table(batch).to_pylist():
                name = receipt["shard"]
                if name not in waiting:
                    continue
                coverage = waiting[name]
                coverage.add(*(receipt[field] for field in ("first", "last", "part", "end", "repeated")))
                parts = coverage.complete()
                if parts is None:
                    continue
                end = {**(waiting.pop(name).end or {}), "repeated": coverage.repeated}
                target = storage.join(folder, f"{name}.parquet")
                shard_metadata = {**metadata, "shard": name, "source_sha256": end.get("sha256") or ""}
                merging[merge.remote(folder, name, parts, target, end, shard_metadata)] = name
                collect(merges_at_once - 1)
        collect(0)
    except KeyboardInterrupt:
        with patient():
            collect(0)
        raise
    except ExecutionTimeoutError as error:
        running = [line.strip(" -") for line in str(error).splitlines() if line.startswith("  - ")]
        where = "; ".join(running) or "any stage"
        raise stalled(context.execution_no_progress_timeout_s, where, smaller="a smaller --batch-size") from error
    finally:
        leave(merging)
    if waiting:
        name, coverage = next(iter(waiting.items()))
        raise TarsiftError(
            f"{len(waiting)} of {len(wave)} shards are incomplete, the first is {name} "
            f"({len(coverage.parts)} parts, end {'seen' if coverage.end else 'not seen'}); run the same command again."
        )


def _merge_and_tidy(
    folder: str, name: str, parts: list[str], target: str, end: dict[str, Any], metadata: dict[str, str]
) -> dict[str, Any]:
    entry = merge_parts(parts, target, end["rows"], metadata)
    storage.remove_tree(parts_of(folder, name))
    source = {key: end[key] for key in ("sha256", "bytes", "problems") if key in end}
    repeated = end["repeated"] + take_repeated()
    return {**entry, "output": f"{name}.parquet", "source": source, "repeated_requests": repeated}
