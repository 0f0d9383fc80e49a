"""Folds: associative, commutative, bounded, and equal to the obvious computation over all rows."""

import hashlib
import pickle
import random

import numpy as np
import pyarrow as pa
import pytest

from tarsift.clip_detect.threshold import TopFraction
from tarsift.operators.flag import Flag, FlagConfig, Judged
from tarsift.operators.folds import (
    Count,
    CountDuplicates,
    CountNear,
    FetchRows,
    Foremost,
    SelectTop,
    Side,
    SmallestHashes,
    SumOfDigests,
)
from tarsift.operators.identity import drawing_hashes, identities, row_hashes, salted
from tarsift.operators.schema import fixed_size_list

KEY = b"k" * 32
N = 600


@pytest.fixture(scope="module")
def rows() -> pa.Table:
    rng = np.random.default_rng(0)
    content = rng.integers(0, 450, N)  # some images occur more than once
    vectors = rng.normal(size=(450, 8)).astype(np.float16)[content]
    errors = [("undecodable_image" if i % 50 == 3 else "missing_caption" if i % 50 == 7 else None) for i in range(N)]
    digests = [None if i % 100 == 9 else hashlib.sha256(str(c).encode()).digest() for i, c in enumerate(content)]
    errors = ["missing_image" if d is None else e for d, e in zip(digests, errors, strict=True)]
    usable = np.array([e in (None, "missing_caption") for e in errors])
    scores = np.round(rng.normal(size=N), 1).astype(np.float32)  # many ties
    return pa.table(
        {
            "shard": pa.array([f"s{i // 100}" for i in range(N)]),
            "row": pa.array([i % 100 for i in range(N)], pa.int32()),
            "image_sha256": pa.array(digests, pa.binary(32)),
            "image_embedding": fixed_size_list(vectors, usable),
            "text_embedding": fixed_size_list(vectors[::-1], np.array([e != "missing_caption" for e in errors])),
            "density": pa.array(scores, mask=~usable),
            "suspicion": pa.array(scores, mask=~usable),
            "error": pa.array(errors, pa.string()),
        }
    )


def ties(table) -> np.ndarray:
    return row_hashes(table, KEY)


def top(selection, config) -> SelectTop:
    return SelectTop(selection, config.score, judged=Judged(config), hashes=ties, columns=("row", *Judged.columns))


def near(cutoff, quarantined) -> CountNear:
    return CountNear(cutoff, "suspicion", judged=Judged(FlagConfig(), quarantined), columns=Judged.columns)


def density_of(table) -> np.ndarray:
    return np.asarray(table["density"].to_numpy(), np.float64)


FOLDS = {
    "smallest": SmallestHashes(40, key=KEY, salt="a"),
    "smallest_above": SmallestHashes(40, key=KEY, salt="a", side=Side("density", 0.5, True)),
    "fetch": FetchRows(2**61, key=KEY, extra=("density",)),
    "fetch_captions": FetchRows(2**61, key=KEY, also={"captions": "text_embedding"}),
    "fetch_below": FetchRows(2**62, key=KEY, salt="b", side=Side("density", 0.0, False)),
    "duplicates": CountDuplicates(1, 3, key=KEY),
    "digests": SumOfDigests(),
    "top": top(TopFraction.start(0.07), FlagConfig()),
    "near": near(0.5, frozenset({"s1"})),
    "count": Count("error"),
    "foremost": Foremost(25, key=KEY, value=density_of, columns=("density",), kept=("shard", "row", "error")),
}


def total(fold, tables) -> object:
    state = fold.init()
    for table in tables:
        state = fold.merge(state, fold.add(fold.init(), table))
    return fold.finish(state)


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, pa.Table):
        return a.equals(b)
    if isinstance(a, TopFraction):
        return same(vars(a), vars(b))
    return bool(np.array_equal(a, b))


