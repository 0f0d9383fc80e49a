"""Findings: suspects that lie close together and say the same, which clean samples around them do not.

That a fraction was flagged is no finding: some samples are always the most suspicious. A group of them that is tighter
than the dump around it, far from ordinary density, and agrees in its captions more than look-alikes do, is one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from tarsift.clip_detect.neighbors import unit_norm
from tarsift.operators.folds import Foremost
from tarsift.operators.schema import matrix, places_of
from tarsift.operators.storage import join
from tarsift.operators.stored import Stored
from tarsift.pipelines.choosing import Drawn, by_suspicion
from tarsift.pipelines.folding import run_fold
from tarsift.pipelines.report.groups import first_of_each
from tarsift.pipelines.report.looks import Look, looks
from tarsift.pipelines.run import Run
from tarsift.pipelines.tasks import run_task

KEY = b"tarsift.findings"
ODDNESS = "purified_slof"  # how far from ordinary density a sample is, in deviations
COLUMNS = ("shard", "row", "caption", "image_sha256", "image_embedding", "text_embedding", "suspicion", ODDNESS)
SHOWN = 5  # captions and samples of a finding that are named


class FindingConfig(BaseModel):
    """When a group of suspects is a finding."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    limit: float = Field(
        default=0.25,
        gt=0,
        description="least value of a finding: the oddness of its members times how much more they agree",
    )
    fraction: float = Field(default=0.05, gt=0, le=0.5, description="share of highest scores among which is looked")
    suspects: int = Field(default=5000, ge=10, description="most samples among which is looked")
    background: int = Field(default=4096, ge=64, description="random other samples that they are compared with")


@dataclass(frozen=True)
class Finding:
    """A group of suspects.

    Attributes:
        value: `oddness` times `excess`, what the limit is for.
        oddness: median `purified_slof` of the members; excess: mean cosine between their captions, less that between
            captions of other samples that look alike to them.
        captions: the most frequent ones with their counts; samples: (shard, row) of some members.
    """

    value: float
    members: int
    oddness: float
    excess: float
    tightness: float
    captions: tuple[tuple[str, int], ...]
    samples: tuple[tuple[str, int], ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def find_findings(run: Run, role: str, config: FindingConfig | None = None) -> tuple[list[Finding], float]:
    """Look for groups among the suspects of a scored run.

    Args:
        role: the encoder that was trained on the dump, whose densities judge.

    Returns:
        The findings, the strongest first, and the highest value of any group, finding or not.
    """
    config = config or FindingConfig()
    judged = sum(entry["rows"] for entry in run.embedded.values())
    count = min(config.suspects, max(10, round(config.fraction * judged)))
    scores = Stored(join(run.out, "scores"), ("shard", "row", "suspicion", ODDNESS))
    folders = [scores, join(run.out, "embeddings", role)]
    top = run_fold(_first(count, by_suspicion), run.names, folders)
    if len(top) < count or not len(top):
        return [], 0.0
    least = float(top["value"].to_numpy().min())
    around = run_fold(_first(config.background, _Below(least)), run.names, folders)
    found = run_task(_groups, top, around)
    values = [finding.value for finding in found]
    return [finding for finding in found if finding.value >= config.limit], max(values, default=0.0)


def _first(count: int, value: Any) -> Foremost:
    return Foremost(count, key=KEY, value=value, columns=("suspicion",), kept=COLUMNS)


class _Below:
    """A random number for each row that is scored below a value, else NaN. Picklable, for a fold."""

    def __init__(self, least: float) -> None:
        self.least = least

    def __call__(self, table: pa.Table) -> np.ndarray:
        return np.where(by_suspicion(table) < self.least, Drawn(KEY)(table), np.nan)


def _groups(top: pa.Table, around: pa.Table) -> list[Finding]:
    """Return the groups among suspects, the strongest first."""
    once = first_of_each(top["image_sha256"].to_pylist(), range(len(top)))
    top = top.take(pa.array(once))
    texts, background_texts = (_embeddings(table, "text_embedding") for table in (top, around))
    images, background = (_embeddings(table, "image_embedding")[0] for table in (top, around))
    found = looks(images, background, texts=texts, background_texts=background_texts)
    return sorted((_finding(top, look) for look in found), key=lambda finding: -finding.value)


def _embeddings(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    values, valid = matrix(table[name])
    return unit_norm(values.astype(np.float32)), valid


def _finding(top: pa.Table, look: Look) -> Finding:
    rows = top.take(pa.array(look.members))
    oddness = float(np.nanmedian(rows[ODDNESS].to_numpy()))
    excess = 0.0 if look.agreement is None or look.around is None else look.agreement - look.around
    captions = Counter(caption for caption in rows["caption"].to_pylist() if caption)
    return Finding(
        value=oddness * max(0.0, excess) if oddness > 0 else 0.0,
        members=len(look.members),
        oddness=oddness,
        excess=excess,
        tightness=look.tightness,
        captions=tuple(captions.most_common(SHOWN)),
        samples=_named(rows),
    )


def _named(rows: pa.Table) -> tuple[tuple[str, int], ...]:
    return tuple(places_of(rows)[:SHOWN])
