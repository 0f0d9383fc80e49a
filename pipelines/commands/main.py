"""The main job and what is asked of its result: clean, audit, select, verify, status, export, demo."""

from __future__ import annotations

from typing import Annotated

import typer

from tarsift.operators.errors import EXIT_CODES
from tarsift.pipelines.options import (
    MAIN,
    SIFT,
    AsJson,
    BatchSize,
    Budget,
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
    checked,
    compose,
    encoder_settings,
    sift_settings,
    spread_settings,
    verdict_settings,
)
from tarsift.pipelines.printing import (
    Screen,
    answer,
    print_audit,
    print_demo,
    print_export,
    print_proof,
    print_result,
    print_selection,
    print_status,
    say,
    sum_up,
)
from tarsift.pipelines.printing_nights import print_state
from tarsift.pipelines.progress import shown_progress

commands = typer.Typer()


@commands.command(rich_help_panel=MAIN)
def clean(
    shards: Shards,
    out: OutOption,
    encoder: Encoder = None,
    captions: Captions = None,
    reference: Reference = None,
    fraction: Fraction = None,
    min_score: MinScore = None,
    min_z: MinZ = None,
    by: By = None,
    on_error: OnError = None,
    on_bad_shard: OnBadShard = None,
    no_shards: NoShards = False,
    max_error_rate: MaxErrorRate = None,
    sift: Annotated[
        bool, typer.Option("--sift", help="Sift classes too, and flag by both verdicts.", rich_help_panel=SIFT)
    ] = False,
    sifter: Sifter = None,
    route: Route = None,
    budget: Budget = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
    threads: Threads = None,
    batch_size: BatchSize = None,
    config: ConfigFile = None,
    set_: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and the settings, and stop.")] = False,
    quiet: Quiet = False,
) -> None:
    """Score a dump, flag the most suspicious samples, write cleaned shards and a report.

    The same command again continues after any interruption.
    """
    from tarsift.pipelines import clean as recipe
    from tarsift.pipelines.plan import make_plan, render_plan

    flags = {
        **encoder_settings(encoder),
        **verdict_settings(fraction, min_score, min_z, by, on_error, on_bad_shard),
        **sift_settings(sifter, route, budget),
        **spread_settings(workers, gpus_per_worker, threads, batch_size),
        "sift.enabled": True if sift else None,
        "read.captions": captions,
        "reference.path": reference,
        "max_error_rate": max_error_rate,
        "write.shards": False if no_shards else None,
    }
    settings = compose(config, set_, flags)
    plan = make_plan(shards, out, settings, sized=dry_run)
    if dry_run:
        render_plan(plan, Screen())
        return
    say(f"tarsift clean  {plan.headline}", quiet)
    with shown_progress(quiet) as progress:
        result = recipe.clean(shards, out, config=settings, progress=progress)
    sum_up(result.to_json(), lambda console: print_result(result, console), quiet=quiet)


@commands.command(rich_help_panel=MAIN)
def audit(
    shards: Shards,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image too; takes far longer.")] = False,
    captions: Captions = None,
    json_: AsJson = False,
    config: ConfigFile = None,
    set_: Set = None,
    quiet: Quiet = False,
) -> None:
    """Look at every byte of a dump before a GPU is rented: exit code 0 if it is whole, 4 if not."""
    from tarsift.pipelines.audit import audit as recipe

    settings = compose(config, set_, {"read.captions": captions})
    with shown_progress(quiet) as progress:
        found = recipe(
            shards, decode=decode, read=settings.read, images=settings.images,
            stall_timeout_s=settings.resources.stall_timeout_s, progress=progress,
        )  # fmt: skip
    sum_up(found.to_json(), lambda console: print_audit(found, console), as_json=json_, quiet=quiet)
    if not found.whole:
        raise typer.Exit(EXIT_CODES["findings"])


