"""How far a result folder or a state of ingestion is, and who works on it: told from its records, without Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict

from tarsift.operators import storage
from tarsift.operators.errors import UsageError
from tarsift.pipelines.ledger import records_of
from tarsift.pipelines.lock import DEAD_AFTER_S, Holder, last_holder
from tarsift.pipelines.nights import State
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


class NightStatus(BaseModel):
    """What is recorded of a night, or planned of one that has not ended.

    Attributes:
        ended: when, as ISO 8601; None: it has not.
        shards: how many came in.
        read, kept, removed, errored: samples; None before the night has ended.
        findings, drift: how many.
        run: how far its result folder is; None once it has ended, and before it is there (while an encoder is trained).
    """

    model_config = ConfigDict(frozen=True)

    night: int
    ended: str | None
    shards: int
    read: int | None = None
    kept: int | None = None
    removed: int | None = None
    errored: int | None = None
    findings: int = 0
    drift: int = 0
    run: Status | None = None


class StateStatus(BaseModel):
    """How far a state of ingestion is.

    Attributes:
        state: `running`, `silent` or `died` as of a result folder, `stopped` (a night was begun and has not ended) or
            `waiting` (for the next night).
        shards: how many have come in, a changed one counted once.
        reference: rows of the standing reference.
        nights: those that ended, the first one first; tonight: one that was begun and has not ended.
        report: page of all nights.
    """

    model_config = ConfigDict(frozen=True)

    folder: str
    state: str
    holder: str
    shards: int
    reference: int
    nights: tuple[NightStatus, ...]
    tonight: NightStatus | None
    report: str | None


def status_of_state(folder: str) -> StateStatus | None:
    """Look at a state of ingestion; None if the folder is none."""
    state = State.load(storage.absolute(folder))
    if state is None:
        return None
    opened = state.opened()
    holder = last_holder(state.folder)
    report = storage.join(state.folder, "report.html")
    last = state.last
    return StateStatus(
        folder=state.folder,
        state=_state(holder, ended="waiting" if opened is None else "stopped"),
        holder=str(holder) if holder else "",
        shards=len(state.seen()),
        reference=last["reference"]["rows"] if last else 0,
        nights=tuple(_night(record) for record in state.records),
        tonight=None if opened is None else _tonight(state, opened),
        report=report if storage.exists(report) else None,
    )


def _night(record: Mapping[str, Any]) -> NightStatus:
    counts = record["counts"]
    return NightStatus(
        night=record["night"], ended=record["ended"], shards=len(record["shards"]),
        read=counts["read"], kept=counts["kept"], removed=counts["removed"], errored=counts["errored"],
        findings=len(record["findings"]), drift=len(record["drift"]),
    )  # fmt: skip


def _tonight(state: State, opened: Mapping[str, Any]) -> NightStatus:
    try:
        run = status(state.place("nights", state.next))
    except UsageError:  # nothing but the encoder is made yet
        run = None
    return NightStatus(night=state.next, ended=None, shards=len(opened["shards"]), run=run)


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
