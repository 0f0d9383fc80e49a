"""The options of the command line, and how they become settings."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from pydantic import ValidationError

from tarsift.operators.errors import ConfigError

MAIN, PASSES, WORKSHOP = "Main job", "Its passes, one by one", "Workshop"
AFTERMATH = "When a trained model misbehaves"
INPUT, VERDICT, SETTINGS = "Input", "Verdict", "Settings"
SIFT, SPREAD = "Sifting", "How the work is spread (changes no score)"

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
        "--encoder", metavar="ROLE=MODEL", rich_help_panel=INPUT, show_default=False,
        help="detect=MODEL, a CLIP trained on this dump, witness=MODEL, one that never saw it, or both; features=MODEL "
        "for sifters. MODEL: enc.pt of `pretrain`, RN50:/models/cc3m.pt, ViT-B-32:TAG, hf-hub:org/name or "
        "embeddings:FOLDER, made elsewhere by clip-retrieval.",
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
Sifter = Annotated[
    str | None,
    typer.Option(
        "--sifter", metavar="NAME", help="How classes are sifted (default diluted-loss).", rich_help_panel=SIFT
    ),
]
Route = Annotated[
    str | None,
    typer.Option(
        "--route",
        metavar="captions|cls|FILE",
        rich_help_panel=SIFT,
        help="Classes: clusters of captions, numbers in .cls, or a file that names one in each line.",
    ),
]
Budget = Annotated[
    int | None,
    typer.Option(
        "--budget", min=1, help="Problems at most, spent on the most suspicious classes.", rich_help_panel=SIFT
    ),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Encoders at once, and scorers on GPUs.", rich_help_panel=SPREAD)
]
GpusPerWorker = Annotated[
    float | None, typer.Option("--gpus-per-worker", min=0, help="GPU share of an encoder.", rich_help_panel=SPREAD)
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of a worker.", rich_help_panel=SPREAD)]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", min=1, help="Rows handed to a worker at once.", rich_help_panel=SPREAD)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


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


def sift_settings(sifter: str | None, route: str | None, budget: int | None) -> dict[str, Any]:
    """Turn the flags of sifting into settings."""
    values = {"sift.method.sifter": sifter, "sift.route": route, "sift.budget": budget}
    return {name: value for name, value in values.items() if value is not None}


def spread_settings(
    workers: int | None, gpus: float | None, threads: int | None, batch_size: int | None
) -> dict[str, Any]:
    values = {"workers": workers, "gpus_per_worker": gpus, "threads": threads, "batch_size": batch_size}
    return {f"resources.{name}": value for name, value in values.items() if value is not None}


def checked(model: Any, values: dict[str, Any]) -> Any:
    """Build a settings model from flags.

    Raises:
        ConfigError: one line that names the flag.
    """
    try:
        return model(**values)
    except ValidationError as error:
        problems = ("--" + ".".join(map(str, p["loc"])) + f": {p['msg']}, got {p['input']!r}" for p in error.errors())
        raise ConfigError("; ".join(problems)) from None


def compose_content(config: str | None, settings: list[str] | None, flags: dict[str, Any]) -> dict[str, Any]:
    """Compose a plain mapping from file, flags and --set, in rising order of precedence."""
    from tarsift.pipelines.config import load_content

    return load_content(config, settings or (), **{name.replace(".", "__"): v for name, v in flags.items()})


def compose(config: str | None, settings: list[str] | None, flags: dict[str, Any]) -> Any:
    """Load the configuration from file, flags and --set, in rising order of precedence."""
    from tarsift.pipelines.config import load_config

    return load_config(config, settings or (), **{name.replace(".", "__"): v for name, v in flags.items()})
