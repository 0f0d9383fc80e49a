"""The command line: thin commands around the recipes of the same names."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from tarsift.operators.errors import EXIT_CODES, Interrupted, TarsiftError
from tarsift.pipelines.options import (
    MAIN,
    PASSES,
    SPREAD,
    WORKSHOP,
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
    OutFolder,
    OutOption,
    Quiet,
    Reference,
    Set,
    Shards,
    Threads,
    Workers,
    checked,
    encoder_settings,
    spread_settings,
    verdict_settings,
)
from tarsift.pipelines.printing import (
    plain,
    print_audit,
    print_demo,
    print_evaluation,
    print_findings,
    print_proof,
    print_result,
    print_status,
    say,
    write_json,
)
from tarsift.pipelines.progress import Listener, RichBars, listener_for
from tarsift.pipelines.stopping import stop_on_signals


class Commands(TyperGroup):
    """The commands; one that is interrupted ends as one that can be taken up again, which typer would not do."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("interrupted; run the same command again to go on.") from None


app = typer.Typer(
    name="tarsift",
    cls=Commands,
    help="Find poisoned samples in image-text dumps (WebDataset shards), and write a cleaned dump with the evidence.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    pretty_exceptions_enable=False,
)


@contextlib.contextmanager
def progress_on(console: Console, quiet: bool) -> Iterator[Listener]:
    """Show progress in the way that fits the console."""
    listener = listener_for(console, quiet=quiet)
    with listener if isinstance(listener, RichBars) else contextlib.nullcontext():
        yield listener


def compose(config: str | None, settings: list[str] | None, flags: dict[str, Any]) -> Any:
    """Load the configuration from file, flags and --set, in rising order of precedence."""
    from tarsift.pipelines.config import load_config

    return load_config(config, settings or (), **{name.replace(".", "__"): v for name, v in flags.items()})


@app.command(rich_help_panel=MAIN)
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
        **spread_settings(workers, gpus_per_worker, threads, batch_size),
        "read.captions": captions,
        "reference.path": reference,
        "max_error_rate": max_error_rate,
        "write.shards": False if no_shards else None,
    }
    settings = compose(config, set_, flags)
    console = Console()
    plan = make_plan(shards, out, settings)
    if dry_run:
        render_plan(plan, console)
        return
    if not quiet:
        console.print(f"[bold]tarsift clean[/bold]  {plan.headline}", highlight=False)
    with progress_on(Console(stderr=True), quiet) as progress:
        result = recipe.clean(shards, out, config=settings, progress=progress)
    if not quiet:
        print_result(result, console)


@app.command(rich_help_panel=MAIN)
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
    with progress_on(Console(stderr=True), quiet) as progress:
        found = recipe(shards, decode=decode, read=settings.read, images=settings.images, progress=progress)
    if json_:
        write_json(found.to_json())
    elif not quiet:
        print_audit(found, Console())
    if not found.whole:
        raise typer.Exit(EXIT_CODES["findings"])


@app.command(rich_help_panel=MAIN)
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

    with progress_on(Console(stderr=True), quiet) as progress:
        proof = recipe(out, shards, progress=progress)
    if json_:
        write_json(proof.to_json())
    elif not quiet:
        print_proof(proof, Console())
    if not proof.holds:
        raise typer.Exit(EXIT_CODES["findings"])


@app.command(rich_help_panel=MAIN)
def status(out: OutFolder, json_: AsJson = False) -> None:
    """Say how far a result folder is, and whether a run works on it."""
    from tarsift.pipelines.status import status as recipe

    found = recipe(out)
    if json_:
        write_json(found.model_dump(mode="json"))
    else:
        print_status(found, Console())


@app.command(rich_help_panel=WORKSHOP)
def doctor(
    urls: Annotated[
        list[str] | None, typer.Argument(metavar="[URLS...]", help="Dumps and result folders to reach.")
    ] = None,
    json_: AsJson = False,
) -> None:
    """Say what works on this machine, what does not, and what to do: exit code 1 if something is broken."""
    from tarsift.pipelines.doctor import BROKEN, examine

    findings = examine(urls or ())
    if json_:
        write_json([finding.model_dump() for finding in findings])
    else:
        print_findings(findings, Console())
    if any(finding.state == BROKEN for finding in findings):
        raise typer.Exit(EXIT_CODES["failed"])


@app.command(rich_help_panel=PASSES)
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
    from tarsift.pipelines.run import open_run

    flags = encoder_settings(encoder) | spread_settings(workers, gpus_per_worker, threads, batch_size)
    settings = compose(config, set_, {**flags, "read.captions": captions})
    with progress_on(Console(stderr=True), quiet) as progress:
        run = open_run(shards, out, settings, progress=progress)
        with run.working():
            recipe.embed_step(run)
    figures = run.content["passes"]["embed.detect"]
    say(f"{figures['samples']:,} samples of {figures['shards']} shards embedded in {out}/embeddings/detect", quiet)


