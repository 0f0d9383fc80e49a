"""What the report knows: gathered from a result folder in memory that does not grow with the dump."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from tarsift.operators.errors import UsageError
from tarsift.operators.listing import Shard
from tarsift.operators.sides import DETECT, ROLES
from tarsift.pipelines.report.charts import Histogram
from tarsift.pipelines.report.folds import Overview, Tally, quantile
from tarsift.pipelines.report.groups import KINDS, Group, Kind, find_candidates, rank_groups, reach_levels
from tarsift.pipelines.report.rows import Available, Rows, RunReader, what_there_is

FOLDS = 2
FRACTIONS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1)
PARTS_OF_VERDICT = (
    "suspicion",
    "suspicion_density",
    "sift_rank",
    "caption_mismatch",
    "multiscale_slof",
    "multiscale_k_distance",
    "purified_slof",
)
PUBLISHED = ("k_distance", "slof", "dao_log")


class ReportConfig(BaseModel):
    """How much the report shows. Nothing here changes a verdict."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: int = Field(default=48, ge=0, le=500, description="highest-scored samples shown as cards")
    neighbors: int = Field(default=4, ge=0, le=16, description="nearest neighbours shown beside each")
    looked_at: int = Field(
        default=5000, ge=1, le=50_000, description="highest-scored samples among which groups are searched"
    )
    background: int = Field(default=4096, ge=16, le=50_000, description="random kept samples they are compared with")
    groups: int = Field(default=8, ge=0, le=26, description="groups shown per kind: look, word, caption")
    strip: int = Field(default=12, ge=0, le=100, description="thumbnails of a group")
    pictures: bool = Field(default=True, description="fetch pictures from the input shards; false shows none")
    max_scan_bytes: int = Field(default=2 << 30, ge=0, description="bytes of compressed shards read again for pictures")
    threads: int = Field(default=4, ge=1, description="shards whose pictures are read at once")


@dataclass(frozen=True)
class Evidence:
    """All that the report is made of, before it is worded.

    `rows` are the highest-scored samples, `background` random kept ones, `cutoffs` rows of (fraction,
    samples, score); `unread` are shards that could not be read back, and why.
    """

    score: str
    overview: dict[str, Any]
    rows: Rows
    background: Rows
    groups: dict[Kind, list[Group]]
    histograms: list[Histogram]
    cutoffs: list[tuple[float, int, float]]
    encoder: dict[str, str]
    unread: dict[str, str]
    notes: list[str]

    @property
    def removed(self) -> int:
        """Samples that are flagged."""
        return self.overview["homes"].get("removed", 0)

    @property
    def flagged_share(self) -> float:
        """Share of flagged samples among those that were judged."""
        return self.removed / max(1, self.overview["judged"])


def shards_of_run(run: dict[str, Any]) -> dict[str, Shard]:
    """Return the inputs of a run by name."""
    inputs = run.get("inputs") or ()
    return {item["name"]: Shard(item["name"], item["url"], int(item.get("size") or 0)) for item in inputs}


def first_role(run: dict[str, Any]) -> str:
    """Return the role whose embeddings are shown: `detect`, unless there is only a witness."""
    return next((role for role in ROLES if role in (run.get("encoders") or {})), DETECT)


