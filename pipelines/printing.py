"""What commands print when they end: what was done, how fast, where the results are."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tarsift.operators.storage import without_secrets
from tarsift.pipelines.text import blanked, command, size, visible

SHOWN_SHARDS = 20


class Screen(Console):
    """The console of all commands: in no text on it, or in a cell of a table, do URLs show a password or signature."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(without_secrets(text), **options)


def say(text: str, quiet: bool) -> None:
    if not quiet:
        Screen().print(text, highlight=False, markup=False, soft_wrap=True)


def tried_again(requests: int) -> str:
    """Return the end of a summary: how many requests to the store were tried again; nothing if none was."""
    return f", {requests:,} requests to the store were tried again" if requests else ""


def print_result(result: Any, console: Console) -> None:
    """Say what was done, how fast, and where the results are; paths are not broken across lines."""
    counts = result.counts
    reasons = ", ".join(f"{reason} {n}" for reason, n in counts["errors"].items())
    rows = {
        "read": f"{counts['read']:,} samples in {result.elapsed_s:.0f} s",
        "kept": f"{counts['kept']:,}   {result.clean_shards}",
        "removed": f"{counts['removed']:,}   {result.out}/removed",
        "errored": f"{counts['errored']:,}   {reasons}",
    }
    embed_rate = result.passes.get("embed.detect", {}).get("samples_per_s")
    if embed_rate:
        rows["embedded at"] = f"{embed_rate:,.0f} samples/s"
    left_over = sum(figures.get("embeddings_of_no_sample", 0) for figures in result.passes.values())
    if left_over:
        rows["left over"] = f"{left_over:,} embeddings are of no sample"
    repeated = sum(figures.get("repeated_requests", 0) for figures in result.passes.values())
    if repeated:
        rows["store"] = f"{repeated:,} requests were tried again"
    if result.report:
        rows["report"] = str(result.report)
    for name, text in rows.items():
        console.print(f"{name:12} {text}", highlight=False, markup=False, soft_wrap=True)


def print_night(result: Any, console: Console) -> None:
    """Say what a night brought, whether it was like the others, and where the results are."""
    if result.night is None:
        console.print("nothing new has come in", highlight=False)
        return
    counts = result.counts
    rows = {
        f"night {result.night}": f"{result.shards:,} shards, {counts['read']:,} samples in "
        f"{sum(result.seconds.values()):.0f} s ({', '.join(f'{n} {s:.0f}' for n, s in result.seconds.items())})",
        "kept": f"{counts['kept']:,}   {result.out}/clean",
        "removed": f"{counts['removed']:,}   {result.out}/removed",
        "errored": f"{counts['errored']:,}",
    }
    if result.changed:
        rows["changed"] = f"{len(result.changed)} shards had other bytes before and were taken again: " + _some(
            result.changed
        )
    if result.gone:
        rows["gone"] = f"{len(result.gone)} shards of earlier nights are not there any more: {_some(result.gone)}"
    rows |= {"report": str(result.report), "nights": str(result.nights)}
    for name, text in rows.items():
        console.print(f"{name:12} {text}", highlight=False, markup=False, soft_wrap=True)
    for text in result.drift:
        console.print(f"drift        {text}", style="bold", highlight=False, markup=False, soft_wrap=True)
    for finding in result.findings:
        said = ", ".join(f"{visible(caption, 60)!r} x {n}" for caption, n in finding.captions[:3])
        text = f"{finding.members} suspects lie together and say the same (value {finding.value:.2f}): {said}"
        console.print(f"finding      {text}", style="bold", highlight=False, markup=False, soft_wrap=True)
    if not result.alarming:
        console.print("             no finding, no drift", highlight=False)


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
    for name, text in rows.items():
        console.print(f"{name:12} {text}", highlight=False, markup=False)


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(visible(name, 60) for name in names[:most]) + (", ..." if len(names) > most else "")


def print_trace(result: Any, console: Console) -> None:
    """Say what was traced, how fast, and where it is."""
    rows = {
        "traced": f"{result.traced:,} of {result.candidates:,} candidates stand out, of {result.of:,} samples, "
        f"in {result.elapsed_s:.0f} s",
        "says": repr(visible(result.says, 200)),
        "samples": result.samples,
        "report": result.report,
    }
    for name, text in rows.items():
        console.print(f"{name:12} {text}", highlight=False, markup=False, soft_wrap=True)


