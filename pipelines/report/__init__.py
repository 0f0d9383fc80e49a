"""Write the report: one HTML file that says what a run found, shows it, and works offline."""

from __future__ import annotations

from tarsift.operators import storage
from tarsift.pipelines.progress import Event, Listener, silent
from tarsift.pipelines.report.data import FOLDS, ReportConfig
from tarsift.pipelines.report.gallery import gathered
from tarsift.pipelines.report.page import page
from tarsift.pipelines.report.render import render

__all__ = ["ReportConfig", "write_report"]


def write_report(out: str, *, config: ReportConfig | None = None, progress: Listener | None = None) -> str:
    """Write `out`/report.html from the tables of a run and return its URL.

    Reads scores, flags and embeddings shard by shard, in memory that does not grow with the dump, and
    a few hundred pictures by byte range. Inputs that are gone or changed leave placeholders.

    Args:
        out: result folder, local or remote.
        config: how much is shown.
        progress: listener for events.

    Raises:
        UsageError: if `out` is no result folder, or was not scored and flagged yet.
    """
    config, progress = config or ReportConfig(), progress or silent
    run, evidence, nearest, thumbs = gathered(out, config=config, progress=progress)
    html = render("report.html", page(out, run, evidence, nearest, thumbs, config))
    url = storage.join(out, "report.html")
    storage.put_bytes(url, html)
    tables = max(1, FOLDS * len(run.get("inputs") or ()))
    progress(Event("report", tables, tables, evidence.overview["rows"], unit="tables", finished=True))
    return url
