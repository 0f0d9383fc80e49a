"""Write the page of an evaluation: curves of the scores against every attack, and their figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tarsift.operators import storage
from tarsift.pipelines.evaluate import FEW, FRACTIONS, Evaluation
from tarsift.pipelines.report.charts import Axis, Line, lines_svg, share_svg
from tarsift.pipelines.report.render import render
from tarsift.pipelines.text import visible

PAGE = "evaluation.html"
LEAD = "suspicion"
OTHERS = 4  # scores drawn beside it: more lines cannot be told apart
NAME_CHARS = 48
TOP = 0.05  # the fraction that `clean` flags by default

FIFTHS = (0, 0.2, 0.4, 0.6, 0.8, 1)
REMOVED = Axis("highest-scored samples removed, %", (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5), True)
FOUND = Axis("poison found, %", FIFTHS)
# Precision of rare poison stays low; the axis ends at the first of these that holds all curves.
PRECISION_TOPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Verdict:
    """What the run flagged, as shares: of all samples, of the clean ones, of the poison; and of poison in it."""

    removed: float
    clean_lost: float
    recall: float
    precision: float


def write_evaluation(evaluation: Evaluation, url: str | None = None) -> str:
    """Write an evaluation as one HTML page that works offline, and return where.

    Args:
        evaluation: what `evaluate` returned.
        url: path or URL of the page; `evaluation.html` in the result folder where None.

    Raises:
        UsageError: if it cannot be written there.
    """
    url = url or storage.join(evaluation.out, PAGE)
    html = render(PAGE, page(evaluation))
    with storage.reachable(url):
        storage.put_bytes(url, html)
    return url


def page(evaluation: Evaluation) -> dict[str, Any]:
    """Make everything that the template shows."""
    names = drawn_scores(evaluation)
    styles = {name: f"line-{i}" for i, name in enumerate(names)}
    attacks = [a for a in evaluation.curves if a is not None]
    only = next((a for a in attacks if evaluation.attacks[a]["poisoned"] == evaluation.poisoned), None)
    panels = [] if only is not None else [_panel(evaluation, attack, styles) for attack in attacks]
    for number, panel in enumerate(panels, 1):
        panel["anchor"] = f"attack-{number}"
    return {
        "evaluation": evaluation,
        "out": storage.without_secrets(evaluation.out),
        "truth": storage.without_secrets(evaluation.truth),
        "lead": names[0] if names else "",
        "top": TOP,
        "top_figures": evaluation.scores[names[0]] if names else {},
        "overview": _panel(evaluation, None, styles) | {"attack": only},
        "panels": panels,
        "left_out": len(evaluation.attacks) - len(attacks),
        "fractions": FRACTIONS,
        "few": FEW,
    }


def drawn_scores(evaluation: Evaluation) -> list[str]:
    """Choose the scores whose curves are drawn, the same for every attack: the default and the best few others.

    The others are the best two over all poison, then the best of each attack, by average precision;
    of scores that differ in their k alone one, as their curves lie over each other.
    """
    ranked = [row["score"] for row in evaluation.rows()]
    chosen = [LEAD] if LEAD in ranked else ranked[:1]

    def take(names: Sequence[str], most: int) -> None:
        for name in names:
            if len(chosen) < most and _family(name) not in map(_family, chosen):
                chosen.append(name)

    take(ranked, 3)
    for attack in sorted(evaluation.attacks, key=lambda name: -evaluation.attacks[name]["poisoned"]):
        take([row["score"] for row in evaluation.rows(attack)[:1]], 1 + OTHERS)
    take(ranked, 1 + OTHERS)
    return chosen


def _family(score: str) -> str:
    """Return a score's name without its number of neighbours."""
    family, _, k = score.rpartition("_k")
    return family if k.isdigit() else score