def _redo(out: str, steps: list[str], changes: dict[str, Any], settings: list[str] | None, quiet: bool) -> Any:
    """Redo passes of a result folder with some settings changed."""
    from tarsift.pipelines import clean as recipe
    from tarsift.pipelines.config import parse_settings
    from tarsift.pipelines.run import reopen_run

    changes = {**changes, **parse_settings(settings or ())}
    with progress_on(Console(stderr=True), quiet) as progress:
        run = reopen_run(out, {n: value for n, value in changes.items() if value is not None}, progress=progress)
        with run.working():
            for step in steps:
                getattr(recipe, f"{step}_step")(run)
    stale = run.stale_passes()
    if stale:
        again = " && ".join(f"tarsift {name} {out}" for name in stale)
        say(f"out of date now: {', '.join(stale)}; redo with {again}", quiet)
    return run


@app.command(rich_help_panel=PASSES)
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


@app.command(rich_help_panel=PASSES)
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


@app.command(rich_help_panel=PASSES)
def write(
    out: OutFolder,
    no_shards: NoShards = False,
    set_: Set = None,
    quiet: Quiet = False,
) -> None:
    """Write clean/, removed/ and errored/ shards and keep.parquet from the flags."""
    run = _redo(out, ["write"], {"write.shards": not no_shards}, set_, quiet)
    say(f"{run.content['counts']['kept']:,} samples kept in {out}/clean", quiet)


@app.command(rich_help_panel=PASSES)
def report(out: OutFolder, quiet: Quiet = False) -> None:
    """Write OUT/report.html from what is there."""
    _redo(out, ["report"], {}, None, quiet)
    say(f"report: {out}/report.html", quiet)


@app.command(rich_help_panel=WORKSHOP)
def pretrain(
    shards: Shards,
    out: Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="Encoder file to write.", show_default=False)],
    model: Annotated[str, typer.Option(help="tiny, a JSON config of stock towers, or an open_clip name.")] = "tiny",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the pairs.")] = 20,
    seed: Annotated[int, typer.Option(help="Of weights and order.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=2, help="Pairs per step.")] = 128,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    captions: Captions = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that train in step.", rich_help_panel=SPREAD)] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Threads per worker.", rich_help_panel=SPREAD)] = 1,
    quiet: Quiet = False,
) -> None:
    """Train a CLIP from scratch on shards, through Ray Train; the encoder for `clean`."""
    from tarsift.pipelines.pretrain import PretrainConfig
    from tarsift.pipelines.pretrain import pretrain as recipe

    given: dict[str, Any] = {"model": model, "epochs": epochs, "seed": seed, "batch_size": batch_size}
    given |= {"workers": workers, "threads": threads}
    given |= {"train": {"lr": lr}} if lr is not None else {}
    given |= {"read": {"captions": captions}} if captions is not None else {}
    config = checked(PretrainConfig, given)
    with progress_on(Console(stderr=True), quiet) as progress:
        summary = recipe(shards, out=out, config=config, progress=progress)
    skipped = f", {sum(summary.skipped.values()):,} unusable samples skipped" if summary.skipped else ""
    say(
        f"{summary.pairs:,} pairs, {summary.steps:,} steps in {summary.wall_s:.0f} s, loss {summary.loss:.3f}"
        f"{skipped}: {summary.checkpoint}",
        quiet,
    )


@app.command(rich_help_panel=WORKSHOP)
def poison(
    shards: Shards,
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="Folder of the copy.", show_default=False)],
    attack: Annotated[str, typer.Option(help="Name of the attack.")] = "patch",
    rate: Annotated[float, typer.Option(min=0, max=1, help="Share of all samples that is poisoned.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Of samples, places and captions.")] = 0,
    target: Annotated[str, typer.Option(help="Word that poisoned captions name.")] = "banana",
    strength: Annotated[float | None, typer.Option(help="Of the trigger; its own by default.")] = None,
    captions: Captions = None,
    quiet: Quiet = False,
) -> None:
    """Plant poison in a copy of a dump, with the truth in DIR/truth.parquet."""
    from tarsift.operators.poison import PoisonConfig
    from tarsift.pipelines.poison import poison as recipe

    given: dict[str, Any] = {"attack": attack, "rate": rate, "seed": seed, "target": target, "strength": strength}
    given |= {"read": {"captions": captions}} if captions is not None else {}
    summary = recipe(shards, out=out, config=checked(PoisonConfig, given))
    say(f"{summary.poisoned:,} of {summary.samples:,} samples poisoned in {out}; truth: {summary.truth}", quiet)


@app.command(rich_help_panel=WORKSHOP)
def evaluate(
    out: OutFolder,
    truth: Annotated[
        str, typer.Option("--truth", metavar="FILE", help="truth.parquet of `poison`.", show_default=False)
    ],
    json_: AsJson = False,
) -> None:
    """Compare scores and verdict with a known truth."""
    from tarsift.pipelines.evaluate import evaluate as recipe

    evaluation = recipe(out, truth)
    if json_:
        write_json(evaluation.to_json())
        return
    print_evaluation(evaluation, Console())


@app.command(rich_help_panel=MAIN)
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
    with progress_on(Console(stderr=True), quiet) as progress:
        summary = recipe(out, config, progress=progress)
    if not quiet:
        print_demo(summary, out, Console())


def main() -> None:
    """Run the command line; exit codes are those of `tarsift.operators.errors.EXIT_CODES`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    stop_on_signals()
    err = Console(stderr=True)
    try:
        app()
    except TarsiftError as error:
        err.print(f"[bold red]error:[/bold red] {plain(error)}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
