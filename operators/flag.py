"""From scores to a verdict: which samples are flagged, why, and where each sample goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from tarsift.operators.errors import IMAGE_USABLE, REASONS

HOMES = ("clean", "removed", "errored")


class FlagConfig(BaseModel):
    """Which samples are flagged, and what becomes of those that carry an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: Annotated[
        Literal["fraction", "score", "z"],
        Field(description="`fraction` of the highest, an absolute `score`, or a robust `z` over the reference"),
    ] = "fraction"
    value: Annotated[float, Field(description="the fraction (0 to 1), the score, or the z")] = 0.05
    score: Annotated[str, Field(description="score column that the policy looks at")] = "suspicion"
    on_error: Annotated[
        dict[str, Literal["drop", "keep"]],
        Field(
            description="per reason code (or `all`): `drop` moves such samples to errored/, `keep` judges them by score"
        ),
    ] = {}
    on_bad_shard: Annotated[
        Literal["salvage", "quarantine", "fail"],
        Field(description="a damaged shard: use what was read, move all of it to errored/, or stop"),
    ] = "salvage"

    @model_validator(mode="after")
    def _check(self) -> FlagConfig:
        if self.policy == "fraction" and not 0 <= self.value < 1:
            raise ValueError(f"a fraction is from 0 to below 1, got {self.value}; 0.05 removes 5 %")
        unknown = set(self.on_error) - set(REASONS) - {"all"}
        if unknown:
            raise ValueError(f"unknown error reason {sorted(unknown)}; known: {', '.join(sorted(REASONS))}, all")
        return self

    def keeps(self, reason: str | None) -> bool:
        """Tell whether a sample with this reason is judged by its score rather than put into errored/."""
        if reason is None:
            return True
        return self.on_error.get(reason, self.on_error.get("all", "drop")) == "keep"


FLAG_COLUMNS = pa.schema(
    [("flagged", pa.bool_()), ("reasons", pa.list_(pa.string())), ("home", pa.string())],
)


class Flag:
    """Map: append `flagged`, `reasons` and `home` to a table with a score column and `error`.

    Args:
        config: the policy.
        cutoff: lowest flagged score; with `tie_hash`, of the samples exactly at the cutoff those
            whose tie hash is at least this are flagged (so that a fraction is met exactly).
        quarantined: shards all of whose samples go to errored/.
    """

    def __init__(
        self,
        config: FlagConfig,
        *,
        cutoff: float,
        tie_hash: int | None = None,
        quarantined: frozenset[str] = frozenset(),
    ):
        self.config = config
        self.cutoff = np.float32(cutoff)
        self.tie_hash = tie_hash
        self.quarantined = quarantined

    def __call__(self, table: pa.Table, hashes: np.ndarray | None = None) -> pa.Table:
        column = table[self.config.score].combine_chunks()
        scores = np.asarray(column.fill_null(np.nan).to_numpy(zero_copy_only=False), np.float32)
        scored = ~np.isnan(scores)
        flagged = scored & (scores > self.cutoff)
        at_cutoff = scored & (scores == self.cutoff)
        if self.tie_hash is None or hashes is None:
            flagged |= at_cutoff
        else:
            flagged |= at_cutoff & (hashes >= np.uint64(self.tie_hash))
        errors = table["error"].to_pylist()
        shards = table["shard"].to_pylist()
        homes, reasons = [], []
        for i, (error, shard) in enumerate(zip(errors, shards, strict=True)):
            if shard in self.quarantined:
                homes.append("errored")
                reasons.append(["bad_shard"] + ([error] if error else []))
            elif not self.config.keeps(error):
                homes.append("errored")
                reasons.append([error])
            elif flagged[i]:
                homes.append("removed")
                reasons.append([f"{self.config.score}>={self.cutoff:.6g} ({self.config.policy} {self.config.value:g})"])
            else:
                homes.append("clean")
                reasons.append([])
        verdict = np.array([home == "removed" for home in homes], bool)
        for name, values in zip(FLAG_COLUMNS.names, (verdict, reasons, homes), strict=True):
            table = table.append_column(name, pa.array(values, FLAG_COLUMNS.field(name).type))
        return table


@dataclass(frozen=True)
class Judged:
    """From a table to the mask (n,) of the rows that a policy judges: scored, and not put aside for an error."""

    config: FlagConfig
    quarantined: frozenset[str] = frozenset()

    columns = ("shard", "error")

    def __call__(self, table: pa.Table) -> np.ndarray:
        scored = np.asarray(table[self.config.score].combine_chunks().is_valid())
        keep = np.array([self.config.keeps(error) for error in table["error"].to_pylist()], bool)
        here = np.array([shard not in self.quarantined for shard in table["shard"].to_pylist()], bool)
        return scored & keep & here


def unscorable(error: str | None) -> bool:
    """Tell whether a row with this error has no image that could be scored."""
    return error is not None and error not in IMAGE_USABLE
