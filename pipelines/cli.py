"""The command line: thin commands around the recipes of the same names."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tarsift.operators.errors import EXIT_CODES, ConfigError, TarsiftError
from tarsift.pipelines.progress import Listener, RichBars, listener_for

app = typer.Typer(
    name="tarsift",
    help="Find poisoned samples in image-text dumps (WebDataset shards), and write a cleaned dump with the evidence.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    pretty_exceptions_enable=False,
)

MAIN, PASSES, WORKSHOP = "Main job", "Its passes, one by one", "Workshop"
INPUT, VERDICT, SPREAD, SETTINGS = "Input", "Verdict", "How the work is spread (changes no score)", "Settings"

Shards = Annotated[
    list[str],
    typer.Argument(
        metavar="SHARDS...",
        help="Paths, globs, brace patterns, folders or URLs of .tar or .tar.gz shards.",
        show_default=False,
    ),
]
OutFolder = Annotated[str, typer.Argument(metavar="OUT", help="A result folder.", show_default=False)]
OutOption = Annotated[
    str,
    typer.Option(
        "--out",
        "-o",
        metavar="OUT",
        help="Result folder, local or a URL such as s3://bucket/clean.",
        show_default=False,
    ),
]
Encoder = Annotated[
    list[str] | None,
    typer.Option(
        "--encoder", metavar="detect=MODEL", rich_help_panel=INPUT, show_default=False,
        help="CLIP trained on this dump: enc.pt of `pretrain`, RN50:/models/cc3m.pt, ViT-B-32:TAG or hf-hub:org/name.",
    ),
]  # fmt: skip
ConfigFile = Annotated[
    str | None, typer.Option("--config", metavar="FILE", help="YAML file with settings.", rich_help_panel=SETTINGS)
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="a.b=c",
        help="One setting, e.g. suspicion.purge_fraction=0.2; may be repeated.",
        rich_help_panel=SETTINGS,
    ),
]
Captions = Annotated[
    str | None, typer.Option(metavar="txt|json:FIELD", help="Where captions are.", rich_help_panel=INPUT)
]
Fraction = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Flag this fraction of highest suspicion (default 0.05).", rich_help_panel=VERDICT),
]
MinScore = Annotated[
    float | None, typer.Option("--min-score", help="Flag scores of at least this instead.", rich_help_panel=VERDICT)
]
MinZ = Annotated[
    float | None,
    typer.Option("--min-z", help="Flag robust z-scores of at least this instead.", rich_help_panel=VERDICT),
]
By = Annotated[
    str | None,
    typer.Option("--by", metavar="SCORE", help="Score column to flag by (default suspicion).", rich_help_panel=VERDICT),
]
OnError = Annotated[
    list[str] | None,
    typer.Option(
        "--on-error", metavar="[REASON=]drop|keep", rich_help_panel=VERDICT,
        help="Samples with an error go to errored/ (drop) or are judged by their score (keep); for one reason or all.",
    ),
]  # fmt: skip
OnBadShard = Annotated[
    str | None,
    typer.Option(
        "--on-bad-shard",
        metavar="salvage|quarantine|fail",
        help="What becomes of a damaged shard.",
        rich_help_panel=VERDICT,
    ),
]
NoShards = Annotated[bool, typer.Option("--no-shards", help="Write only lists, no shards.", rich_help_panel=VERDICT)]
MaxErrorRate = Annotated[
    float | None,
    typer.Option(
        "--max-error-rate", min=0, max=1, help="Exit with 3 if more samples carry an error.", rich_help_panel=VERDICT
    ),
]
Reference = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="Embeddings of a trusted dump to score against.", rich_help_panel=INPUT),
]
Workers = Annotated[int | None, typer.Option(min=1, help="Encoder and scoring actors.", rich_help_panel=SPREAD)]
GpusPerWorker = Annotated[
    float | None, typer.Option("--gpus-per-worker", min=0, help="GPU share of an actor.", rich_help_panel=SPREAD)
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of an actor.", rich_help_panel=SPREAD)]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", min=1, help="Rows handed to an actor at once.", rich_help_panel=SPREAD)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@contextlib.contextmanager
def progress_on(console: Console, quiet: bool) -> Iterator[Listener]:
    """Show progress in the way that fits the console."""
    listener = listener_for(console, quiet=quiet)
    with listener if isinstance(listener, RichBars) else contextlib.nullcontext():
        yield listener


def encoder_settings(encoders: list[str] | None) -> dict[str, Any]:
    """Turn ROLE=SPEC texts into settings.

    Raises:
        ConfigError: for a text without a role.
    """
    found = {}
    for text in encoders or []:
        role, equals, spec = text.partition("=")
        if not equals or not spec:
            raise ConfigError(f"--encoder takes ROLE=MODEL, got {text!r}; for example --encoder detect=enc.pt.")
        found[f"encoders.{role}.spec"] = spec
    return found


def verdict_settings(
    fraction: float | None, min_score: float | None, min_z: float | None, by: str | None,
    on_error: list[str] | None, on_bad_shard: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Turn the verdict's flags into settings.

    Raises:
        ConfigError: if two policies are given.
    """
    given = [(n, v) for n, v in (("fraction", fraction), ("score", min_score), ("z", min_z)) if v is not None]
    if len(given) > 1:
        raise ConfigError("--fraction, --min-score and --min-z exclude each other; give one.")
    settings: dict[str, Any] = {}
    if given:
        settings |= {"flag.policy": given[0][0], "flag.value": given[0][1]}
    if by is not None:
        settings["flag.score"] = by
    if on_error:
        policies = [text.rpartition("=") for text in on_error]
        settings["flag.on_error"] = {reason or "all": policy for reason, _, policy in policies}
    if on_bad_shard is not None:
        settings["flag.on_bad_shard"] = on_bad_shard
    return settings


