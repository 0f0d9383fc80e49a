"""Evidence to values for the template: everything on the page, section by section."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import yaml

from tarsift.operators import storage
from tarsift.operators.errors import REASONS, SHARD_PROBLEMS
from tarsift.operators.grouped import read_groups
from tarsift.operators.sift_settings import SIFT_STATUS
from tarsift.pipelines.report.answers import HONESTY, TELLING_SHARE, answers, group_name
from tarsift.pipelines.report.charts import columns_svg, histogram_svg
from tarsift.pipelines.report.data import Evidence, ReportConfig, first_role, shards_of_run
from tarsift.pipelines.report.gallery import Nearest, card_views, group_views
from tarsift.pipelines.report.pictures import Thumbnails
from tarsift.pipelines.text import blanked, command

ROWS_SHOWN = 5
PROBLEMS_SHOWN = 100
CLASSES_SHOWN = 10  # left out, and as many that were sifted
SHARD_Z = 3.0  # a shard with so many standard deviations more flags than the dump is named

SCORE_NOTES = {
    "suspicion": "the default verdict: density against a purified reference, smoothed over neighbours",
    "multiscale_slof": "sparser than its neighbours, largest over several k",
    "multiscale_k_distance": "far from its k-th neighbour, largest over several k",
    "purified_slof": "sparser than its neighbours in a reference without the most suspicious",
    "suspicion_sifted": "the default verdict, raised where the sifter confirms it",
    "sift_rank": "rank in its class by the sifter",
    "density": "the two SLOF scores together, before smoothing",
    "clip_similarity": "cosine of image and caption; a measure, neither high nor low is a verdict",
    "k_distance": "distance to the k-th neighbour in the reference",
    "slof": "that distance relative to the neighbours' own",
    "dao_log": "the same, weighted by local intrinsic dimension",
    "lid": "local intrinsic dimension",
}


def page(
    out: str, run: dict[str, Any], evidence: Evidence, nearest: Nearest, thumbs: Thumbnails, config: ReportConfig
) -> dict[str, Any]:
    """Make everything that the template shows."""
    out, run = blanked(out), blanked(run)  # the page is passed on, `run.json` keeps the URLs whole
    counts = _counts(run, evidence)
    threshold, reference = run.get("threshold") or {}, run.get("reference") or {}
    inputs = run.get("inputs") or ()
    return {
        "out": out,
        "tarsift": run.get("tarsift", "?"),
        "created": run.get("created", "?"),
        "inputs": len(inputs),
        "inputs_bytes": sum(int(item.get("size") or 0) for item in inputs),
        "counts": counts,
        "homes": [
            (name, counts[name], counts[name] / max(1, counts["read"])) for name in ("kept", "removed", "errored")
        ],
        "answers": answers(run, evidence, counts, thumbs.missing),
        "honesty": HONESTY,
        "notes": evidence.notes,
        "score": evidence.score,
        "flagged_share": evidence.flagged_share,
        "looked_at": int(evidence.rows.flagged.sum()),
        "background": len(evidence.background),
        "groups": group_views(evidence, thumbs, config),
        "cards": card_views(evidence, nearest, thumbs),
        "missing": thumbs.missing,
        "charts": _charts(evidence),
        "cutoffs": _cutoffs(evidence, threshold),
        "commands": _commands(out, threshold),
        "shards": _shards(evidence),
        "errors": _errors(evidence),
        "problems": _problems(run),
        "unread": sorted(evidence.unread.items()),
        "duplicates": _duplicates(evidence),
        "sifting": _sifting(out, run),
        "encoders": _encoders(run, evidence),
        "reference": reference,
        "passes": [{"repeated_requests": 0, "name": name, **p} for name, p in (run.get("passes") or {}).items()],
        "stale": run.get("stale") or [],
        "config_text": yaml.safe_dump(run.get("config") or {}, sort_keys=False, width=100),
        "versions": run.get("versions") or {},
    }


def _sifting(out: str, run: dict[str, Any]) -> dict[str, Any] | None:
    """What became of samples and classes; None where nothing was sifted."""
    sift = run.get("sift")
    if not sift:
        return None
    try:
        classes = read_groups(storage.join(out, "sift", "classes.parquet")).to_pylist()
    except (OSError, ValueError, KeyError):
        classes = []
    for row in classes:
        row["share"] = row["suspects"] / max(1, row["samples"])
    classes.sort(key=lambda row: (-row["share"], row["class"]))
    statuses = [(name, n, SIFT_STATUS.get(name, "")) for name, n in sift.get("by_status", {}).items()]
    left_out = [row for row in classes if row["status"] not in ("sifted", "over_budget")]
    sifted = [row for row in classes if row["status"] == "sifted"]
    return {
        "sifter": sift.get("sifter", "?"),
        "problems": sift.get("problems", 0),
        "classes": len(classes),
        "statuses": statuses,
        "failed": sorted(sift.get("failed", {}).items()),
        "rows": [*left_out[:CLASSES_SHOWN], *sifted[:CLASSES_SHOWN]],
    }


def _counts(run: dict[str, Any], evidence: Evidence) -> dict[str, int]:
    """Counts as the run told them; `seen` is what the tables held."""
    homes = evidence.overview["homes"]
    seen = {"read": evidence.overview["rows"], "kept": homes.get("clean", 0)}
    seen |= {"removed": homes.get("removed", 0), "errored": homes.get("errored", 0)}
    told = run.get("counts") or {}
    return {name: int(told.get(name, seen[name])) for name in seen} | {"seen": seen["read"]}


def _charts(evidence: Evidence) -> list[dict[str, Any]]:
    charts = []
    for histogram in evidence.histograms:
        family, _, k = histogram.name.rpartition("_k")
        published = family in SCORE_NOTES and k.isdigit()
        note = f"{SCORE_NOTES[family]}, k = {k}" if published else SCORE_NOTES.get(histogram.name, "")
        size = {"width": 420, "height": 170} if charts else {"width": 1160, "height": 250}
        charts.append({"name": histogram.name, "note": note, "svg": histogram_svg(histogram, **size)})
    return charts


def _cutoffs(evidence: Evidence, threshold: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for fraction, samples, score in evidence.cutoffs:
        telling = [g for kind in ("look", "word") for g in evidence.groups[kind] if g.share >= TELLING_SHARE]
        held = [group_name(evidence.groups, g) for g in telling if g.reach <= fraction]
        current = threshold.get("policy") == "fraction" and math.isclose(threshold.get("value") or -1, fraction)
        rows.append({"fraction": fraction, "samples": samples, "score": score, "held": held, "current": current})
    return rows


def _commands(out: str, threshold: dict[str, Any]) -> list[tuple[str, str]]:
    flag, write = command("tarsift", "flag", out), command("tarsift", "write", out)
    now = threshold.get("value") if threshold.get("policy") == "fraction" else None
    other = 0.01 if now == 0.02 else 0.02
    return [
        ("To flag another share, without encoding or scoring again:", f"{flag} --fraction {other} && {write}"),
        ("To make this page again:", command("tarsift", "report", out)),
    ]


def _shards(evidence: Evidence) -> dict[str, Any]:
    shards = sorted(evidence.overview["shards"].items())
    judged = np.array([rows - errored for _, (rows, _, errored) in shards], float)
    flagged = np.array([flagged for _, (_, flagged, _) in shards], float)
    expected = float(flagged.sum() / max(1.0, judged.sum()))
    shares = flagged / np.maximum(judged, 1)
    z = (flagged - expected * judged) / np.sqrt(np.maximum(expected * (1 - expected) * judged, 1e-9))
    named = [i for i in np.argsort(-z, kind="stable")[:ROWS_SHOWN].tolist() if z[i] > SHARD_Z]
    return {
        "number": len(shards),
        "expected": expected,
        "svg": columns_svg(shares, expected=expected) if len(shards) > 1 and expected else "",
        "rows": [
            {"name": shards[i][0], "samples": judged[i], "flagged": flagged[i], "share": shares[i], "z": z[i]}
            for i in named
        ],
    }


def _errors(evidence: Evidence) -> list[dict[str, Any]]:
    meanings = REASONS | {"bad_shard": "its whole shard was put aside"}
    found = sorted(evidence.overview["errors"].items(), key=lambda item: (-item[1][0], item[0]))
    return [
        {"reason": reason, "meaning": meanings.get(reason, ""), "samples": n, "errored": away, "examples": examples}
        for (reason, away), (n, examples) in found
    ]


def _problems(run: dict[str, Any]) -> list[dict[str, Any]]:
    urls = {name: shard.url for name, shard in shards_of_run(run).items()}
    problems = (run.get("counts") or {}).get("shard_problems") or {}
    rows = [
        {
            **problem,
            "shard": shard,
            "url": urls.get(shard, ""),
            "meaning": SHARD_PROBLEMS.get(problem.get("problem"), ""),
        }
        for shard, found in sorted(problems.items())
        for problem in found
    ]
    return rows[:PROBLEMS_SHOWN]


def _duplicates(evidence: Evidence) -> dict[str, Any]:
    samples, flagged, images = evidence.overview["copies"]
    most = evidence.overview["copied"][:ROWS_SHOWN]
    return {
        "samples": samples,
        "flagged": flagged,
        "images": round(images),
        "most": [{"copies": -n, "sha256": sha.hex(), "shard": s, "row": r} for n, sha, s, r in most],
    }


def _encoders(run: dict[str, Any], evidence: Evidence) -> dict[str, dict[str, Any]]:
    told = {role: dict(info) for role, info in (run.get("encoders") or {}).items()}
    stored = evidence.encoder.get("weights_sha256")
    role = first_role(run)
    if role in told and stored and told[role].get("weights_sha256") not in (None, stored):
        told[role]["stored"] = stored  # the embeddings are not of the encoder on record
    return told
