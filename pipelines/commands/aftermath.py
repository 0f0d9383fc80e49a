"""What follows when a trained model misbehaves: trace, repair."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tarsift.pipelines.config import parse_settings, put_setting
from tarsift.pipelines.options import AFTERMATH, AsJson, OutFolder, Quiet, Set, checked
from tarsift.pipelines.printing import print_repair, print_trace, sum_up
from tarsift.pipelines.progress import shown_progress

commands = typer.Typer()
Model = Annotated[
    str,
    typer.Option(
        "--encoder", metavar="MODEL", show_default=False,
        help="The CLIP that misbehaves: enc.pt of `pretrain`, RN50:/models/cc3m.pt or ViT-B-32:TAG.",
    ),
]  # fmt: skip


@commands.command(rich_help_panel=AFTERMATH)
def trace(
    out: OutFolder,
    encoder: Model,
    query: Annotated[
        list[str],
        typer.Option(
            metavar="PICTURE", help="Of which it says so and should not; may be repeated.", show_default=False
        ),
    ],
    says: Annotated[str, typer.Option(metavar="CAPTION", help="What it says of it.", show_default=False)],
    name: Annotated[
        str | None, typer.Option(help="Of the folder in OUT/trace.", show_default="a digest of what is asked")
    ] = None,
    set_: Set = None,
    quiet: Quiet = False,
    json_: AsJson = False,
) -> None:
    """Find the training samples behind what a model says of a picture, by Delta-Influence.

    OUT is the result folder of the dump that the model was trained on. Takes the extra `influence`.
    """
    from tarsift.operators.trace_settings import TracingConfig
    from tarsift.pipelines.trace import trace as recipe

    config = checked(TracingConfig, _nested(set_))
    with shown_progress(quiet or json_) as progress:
        result = recipe(out, encoder=encoder, queries=query, says=says, name=name, config=config, progress=progress)
    sum_up(result.to_json(), lambda console: print_trace(result, console), as_json=json_, quiet=quiet)


@commands.command(rich_help_panel=AFTERMATH)
def repair(
    out: OutFolder,
    encoder: Model,
    to: Annotated[str, typer.Option(metavar="FILE", help="Encoder file to write.", show_default=False)],
    method: Annotated[
        str, typer.Option(metavar="NAME", help="eu (train anew), cf (train on), ssd, scrub, badt or ibau.")
    ] = "eu",
    trace: Annotated[
        str | None, typer.Option(metavar="NAME", help="A trace.", show_default="the only one there is")
    ] = None,
    forget: Annotated[
        str | None,
        typer.Option(
            metavar="traced|flagged", help="What is to be forgotten.", show_default="traced, if there is a trace"
        ),
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option("--held-out", metavar="SHARDS", help="Pairs it never saw, to measure what it still knows."),
    ] = None,
    set_: Set = None,
    quiet: Quiet = False,
    json_: AsJson = False,
) -> None:
    """Make an encoder that has forgotten what was traced or flagged, and compare what it says before and after.

    eu and cf train on the shards of OUT without those samples; interrupted, the same command goes on.
    """
    from tarsift.operators.repair_settings import RepairConfig
    from tarsift.pipelines.repair import repair as recipe

    config = checked(RepairConfig, _nested(set_))
    with shown_progress(quiet or json_) as progress:
        result = recipe(
            out, encoder=encoder, to=to, method=method, trace=trace, forget=forget, held_out=held_out, config=config,
            progress=progress,
        )  # fmt: skip
    sum_up(result.to_json(), lambda console: print_repair(result, console), as_json=json_, quiet=quiet)


def _nested(settings: list[str] | None) -> dict[str, Any]:
    """Turn a.b=c texts into nested values."""
    found: dict[str, Any] = {}
    for setting, value in parse_settings(settings or ()).items():
        put_setting(found, setting, value)
    return found