def compose(config: str | None, settings: list[str] | None, flags: dict[str, Any]) -> Any:
    """Load the configuration from file, flags and --set, in rising order of precedence."""
    from tarsift.pipelines.config import load_config

    return load_config(config, settings or (), **{name.replace(".", "__"): v for name, v in flags.items()})


def spread_settings(
    workers: int | None, gpus: float | None, threads: int | None, batch_size: int | None
) -> dict[str, Any]:
    values = {"workers": workers, "gpus_per_worker": gpus, "threads": threads, "batch_size": batch_size}
    return {f"resources.{name}": value for name, value in values.items() if value is not None}


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
    from tarsift.pipelines.session import session

    flags = encoder_settings(encoder) | spread_settings(workers, gpus_per_worker, threads, batch_size)
    settings = compose(config, set_, {**flags, "read.captions": captions})
    with progress_on(Console(stderr=True), quiet) as progress:
        run = recipe.open_run(shards, out, settings, progress=progress)
        with session():
            recipe.embed_step(run)
    figures = run.content["passes"]["embed.detect"]
    say(f"{figures['samples']:,} samples of {figures['shards']} shards embedded in {out}/embeddings/detect", quiet)


def _redo(out: str, steps: list[str], changes: dict[str, Any], settings: list[str] | None, quiet: bool) -> Any:
    """Redo passes of a result folder with some settings changed."""
    import yaml

    from tarsift.pipelines import clean as recipe
    from tarsift.pipelines.session import session

    for text in settings or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set takes name=value, got {text!r}; for example --set flag.value=0.02.")
        changes[name] = yaml.safe_load(value)
    changes = {name: value for name, value in changes.items() if value is not None}
    with progress_on(Console(stderr=True), quiet) as progress:
        run = recipe.reopen_run(out, changes, progress=progress)
        with session():
            for step in steps:
                getattr(recipe, f"{step}_step")(run)
        stale = recipe.stale_passes(run)
    if stale:
        say(
            f"out of date now: {', '.join(stale)}; redo with " + " && ".join(f"tarsift {s} {out}" for s in stale), quiet
        )
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
    console = Console()
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
        )
    else:
        console.print(
            "\nNothing was planted, so there is nothing to measure detection by. The highest-scored samples were "
            "removed as always; that is no finding, and no proof that a corpus is clean."
        )
    console.print(f"{summary.elapsed_s:.0f} s; report: {summary.report}; figures: {out}/summary.json", highlight=False)


def checked(model: Any, values: dict[str, Any]) -> Any:
    """Build a settings model from flags.

    Raises:
        ConfigError: one line that names the flag.
    """
    from pydantic import ValidationError

    try:
        return model(**values)
    except ValidationError as error:
        problems = ("--" + ".".join(map(str, p["loc"])) + f": {p['msg']}, got {p['input']!r}" for p in error.errors())
        raise ConfigError("; ".join(problems)) from None


def say(text: str, quiet: bool) -> None:
    if not quiet:
        Console().print(text, highlight=False, markup=False, soft_wrap=True)


def print_result(result: Any, console: Console) -> None:
    """Say what was done, how fast, and where the results are."""
    counts = result.counts
    table = Table(title=None, show_header=False, box=None, pad_edge=False)
    table.add_row("read", f"{counts['read']:,} samples in {result.elapsed_s:.0f} s")
    table.add_row("kept", f"{counts['kept']:,}   {result.clean_shards}")
    table.add_row("removed", f"{counts['removed']:,}   {result.out}/removed")
    reasons = ", ".join(f"{reason} {n}" for reason, n in counts["errors"].items())
    table.add_row("errored", f"{counts['errored']:,}   {reasons}")
    embed_rate = result.passes.get("embed.detect", {}).get("samples_per_s")
    if embed_rate:
        table.add_row("embedded at", f"{embed_rate:,.0f} samples/s")
    if result.report:
        table.add_row("report", str(result.report))
    console.print(table, highlight=False)


def main() -> None:
    """Run the command line; exit codes are those of `tarsift.operators.errors.EXIT_CODES`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    err = Console(stderr=True)
    try:
        app()
    except TarsiftError as error:
        err.print(f"[bold red]error:[/bold red] {_plain(error)}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        err.print("interrupted; run the same command again to go on", highlight=False)
        sys.exit(EXIT_CODES["interrupted"])


def _plain(error: BaseException) -> str:
    """Make an error's text safe for a terminal: it may quote captions or member names."""
    from rich.markup import escape

    return escape("".join(c if c.isprintable() or c == "\n" else "?" for c in str(error)))


def write_json(value: Any, target: Path | None = None) -> None:
    """Print JSON to stdout, or into a file."""
    text = json.dumps(value, indent=2)
    if target is None:
        sys.stdout.write(text + "\n")
    else:
        target.write_text(text + "\n")


if __name__ == "__main__":
    main()
