"""Small charts as SVG text: no script, no style of their own; colours come from the page by class."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from markupsafe import Markup, escape

# Points by which a straight line is drawn over the whole of a logarithmic axis.
BENDS = 80


@dataclass(frozen=True)
class Histogram:
    """Counts of kept and flagged samples, or of two other groups, over equal bins from `low` to `high`.

    What lies outside is counted in the first and last bin; `beyond` says how many that is above.
    """

    name: str
    low: float
    high: float
    kept: Int[np.ndarray, " bins"]
    flagged: Int[np.ndarray, " bins"]
    beyond: int = 0
    cutoff: float | None = None
    groups: tuple[str, str] = ("kept", "flagged")


def short_number(value: float | int) -> str:
    """Write a number in at most about six characters: `950`, `12.3k`, `3.3M`, `0.042`."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            scale = 1e3 if unit == "k" else limit
            return f"{value / scale:.1f}".removesuffix(".0") + unit
    if size >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def ticks(low: float | int, high: float | int, count: int = 6) -> list[float | int]:
    """Return round numbers between `low` and `high`, about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [0.0 if i == 0 else i * step for i in range(first, last + 1)]


def histogram_svg(chart: Histogram, *, width: int = 640, height: int = 220) -> Markup:
    """Draw kept and flagged samples over each other, counts on a logarithmic scale."""
    left, right, top, bottom = 44, 12, 22, 26
    inner_w, inner_h = width - left - right, height - top - bottom
    bins = len(chart.kept)
    most = max(1, int(max(chart.kept.max(initial=0), chart.flagged.max(initial=0))))
    full = math.log10(most + 1) * 1.04
    span = (chart.high - chart.low) or 1.0

    def x(value: float | int) -> float:
        return left + min(1.0, max(0.0, (value - chart.low) / span)) * inner_w

    def y(count: float | int) -> float:
        return top + inner_h * (1 - math.log10(count + 1) / full)

    kept, flagged = int(chart.kept.sum()), int(chart.flagged.sum())
    summary = (
        f"{chart.name}: {kept:,} {chart.groups[0]} and {flagged:,} {chart.groups[1]} samples from "
        f"{short_number(chart.low)} to {short_number(chart.high)}"
        + (f", cut-off {short_number(chart.cutoff)}" if chart.cutoff is not None else "")
    )
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(summary)}">',
        f"<title>{escape(summary)}</title>",
    ]
    for power in range(int(math.log10(most)) + 1):
        at = y(10.0**power)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_label(left - 6, at + 3.5, short_number(10.0**power), anchor="end"))
    for series, counts in (("kept", chart.kept), ("flagged", chart.flagged)):
        if path := _bars(counts, left, inner_w / bins, top + inner_h, y):
            parts.append(f'<path class="{series}" d="{path}"/>')
    parts.append(f'<line class="base" x1="{left}" x2="{width - right}" y1="{top + inner_h}" y2="{top + inner_h}"/>')
    for value in ticks(chart.low, chart.high, max(3, width // 110)):
        parts.append(_label(x(value), height - 8, short_number(value)))
    if chart.beyond:
        parts.append(_label(width - right, top - 8, f"{chart.beyond:,} beyond ›", anchor="end"))
    if chart.cutoff is not None and chart.low <= chart.cutoff <= chart.high:
        at = x(chart.cutoff)
        anchor, gap = ("end", -5) if at > left + inner_w * 0.6 else ("start", 5)
        parts.append(f'<line class="cut" x1="{at:.1f}" x2="{at:.1f}" y1="{top - 8}" y2="{top + inner_h}"/>')
        label = f"cut-off {short_number(chart.cutoff)}"
        parts.append(_label(at + gap, top, label, anchor=anchor, style="cut-label"))
    parts.append("</svg>")
    return Markup("".join(parts))


def _label(x: float | int, y: float | int, text: str, *, anchor: str = "middle", style: str = "axis") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _bars(
    counts: Int[np.ndarray, " bins"], left: float | int, step: float | int, base: float | int, y: Callable[[int], float]
) -> str:
    gap = min(1.0, step * 0.15)
    return "".join(
        f"M{left + i * step:.1f} {base:.1f}V{y(int(count)):.1f}h{step - gap:.1f}V{base:.1f}z"
        for i, count in enumerate(counts)
        if count
    )


@dataclass(frozen=True)
class Axis:
    """A range of shares, 0 to 1, with the marks on it; they are labelled in per cent. Logarithmic ones start over 0."""

    title: str
    marks: tuple[float, ...]
    logarithmic: bool = False

    def place(self, shares: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Return where on the axis shares are, 0 at its first mark and 1 at its last; none lies outside."""
        low, high = self.marks[0], self.marks[-1]
        if self.logarithmic:
            at = np.log(np.maximum(shares, low) / low) / math.log(high / low)
        else:
            at = (shares - low) / (high - low)
        return np.clip(at, 0, 1)


@dataclass(frozen=True)
class Line:
    """A curve of a chart. `style` is its class in the page; as `steps` it holds y from the x before up to its own."""

    name: str
    style: str
    x: Float[np.ndarray, " n"]
    y: Float[np.ndarray, " n"]
    steps: bool = False


