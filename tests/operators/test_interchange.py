"""Scales of other tools: unit norm in float16, and quality from 0 to 1 with the worst lowest."""

import numpy as np
import pyarrow as pa
import pytest

from tarsift.operators.interchange import extension_of, numbers_of, quality, unit_half


def test_embeddings_have_norm_one():
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(50, 16)) * 1000).astype(np.float16)
    values[3] = 0
    out = unit_half(values)
    assert out.dtype == np.float16
    norms = np.linalg.norm(out.astype(np.float64), axis=1)
    np.testing.assert_allclose(np.delete(norms, 3), 1, atol=16**0.5 * 2**-12)  # half a unit of float16 per coordinate
    assert not out[3].any()


def test_the_most_suspicious_has_the_lowest_quality():
    scores = np.array([-700.0, -30, -1, 0, 1, 5, 60, 700])
    values = quality(scores)
    assert (np.diff(values[1:]) < 0).all()
    assert ((values > 0) & (values <= 1)).all()
    assert values[3] == pytest.approx(0.5)
    assert np.isnan(quality(np.array([np.nan]))[0])


def test_pictures_are_named_by_their_content():
    heads = {b"\xff\xd8\xff\xe0": "jpg", b"\x89PNG\r\n": "png", b"RIFF....WEBP": "webp", b"<html>": "jpg"}
    assert [extension_of(head) for head in heads] == list(heads.values())


def test_numbers_are_scores_and_measures():
    schema = pa.schema([("row", pa.int32()), ("suspicion", pa.float32()), ("duplicate_count", pa.int32())])
    assert numbers_of(schema) == ["suspicion", "duplicate_count"]