@commands.command(rich_help_panel=MAIN)
def select(
    out: OutFolder,
    clean: Annotated[int, typer.Option("--clean", min=1, help="How many samples.", show_default=False)],
    no_shards: Annotated[bool, typer.Option("--no-shards", help="Write only the list.")] = False,
    json_: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Choose samples of a sifted dump that are surely clean, into OUT/selected."""
    from tarsift.pipelines.select import select as recipe

    with shown_progress(quiet) as progress:
        found = recipe(out, clean, shards=not no_shards, progress=progress)
    sum_up(found.to_json(), lambda console: print_selection(found, console), as_json=json_, quiet=quiet)


@commands.command(rich_help_panel=MAIN)
def verify(
    out: OutFolder,
    shards: Annotated[
        list[str] | None, typer.Argument(metavar="[SHARDS...]", help="The dump; by default where the run read it.")
    ] = None,
    json_: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Prove that clean + removed + errored = the dump, byte for byte: exit code 0 if so, 4 if not."""
    from tarsift.pipelines.verify import verify as recipe

    with shown_progress(quiet) as progress:
        proof = recipe(out, shards, progress=progress)
    sum_up(proof.to_json(), lambda console: print_proof(proof, console), as_json=json_, quiet=quiet)
    if not proof.holds:
        raise typer.Exit(EXIT_CODES["findings"])


@commands.command(rich_help_panel=MAIN)
def status(
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="A result folder, or the state of an ingestion.", show_default=False)
    ],
    json_: AsJson = False,
) -> None:
    """Say how far a result folder, or the state of an ingestion, is, and whether somebody works on it."""
    from tarsift.pipelines.status import Status, status_of_state
    from tarsift.pipelines.status import status as status_of_run

    found = status_of_state(out) or status_of_run(out)
    show = print_status if isinstance(found, Status) else print_state
    answer(found.model_dump(mode="json"), lambda console: show(found, console), as_json=json_)


@commands.command(rich_help_panel=MAIN)
def export(
    out: OutFolder,
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME",
            show_default=False,
            help="datacomp (sorted uids, .npy), clip-retrieval (folder of embeddings), fiftyone (folder), "
            "datalab (.parquet or .csv) or sizes (for open_clip).",
        ),
    ],
    to: Annotated[
        str | None,
        typer.Option(
            metavar="FILE_OR_FOLDER", help="Local or a URL.", show_default="for sizes, beside the shards of clean/"
        ),
    ] = None,
    which: Annotated[
        str | None,
        typer.Option(
            metavar="kept|removed|errored|all", help="Samples.", show_default="kept; all for fiftyone and datalab"
        ),
    ] = None,
    role: Annotated[
        str | None,
        typer.Option(
            metavar="detect|witness|features", help="Encoder of the embeddings.", show_default="the first there is"
        ),
    ] = None,
    images: Annotated[bool, typer.Option("--images", help="Write the pictures too (fiftyone).")] = False,
    json_: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write verdicts, scores or embeddings in the format of another tool."""
    from tarsift.pipelines.export import export as recipe

    with shown_progress(quiet) as progress:
        done = recipe(out, to, format=format_, which=which, role=role, images=images, progress=progress)
    sum_up(done.to_json(), lambda console: print_export(done, console), as_json=json_, quiet=quiet)


@commands.command(rich_help_panel=MAIN)
def demo(
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="Folder for everything.")] = "demo-out",
    rate: Annotated[float | None, typer.Option(min=0, max=0.49, help="Share of samples that is poisoned.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
    samples: Annotated[int | None, typer.Option(min=500, help="Captioned pictures.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes of training.")] = None,
    quiet: Quiet = False,
) -> None:
    """Poison a corpus made on the spot, train on it, clean it, and train again: minutes on two CPU cores."""
    from tarsift.pipelines.demo import DemoConfig
    from tarsift.pipelines.demo import demo as recipe

    given = {"rate": rate, "seed": seed, "samples": samples, "epochs": epochs}
    config = checked(DemoConfig, {name: value for name, value in given.items() if value is not None})
    with shown_progress(quiet) as progress:
        summary = recipe(out, config, progress=progress)
    sum_up(summary.to_json(), lambda console: print_demo(summary, out, console), quiet=quiet)
