"""What the terminal says of ingestion: of a night, of what has come in, of the state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from tarsift.pipelines.printing import STATES, print_rows
from tarsift.pipelines.text import visible

WAITING = "waiting for the next night"
LATEST = 10  # nights that are listed


def print_night(result: Any, console: Console) -> None:
    """Say what a night brought, whether it was like the others, and where the results are."""
    links = {"report": result.report, "nights": result.nights}
    print_rows(rows_of_night(result) | {name: str(url) for name, url in links.items() if url}, console)


def rows_of_night(result: Any) -> dict[str, str]:
    if result.night is None:
        return {"night": "nothing new has come in"}
    counts = result.counts
    parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in result.seconds.items())
    rows = {
        f"night {result.night}": f"{result.shards:,} shards, {counts['read']:,} samples in "
        f"{sum(result.seconds.values()):.0f} s ({parts})",
        "kept": f"{counts['kept']:,}   {result.out}/clean",
        "removed": f"{counts['removed']:,}   {result.out}/removed",
        "errored": f"{counts['errored']:,}",
    }
    if result.changed:
        rows["changed"] = (
            f"{len(result.changed):,} shards had other bytes, and were taken again: {_some(result.changed)}"
        )
    if result.gone:
        rows["gone"] = f"{len(result.gone):,} shards of earlier nights are not there any more: {_some(result.gone)}"
    for i, text in enumerate(result.drift, 1):
        rows[f"drift {i}"] = text
    for i, finding in enumerate(result.findings, 1):
        said = ", ".join(f"{visible(caption, 60)!r} x {n}" for caption, n in finding.captions[:3])
        rows[f"finding {i}"] = (
            f"{finding.members} suspects lie together and say the same (value {finding.value:.2f}): {said}"
        )
    if not result.alarming:
        rows["unusual"] = "nothing: no finding, no drift"
    return rows


def print_arrivals(found: Any, console: Console) -> None:
    """Say what has come in since the last night."""
    size = sum(shard.size for shard in (*found.new, *found.changed))
    rows = {
        "new": f"{len(found.new):,} shards",
        "changed": f"{len(found.changed):,} shards have another size",
        "to look at": f"{len(found.doubtful):,} shards were written again with the same size",
        "gone": f"{len(found.gone):,} shards",
        "tonight": f"{len(found.new) + len(found.changed):,} shards, {size / 1e6:,.1f} MB",
    }
    print_rows(rows, console)


def print_state(status: Any, console: Console) -> None:
    """Say how far an ingestion is: its latest nights, and what is done of tonight's."""
    table = Table(box=None, pad_edge=False)
    titles = ("night", "ended", "shards", "samples", "removed", "errored", "findings", "drift")
    for title in titles:
        table.add_column(title, justify="left" if title == "ended" else "right")
    for night in status.nights[-LATEST:]:
        counts = (night.shards, night.read, night.removed, night.errored, night.findings, night.drift)
        table.add_row(str(night.night), night.ended, *(f"{count:,}" for count in counts))
    if status.nights:
        console.print(table, highlight=False)
    by = f" ({status.holder})" if status.holder and status.state != "waiting" else ""
    known = f"{len(status.nights):,} nights, {status.shards:,} shards, {status.reference:,} standing samples"
    rows = {"state": f"{WAITING if status.state == 'waiting' else STATES[status.state]}{by}", "known": known}
    if tonight := status.tonight:
        passes = tonight.run.passes if tonight.run else ()
        now = next((step for step in reversed(passes) if step.done), None)
        done = f"{now.name} {now.done:,}/{now.of or '?'}" if now else "before its first pass"
        rows["tonight"] = f"night {tonight.night}, {tonight.shards:,} shards: {done}"
    if status.report:
        rows["report"] = status.report
    print_rows(rows, console)


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(visible(name, 60) for name in names[:most]) + (", ..." if len(names) > most else "")
