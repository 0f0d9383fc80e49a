"""Passes of a result folder done again with other settings: nothing is encoded a second time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tarsift.pipelines import clean as recipe
from tarsift.pipelines.clean import CleanResult
from tarsift.pipelines.progress import Listener, silent
from tarsift.pipelines.run import Run, reopen_run

Redone = Literal["score", "sift", "flag", "write", "report"]


def redo(
    out: str, *passes: Redone, changes: Mapping[str, Any] | None = None, progress: Listener = silent
) -> CleanResult:
    """Do passes of a result folder again, with some settings changed; as the commands of their names do.

    Args:
        out: result folder of `clean`.
        passes: in their order. Later ones that are left out are out of date then: `clean/` is that of the earlier
            verdicts until `write` is done again.
        changes: dotted names of settings to values; they must belong to the last of the passes (docs/settings.md).
        progress: told what is done; silent by default.

    Returns:
        What stands in `out` now; `report` is None where it was not written.

    Raises:
        UsageError: if `out` is no result folder, or a pass before is not complete.
        ConfigError: for a setting that is unknown, out of range, or belongs to another pass.
        BusyError: another run works on `out`.

    Example:
        >>> redo("out", "flag", changes={"flag.value": 0.02}).counts["removed"]  # doctest: +SKIP
        20
    """
    start = time.monotonic()
    run = redo_passes(out, passes, changes or {}, progress)
    report = f"{run.out}/report.html" if "report" in passes else None
    return recipe.result_of(run, start, report)


def redo_passes(out: str, passes: Sequence[str], changes: Mapping[str, Any], progress: Listener) -> Run:
    """Do as `redo`, and return the run, which knows what is out of date."""
    run = reopen_run(out, changes, redo=passes[-1], progress=progress)
    with run.working():
        for name in passes:
            getattr(recipe, f"{name}_step")(run)
    return run
