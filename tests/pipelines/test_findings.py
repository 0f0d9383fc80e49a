"""Findings: a tight group of odd samples that say the same is one; rare but natural pictures are none."""

import numpy as np
import pyarrow as pa
import pytest

from tarsift.operators.schema import fixed_size_list
from tarsift.pipelines.findings import FindingConfig, _groups

WIDTH = 16


def unit(values: np.ndarray) -> np.ndarray:
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def rows(images: np.ndarray, texts: np.ndarray, captions: list[str], oddness: float, first: int = 0) -> pa.Table:
    n = len(images)
    return pa.table(
        {
            "shard": ["s"] * n,
            "row": pa.array(range(first, first + n), pa.int32()),
            "caption": captions,
            "image_sha256": [f"{first + i:032d}".encode() for i in range(n)],
            "image_embedding": fixed_size_list(images),
            "text_embedding": fixed_size_list(texts),
            "purified_slof": pa.array(np.full(n, oddness), pa.float32()),
            "value": pa.array(np.ones(n)),
        }
    )


def scattered(rng: np.random.Generator, n: int, first: int = 0) -> pa.Table:
    """Ordinary samples: pictures and captions in any direction."""
    images, texts = (unit(rng.normal(size=(n, WIDTH))) for _ in range(2))
    return rows(images, texts, [f"caption {i}" for i in range(n)], 0.5, first)


def together(rng: np.random.Generator, n: int, texts: np.ndarray, oddness: float, first: int) -> pa.Table:
    """Samples whose pictures lie close together."""
    images = unit(rng.normal(size=WIDTH) + 0.05 * rng.normal(size=(n, WIDTH)))
    return rows(images, texts, ["a photo of a banana"] * n, oddness, first)


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def test_a_campaign_is_a_finding_and_says_what_it_says(rng):
    same = unit(np.tile(rng.normal(size=WIDTH), (20, 1)) + 0.05 * rng.normal(size=(20, WIDTH)))
    top = pa.concat_tables([scattered(rng, 200), together(rng, 20, same, 4.0, 1000)])
    [found, *others] = _groups(top, scattered(rng, 500, 5000))
    assert found.members >= 15
    assert found.captions == (("a photo of a banana", found.members),)
    assert found.value == pytest.approx(found.oddness * found.excess)
    assert found.value > 2 * FindingConfig().limit
    assert all(row >= 1000 for _, row in found.samples)
    assert all(other.value < FindingConfig().limit for other in others)


def test_a_rare_subject_whose_captions_differ_is_none(rng):
    differing = unit(rng.normal(size=(20, WIDTH)))
    top = pa.concat_tables([scattered(rng, 200), together(rng, 20, differing, 4.0, 1000)])
    found = _groups(top, scattered(rng, 500, 5000))
    assert all(group.value < FindingConfig().limit for group in found)


def test_a_group_of_ordinary_density_is_none(rng):
    same = unit(np.tile(rng.normal(size=WIDTH), (20, 1)))
    top = pa.concat_tables([scattered(rng, 200), together(rng, 20, same, -1.0, 1000)])
    found = _groups(top, scattered(rng, 500, 5000))
    assert all(group.value == 0 or group.value < FindingConfig().limit for group in found)


def test_copies_of_one_image_count_once(rng):
    same = unit(np.tile(rng.normal(size=WIDTH), (3, 1)))
    few = together(rng, 3, same, 4.0, 1000)
    copies = pa.concat_tables([few] * 10)
    found = _groups(pa.concat_tables([scattered(rng, 200), copies]), scattered(rng, 500, 5000))
    assert all(dict(group.captions).get("a photo of a banana", 0) <= 3 for group in found)
