"""What the main job needs and what it is measured with: doctor, pretrain, poison, evaluate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer

from tarsift.clip_detect.triggers import ATTACKS
from tarsift.operators.errors import EXIT_CODES, ConfigError, UsageError
from tarsift.pipelines.options import (
    SPREAD,
    WORKSHOP,
    AsJson,
    Captions,
    OutFolder,
    Quiet,
    Shards,
    checked,
)
from tarsift.pipelines.printing import answer, print_evaluation, print_findings, say, sum_up, tried_again, warn
from tarsift.pipelines.progress import shown_progress

commands = typer.Typer()


@commands.command(rich_help_panel=WORKSHOP)
def pretrain(
    shards: Shards,
    out: Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="Encoder file to write.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(help="tiny, a JSON config of stock towers, or an open_clip name.", show_default="tiny"),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--from", metavar="MODEL", help="Train this one further: enc.pt, RN50:FILE or ViT-B-32:TAG."),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the pairs.")] = 20,
    seed: Annotated[int, typer.Option(help="Of weights and order.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=2, help="Pairs per step.")] = 128,
    lr: Annotated[
        float | None, typer.Option(help="Highest learning rate.", show_default="0.004, with --from 0.0004")
    ] = None,
    losses: Annotated[
        str | None, typer.Option(metavar="FILE", help="Parquet file for the loss of every pair in every epoch.")
    ] = None,
    leave_out: Annotated[
        str | None,
        typer.Option(
            "--leave-out", metavar="FILE", help="Parquet list (shard, key) of samples that are not trained on."
        ),
    ] = None,
    cache_bytes: Annotated[
        int, typer.Option("--cache-bytes", min=0, help="Keep pixels in memory up to this size, else stream shards.")
    ] = 2 << 30,
    force: Annotated[bool, typer.Option("--force", help="Begin anew, whatever earlier trainings left.")] = False,
    captions: Captions = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that train in step.", rich_help_panel=SPREAD)] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Threads per worker.", rich_help_panel=SPREAD)] = 1,
    snapshot_s: Annotated[
        float, typer.Option("--snapshot-s", min=0, help="Seconds between snapshots.", rich_help_panel=SPREAD)
    ] = 60.0,
    quiet: Quiet = False,
) -> None:
    """Train a CLIP on shards, from scratch or --from another one; the encoder for `clean`.

    Interrupted, the same command goes on from its last snapshot (OUT.part); streamed shards at about
    the same place. What is done is not done again. Ray Train runs several workers.
    """
    from tarsift.pipelines.pretrain import PretrainConfig
    from tarsift.pipelines.pretrain import pretrain as recipe

    given: dict[str, Any] = {"model": model, "epochs": epochs, "seed": seed, "batch_size": batch_size}
    given |= {"workers": workers, "threads": threads, "snapshot_s": snapshot_s, "cache_bytes": cache_bytes}
    given |= {"base": base, "losses": losses, "leave_out": leave_out}
    given |= {"train": {"lr": lr}} if lr is not None else {}
    given |= {"read": {"captions": captions}} if captions is not None else {}
    config = checked(PretrainConfig, given)
    with shown_progress(quiet) as progress:
        summary = recipe(shards, out=out, config=config, force=force, progress=progress)
    before = f" ({summary.went_on_from:,} of them before)" if summary.went_on_from else ""
    skipped = f", {_counted(summary.skipped)} skipped" if summary.skipped else ""
    said = (
        f"{summary.pairs:,} pairs, {summary.steps:,} steps{before} in {summary.wall_s:.0f} s, loss {summary.loss:.3f}"
        f"{skipped}: {summary.checkpoint}"
    )
    sum_up(asdict(summary), lambda _: say(said, quiet=False), quiet=quiet)


@commands.command(rich_help_panel=WORKSHOP)
def poison(
    shards: Shards,
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="Folder of the copy.", show_default=False)],
    attack: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help=f"One or several of {', '.join(ATTACKS)}; default patch.")
    ] = None,
    rate: Annotated[float, typer.Option(min=0, max=1, help="Share of all samples that each attack poisons.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Of samples, places and captions.")] = 0,
    target: Annotated[str, typer.Option(help="Word that poisoned captions name.")] = "banana",
    strength: Annotated[
        list[str] | None, typer.Option(metavar="TRIGGER=X", help="Of a trigger; the published one by default.")
    ] = None,
    captions: Captions = None,
    quiet: Quiet = False,
) -> None:
    """Plant poison in a copy of a dump, with the truth in DIR/truth.parquet."""
    from tarsift.operators.poison import PoisonConfig
    from tarsift.pipelines.poison import poison as recipe

    given: dict[str, Any] = {"attacks": attack or ["patch"], "rate": rate, "seed": seed, "target": target}
    given |= {"strengths": dict(_strength(text) for text in strength or ())}
    given |= {"read": {"captions": captions}} if captions is not None else {}
    config = checked(PoisonConfig, given)
    with shown_progress(quiet):
        summary = recipe(shards, out=out, config=config)
    beside = f", {_counted(summary.unusable)} cannot be" if summary.unusable else ""
    beside += tried_again(summary.repeated_requests)
    said = f"{summary.poisoned:,} of {summary.samples:,} samples poisoned in {out}{beside}; truth: {summary.truth}"
    sum_up(asdict(summary), lambda _: say(said, quiet=False), quiet=quiet)


@commands.command(rich_help_panel=WORKSHOP)
def evaluate(
    out: OutFolder,
    truth: Annotated[
        str, typer.Option("--truth", metavar="FILE", help="truth.parquet of `poison`.", show_default=False)
    ],
    page: Annotated[
        str | None,
        typer.Option(metavar="FILE.html", help="Where the page of plots goes.", show_default="OUT/evaluation.html"),
    ] = None,
    json_: AsJson = False,
) -> None:
    """Compare scores and verdict with a known truth: a table, and a page of plots per attack and score."""
    from tarsift.pipelines.evaluate import evaluate as recipe
    from tarsift.pipelines.report.evaluation import write_evaluation

    evaluation = recipe(out, truth)
    answer(evaluation.to_json(), lambda console: print_evaluation(evaluation, console), as_json=json_)
    try:
        say(f"page: {write_evaluation(evaluation, page)}", quiet=json_)
    except UsageError as error:
        if page is not None:
            raise
        warn(f"no page: {error} --page FILE.html puts it elsewhere.")


@commands.command(rich_help_panel=WORKSHOP)
def doctor(
    urls: Annotated[
        list[str] | None, typer.Argument(metavar="[URLS...]", help="Dumps and result folders to reach.")
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Write a tiny file to each of URLS as well, and remove it.")
    ] = False,
    json_: AsJson = False,
) -> None:
    """Say what works on this machine, what does not, and what to do: exit code 1 if something is broken.

    It joins a Ray that is running and asks every node of it; nothing is written unless --write is given.
    """
    from tarsift.pipelines.doctor import BROKEN, examine

    with shown_progress(quiet=True):
        findings = examine(urls or (), write=write)
    answer(
        [finding.model_dump() for finding in findings], lambda console: print_findings(findings, console), as_json=json_
    )
    if any(finding.state == BROKEN for finding in findings):
        raise typer.Exit(EXIT_CODES["failed"])


def _counted(reasons: Mapping[str, int]) -> str:
    each = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
    return f"{sum(reasons.values()):,} unusable samples ({each})"


def _strength(text: str) -> tuple[str, str]:
    trigger, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--strength takes TRIGGER=X, such as blend=0.4; got {text!r}.")
    return trigger, value