def lines_svg(
    lines: Sequence[Line],
    *,
    x: Axis,
    y: Axis,
    summary: str,
    marker: tuple[float, float, str] | None = None,
    width: int = 344,
    height: int = 262,
) -> Markup:
    """Draw curves over each other, the first one on top.

    Args:
        lines: with a rising x.
        x: the axis below, titled there.
        y: the axis at the left, titled above.
        summary: what is drawn, for those who cannot see it.
        marker: a point and what it is.
    """
    left, right, top, bottom = 34, 14, 26, 40
    inner_w, inner_h = width - left - right, height - top - bottom
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(summary)}">',
        f"<title>{escape(summary)}</title>",
    ]
    for mark, at in zip(y.marks, top + inner_h * (1 - y.place(np.array(y.marks))), strict=True):
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_label(left - 6, at + 3.5, f"{100 * mark:g}", anchor="end"))
    for mark, at in zip(x.marks, left + inner_w * x.place(np.array(x.marks)), strict=True):
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{top + inner_h}"/>')
        parts.append(_label(at, top + inner_h + 15, f"{100 * mark:g}"))
    parts.append(f'<line class="base" x1="{left}" x2="{width - right}" y1="{top + inner_h}" y2="{top + inner_h}"/>')
    parts.append(_label(0, 11, y.title, anchor="start"))
    parts.append(_label(left + inner_w / 2, height - 5, x.title))
    for line in reversed(lines):
        across, up = _traced(line, x)
        path = _path(left + inner_w * x.place(across), top + inner_h * (1 - y.place(up)))
        parts.append(f'<path class="line {line.style}" d="{path}"><title>{escape(line.name)}</title></path>')
    if marker:
        at = left + inner_w * float(x.place(np.array(marker[0])))
        over = top + inner_h * (1 - float(y.place(np.array(marker[1]))))
        diamond = f"M{at:.1f} {over - 5.5:.1f}l5.5 5.5l-5.5 5.5l-5.5 -5.5z"
        parts.append(f'<path class="marker" d="{diamond}"><title>{escape(marker[2])}</title></path>')
    parts.append("</svg>")
    return Markup("".join(parts))


def _traced(line: Line, axis: Axis) -> tuple[np.ndarray, np.ndarray]:
    """Return the points of a line on an axis: both corners of a step, and more where a logarithm bends a long piece.

    A line without steps that goes on beyond the axis is cut at its ends.
    """
    if line.steps:
        return np.append(0.0, np.repeat(line.x, 2)[:-1]), np.repeat(line.y, 2)
    low, high = axis.marks[0], axis.marks[-1]
    more = np.geomspace(low, high, BENDS) if axis.logarithmic else np.array([low, high])
    after = np.minimum(np.searchsorted(line.x, more), len(line.x) - 1)
    long = np.diff(axis.place(line.x), prepend=0)[after] > 1 / BENDS
    end = (more == low) | (more == high)
    more = more[(long | end) & (line.x[0] < more) & (more < line.x[after])]
    across = np.append(line.x, more)
    order = np.argsort(across, kind="stable")
    across, up = across[order], np.append(line.y, np.interp(more, line.x, line.y))[order]
    seen = (across >= low) & (across <= high)
    return across[seen], up[seen]


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """Write points to a tenth of a pixel, leaving out those that fall on the one before."""
    points = np.round(np.stack([x, y], axis=1), 1)
    points = points[np.append(True, np.any(np.diff(points, axis=0), axis=1))]
    return "M" + " ".join(f"{across:g} {up:g}" for across, up in points.tolist())


def share_svg(share: float, *, width: int = 72, height: int = 8) -> Markup:
    """Draw a share (0 to 1) as a filled bar; the number itself stands beside it in the page."""
    share = min(1.0, max(0.0, share))
    return Markup(
        f'<svg class="share" viewBox="0 0 {width} {height}" width="{width}" height="{height}" aria-hidden="true">'
        f'<rect class="track" width="{width}" height="{height}" rx="3"/>'
        f'<rect class="fill" width="{share * width:.1f}" height="{height}" rx="3"/></svg>'
    )


def columns_svg(shares: Float[np.ndarray, " n"], *, expected: float, width: int = 640, height: int = 70) -> Markup:
    """Draw one thin column per shard, in order: its share of flagged samples, and the share of the whole dump.

    More shards than pixels are drawn as the highest share among neighbours.
    """
    most = width // 3
    if len(shares) > most:
        shares = np.array([part.max() for part in np.array_split(shares, most)])
    high = max(float(shares.max(initial=0)), expected, 1e-9) * 1.05
    step = min(width / max(1, len(shares)), 24.0)
    drawn = step * len(shares)
    summary = (
        f"share of flagged samples per shard, at most {shares.max(initial=0):.1%}; all shards together {expected:.1%}"
    )
    path = "".join(
        f"M{i * step:.1f} {height}V{height * (1 - share / high):.1f}h{step * 0.8:.1f}V{height}z"
        for i, share in enumerate(shares)
        if share > 0
    )
    at = height * (1 - expected / high)
    return Markup(
        f'<svg class="shards" viewBox="0 0 {drawn:.0f} {height}" width="{drawn:.0f}" height="{height}" role="img" '
        f'aria-label="{escape(summary)}"><title>{escape(summary)}</title><path class="flagged" d="{path}"/>'
        f'<line class="cut" x1="0" x2="{drawn:.0f}" y1="{at:.1f}" y2="{at:.1f}"/></svg>'
    )