def print_repair(result: Any, console: Console) -> None:
    """Say what a model says before and after its repair."""
    names = {
        "queries": "queries of which it says what was traced",
        "forgotten": "samples to forget of which it says so",
        "recall_at_5": "pictures whose caption is among the five nearest",
    }
    table = Table("", "before", "after", box=None, pad_edge=False)
    for name, what in names.items():
        if name in result.before:
            table.add_row(what, f"{result.before[name]:.1%}", f"{result.after[name]:.1%}")
    console.print(table)
    done = (
        f"{result.method}: {result.forgot:,} samples forgotten in {result.elapsed_s:.0f} s; measured on {result.held}"
    )
    for text in (
        done,
        f"kept to      {result.kept_to}",
        f"repaired     {result.encoder}",
        f"forgotten    {result.listed}",
    ):
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_selection(selection: Any, console: Console) -> None:
    """Say what was chosen, how pure it is, and where it is."""
    chance = f"{selection.suspects_expected:g} in a random choice"
    rows = {
        "chosen": f"{selection.chosen:,} of {selection.of:,} sifted samples   {selection.shards or selection.listed}",
        "suspects": f"{selection.suspects:,} among as many chosen by the sifter alone ({chance}); these are left out",
        "purity": f"{selection.purity:.2%} before that, if suspects and no others are poisoned",
    }
    for name, text in rows.items():
        console.print(f"{name:12} {text}", highlight=False, markup=False, soft_wrap=True)


def print_export(done: Any, console: Console) -> None:
    """Say what was written, how many samples are in it, and where it is."""
    where = done.files[0] if len(done.files) == 1 else done.to
    rows = {done.format: f"{done.samples:,} samples in {done.elapsed_s:.0f} s   {where}"}
    if done.left_out:
        rows["left out"] = ", ".join(f"{count:,} {why}" for why, count in done.left_out.items())
    for name, text in rows.items():
        console.print(f"{name:14} {text}", highlight=False, markup=False, soft_wrap=True)


def print_audit(audit: Any, console: Console) -> None:
    """Say whether a dump is whole and, where it is not, what is wrong and where."""
    from tarsift.operators.audit import PROBLEMS

    damaged = [shard for shard in audit.shards if not shard.whole]
    for shard in damaged[:SHOWN_SHARDS]:
        for problem in shard.problems:
            places = ", ".join(visible(place) for place in problem.examples)
            more = ", ..." if problem.count > len(problem.examples) else ""
            line = f"{visible(shard.shard)}: {problem.count:,} {problem.problem}  ({places}{more})"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if len(damaged) > SHOWN_SHARDS:
        console.print(f"... and {len(damaged) - SHOWN_SHARDS:,} more shards; --json names them all", highlight=False)
    if damaged:
        table = Table(box=None, pad_edge=False)
        for title in ("problem", "found", "meaning"):
            table.add_column(title)
        for name, count in audit.problems.items():
            table.add_row(name, f"{count:,}", PROBLEMS[name])
        console.print(table, highlight=False)
    rate = audit.bytes / max(audit.elapsed_s, 1e-9)
    looked = "every image decoded" if audit.decoded else "images not decoded (--decode does)"
    verdict = f"{len(damaged):,} of {len(audit.shards):,} shards have problems" if damaged else "whole"
    console.print(
        f"{verdict}: {len(audit.shards):,} shards, {audit.samples:,} samples, {size(audit.bytes)} in "
        f"{audit.elapsed_s:.0f} s ({size(int(rate))}/s), {looked}{tried_again(audit.repeated_requests)}",
        highlight=False,
        soft_wrap=True,
    )


def print_proof(proof: Any, console: Console) -> None:
    """Say whether a result holds and, where it does not, what is wrong and where."""
    from tarsift.operators.verify import FAULTS

    faulty = [(shard.shard, fault) for shard in proof.shards for fault in shard.faults]
    faulty += [(proof.out, fault) for fault in proof.faults]
    for name, fault in faulty[:SHOWN_SHARDS]:
        line = f"{visible(name)}: {fault.fault}  ({visible(fault.detail)})"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if len(faulty) > SHOWN_SHARDS:
        console.print(f"... and {len(faulty) - SHOWN_SHARDS:,} more; --json names them all", highlight=False)
    for code in dict.fromkeys(fault.fault for _, fault in faulty):
        console.print(f"{code}: {FAULTS[code]}", highlight=False, soft_wrap=True)
    members = ", ".join(f"{home} {count:,}" for home, count in proof.members.items())
    what = f"{len(proof.shards):,} shards, members {members}" if proof.with_shards else "lists only, no shards written"
    verdict = f"{len(faulty):,} faults" if faulty else "holds"
    again = tried_again(proof.repeated_requests)
    console.print(f"{verdict}: {what}; {proof.elapsed_s:.0f} s{again}", highlight=False, soft_wrap=True)


STATES = {
    "running": "running",
    "silent": "no sign of life for a while; if it is dead, run the same command again",
    "died": "died; run the same command again to go on",
    "stopped": "stopped; run the same command again to go on",
    "outdated": "out of date: an earlier pass was done anew",
    "complete": "complete",
}


