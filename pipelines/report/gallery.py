"""The pictures of the report: cards of single samples with their neighbours, and strips of groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tarsift.clip_detect.neighbors import knn
from tarsift.operators.decoding import ImageConfig
from tarsift.pipelines.ledger import RunFile
from tarsift.pipelines.progress import Event, Listener, silent
from tarsift.pipelines.report.answers import LETTERS, letter_of, shards_of
from tarsift.pipelines.report.charts import share_svg
from tarsift.pipelines.report.data import Evidence, ReportConfig, collect, shards_of_run
from tarsift.pipelines.report.groups import KINDS, Group, Kind, captions_of, first_of_each
from tarsift.pipelines.report.pictures import LARGE, SMALL, Picture, Thumbnails, make_thumbnails
from tarsift.pipelines.report.rows import Rows

CARD_SCORES = ("suspicion", "multiscale_slof", "purified_slof", "density", "clip_similarity")
CAPTIONS_SHOWN = 5
TABLE_STRIP = 6
SHARED = 0.5  # of the smaller group's members: then two groups are called one matter


@dataclass(frozen=True)
class Nearest:
    """For every card the positions of its nearest suspects, and of its nearest kept samples (in the background)."""

    suspects: list[list[int]]
    kept: list[list[int]]


def gathered(
    out: str, *, config: ReportConfig, progress: Listener = silent
) -> tuple[dict[str, Any], Evidence, Nearest, Thumbnails]:
    """Read what is known of a run, and fetch the pictures of it that are shown.

    Returns:
        `run.json`, what the tables of the run hold, neighbours and pictures.

    Raises:
        UsageError: if `out` is no result folder, or was not scored and flagged yet.
    """
    run = RunFile.load_or_refuse(out).content
    evidence = collect(
        out, run, config=config, tick=lambda done, total: progress(Event("report", done, total, unit="tables"))
    )
    nearest = nearest_of_cards(evidence, config)
    thumbs = make_thumbnails(
        pictures_wanted(evidence, nearest, config),
        shards_of_run(run),
        images=ImageConfig(),
        max_scan_bytes=config.max_scan_bytes,
        threads=config.threads,
    )
    return run, evidence, nearest, thumbs


def nearest_of_cards(evidence: Evidence, config: ReportConfig) -> Nearest:
    """Find the neighbours shown beside the highest-scored samples; copies of the sample itself are left out."""
    rows, background = evidence.rows, evidence.background
    shown = list(range(min(config.samples, len(rows))))
    none: list[list[int]] = [[] for _ in shown]
    if rows.images is None or not shown or not config.neighbors:
        return Nearest(none, none)
    suspects = [i for i in range(len(rows)) if rows.flagged[i] or i < len(shown)]
    return Nearest(
        _nearest(rows, shown, rows, suspects, config.neighbors),
        _nearest(rows, shown, background, list(range(len(background))), config.neighbors),
    )


def _nearest(rows: Rows, asked: list[int], others: Rows, pool: list[int], k: int) -> list[list[int]]:
    pool = first_of_each(others.digests, pool)
    if rows.images is None or others.images is None or len(pool) < 2:
        return [[] for _ in asked]
    k_ = min(k + 1, len(pool) - 1)  # one more: it may be the sample itself
    found = knn(rows.images[asked], others.images[pool], k_)
    near = []
    for i, indices in zip(asked, np.asarray(pool)[found.indices].tolist(), strict=True):
        same = {j for j in indices if others.identities[j] == rows.identities[i]}
        same |= {j for j in indices if rows.digests[i] is not None and others.digests[j] == rows.digests[i]}
        near.append([j for j in indices if j not in same][:k])
    return near


def pictures_wanted(evidence: Evidence, nearest: Nearest, config: ReportConfig) -> list[Picture]:
    """List the pictures of the page, most important first."""
    if not config.pictures:
        return []
    rows, background = evidence.rows, evidence.background
    wanted = [_picture(rows, i, LARGE) for i in range(min(config.samples, len(rows)))]
    for kind in KINDS:
        for group in evidence.groups[kind]:
            wanted += [_picture(rows, i, SMALL) for i in _strip(rows, group, config)]
    wanted += [_picture(rows, i, SMALL) for near in nearest.suspects for i in near]
    wanted += [_picture(background, i, SMALL) for near in nearest.kept for i in near]
    return [picture for picture in wanted if picture is not None]


def _strip(rows: Rows, group: Group, config: ReportConfig) -> list[int]:
    most = config.strip if group.kind == "look" else min(config.strip, TABLE_STRIP)
    return first_of_each(rows.digests, group.members)[:most]


def _picture(rows: Rows, i: int, edge: int) -> Picture | None:
    offset, size = rows.value("image_offset", i), rows.value("image_size", i)
    if offset is None or size is None:
        return None
    shard, row = rows.identities[i]
    return Picture(shard, row, offset, size, rows.digests[i], edge)


def thumb_view(rows: Rows, i: int, thumbs: Thumbnails) -> dict[str, Any]:
    """Return what the template needs to show one small picture."""
    shard, row = rows.identities[i]
    return {"shard": shard, "row": row, "thumb": thumbs.made.get((shard, row)), "caption": rows.captions[i]}


def card_views(evidence: Evidence, nearest: Nearest, thumbs: Thumbnails) -> list[dict[str, Any]]:
    """Return the cards of the highest-scored samples."""
    rows = evidence.rows
    lettered = list(zip(LETTERS, (set(g.members) for g in evidence.groups["look"]), strict=False))
    cards = []
    for i, (suspects, kept) in enumerate(zip(nearest.suspects, nearest.kept, strict=True)):
        scores = [(name, rows.value(name, i)) for name in CARD_SCORES if name != evidence.score]
        cards.append(
            {
                **thumb_view(rows, i, thumbs),
                "rank": i + 1,
                "uid": rows.value("uid", i),
                "score": float(rows.scores[i]),
                "scores": [(name, value) for name, value in scores if value is not None],
                "copies": rows.value("duplicate_count", i) or 1,
                "flagged": bool(rows.flagged[i]),
                "letters": [letter for letter, members in lettered if i in members],
                "suspects": [thumb_view(rows, j, thumbs) for j in suspects],
                "kept": [thumb_view(evidence.background, j, thumbs) for j in kept],
            }
        )
    return cards


def group_views(evidence: Evidence, thumbs: Thumbnails, config: ReportConfig) -> dict[Kind, list[dict[str, Any]]]:
    """Return the groups of each kind, with a strip of pictures and the captions of their members."""
    rows, groups = evidence.rows, evidence.groups
    lettered = list(zip(LETTERS, (set(g.members) for g in groups["look"]), strict=False))
    views: dict[Kind, list[dict[str, Any]]] = {}
    for kind in KINDS:
        views[kind] = []
        for group in groups[kind]:
            mine, said = set(group.members), captions_of(rows, group)
            views[kind].append(
                {
                    "group": group,
                    "letter": letter_of(groups, group),
                    "bar": share_svg(group.share),
                    "shards": shards_of(evidence, group),
                    "median": float(np.median(rows.scores[list(group.members)])),
                    "captions": said.most_common(CAPTIONS_SHOWN),
                    "other_captions": max(0, len(said) - CAPTIONS_SHOWN),
                    "inside": [x for x, of in lettered if len(of & mine) >= SHARED * min(len(of), len(mine))],
                    "strip": [thumb_view(rows, i, thumbs) for i in _strip(rows, group, config)],
                }
            )
    for look in views["look"]:
        look["words"] = [w["group"].title for w in views["word"] if look["letter"] in w["inside"]][:3]
    return views
