"""Metrics for Prometheus, through Ray: what runs and their passes have done, told by the process that drives them.

Workers report nothing: what they did comes with their receipts and counts once, when it is committed, while a task that
Ray tries again would have counted twice. Ray's agents export the metrics, with `ray_` before their names, where
`ray[default]` is installed (extra `cluster`); elsewhere they lead nowhere.

Ray forgets a gauge that is not set again in every interval of its export (10 s). A thread does that as long as the work
lasts, so the gauges of a driver that died go with it. Counters stay.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import ray
from ray.util import metrics

from tarsift.operators.errors import REASONS, Interrupted
from tarsift.operators.retry import take_unreported
from tarsift.pipelines.progress import Event, Listener

BEAT_S = 4.0  # between settings of the gauges; two or more in every interval of Ray's export
VERDICTS = ("kept", "removed", "errored")


@dataclass(frozen=True)
class Metric:
    """A metric: what it counts or shows, and the labels that tell its series apart; of each there are few values."""

    kind: Literal["counter", "gauge"]
    what: str
    labels: tuple[str, ...] = ()


METRICS: dict[str, Metric] = {
    "tarsift_samples_total": Metric("counter", "Samples that a pass has handled.", ("pass",)),
    "tarsift_shards_total": Metric("counter", "Shards that a pass has done; in the main job, committed.", ("pass",)),
    "tarsift_errored_samples_total": Metric(
        "counter", "Samples with an error, as each pass has met them, by reason code.", ("pass", "reason")
    ),
    "tarsift_repeated_requests_total": Metric(
        "counter", "Requests to the store that were tried again, told with the next progress of a pass.", ("pass",)
    ),
    "tarsift_passes_started_total": Metric("counter", "Passes that were begun.", ("pass",)),
    "tarsift_passes_finished_total": Metric("counter", "Passes that came to their end.", ("pass",)),
    "tarsift_runs_total": Metric(
        "counter", "Pieces of work with Ray, such as one clean, by how they ended: done, failed or interrupted.",
        ("outcome",),
    ),
    "tarsift_nights_total": Metric("counter", "Nights of an ingestion that ended."),
    "tarsift_findings_total": Metric(
        "counter", "What was unlike the nights before, by kind: finding or drift.", ("kind",)
    ),
    "tarsift_pass_running": Metric("gauge", "1 while a pass runs.", ("pass",)),
    "tarsift_pass_done_ratio": Metric("gauge", "Share of a running pass that is done, 0 to 1.", ("pass",)),
    "tarsift_last_progress_timestamp_seconds": Metric(
        "gauge", "When a running pass last told of progress, in seconds since 1970.", ("pass",)
    ),
    "tarsift_last_run_samples": Metric(
        "gauge", "Samples by verdict (kept, removed, errored) in the latest run that has judged them.", ("verdict",)
    ),
}  # fmt: skip

Record = Callable[[str, float, Mapping[str, str]], None]


@cache
def _metric(name: str) -> Any:
    metric = METRICS[name]
    made = metrics.Counter if metric.kind == "counter" else metrics.Gauge
    return made(name, metric.what, metric.labels)


def to_ray(name: str, value: float, labels: Mapping[str, str]) -> None:
    """Add to a counter of METRICS, or set a gauge; nothing where there is no Ray session."""
    if not ray.is_initialized():
        return
    metric = _metric(name)
    (metric.inc if METRICS[name].kind == "counter" else metric.set)(value, dict(labels))


def count_night(findings: int, drift: int, record: Record = to_ray) -> None:
    """Count a night of an ingestion, and what it was unlike the others in; never fails."""
    for name, value, labels in (
        ("tarsift_nights_total", 1, {}),
        ("tarsift_findings_total", findings, {"kind": "finding"}),
        ("tarsift_findings_total", drift, {"kind": "drift"}),
    ):
        if value:  # Ray refuses to add nothing
            with suppress(Exception):
                record(name, value, labels)


class Reporter:
    """A listener that reports what it hears as metrics and hands it on to another one.

    Args:
        listener: told of every event after it was counted.
        record: takes name, value and labels; if it fails, nothing more is reported: no metric is worth a run.
    """

    def __init__(self, listener: Listener, record: Record = to_ray):
        self.listener = listener
        self._to = record
        self._off = False
        self._guard = threading.Lock()
        self._last: dict[str, tuple[Event, float]] = {}  # running passes: what was heard last, and when
        self._verdicts: dict[str, int] = {}

    def __call__(self, event: Event) -> None:
        with self._guard:
            self._count(event)
        self.listener(event)

    def judged(self, counts: Mapping[str, Any]) -> None:
        """Report how many samples there are of each verdict."""
        with self._guard:
            self._verdicts = {verdict: counts[verdict] for verdict in VERDICTS if verdict in counts}
            self._set_verdicts()

    def beat(self) -> None:
        """Set the gauges again."""
        with self._guard:
            for name, (event, at) in self._last.items():
                self._show(name, event, at)
            self._set_verdicts()

    def end(self, outcome: str) -> None:
        """Report how the work ended; no pass of it runs any more."""
        with self._guard:
            for name in self._last:
                self._record("tarsift_pass_running", 0, {"pass": name})
            self._last.clear()
            self._record("tarsift_runs_total", 1, {"outcome": outcome})

    def _count(self, event: Event) -> None:
        name = event.name
        labels = {"pass": name}
        if name not in self._last:
            self._record("tarsift_passes_started_total", 1, labels)
        before, _ = self._last.get(name, (event, 0.0))  # what the first one tells was done earlier
        self._last[name] = event, time.time()
        self._record("tarsift_samples_total", event.samples - before.samples, labels)
        if event.unit == "shards":
            self._record("tarsift_shards_total", event.done - before.done, labels)
        for reason, number in event.errors.items():
            known = reason if reason in REASONS else "other"
            self._record(
                "tarsift_errored_samples_total", number - before.errors.get(reason, 0), {**labels, "reason": known}
            )
        repeated = event.repeated - before.repeated + take_unreported()
        self._record("tarsift_repeated_requests_total", repeated, labels)
        self._show(name, *self._last[name])
        if event.finished:
            del self._last[name]
            self._record("tarsift_passes_finished_total", 1, labels)
            self._record("tarsift_pass_running", 0, labels)

    def _show(self, name: str, event: Event, at: float) -> None:
        labels = {"pass": name}
        self._record("tarsift_pass_running", 1, labels)
        self._record("tarsift_pass_done_ratio", event.done / event.total if event.total else 1.0, labels)
        self._record("tarsift_last_progress_timestamp_seconds", at, labels)

    def _set_verdicts(self) -> None:
        for verdict, number in self._verdicts.items():
            self._record("tarsift_last_run_samples", number, {"verdict": verdict})

    def _record(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        if self._off or (METRICS[name].kind == "counter" and value <= 0):  # Ray refuses to add nothing
            return
        self._off = True
        with suppress(Exception):
            self._to(name, value, labels)
            self._off = False


@contextmanager
def reported(listener: Listener, record: Record = to_ray) -> Iterator[Reporter]:
    """Report the work of the block, and how it ends; the block lies within a Ray session, whose end sends the rest.

    Yields:
        The listener to tell in place of `listener`.
    """
    reporter = Reporter(listener, record)
    over = threading.Event()

    def beats() -> None:
        while not over.wait(BEAT_S):
            reporter.beat()

    thread = threading.Thread(target=beats, name="tarsift-metrics", daemon=True)
    thread.start()
    outcome = "failed"
    try:
        yield reporter
        outcome = "done"
    except (Interrupted, KeyboardInterrupt):
        outcome = "interrupted"
        raise
    finally:
        over.set()
        thread.join()
        reporter.end(outcome)