def print_status(status: Any, console: Console) -> None:
    """Say how far a result folder is and what to do."""
    table = Table(box=None, pad_edge=False)
    table.add_column("pass")
    for title in ("done", "samples"):
        table.add_column(title, justify="right")
    for step in status.passes:
        table.add_row(step.name, f"{step.done:,}/{step.of or '?'}", f"{step.samples:,}")
    console.print(table, highlight=False)
    by = f" ({status.holder})" if status.holder and status.state not in ("complete", "outdated") else ""
    console.print(f"{STATES[status.state]}{by}", highlight=False, markup=False, soft_wrap=True)
    if status.stale:
        again = " && ".join(command("tarsift", name, status.out) for name in status.stale)
        redo = f"; redo with {again}" if status.state in ("outdated", "stopped") else ""
        console.print(f"out of date: {', '.join(status.stale)}{redo}", highlight=False, markup=False, soft_wrap=True)
    if status.report:
        console.print(f"report: {status.report}", highlight=False, markup=False, soft_wrap=True)


def print_findings(findings: Any, console: Console) -> None:
    """List what was looked at, with what to do where it is not well."""
    styles = {"ok": "green", "warning": "yellow", "broken": "bold red"}
    for finding in findings:
        state = f"[{styles[finding.state]}]{finding.state:8}[/]"
        remedy = f"\n         -> {finding.remedy}" if finding.remedy else ""
        text = escape(f"{visible(finding.name)}: {visible(finding.detail, 600)}{remedy}")
        console.print(f"{state} {text}", highlight=False, soft_wrap=True)


def print_evaluation(evaluation: Any, console: Console) -> None:
    """Print how well each score and the verdict did."""
    console.print(f"{evaluation.poisoned:,} of {evaluation.samples:,} samples are planted. {evaluation.note}")
    if not evaluation.scores:
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("score")
    columns = ("auroc", "average_precision", "recall_at_0.01", "recall_at_0.05", "recall_at_0.1", "clean_lost_at_0.05")
    for name in ("AUROC", "AP", "recall at 1 %", "at 5 %", "at 10 % removed", "clean lost at 5 %"):
        table.add_column(name, justify="right")
    for row in evaluation.rows():
        values = [f"{row[c]:,.0f}" if c.startswith("clean_lost") else f"{row[c]:.3f}" for c in columns]
        table.add_row(str(row["score"]), *values)
    console.print(table, highlight=False)
    if evaluation.flagged:
        verdict = evaluation.flagged
        console.print(
            f"flagged {verdict['flagged']:,}: recall {verdict['recall']:.3f}, precision {verdict['precision']:.3f}, "
            f"{verdict['clean_lost']:,} clean samples lost",
            highlight=False,
        )


def print_demo(summary: Any, out: str, console: Console) -> None:
    """Print what a newcomer should know of a demo."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in ("poisoned", "cleaned", "random removal"):
        table.add_column(name, justify="right", no_wrap=True)

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    console.print(f"\n{summary.samples:,} captioned pictures, {summary.poisoned} poisoned, {summary.removed} removed\n")
    if summary.poisoned:
        success = (summary.attack_success_before, summary.attack_success_after, summary.attack_success_random_removal)
        table.add_row("patched digits taken for bananas", *map(share, success))
    table.add_row("accuracy on clean digits", share(summary.accuracy_before), share(summary.accuracy_after), "")
    console.print(table, highlight=False)
    if summary.poisoned:
        console.print(
            f"\nfound among the {summary.removed / summary.samples:.0%} removed: {share(summary.recall_at_0_05)} "
            f"of the poison (AUROC {summary.auroc:.3f}, average precision {summary.average_precision:.3f})",
            highlight=False,
            soft_wrap=True,
        )
    else:
        console.print(
            "\nNothing was planted, so there is nothing to measure detection by. The highest-scored samples were "
            "removed as always; that is no finding, and no proof that a corpus is clean."
        )
    # Paths are not broken across lines: they are there to be copied.
    where = f"{summary.elapsed_s:.0f} s; report: {summary.report}; figures: {out}/summary.json"
    console.print(where, highlight=False, soft_wrap=True)


def write_json(value: Any) -> None:
    """Print JSON to stdout, without the passwords and signatures of its URLs."""
    sys.stdout.write(json.dumps(blanked(value), indent=2) + "\n")


def answer(value: Any, show: Callable[[Console], None], *, as_json: bool, quiet: bool = False) -> None:
    """Write what a command found: `value` as JSON, else by `show`, else, if quiet, not at all."""
    if as_json:
        write_json(value)
    elif not quiet:
        show(Screen())


def plain(error: BaseException | str) -> str:
    """Make an error, or its traceback, safe for a terminal: it may quote captions, member names, or a signed URL."""
    return escape("".join(c if c.isprintable() or c == "\n" else "?" for c in without_secrets(str(error))))
