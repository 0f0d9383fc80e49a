"""The passes of the main job, one by one: embed, score, sift, flag, write, report."""

from __future__ import annotations

from typing import Any

import typer

from tarsift.pipelines.options import (
    PASSES,
    BatchSize,
    Budget,
    By,
    Captions,
    ConfigFile,
    Encoder,
    Fraction,
    GpusPerWorker,
    MinScore,
    MinZ,
    NoShards,
    OnBadShard,
    OnError,
    OutFolder,
    OutOption,
    Quiet,
    Reference,
    Route,
    Set,
    Shards,
    Sifter,
    Threads,
    Workers,
    compose,
    encoder_settings,
    sift_settings,
    spread_settings,
    verdict_settings,
)
from tarsift.pipelines.printing import say
from tarsift.pipelines.progress import shown_progress

commands = typer.Typer()


@commands.command(rich_help_panel=PASSES)
def embed(
    shards: Shards,
    out: OutOption,
    encoder: Encoder = None,
    captions: Captions = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
    threads: Threads = None,
    batch_size: BatchSize = None,
    config: ConfigFile = None,
    set_: Set = None,
    quiet: Quiet = False,
) -> None:
    """Read, decode and encode shards into OUT/embeddings."""
    from tarsift.pipelines import clean as recipe
    from tarsift.pipelines.passes import embed_name
    from tarsift.pipelines.run import open_run

    flags = encoder_settings(encoder) | spread_settings(workers, gpus_per_worker, threads, batch_size)
    settings = compose(config, set_, {**flags, "read.captions": captions})
    with shown_progress(quiet) as progress:
        run = open_run(shards, out, settings, progress=progress)
        with run.working():
            recipe.embed_step(run)
    for role in run.roles:
        figures = run.content["passes"][embed_name(role)]
        left_over = figures.get("embeddings_of_no_sample", 0)
        more = f"; {left_over:,} embeddings are of no sample" if left_over else ""
        samples = f"{figures['samples']:,} samples of {figures['shards']} shards"
        say(f"{samples} embedded in {out}/embeddings/{role}{more}", quiet)


def _redo(out: str, steps: list[str], changes: dict[str, Any], settings: list[str] | None, quiet: bool) -> Any:
    """Redo passes of a result folder with some settings changed."""
    from tarsift.pipelines.config import parse_settings
    from tarsift.pipelines.redo import redo_passes

    changes = {**changes, **parse_settings(settings or ())}
    with shown_progress(quiet) as progress:
        given = {name: value for name, value in changes.items() if value is not None}
        run = redo_passes(out, steps, given, progress)
    stale = run.stale_passes()
    if stale:
        again = " && ".join(f"tarsift {name} {out}" for name in stale)
        say(f"out of date now: {', '.join(stale)}; redo with {again}", quiet)
    return run


@commands.command(rich_help_panel=PASSES)
def score(
    out: OutFolder,
    reference: Reference = None,
    workers: Workers = None,
    threads: Threads = None,
    batch_size: BatchSize = None,
    set_: Set = None,
    quiet: Quiet = False,
) -> None:
    """Score stored embeddings (again) into OUT/scores."""
    changes = {"reference.path": reference} | spread_settings(workers, None, threads, batch_size)
    run = _redo(out, ["score"], changes, set_, quiet)
    say(f"{run.content['passes']['score']['samples']:,} samples scored in {out}/scores", quiet)


@commands.command(rich_help_panel=PASSES)
def sift(
    out: OutFolder,
    encoder: Encoder = None,
    sifter: Sifter = None,
    route: Route = None,
    budget: Budget = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
    set_: Set = None,
    quiet: Quiet = False,
) -> None:
    """Sort samples into classes by their captions, and sift the classes, into OUT/sift."""
    changes = encoder_settings(encoder) | sift_settings(sifter, route, budget)
    run = _redo(out, ["sift"], changes | spread_settings(workers, gpus_per_worker, None, None), set_, quiet)
    said = run.content["sift"]
    for name, reason in said["failed"].items():
        say(f"problem {name} failed: {reason}", quiet)
    say(
        f"{said['sifted']:,} of {said['samples']:,} samples sifted, in {said['problems']} problems, in {out}/sift",
        quiet,
    )
    say(f"flag by both verdicts: tarsift flag {out} --by suspicion_sifted", quiet)


@commands.command(rich_help_panel=PASSES)
def flag(
    out: OutFolder,
    fraction: Fraction = None,
    min_score: MinScore = None,
    min_z: MinZ = None,
    by: By = None,
    on_error: OnError = None,
    on_bad_shard: OnBadShard = None,
    set_: Set = None,
    quiet: Quiet = False,
) -> None:
    """Flag scored samples (again) with another threshold, without encoding again."""
    changes = verdict_settings(fraction, min_score, min_z, by, on_error, on_bad_shard)
    run = _redo(out, ["flag"], changes, set_, quiet)
    counts = run.content["counts"]
    say(f"{counts['removed']:,} of {counts['read']:,} samples flagged in {out}/flags", quiet)


@commands.command(rich_help_panel=PASSES)
def write(
    out: OutFolder,
    no_shards: NoShards = False,
    set_: Set = None,
    quiet: Quiet = False,
) -> None:
    """Write clean/, removed/ and errored/ shards and keep.parquet from the flags."""
    run = _redo(out, ["write"], {"write.shards": not no_shards}, set_, quiet)
    say(f"{run.content['counts']['kept']:,} samples kept in {out}/clean", quiet)


@commands.command(rich_help_panel=PASSES)
def report(out: OutFolder, quiet: Quiet = False) -> None:
    """Write OUT/report.html from what is there."""
    _redo(out, ["report"], {}, None, quiet)
    say(f"report: {out}/report.html", quiet)
