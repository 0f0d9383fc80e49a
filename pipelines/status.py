"""How far a result folder is, and whether somebody works on it: told from its records, without Ray."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict

from tarsift.operators import storage
from tarsift.pipelines.ledger import records_of
from tarsift.pipelines.lock import DEAD_AFTER_S, Holder, last_holder
from tarsift.pipelines.run import reopen_run


class PassStatus(BaseModel):
    """How far a pass is.

    Attributes:
        done, of: shards that are through it, or in the pass `sifters` problems, of which there are 0 before they are
            planned; a pass over all shards at once has one part.
        samples: in those that are done.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    done: int
    of: int
    samples: int


class Status(BaseModel):
    """How far a result folder is.

    Attributes:
        state: `running`, `silent` (on another machine or in another container, and no sign of life for over
            DEAD_AFTER_S), `died`, `stopped` (ended before all was done), `outdated` (all was done, and then an earlier
            pass anew) or `complete`.
        holder: who works, or worked last, on it.
        stale: passes, the report among them, that were made from an earlier state of those before them.
    """

    model_config = ConfigDict(frozen=True)

    out: str
    state: str
    holder: str
    passes: tuple[PassStatus, ...]
    stale: tuple[str, ...]
    report: str | None


def status(out: str) -> Status:
    """Look at a result folder.

    Raises:
        UsageError: if `out` is none.

    Example:
        >>> status("cc3m-clean").state  # doctest: +SKIP
        'running'
    """
    run = reopen_run(out)
    passes = []
    for name, _ in run.passes():
        parts = set(run.parts_of(name))
        records = [record for record in records_of(run.out, name) if record["shard"] in parts]
        latest, done = (Counter(r["fingerprint"] for r in records).most_common(1) or [("", 0)])[0]
        samples = sum(record.get("rows", 0) for record in records if record["fingerprint"] == latest)
        passes.append(PassStatus(name=name, done=done, of=len(parts), samples=samples))
    report = storage.join(run.out, "report.html")
    made = run.fingerprint_of("report")
    reported = made is not None and storage.exists(report)
    told_of_before = made not in (None, run.wanted_fingerprints()["report"])
    stale = (*run.stale_passes(), *(["report"] if told_of_before else []))
    holder = last_holder(run.out)
    return Status(
        out=run.out,
        state=_state(holder, ended="stopped" if not reported else "outdated" if stale else "complete"),
        holder=str(holder) if holder else "",
        passes=tuple(passes),
        stale=stale,
        report=report if reported else None,
    )


def _state(holder: Holder | None, *, ended: str) -> str:
    if holder is None or holder.released:
        return ended
    gone = holder.gone()
    if gone is not None:
        return "died" if gone else "running"
    age = (datetime.now(UTC) - datetime.fromisoformat(holder.at)).total_seconds()
    return "running" if age < DEAD_AFTER_S else "silent"
