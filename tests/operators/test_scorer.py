"""Score operators on tables: what each appends, to which rows, and that nothing else changes."""

import pickle

import numpy as np
import pyarrow as pa
import pytest

from tarsift.clip_detect.mismatch import fit_mismatch
from tarsift.clip_detect.suspicion import ScoredRows, SuspicionConfig, fit_density, fit_smoothing
from tarsift.clip_detect.verdict import CAPTION_WEIGHT, Verdict, fit_verdict
from tarsift.operators.identity import identities
from tarsift.operators.schema import fixed_size_list, matrix
from tarsift.operators.scorer import CountCopies, Judge, ScoreDensity, ScoreMismatch, SmoothScores

KEY = b"k" * 32
N = 300
CONFIG = SuspicionConfig(reference_size=128, banks=2, published_ks=(8,))


@pytest.fixture(scope="module")
def rows() -> pa.Table:
    """Rows with embeddings; row 3 has no usable image, row 5 no caption, row 7 is a copy of row 6."""
    rng = np.random.default_rng(0)
    digests: list[bytes | None] = [bytes([i % 256, i // 256]) * 16 for i in range(N)]
    digests[7] = digests[6]
    images, captions = rng.normal(size=(N, 8)).astype(np.float16), rng.normal(size=(N, 8)).astype(np.float16)
    images[7] = images[6]
    errors = [{3: "undecodable_image", 5: "missing_caption"}.get(i) for i in range(N)]
    return pa.table(
        {
            "shard": pa.array(["s"] * N),
            "row": pa.array(range(N), pa.int32()),
            "image_sha256": pa.array(digests, pa.binary(32)),
            "error": pa.array(errors, pa.string()),
            "image_embedding": fixed_size_list(images, np.arange(N) != 3),
            "text_embedding": fixed_size_list(captions, np.arange(N) != 5),
        }
    )


@pytest.fixture(scope="module")
def maps(rows):
    """Every score operator, fitted, in the order in which they are used."""
    usable = np.arange(N) != 3
    ids = identities(rows, KEY)[usable]
    images, captions = (matrix(rows[f"{tower}_embedding"])[0].astype(np.float32)[usable] for tower in ("image", "text"))
    rule = fit_density(images, ids, ids, CONFIG)
    # The captions' embeddings stand for a witness's of the images as well.
    scored = ScoredRows(images, ids, ids, rule.score(images, ids)["density"], captions, captions)
    pool, rest = (ScoredRows(*(part[rows] for part in scored)) for rows in (slice(0, 30), slice(30, None)))
    smoothing = fit_smoothing(pool, rest, scored, CONFIG)
    mismatch = fit_mismatch(images, captions, ids, ids)
    columns = smoothing.score(images, ids, scored.density, captions, captions)
    second = columns["neighbor_disagreement"]
    verdict = fit_verdict(columns["suspicion"], mismatch.score(images, captions, ids)["caption_mismatch"], second)
    twice = np.sort(np.unique(ids[6:7]))
    return {
        "copies": CountCopies(twice, np.array([2], np.int32), key=KEY),
        "density": ScoreDensity(rule, key=KEY),
        "smoothing": SmoothScores(smoothing, key=KEY, witness="text_embedding"),
        "mismatch": ScoreMismatch(mismatch, key=KEY),
        "judge": Judge(verdict, density=True, captions=True),
    }


def through(maps, table: pa.Table, last: str) -> pa.Table:
    for name, apply in maps.items():
        if name == "density":  # which drops the embedding
            embedding = table["image_embedding"]
            table = apply(table).append_column("image_embedding", embedding)
        else:
            table = apply(table)
        if name == last:
            return table
    raise KeyError(last)


def test_what_each_appends(maps, rows):
    before = set(rows.column_names)
    appended = {}
    for name in maps:
        table = through(maps, rows, name)
        appended[name] = [column for column in table.column_names if column not in before]
        before |= set(appended[name])
        assert table["row"].equals(rows["row"])
    assert appended["copies"] == ["duplicate_count"]
    assert appended["smoothing"] == ["suspicion_image", "caption_excess", "suspicion", "neighbor_disagreement"]
    assert appended["mismatch"] == [
        "caption_distance", "lemon_image", "lemon_caption", "caption_unmatched", "safeclip", "caption_mismatch",
    ]  # fmt: skip
    assert appended["judge"] == ["suspicion_density"]  # and `suspicion` anew


@pytest.mark.parametrize("size", [1, 7, N])
def test_rows_are_scored_alone_and_after_pickling(maps, rows, size):
    maps = pickle.loads(pickle.dumps(maps))
    whole = through(maps, rows, "judge")
    parts = pa.concat_tables(through(maps, rows.slice(i, size), "judge") for i in range(0, 70, size))
    assert parts.equals(whole.slice(0, len(parts)))
    assert through(maps, rows.slice(0, 0), "judge").schema == whole.schema


def test_rows_without_image_or_caption(maps, rows):
    table = through(maps, rows, "judge")
    nulls = {name: np.flatnonzero(~np.asarray(table[name].is_valid())).tolist() for name in table.column_names}
    assert nulls["suspicion"] == nulls["suspicion_density"] == nulls["density"] == [3]
    assert nulls["caption_mismatch"] == nulls["safeclip"] == nulls["neighbor_disagreement"] == [3, 5]
    assert table["caption_excess"][5].as_py() == 0
    assert table["duplicate_count"].to_pylist()[5:9] == [1, 2, 2, 1]
    assert table["density"][6] == table["density"][7]


def test_a_verdict_of_one_side_is_that_side():
    density, captions = np.array([1.0, 5.0, 2.0]), np.array([3.0, np.nan, 4.0])
    assert fit_verdict(density, None).score(density, None).tolist() == [1, 5, 2]
    assert np.array_equal(fit_verdict(None, captions).score(None, captions), [3, np.nan, 4], equal_nan=True)


def test_a_verdict_of_both_is_a_sum_in_units_of_their_spread():
    rng = np.random.default_rng(0)
    density, captions = rng.normal(3, 2, 5000), rng.normal(-1, 0.5, 5000)
    captions[0] = np.nan  # no caption: the other side decides alone
    verdict = fit_verdict(density, captions)
    found = verdict.score(density, captions)
    wanted = (density - 3) / 2 + CAPTION_WEIGHT * np.nan_to_num((captions + 1) / 0.5)
    assert np.abs(found - wanted).max() < 0.5
    assert np.corrcoef(found, wanted)[0, 1] > 0.999
    assert verdict.scale == pytest.approx([0, np.hypot(1, CAPTION_WEIGHT) / 1.4826], abs=0.1)
    arrays, settings = verdict.state()
    assert Verdict.from_state(arrays, settings).score(density, captions).tobytes() == found.tobytes()
