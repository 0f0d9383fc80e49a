"""What commands print when they end: what was done, how fast, where the results are."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tarsift.operators.storage import without_secrets
from tarsift.pipelines import json_log
from tarsift.pipelines.text import blanked, command, size, visible

SHOWN_SHARDS = 20


class Screen(Console):
    """The console of all commands: in no text on it, or in a cell of a table, do URLs show a password or signature."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(without_secrets(text), **options)


def say(text: str, quiet: bool) -> None:
    """Say a sentence of what was done; in a line of the log where that is JSON."""
    if quiet:
        return
    if json_log.asked_for():
        json_log.write_line("message", message=text)
    else:
        Screen().print(text, highlight=False, markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """Say on the standard error what did not work out, where work goes on all the same."""
    if json_log.asked_for():
        json_log.write_line("message", level="warning", message=text)
    else:
        Screen(stderr=True).print(plain(text), highlight=False, soft_wrap=True)


def tried_again(requests: int) -> str:
    """Return the end of a summary: how many requests to the store were tried again; nothing if none was."""
    return f", {requests:,} requests to the store were tried again" if requests else ""


def print_rows(rows: Mapping[str, str], console: Console, *, width: int = 12) -> None:
    """Print a name and a text in each line; paths are not broken across lines."""
    for name, text in rows.items():
        console.print(f"{name:{width}} {text}", highlight=False, markup=False, soft_wrap=True)


def print_result(result: Any, console: Console) -> None:
    """Say what was done, how fast, and where the results are."""
    print_rows(rows_of_result(result) | ({"report": str(result.report)} if result.report else {}), console)


def rows_of_result(result: Any) -> dict[str, str]:
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
    return rows


def print_trace(result: Any, console: Console) -> None:
    """Say what was traced, how fast, and where it is."""
    print_rows(rows_of_trace(result) | {"report": result.report}, console)


def rows_of_trace(result: Any) -> dict[str, str]:
    return {
        "traced": f"{result.traced:,} of {result.candidates:,} candidates stand out, of {result.of:,} samples, "
        f"in {result.elapsed_s:.0f} s",
        "says": repr(visible(result.says, 200)),
        "samples": result.samples,
    }


def print_repair(result: Any, console: Console) -> None:
    """Say what a model says before and after its repair."""
    table = Table(*COMPARED, box=None, pad_edge=False)
    for row in rows_of_repair(result):
        table.add_row(*row)
    console.print(table)
    done = (
        f"{result.method}: {result.forgot:,} samples forgotten in {result.elapsed_s:.0f} s; measured on {result.held}"
    )
    console.print(done, highlight=False, markup=False, soft_wrap=True)
    print_rows({"kept to": result.kept_to, "repaired": result.encoder, "forgotten": result.listed}, console)


COMPARED = ("", "before", "after")


def rows_of_repair(result: Any) -> list[tuple[str, str, str]]:
    names = {
        "queries": "queries of which it says what was traced",
        "forgotten": "samples to forget of which it says so",
        "recall_at_5": "pictures whose caption is among the five nearest",
    }
    return [
        (what, f"{result.before[name]:.1%}", f"{result.after[name]:.1%}")
        for name, what in names.items()
        if name in result.before
    ]


def print_selection(selection: Any, console: Console) -> None:
    """Say what was chosen, how pure it is, and where it is."""
    print_rows(rows_of_selection(selection), console)


def rows_of_selection(selection: Any) -> dict[str, str]:
    chance = f"{selection.suspects_expected:g} in a random choice"
    return {
        "chosen": f"{selection.chosen:,} of {selection.of:,} sifted samples   {selection.shards or selection.listed}",
        "suspects": f"{selection.suspects:,} among as many chosen by the sifter alone ({chance}); these are left out",
        "purity": f"{selection.purity:.2%} before that, if suspects and no others are poisoned",
    }


def print_export(done: Any, console: Console) -> None:
    """Say what was written, how many samples are in it, and where it is."""
    print_rows(rows_of_export(done), console, width=14)


def rows_of_export(done: Any) -> dict[str, str]:
    where = done.files[0] if len(done.files) == 1 else done.to
    rows = {done.format: f"{done.samples:,} samples in {done.elapsed_s:.0f} s   {where}"}
    if done.left_out:
        rows["left out"] = ", ".join(f"{count:,} {why}" for why, count in done.left_out.items())
    return rows


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
    console.print(verdict_of_audit(audit), highlight=False, soft_wrap=True)


def verdict_of_audit(audit: Any) -> str:
    damaged = sum(not shard.whole for shard in audit.shards)
    rate = audit.bytes / max(audit.elapsed_s, 1e-9)
    looked = "every image decoded" if audit.decoded else "images not decoded (--decode does)"
    verdict = f"{damaged:,} of {len(audit.shards):,} shards have problems" if damaged else "whole"
    return (
        f"{verdict}: {len(audit.shards):,} shards, {audit.samples:,} samples, {size(audit.bytes)} in "
        f"{audit.elapsed_s:.0f} s ({size(int(rate))}/s), {looked}{tried_again(audit.repeated_requests)}"
    )


def print_proof(proof: Any, console: Console) -> None:
    """Say whether a result holds and, where it does not, what is wrong and where."""
    from tarsift.operators.verify import FAULTS

    faulty = faults_of(proof)
    for name, fault in faulty[:SHOWN_SHARDS]:
        line = f"{visible(name)}: {fault.fault}  ({visible(fault.detail)})"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if len(faulty) > SHOWN_SHARDS:
        console.print(f"... and {len(faulty) - SHOWN_SHARDS:,} more; --json names them all", highlight=False)
    for code in dict.fromkeys(fault.fault for _, fault in faulty):
        console.print(f"{code}: {FAULTS[code]}", highlight=False, soft_wrap=True)
    console.print(verdict_of_proof(proof), highlight=False, soft_wrap=True)


def faults_of(proof: Any) -> list[tuple[str, Any]]:
    """Return every fault with where it is."""
    of_shards = [(shard.shard, fault) for shard in proof.shards for fault in shard.faults]
    return of_shards + [(proof.out, fault) for fault in proof.faults]


def verdict_of_proof(proof: Any) -> str:
    faults = len(faults_of(proof))
    members = ", ".join(f"{home} {count:,}" for home, count in proof.members.items())
    what = f"{len(proof.shards):,} shards, members {members}" if proof.with_shards else "lists only, no shards written"
    verdict = f"{faults:,} faults" if faults else "holds"
    return f"{verdict}: {what}; {proof.elapsed_s:.0f} s{tried_again(proof.repeated_requests)}"


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
    for name in FIGURES.values():
        table.add_column(name, justify="right")
    for row in rows_of_evaluation(evaluation):
        table.add_row(*row)
    console.print(table, highlight=False)
    if evaluation.flagged:
        console.print(flagged_of(evaluation), highlight=False)


FIGURES = {
    "auroc": "AUROC", "average_precision": "AP", "recall_at_0.01": "recall at 1 %", "recall_at_0.05": "at 5 %",
    "recall_at_0.1": "at 10 % removed", "clean_lost_at_0.05": "clean lost at 5 %",
}  # fmt: skip


def rows_of_evaluation(evaluation: Any) -> list[list[str]]:
    return [
        [str(row["score"]), *(f"{row[c]:,.0f}" if c.startswith("clean_lost") else f"{row[c]:.3f}" for c in FIGURES)]
        for row in evaluation.rows()
    ]


def flagged_of(evaluation: Any) -> str:
    verdict = evaluation.flagged
    return (
        f"flagged {verdict['flagged']:,}: recall {verdict['recall']:.3f}, precision {verdict['precision']:.3f}, "
        f"{verdict['clean_lost']:,} clean samples lost"
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


def sum_up(value: Any, show: Callable[[Console], None], *, as_json: bool = False, quiet: bool = False) -> None:
    """Write what long work has come to, as `answer` does; in a line of the log where that is JSON."""
    if json_log.asked_for() and not as_json:
        if not quiet:
            json_log.write_line("result", result=value)
    else:
        answer(value, show, as_json=as_json, quiet=quiet)


def plain(error: BaseException | str) -> str:
    """Make an error, or its traceback, safe for a terminal: it may quote captions, member names, or a signed URL."""
    return escape("".join(c if c.isprintable() or c == "\n" else "?" for c in without_secrets(str(error))))