@pytest.mark.parametrize("name", FOLDS)
def test_fold_does_not_depend_on_grouping_or_order(rows, name):
    fold = pickle.loads(pickle.dumps(FOLDS[name]))
    whole = fold.finish(fold.add(fold.init(), rows))
    pieces = [rows.slice(i, 37) for i in range(0, N, 37)]
    random.Random(1).shuffle(pieces)
    assert same(whole, total(fold, pieces))
    left = fold.merge(fold.add(fold.init(), pieces[0]), fold.add(fold.init(), pieces[1]))
    right = fold.merge(fold.add(fold.init(), pieces[1]), fold.add(fold.init(), pieces[0]))
    assert same(fold.finish(left), fold.finish(right))
    assert set(fold.columns) <= set(rows.column_names)


def salted_hashes(rows, salt="a") -> np.ndarray:
    return salted(drawing_hashes(identities(rows, KEY), KEY), salt)


def scorable_rows(rows) -> np.ndarray:
    return np.array([e in (None, "missing_caption") for e in rows["error"].to_pylist()])


def test_smallest_hashes_are_of_distinct_scorable_images(rows):
    hashes = salted_hashes(rows)[scorable_rows(rows)]
    found = total(FOLDS["smallest"], [rows])
    assert found.tolist() == sorted(set(hashes.tolist()))[:40]


def test_fetch_gives_each_image_once_with_its_own_embedding(rows):
    found = total(FOLDS["fetch"], [rows])
    hashes = salted_hashes(rows, "")
    wanted = sorted({int(h) for h, ok in zip(hashes, scorable_rows(rows), strict=True) if ok and h <= 2**61})
    assert found["hashes"].tolist() == wanted
    for i in range(len(wanted)):
        at = int(np.flatnonzero((hashes == wanted[i]) & scorable_rows(rows))[0])
        assert np.array_equal(found["embeddings"][i], np.float32(rows["image_embedding"][at].as_py()))


def test_duplicates_of_all_partitions_are_those_of_the_whole(rows):
    digests = [d for d in rows["image_sha256"].to_pylist() if d is not None]
    wanted = sorted(digests.count(d) for d in set(digests) if digests.count(d) > 1)
    parts = [total(CountDuplicates(p, 3, key=KEY), [rows]) for p in range(3)]
    assert sorted(int(c) for _, counts in parts for c in counts) == wanted


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.07, 0.5])
def test_selection_flags_exactly_the_fraction_despite_ties(rows, fraction):
    selection = TopFraction.start(fraction)
    while not selection.done:
        selection = total(top(selection, FlagConfig()), [rows.slice(0, 250), rows.slice(250)])
    cut = selection.finish()
    config = FlagConfig(value=fraction)
    flagged = Flag(config, cutoff=cut.score, tie_hash=int(cut.hash))(rows, row_hashes(rows, KEY))["flagged"]
    n = int(Judged(config)(rows).sum())
    assert sum(flagged.to_pylist()) == int(np.ceil(fraction * n))


def test_near_counts_within_one_unit_in_the_last_place(rows):
    close, judged_rows = total(near(0.5, frozenset()), [rows])
    ok = np.array([e is None for e in rows["error"].to_pylist()])
    scores = np.asarray(rows["suspicion"].combine_chunks().fill_null(np.nan).to_numpy(zero_copy_only=False))
    assert (close, judged_rows) == (int((scores[ok] == np.float32(0.5)).sum()), int(ok.sum()))


@pytest.mark.parametrize("count", [0, 1, 25, N])
def test_foremost_are_those_of_highest_value_and_then_of_smallest_row_hash(rows, count):
    fold = Foremost(count, key=KEY, value=density_of, columns=("density",), kept=("shard", "row"))
    found = total(fold, [rows.slice(i, 100) for i in range(0, N, 100)])
    values, hashes = density_of(rows), row_hashes(rows, KEY)
    order = [i for i in np.lexsort((hashes, -values)) if not np.isnan(values[i])][:count]
    assert found["shard"].to_pylist() == [rows["shard"][i].as_py() for i in order]
    assert found["row"].to_pylist() == [rows["row"][i].as_py() for i in order]
    assert np.array_equal(found["value"], values[order])


def test_empty_tables_change_nothing(rows):
    for fold in FOLDS.values():
        assert same(total(fold, [rows, rows.slice(0, 0)]), total(fold, [rows]))
