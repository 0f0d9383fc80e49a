"""The job of every night: ingest."""

from __future__ import annotations

from typing import Annotated

import typer

from tarsift.operators.errors import EXIT_CODES
from tarsift.pipelines.options import (
    INPUT,
    MAIN,
    VERDICT,
    AsJson,
    BatchSize,
    By,
    Captions,
    ConfigFile,
    Encoder,
    Fraction,
    GpusPerWorker,
    MaxErrorRate,
    MinScore,
    MinZ,
    NoShards,
    OnBadShard,
    OnError,
    Quiet,
    Set,
    Shards,
    Threads,
    Workers,
    compose_content,
    encoder_settings,
    spread_settings,
    verdict_settings,
)
from tarsift.pipelines.printing import Screen, sum_up
from tarsift.pipelines.printing_nights import print_arrivals, print_night
from tarsift.pipelines.progress import shown_progress

commands = typer.Typer()


@commands.command(rich_help_panel=MAIN)
def ingest(
    shards: Shards,
    state: Annotated[
        str,
        typer.Option(
            "--state", metavar="STATE", help="Folder of the state, local or a URL; the first call makes it.",
            show_default=False,
        ),
    ],
    encoder: Encoder = None,
    fixed: Annotated[
        bool,
        typer.Option(
            "--fixed", rich_help_panel=INPUT,
            help="Let encoders stand still. A new backdoor is then seen by its captions only.",
        ),
    ] = False,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over tonight's samples in training.", rich_help_panel=INPUT)
    ] = None,
    root: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="Folder below which shards are named; the first call keeps it.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    captions: Captions = None,
    fraction: Fraction = None,
    min_score: MinScore = None,
    min_z: MinZ = None,
    by: By = None,
    on_error: OnError = None,
    on_bad_shard: OnBadShard = None,
    no_shards: NoShards = False,
    max_error_rate: MaxErrorRate = None,
    fail_on_findings: Annotated[
        bool,
        typer.Option("--fail-on-findings", help="Exit with 4 for a finding or drift.", rich_help_panel=VERDICT),
    ] = False,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Nights whose embeddings and encoder are kept (default 30).")
    ] = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
    threads: Threads = None,
    batch_size: BatchSize = None,
    config: ConfigFile = None,
    set_: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what has come in, and stop.")] = False,
    json_: AsJson = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Clean the shards that were not seen before, each night, and tell what is unlike the nights before.

    Give all shards there are: the state knows those it has seen. The same command again goes on after any
    interruption. Settings of a night's run are those of clean; those of ingestion itself are --set ingest.NAME=VALUE.
    """
    from tarsift.pipelines.ingest import ingest as recipe
    from tarsift.pipelines.ingest import what_came_in
    from tarsift.pipelines.ingest_settings import parse_ingest_config

    flags = {
        **encoder_settings(encoder),
        **verdict_settings(fraction, min_score, min_z, by, on_error, on_bad_shard),
        **spread_settings(workers, gpus_per_worker, threads, batch_size),
        "read.captions": captions,
        "max_error_rate": max_error_rate,
        "write.shards": False if no_shards else None,
        "ingest.train": False if fixed else None,
        "ingest.epochs": epochs,
        "ingest.keep": keep,
    }
    settings = parse_ingest_config(compose_content(config, set_, flags))
    if dry_run:
        print_arrivals(what_came_in(shards, state, root=root), Screen())
        return
    with shown_progress(quiet) as progress:
        result = recipe(shards, state, config=settings, root=root, progress=progress)
    sum_up(result.to_json(), lambda console: print_night(result, console), as_json=json_, quiet=quiet)
    if fail_on_findings and result.alarming:
        raise typer.Exit(EXIT_CODES["findings"])