def collect(
    out: str, run: dict[str, Any], *, config: ReportConfig, tick: Callable[[int, int], None] = lambda done, total: None
) -> Evidence:
    """Read scores, flags and embeddings of a run, each shard a few times, and find what is worth showing.

    Raises:
        UsageError: if there are no flags or scores at all, or not the score that the flags were set by.
    """
    names = sorted(shards_of_run(run))
    available = what_there_is(out, names, first_role(run))
    threshold = run.get("threshold") or {}
    score = threshold.get("score") or "suspicion"
    if score not in available.scores and len(available.columns["scores"]) > 2:
        raise UsageError(f"{out}/scores has no column {score!r}, by which flags were set; run `tarsift score {out}`.")
    done = iter(range(1, FOLDS * len(names) + 1))
    reader = RunReader(
        out, available, threads=config.threads, tick=lambda: tick(next(done), max(1, FOLDS * len(names)))
    )
    charts = _charts(score, available.scores)
    key = hashlib.sha256(json.dumps([run.get("created"), names]).encode()).digest()
    overview = reader.fold(
        Overview(score, charts, max(config.looked_at, config.samples), config.background, key), names
    )
    top = reader.rows([(shard, row) for _, shard, row in overview["top"]], score)
    background = reader.rows([(shard, row) for _, shard, row in overview["background"]], score)
    candidates = find_candidates(top, background, threads=config.threads)
    levels = reach_levels(candidates, top.scores)
    found = [g.look for g in candidates["look"] if g.look]
    ranges = {name: _range(overview["coarse"][name]) for name in charts if name in overview["coarse"]}
    tally = reader.fold(
        Tally(
            score,
            ranges,
            captions=[g.title for g in candidates["caption"]],
            words=[g.title for g in candidates["word"]],
            centres=np.stack([look.centre for look in found]) if found else np.zeros((0, 1), np.float32),
            radii=np.array([look.radius for look in found], np.float32),
            levels=np.concatenate([levels[kind] for kind in KINDS]),
        ),
        names,
    )
    ends = np.cumsum([len(levels[kind]) for kind in KINDS])[:-1]
    groups = rank_groups(
        candidates,
        {kind: tally[kind] for kind in KINDS},
        dict(zip(KINDS, np.split(tally["levels"], ends), strict=True)),
        top.scores,
        middle=quantile(overview["coarse"][score], 0.5) if score in overview["coarse"] else 0.0,
        judged=overview["judged"],
        flagged=overview["homes"].get("removed", 0),
        most=config.groups,
    )
    return Evidence(
        score=score,
        overview=overview,
        rows=top,
        background=background,
        groups=groups,
        histograms=[_histogram(name, ranges[name], tally, threshold if name == score else {}) for name in ranges],
        cutoffs=_cutoffs(overview, score, threshold),
        encoder=available.encoder,
        unread=reader.unread,
        notes=_notes(available, config),
    )


def _charts(score: str, available: Sequence[str]) -> tuple[str, ...]:
    """Choose what to draw: the score of the verdict, its parts, each published score at its largest k."""
    chosen = [score, *PARTS_OF_VERDICT]
    for family in PUBLISHED:
        ks = [int(m[1]) for name in available if (m := re.fullmatch(rf"{family}_k(\d+)", name))]
        chosen += [f"{family}_k{max(ks)}"] if ks else []
    return tuple(dict.fromkeys(name for name in (*chosen, "clip_similarity") if name in available))


def _range(coarse: np.ndarray) -> tuple[float, float]:
    """Choose the ends of a histogram: all values but the outermost 1 in 2,000, unless those are near."""
    low, high = quantile(coarse, 0.0005), quantile(coarse, 0.9995)
    least, most = quantile(coarse, 0.0), quantile(coarse, 1.0)
    span = high - low
    low = least if low - least < span / 2 else low
    high = most if most - high < span / 2 else high
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _histogram(name: str, ends: tuple[float, float], tally: dict[str, np.ndarray], threshold: dict) -> Histogram:
    bins = tally[f"bins:{name}"]
    return Histogram(name, *ends, bins[:, 0], bins[:, 1], int(tally[f"beyond:{name}"][0]), threshold.get("cutoff"))


def _cutoffs(overview: dict[str, Any], score: str, threshold: dict[str, Any]) -> list[tuple[float, int, float]]:
    """For common fractions and the run's own: (fraction, samples flagged, the score they reach, to 1 part in 128)."""
    coarse, judged = overview["coarse"].get(score), overview["judged"]
    if coarse is None or not judged:
        return []
    own = {threshold["value"]} if threshold.get("policy") == "fraction" and threshold.get("value") else set()
    fractions = sorted({*FRACTIONS, *own})
    return [(f, math.ceil(f * judged), quantile(coarse, 1 - f)) for f in fractions]


def _notes(available: Available, config: ReportConfig) -> list[str]:
    notes = []
    columns = available.columns[available.embeddings]
    if not columns:
        notes.append("There are no stored embeddings: captions, pictures, groups and neighbours are not shown.")
    elif "image_embedding" not in columns and len(columns) > 2:
        notes.append("Image embeddings were not stored: look-alike groups and neighbours are not shown.")
    if not config.pictures:
        notes.append("Pictures were left out on request.")
    return notes
