"""Proof of a result: clean + removed + errored = input, member by member, and the lists agree with it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from pydantic import BaseModel, ConfigDict

from tarsift.operators import storage
from tarsift.operators.errors import Interrupted, TarsiftError, UsageError
from tarsift.operators.flag import HOMES
from tarsift.operators.listing import Shard, shards_outside
from tarsift.operators.retry import take_repeated
from tarsift.operators.schema import places_of
from tarsift.operators.verify import Fault, ShardProof, verify_shard
from tarsift.pipelines.ledger import Ledger
from tarsift.pipelines.metrics import reported
from tarsift.pipelines.notebook import html_table
from tarsift.pipelines.printing import SHOWN_SHARDS, faults_of, verdict_of_proof
from tarsift.pipelines.progress import Event, Listener, silent
from tarsift.pipelines.run import Run, reopen_run
from tarsift.pipelines.session import session
from tarsift.pipelines.tasks import side_by_side
from tarsift.pipelines.write import kept_rows, shard_outputs, verdicts_of


class Proof(BaseModel):
    """What was compared, and what is wrong, if anything.

    Attributes:
        with_shards: whether there are shards to compare; `--no-shards` writes lists only.
        faults: of the result as a whole.
        repeated_requests: requests to the store that were tried again, with success.
    """

    model_config = ConfigDict(frozen=True)

    out: str
    shards: tuple[ShardProof, ...]
    with_shards: bool
    faults: tuple[Fault, ...]
    elapsed_s: float
    repeated_requests: int = 0

    @property
    def holds(self) -> bool:
        return not self.faults and not any(shard.faults for shard in self.shards)

    @property
    def members(self) -> dict[str, int]:
        """Members by home."""
        counts: Counter[str] = Counter(dict.fromkeys(HOMES, 0))
        for shard in self.shards:
            counts.update(shard.members)
        return dict(counts)

    def to_json(self) -> dict[str, Any]:
        return {"holds": self.holds, "members": self.members} | self.model_dump(mode="json")

    def _repr_html_(self) -> str:
        rows = [(name, fault.fault, fault.detail) for name, fault in faults_of(self)[:SHOWN_SHARDS]]
        return html_table(f"tarsift verify: {verdict_of_proof(self)}", rows)


def verify(out: str, inputs: str | Sequence[str] | None = None, *, progress: Listener = silent) -> Proof:
    """Compare a result folder with the dump it was made from, byte for byte.

    Args:
        out: a result folder whose pass `write` is done.
        inputs: the dump, where it lies now; where the run read it, if not given.
        progress: told after every shard.

    Raises:
        UsageError: if `out` is no result folder or not yet complete.

    Example:
        >>> verify("cc3m-clean", "s3://bucket/cc3m/").holds  # doctest: +SKIP
        True
    """
    start = time.monotonic()
    run = reopen_run(out)
    given = {shard.name: shard for shard in (shards_outside(inputs, run.out) if inputs else run.shards)}
    written_print = run.fingerprint_of("write")
    if written_print is None:
        raise UsageError(f"{out} is not complete: the pass write was never done. Run the same `tarsift clean` again.")
    run.complete("flag")
    with_shards = run.config.write.shards
    faults = [Fault(fault="unknown_shard", detail=name) for name in sorted(given.keys() - set(run.names))]
    with session(stall_timeout_s=run.config.resources.stall_timeout_s), reported(progress) as progress:
        homes, unreadable = _count_verdicts(run)
        entries = Ledger(run.out, "write", written_print).entries(run.names) if with_shards else {}
        proofs = _compare_shards(run, given, entries, unreadable, progress) if with_shards else {}
    if unreadable:  # nothing to compare counts and list with
        faults += [] if with_shards else unreadable.values()
    else:
        faults += _compare_counts(run, homes)
        faults += _compare_keep_list(run)
    return Proof(
        out=run.out,
        shards=tuple(proofs[name] for name in sorted(proofs)),
        with_shards=with_shards,
        faults=tuple(faults),
        elapsed_s=time.monotonic() - start,
        repeated_requests=sum(proof.repeated_requests for proof in proofs.values()) + take_repeated(),
    )


def _count_verdicts(run: Run) -> tuple[Counter[str], dict[str, Fault]]:
    """Return the samples by home over all shards, and the shards whose verdicts cannot be read."""
    homes: Counter[str] = Counter()
    unreadable = {}
    for name, (result,) in side_by_side(_verdicts_of_shard, ((name, (name, run.out)) for name in run.names)):
        told = ray.get(result)
        if isinstance(told, Fault):
            unreadable[name] = told
        else:
            homes += told
    return homes, unreadable


def _verdicts_of_shard(name: str, out: str) -> Counter[str] | Fault:
    try:
        return Counter(verdicts_of(name, out))
    except Interrupted:
        raise
    except (OSError, ValueError, KeyError, pa.ArrowException, TarsiftError) as error:
        return Fault(fault="verdicts_unreadable", detail=f"{name}: {error}")


def _compare_shards(
    run: Run,
    given: Mapping[str, Shard],
    entries: Mapping[str, Mapping[str, Any]],
    unreadable: Mapping[str, Fault],
    progress: Listener,
) -> dict[str, ShardProof]:
    proofs: dict[str, ShardProof] = {}
    calls = []
    for name in run.names:
        code = "source_missing" if name not in given else "not_written" if name not in entries else None
        fault = Fault(fault=code, detail=name) if code else unreadable.get(name)
        if fault:
            proofs[name] = ShardProof(shard=name, members={}, bytes=0, faults=(fault,))
        else:
            calls.append((name, (given[name], run.out, entries[name])))
    progress(Event("verify", len(proofs), len(run.names)))
    samples = repeated = 0
    for name, (result,) in side_by_side(_verify_shard, calls):
        proofs[name] = ray.get(result)
        samples += entries[name]["rows"]
        repeated += proofs[name].repeated_requests
        progress(Event("verify", len(proofs), len(run.names), samples, repeated=repeated))
    progress(Event("verify", len(proofs), len(run.names), samples, finished=True, repeated=repeated))
    return proofs


def _verify_shard(shard: Shard, out: str, entry: Mapping[str, Any]) -> ShardProof:
    return verify_shard(
        shard,
        verdicts_of(shard.name, out),
        shard_outputs(shard.name, out),
        source_sha256=entry["sha256"],
        output_sha256={home: written["sha256"] for home, written in entry["homes"].items()},
    )


def _compare_counts(run: Run, homes: Mapping[str, int]) -> list[Fault]:
    counted = {name: homes.get(home, 0) for name, home in zip(("kept", "removed", "errored"), HOMES, strict=True)}
    stated = {name: run.content.get("counts", {}).get(name) for name in counted}
    return [] if counted == stated else [Fault(fault="counts_differ", detail=f"verdicts {counted}, run.json {stated}")]


def _compare_keep_list(run: Run) -> list[Fault]:
    url = storage.join(run.out, "keep.parquet")
    try:
        with storage.open_read(url) as file:
            listed = _rows_of(pq.ParquetFile(file).iter_batches(columns=["shard", "row"]))
            for wanted in _rows_of(kept_rows(run.names, run.out)):
                found = next(listed, None)
                if found != wanted:
                    return [Fault(fault="keep_list_differs", detail=f"{wanted} by the verdicts, {found} in {url}")]
            surplus = next(listed, None)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        return [Fault(fault="keep_list_differs", detail=f"{url}: {error}")]
    return [Fault(fault="keep_list_differs", detail=f"{surplus} in {url} was not kept")] if surplus else []


def _rows_of(tables: Iterable[pa.Table | pa.RecordBatch]) -> Iterator[tuple[str, int]]:
    for table in tables:
        yield from places_of(table)
