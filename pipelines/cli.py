"""The command line: one program of all commands, and what it exits with."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from tarsift.operators.errors import EXIT_CODES, Interrupted, TarsiftError
from tarsift.pipelines import json_log
from tarsift.pipelines.commands import aftermath, nightly, passes, workshop
from tarsift.pipelines.commands import main as main_commands
from tarsift.pipelines.printing import Screen, plain
from tarsift.pipelines.stopping import stop_on_signals
from tarsift.pipelines.supervisor import supervised


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
for module in (main_commands, nightly, passes, aftermath, workshop):
    app.add_typer(module.commands)


def main() -> None:
    """Run the command line; exit codes are those of `tarsift.operators.errors.EXIT_CODES`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    stop_on_signals()
    if json_log.asked_for():
        _main_with_json_log()
    err = Screen(stderr=True)
    try:
        json_log.refuse_unknown_format()
        app()
    except TarsiftError as error:
        err.print(f"[bold red]error:[/bold red] {plain(error)}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except Exception:  # not foreseen, so told in full, as Python would; drivers put whole URLs into their errors
        err.print(plain(traceback.format_exc()), highlight=False, soft_wrap=True)
        sys.exit(EXIT_CODES["failed"])


def _main_with_json_log() -> NoReturn:
    """Do the same, with every error as a line of JSON, those of typer too."""
    json_log.take_warnings()
    try:
        code = app(standalone_mode=False)  # the code of `typer.Exit`, or None
    except TarsiftError as error:
        json_log.write_error(str(error), error.exit_code, type=type(error).__name__)
        sys.exit(error.exit_code)
    except Exception as error:
        if hasattr(error, "format_message"):  # of typer: wrong options
            code = getattr(error, "exit_code", EXIT_CODES["usage"])
            json_log.write_error(error.format_message(), code, type=type(error).__name__)  # pyright: ignore
            sys.exit(code)
        told = {"type": type(error).__name__, "traceback": traceback.format_exc()}
        json_log.write_error(str(error), EXIT_CODES["failed"], **told)
        sys.exit(EXIT_CODES["failed"])
    sys.exit(code if isinstance(code, int) else EXIT_CODES["done"])


def program() -> None:
    """Run the command line in a child process that is watched over; this is what the command `tarsift` calls."""
    sys.exit(supervised(main))


if __name__ == "__main__":
    program()
