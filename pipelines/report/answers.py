"""The four questions at the top of the report, answered in a few sentences each.

An answer never says that a dump is poisoned or clean: it says where to look and what cannot be seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from markupsafe import Markup

from tarsift.operators.sides import DETECT
from tarsift.pipelines.report.charts import short_number
from tarsift.pipelines.report.data import Evidence
from tarsift.pipelines.report.groups import KINDS, Group, Kind
from tarsift.pipelines.text import count, percent, visible

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# A group is named at the top if at least this many samples, and this share of all that have what it
# shares, are flagged.
TELLING_SAMPLES, TELLING_SHARE = 10, 0.5

HONESTY = (
    "That a fraction was flagged is no finding: the highest-scored share of any dump, clean or not, can be flagged.",
    "How high the scores are says nothing about whether the dump is poisoned: those of clean dumps are as high.",
    "An encoder that never learned an attack shows nothing of it: a quiet page does not mean a clean dump.",
)


@dataclass(frozen=True)
class Answer:
    """One box: `status` is `look`, `ok` or `quiet`; `lines` are escaped already."""

    question: str
    status: Literal["look", "ok", "quiet"]
    word: str
    lines: list[str]
    link: str


def answers(
    run: dict[str, Any], evidence: Evidence, counts: dict[str, int], missing_pictures: dict[str, int]
) -> list[Answer]:
    """Answer the four questions."""
    telling: dict[Kind, Group | None] = {kind: _telling(evidence.groups[kind]) for kind in KINDS}
    return [
        _campaign(telling, evidence),
        _threshold(run.get("threshold") or {}, telling, evidence),
        _breakage(run, evidence, counts, missing_pictures),
        _sight(run),
    ]


def letter_of(groups: dict[Kind, list[Group]], group: Group) -> str | None:
    """Return the letter of a look-alike group; None for other kinds."""
    return LETTERS[groups["look"].index(group)] if group.kind == "look" else None


def group_name(groups: dict[Kind, list[Group]], group: Group) -> str:
    """Name a group in a sentence."""
    letter = letter_of(groups, group)
    return f"group {letter}" if letter else f"“{visible(group.title, 60)}”"


def shards_of(evidence: Evidence, group: Group) -> int:
    """Count the shards that a group's members come from."""
    return len({evidence.rows.identities[i][0] for i in group.members})


def policy(threshold: dict[str, Any], score: str) -> str:
    """Say in words which samples are flagged."""
    value = threshold.get("value")
    if value is None:
        return "no threshold is on record"
    words = {
        "fraction": f"the highest {percent(value)} by {score}",
        "score": f"{score} of at least {short_number(value)}",
        "z": f"{score} at least {short_number(value)} robust standard deviations above the median",
    }
    return words.get(threshold.get("policy", ""), score)


def _telling(groups: list[Group]) -> Group | None:
    return next((g for g in groups if _tells(g)), None)


def _tells(group: Group) -> bool:
    return group.flagged >= TELLING_SAMPLES and group.share >= TELLING_SHARE


def _campaign(telling: dict[Kind, Group | None], evidence: Evidence) -> Answer:
    question, link = "Is this a campaign?", "#shared"
    lines = []
    if (group := telling["look"]) and (look := group.look):
        agree = ""
        if look.agreement is not None and look.around is not None:
            agree = f" Cosine between their captions: {look.agreement:.2f}, around them {look.around:.2f}."
        lines.append(
            f"Group {letter_of(evidence.groups, group)}: {count(len(group.members), 'flagged sample')} look alike, "
            f"{look.tightness:.1f} times closer to each other than to the kept samples around, in "
            f"{count(shards_of(evidence, group), 'shard')}. "
            f"Of the {count(group.total, 'sample')} of the dump most like them {group.flagged:,} are flagged.{agree}"
        )
    if group := telling["word"] or telling["caption"]:
        has = "whose caption has this word" if group.kind == "word" else "with this caption"
        lines.append(
            f"“{visible(group.title, 60)}”: {group.flagged:,} of the {count(group.total, 'sample')} {has} are flagged "
            f"({percent(group.share)}; of all samples {percent(evidence.flagged_share)}), in "
            f"{count(shards_of(evidence, group), 'shard')}."
        )
    others = [g for g in evidence.groups["look"] if g is not telling["look"] and _tells(g)]
    if others:
        names = ", ".join(letter_of(evidence.groups, g) or "" for g in others)
        lines.append(f"Less strong: {'group' if len(others) == 1 else 'groups'} {names}.")
    if lines:
        lines.append("Look at the pictures: one mark on all of them under captions that do not fit is a campaign; ")
        lines[-1] += "a subject that is merely rare is not."
        return Answer(question, "look", "Something stands out", lines, link)
    if not evidence.removed:
        return Answer(question, "quiet", "Nothing was flagged", ["So there is nothing to compare."], link)
    lines = ["No look, word or caption is shared by many flagged samples and few others. "]
    lines[0] += "Chance finds look like that, and so does an attack that the encoder has not learned."
    return Answer(question, "quiet", "Nothing stands out", lines, link)


