"""Flag: homes, reasons, ties."""

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from tarsift.operators.flag import Flag, FlagConfig, Judged


def table(scores, errors=None, shard="a") -> pa.Table:
    n = len(scores)
    return pa.table(
        {
            "shard": [shard] * n,
            "row": pa.array(range(n), pa.int32()),
            "suspicion": pa.array(scores, pa.float32()),
            "error": pa.array(errors or [None] * n, pa.string()),
        }
    )


def homes(flag: Flag, rows: pa.Table, hashes=None) -> list[str]:
    return flag(rows, hashes)["home"].to_pylist()


def test_appends_exactly_three_columns_and_keeps_order():
    rows = table([1.0, 3.0, 2.0])
    out = Flag(FlagConfig(policy="score", value=2), cutoff=2.0)(rows)
    assert out.column_names == [*rows.column_names, "flagged", "reasons", "home"]
    assert out["flagged"].to_pylist() == [False, True, True]
    assert out["reasons"].to_pylist()[0] == []
    assert "suspicion>=2" in out["reasons"].to_pylist()[1][0]
    assert len(Flag(FlagConfig(), cutoff=1.0)(rows.slice(0, 0))) == 0


def test_ties_at_the_cutoff_go_by_hash():
    flag = Flag(FlagConfig(), cutoff=2.0, tie_hash=50)
    hashes = np.array([10, 50, 99], np.uint64)
    assert homes(flag, table([2.0, 2.0, 2.0]), hashes) == ["clean", "removed", "removed"]


def test_errors_have_a_home_by_policy():
    rows = table([9.0, None, 9.0], ["missing_caption", "undecodable_image", None])
    assert homes(Flag(FlagConfig(), cutoff=1.0), rows) == ["errored", "errored", "removed"]
    keep = FlagConfig(on_error={"missing_caption": "keep"})
    assert homes(Flag(keep, cutoff=1.0), rows) == ["removed", "errored", "removed"]
    keep_all = FlagConfig(on_error={"all": "keep"})
    assert homes(Flag(keep_all, cutoff=1.0), rows) == ["removed", "clean", "removed"]


def test_a_quarantined_shard_goes_to_errored_whole():
    out = Flag(FlagConfig(), cutoff=1.0, quarantined=frozenset({"a"}))(table([0.0, 9.0]))
    assert out["home"].to_pylist() == ["errored", "errored"]
    assert out["reasons"].to_pylist() == [["bad_shard"], ["bad_shard"]]


def test_only_scored_and_kept_rows_are_judged():
    rows = table([9.0, None, 9.0, 1.0], ["missing_caption", "undecodable_image", None, None])
    assert Judged(FlagConfig())(rows).tolist() == [False, False, True, True]
    assert Judged(FlagConfig(), frozenset({"a"}))(rows).tolist() == [False] * 4


@pytest.mark.parametrize("bad", [{"value": 1.0}, {"value": -0.1}, {"on_error": {"what": "drop"}}, {"policy": "top"}])
def test_bad_policies_are_refused(bad):
    with pytest.raises(ValidationError):
        FlagConfig(**bad)