def _panel(evaluation: Evaluation, attack: str | None, styles: dict[str, str]) -> dict[str, Any]:
    """Make what is shown of one attack, or of all poison where `attack` is None."""
    mine: dict[str, Any] = evaluation.attacks[attack] if attack is not None else {}
    poisoned = mine["poisoned"] if mine else evaluation.poisoned
    most = max((figures["scored"] for figures in evaluation.scores.values()), default=0)
    rows = [
        row | {"style": styles.get(row["score"], ""), "partial": row["scored"] / most if row["scored"] < most else None}
        for row in evaluation.rows(attack)
    ]
    verdict = _verdict(evaluation, poisoned, mine.get("flagged_recall"))
    return {
        "attack": attack,
        "poisoned": poisoned,
        "few": poisoned < FEW,
        "unscored": mine.get("unscored", evaluation.unscored_poisoned),
        "verdict": verdict,
        "bar": share_svg(verdict.recall) if verdict else "",
        "key": sorted((row["style"], row["score"]) for row in rows if row["style"]),
        "drawn": [row for row in rows if row["style"]],
        "rest": [row for row in rows if not row["style"]],
        "lead": next((row for row in rows if row["style"] == "line-0"), None),
        "best": rows[0] if rows else None,
        "charts": _charts(evaluation, attack, styles, verdict, poisoned) if rows else [],
    }


def _verdict(evaluation: Evaluation, poisoned: int, recall: float | None) -> Verdict | None:
    if not evaluation.flagged:
        return None
    whole = evaluation.flagged
    recall = whole["recall"] if recall is None else recall
    caught = recall * poisoned
    precision = caught / max(1.0, caught + whole["clean_lost"])
    return Verdict(whole["flagged"] / evaluation.samples, whole["clean_lost_share"], recall, precision)


def _charts(
    evaluation: Evaluation, attack: str | None, styles: dict[str, str], verdict: Verdict | None, poisoned: int
) -> list[dict[str, Any]]:
    clean = evaluation.samples - evaluation.poisoned
    kind = f"attack {visible(attack, NAME_CHARS)}" if attack is not None else "all poison"
    mine = evaluation.attacks[attack]["scores"] if attack is not None else evaluation.scores
    curves = {name: evaluation.curves[attack][name] for name in styles if name in mine}
    chance = np.linspace(0, 1, 2)
    base = poisoned / max(1, poisoned + clean)

    def drawn(which: str, figure: str, *, steps: bool = False) -> list[Line]:
        lines = []
        for name, three in curves.items():
            curve = getattr(three, which)
            told = visible(name, NAME_CHARS) + (f": {figure} {mine[name][figure]:.3f}" if figure else "")
            lines.append(Line(told, styles[name], curve.x, curve.y, steps))
        level = np.full(2, base) if steps else chance
        return [*lines, Line("chance", "random", chance, level)]

    def told(what: str, figure: str) -> str:
        values = ", ".join(f"{visible(name, NAME_CHARS)} {mine[name][figure]:.3f}" for name in curves)
        return f"{what} for {kind}; {figure.replace('_', ' ')}: {values}"

    def marked(x: float, y: float) -> tuple[float, float, str]:
        return x, y, "what this run flagged"

    precision = drawn("precision_recall", "average_precision", steps=True)
    highest = max([float(line.y.max()) for line in precision] + ([verdict.precision] if verdict else []))
    top = next(t for t in PRECISION_TOPS if t >= highest)
    pure = Axis("poison in what is removed (precision), %", tuple(top * share for share in FIFTHS))
    return [
        {
            "name": "ROC",
            "svg": lines_svg(
                drawn("roc", "auroc"),
                x=_rates(clean),
                y=FOUND,
                summary=told("ROC curves", "auroc"),
                marker=marked(verdict.clean_lost, verdict.recall) if verdict else None,
            ),
        },
        {
            "name": "Precision over recall",
            "svg": lines_svg(
                precision,
                x=FOUND,
                y=pure,
                summary=told("Precision over recall", "average_precision"),
                marker=marked(verdict.recall, verdict.precision) if verdict else None,
            ),
        },
        {
            "name": "Recall by removed fraction",
            "svg": lines_svg(
                drawn("removal", ""),
                x=REMOVED,
                y=FOUND,
                summary=told("Recall over the removed fraction", f"recall_at_{TOP:g}"),
                marker=marked(verdict.removed, verdict.recall) if verdict else None,
            ),
        },
    ]


def _rates(clean: int) -> Axis:
    """Return the axis of false-positive rates: down to a few clean samples, two to five decades."""
    decades = min(5, max(2, int(np.log10(max(1, clean)))))
    return Axis("clean samples removed (false-positive rate), %", tuple(10.0**-i for i in range(decades, -1, -1)), True)