def _threshold(threshold: dict[str, Any], telling: dict[Kind, Group | None], evidence: Evidence) -> Answer:
    question, link = "Is the threshold sane?", "#scores"
    cutoff = threshold.get("cutoff")
    reached = f": {short_number(cutoff)} and above" if evidence.removed and cutoff is not None else ""
    lines: list[str] = [f"Flagged is {policy(threshold, evidence.score)}{reached}."]
    ties = int(threshold.get("ties_within_one_ulp") or 0)
    if ties > max(10, 0.01 * evidence.removed):
        lines.append(f"{ties:,} samples lie at the cut-off itself; a hash decides which of them are flagged.")
    group = telling["look"] or telling["word"] or telling["caption"]
    if not evidence.removed:
        return Answer(question, "quiet", "Nothing was flagged", lines, link)
    if group is None:
        lines.append(
            "Nothing stands out that it could be measured by. Less loses fewer clean samples, more covers more."
        )
        return Answer(question, "quiet", "There is no yardstick", lines, link)
    name = group_name(evidence.groups, group)
    like = "samples most like it" if group.look else "samples with it"
    held = f"{name}: of {group.total:,} {like} {group.flagged:,} are flagged"
    if group.share < 0.9 and group.reach > 0.7 * evidence.flagged_share:
        more = Markup(
            "It cuts through {}. Flag more, such as <code>--fraction {:g}</code>, and see if its share rises."
        )
        lines.append(more.format(held, round_up(2 * evidence.flagged_share)))
        return Answer(question, "look", "Perhaps it flags too few", lines, link)
    enough = round_up(group.reach)
    fewer = round(evidence.overview["judged"] * (evidence.flagged_share - enough))
    if fewer > 0:
        less = Markup(
            "19 in 20 flagged samples of {} are within the highest {}: <code>--fraction {:g}</code> would remove them "
            "too, and {} fewer."
        )
        lines.append(less.format(name, percent(group.reach, 2), enough, count(fewer, "sample")))
    else:
        lines.append(f"It covers {held}.")
    return Answer(question, "ok", "It covers what stands out", lines, link)


def round_up(fraction: float | int) -> float:
    """Round a fraction up to two digits, at most 0.99: 0.00966 -> 0.0097."""
    if fraction <= 0:
        return 0.0
    step = 10.0 ** (math.floor(math.log10(fraction)) - 1)
    return min(0.99, round(math.ceil(fraction / step - 1e-9) * step, 12))


def _breakage(
    run: dict[str, Any], evidence: Evidence, counts: dict[str, int], missing_pictures: dict[str, int]
) -> Answer:
    serious, lines = [], []
    damaged = len((run.get("counts") or {}).get("shard_problems") or {})
    if counts["read"] != counts["kept"] + counts["removed"] + counts["errored"]:
        serious.append(
            "Read is not kept + removed + errored: run the last passes again, and report it if that remains."
        )
    if counts["seen"] != counts["read"] or evidence.unread:
        serious.append(
            f"This page covers {count(counts['seen'], 'sample')} of {counts['read']:,}; "
            f"{count(len(evidence.unread), 'shard')} could not be read back."
        )
    if stale := run.get("stale"):
        serious.append(f"Out of date, as an earlier pass was made anew: {', '.join(map(str, stale))}.")
    if damaged:
        serious.append(f"{count(damaged, 'shard')} of {len(run.get('inputs') or ()):,} came damaged.")
    if counts["errored"]:
        share = percent(counts["errored"] / max(1, counts["read"]))
        lines.append(f"{count(counts['errored'], 'sample')} could not be used ({share}).")
    if missing_pictures:
        lines.append(f"{count(sum(missing_pictures.values()), 'picture')} of this page could not be shown.")
    word = "Yes" if serious else ("Single samples only" if counts["errored"] else "No")
    lines = [*serious, *lines] or ["Every sample was read and has its place."]
    return Answer("Did anything break?", "look" if serious else "ok", word, lines, "#errors")


def _sight(run: dict[str, Any]) -> Answer:
    encoders = run.get("encoders") or {}
    sides = run.get("sides") or {}
    regime = (encoders.get(DETECT) or {}).get("regime") or {}
    words: dict[str, tuple[Literal["look", "ok"], str]] = {
        "trained_on_this_dump": ("ok", "What its encoder has learned"),
        "partly": ("look", "What its encoder has learned of a part"),
        "not_trained_on_this_dump": ("look", "Hardly anything"),
    }
    status, word = words.get(regime.get("code", ""), ("look", "That is not known"))
    judges = tuple(sides.get("judges") or ())
    if judges == ("captions",):
        status, word = "look", "Captions that do not fit"
    elif judges == ("density", "captions"):
        word = f"{word}, and captions that do not fit"
    said = [(info.get("regime") or {}).get("sentence") for info in encoders.values()]
    said = [line for line in said if line] or ["It is not on record what the encoder was trained on."]
    if sides.get("looked_for"):
        said.append(f"It looked for {'; and for '.join(sides['looked_for'])}.")
        said.append(f"It did not look for {'; nor for '.join(sides['not_looked_for'])}.")
    elif regime.get("blind_to"):
        said.append(f"It cannot see {regime['blind_to']}")
    if coverage := (run.get("reference") or {}).get("coverage"):
        said.append(coverage)
    return Answer("What can this run see?", status, word, [visible(line, 600) for line in said], "#run")
