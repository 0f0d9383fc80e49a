"""Write the page of an ingestion: what each night brought, and whether it was like the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from tarsift.clip_detect.drift import Spread
from tarsift.operators import storage
from tarsift.pipelines.report.render import render

PAGE = "nights.html"
NAME = "report.html"
SHOWN = 60  # nights in the charts, the latest
LEVEL = 0.99  # the tail whose share is drawn; 0.01 where low values are the suspicious ones


def write_nights_page(state: str, records: Sequence[Mapping[str, Any]], low_is_bad: Sequence[str]) -> str:
    """Write STATE/report.html from the records of all nights, and return where it is.

    Args:
        low_is_bad: values of which the low ones are suspicious.
    """
    url = storage.join(state, NAME)
    storage.put_bytes(url, render(PAGE, page(state, records, low_is_bad)))
    return url


def page(state: str, records: Sequence[Mapping[str, Any]], low_is_bad: Sequence[str]) -> dict[str, Any]:
    """Make everything that the template shows."""
    shown = list(records)[-SHOWN:]
    names = list(dict.fromkeys(name for record in shown for name in record["spreads"]))
    rows = [
        {
            "night": record["night"],
            "ended": record["ended"][:16].replace("T", " "),
            "shards": len(record["shards"]),
            "counts": record["counts"],
            "findings": len(record["findings"]),
            "drift": len(record["drift"]),
            "changed": len(record["changed"]),
            "seconds": sum(record["seconds"].values()),
            "report": f"nights/{record['night']:04d}/report.html",
        }
        for record in reversed(records)
    ]
    told = [record for record in reversed(records) if record["findings"] or record["drift"]]
    return {
        "state": storage.without_secrets(state),
        "out": storage.without_secrets(state),
        "last": records[-1] if records else None,
        "rows": rows,
        "told": told[:SHOWN],
        "charts": [chart for name in names if (chart := _chart(name, shown, upper=name not in low_is_bad))],
        "samples": sum(record["counts"]["read"] for record in records),
    }


def _chart(name: str, records: Sequence[Mapping[str, Any]], *, upper: bool) -> dict[str, Any] | None:
    """Draw the share of each night beyond the level that one sample in a hundred is beyond in the median night."""
    nights = [(record, Spread.from_json(record["spreads"][name])) for record in records if name in record["spreads"]]
    if len(nights) < 2:
        return None
    level = LEVEL if upper else 1 - LEVEL
    beyond = float(np.median([spread.at(level) for _, spread in nights]))
    shares = [spread.share_above(beyond) if upper else 1 - spread.share_above(beyond) for _, spread in nights]
    alarms = [any(text.startswith(f"{name}:") for text in record["drift"]) for record, _ in nights]
    numbers = [int(record["night"]) for record, _ in nights]
    title = f"{name}: samples {'above' if upper else 'below'} {beyond:.3g}, %"
    return {"name": title, "svg": bars_svg(title, numbers, [100 * share for share in shares], alarms)}


def bars_svg(
    title: str, numbers: Sequence[int], values: Sequence[float], marked: Sequence[bool], *, width: int = 344
) -> Markup:
    """Draw a bar for each night from 0 up; those that are marked as flagged samples are.

    Args:
        numbers: of the nights; values: height of each bar.
    """
    left, right, top, bottom, height = 34, 8, 10, 24, 150
    inner_w, inner_h = width - left - right, height - top - bottom
    most = max(*values, 1e-9) * 1.1
    step = inner_w / len(values)
    summary = f"{title}; " + ", ".join(f"night {n} {v:.2f}" for n, v in zip(numbers, values, strict=True))
    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(summary)}">']
    for part in (0.0, 0.5, 1.0):
        at = top + inner_h * (1 - part / 1.1)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        label = f"{most / 1.1 * part:.2g}"
        parts.append(f'<text class="axis" x="{left - 5}" y="{at + 3.5:.1f}" text-anchor="end">{label}</text>')
    every = max(1, len(values) // 10)
    for i, (number, value, flagged) in enumerate(zip(numbers, values, marked, strict=True)):
        x, tall = left + i * step + step * 0.1, inner_h * value / most
        kind = "flagged" if flagged else "kept"
        parts.append(
            f'<rect class="{kind}" x="{x:.1f}" y="{top + inner_h - tall:.1f}" width="{step * 0.8:.1f}" '
            f'height="{tall:.1f}"><title>night {number}: {value:.2f}</title></rect>'
        )
        if i % every == 0:
            middle = x + step * 0.4
            parts.append(f'<text class="axis" x="{middle:.1f}" y="{height - 8}" text-anchor="middle">{number}</text>')
    return Markup("".join([*parts, "</svg>"]))
