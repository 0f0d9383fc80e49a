"""What of a night is unlike the nights before: findings among its suspects, and drift of its scores and rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from tarsift.clip_detect.drift import DriftConfig, Spread, drifts, judge_share
from tarsift.operators.folds import Foremost
from tarsift.operators.schema import MEASURES
from tarsift.operators.sides import Sides
from tarsift.operators.storage import join
from tarsift.operators.stored import Stored
from tarsift.pipelines.choosing import Drawn
from tarsift.pipelines.clean import score_columns
from tarsift.pipelines.findings import Finding, find_findings
from tarsift.pipelines.folding import run_fold
from tarsift.pipelines.ingest_settings import IngestConfig
from tarsift.pipelines.nights import latest
from tarsift.pipelines.run import Run

KEY = b"tarsift.ingest"
SAMPLED = 50_000  # rows by which the spread of a night's scores is measured
WATCHED = ("suspicion", "suspicion_image", "caption_mismatch", "caption_excess")
LOW_IS_BAD = ("clip_similarity", "witness_clip_similarity")


@dataclass(frozen=True)
class Look:
    """What was seen of a night.

    Attributes:
        findings: the strongest first; highest: value of the strongest group, finding or not.
        drift: sentences, one for each tail or rate that is fuller than in earlier nights.
        spreads: of the values that are watched, and shares: of errors and copies, for the nights to come.
    """

    findings: tuple[Finding, ...]
    highest: float
    drift: tuple[str, ...]
    spreads: Mapping[str, Spread]
    shares: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return plain values, for the record of the night."""
        return {
            "spreads": {name: spread.to_json() for name, spread in self.spreads.items()},
            "shares": dict(self.shares),
            "drift": list(self.drift),
            "highest": self.highest,
            "findings": [finding.to_json() for finding in self.findings],
        }


def look_at(run: Run, earlier: Sequence[Mapping[str, Any]], config: IngestConfig) -> Look:
    """Look for findings in a scored run, and compare it with the records of earlier nights."""
    sample, counts = _sample(run), run.content["counts"]
    copies = sample["duplicate_count"].to_numpy(zero_copy_only=False) > 1
    shares = {
        "errored samples": (counts["errored"] / max(counts["read"], 1), counts["read"]),
        "copies of images": (float(np.mean(copies)) if len(sample) else 0.0, len(sample)),
    }
    watched = (name for name in (*WATCHED, *LOW_IS_BAD) if name in sample.column_names)
    measured = ((name, Spread.of(sample[name].to_numpy(zero_copy_only=False))) for name in watched)
    spreads = {name: spread for name, spread in measured if spread is not None}
    sides = Sides.from_json(run.content["sides"])
    findings, highest = [], 0.0
    if sides.density is not None and "density" in sides.judges:
        findings, highest = find_findings(run, sides.density, config.findings)
    return Look(
        tuple(findings),
        highest,
        (*_of_spreads(spreads, earlier, config.drift), *_of_shares(shares, earlier, config.drift)),
        spreads,
        {name: share for name, (share, _) in shares.items()},
    )


def _of_spreads(spreads: Mapping[str, Spread], earlier: Sequence[Mapping[str, Any]], config: DriftConfig) -> list[str]:
    """Say of each value its outermost tail that is fuller than it was."""
    said = []
    for name, spread in spreads.items():
        before = [Spread.from_json(plain) for plain in latest(earlier, "spreads", name)]
        said += [
            f"{name}: {d.share:.2%} of the samples are {'above' if d.upper else 'below'} {d.beyond:.4g}, "
            f"where {d.expected:.2%} were (z {d.z:.1f})"
            for d in drifts(spread, before, config, upper=name not in LOW_IS_BAD)[:1]
        ]
    return said


def _of_shares(
    shares: Mapping[str, tuple[float, int]], earlier: Sequence[Mapping[str, Any]], config: DriftConfig
) -> list[str]:
    """Say which shares of so many samples are larger than they were."""
    said = []
    for name, (share, count) in shares.items():
        before = np.array(list(latest(earlier, "shares", name))[-config.nights :])
        z = judge_share(share, count, before, config)
        if z is not None:
            said.append(f"{name}: {share:.2%}, where there were {before.mean():.2%} (z {z:.1f})")
    return said


def _sample(run: Run) -> pa.Table:
    """Return random rows of a scored run with what is watched, in bounded memory."""
    there = [name for name in (*WATCHED, *LOW_IS_BAD) if name in {*score_columns(run), *MEASURES}]
    kept = ("shard", "row", *there, "duplicate_count")
    fold = Foremost(SAMPLED, key=KEY, value=Drawn(KEY), columns=("error",), kept=kept)
    return run_fold(fold, run.names, [Stored(join(run.out, "scores"))])
