"""The demo's corpus: real shards, captions that are true, and a test set that was never rendered for training."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from tarsift.operators.shards import ReadShard, list_shards
from tarsift.pipelines.demo_corpus import (
    CLASSES,
    INKS,
    PAPERS,
    TARGET,
    TEST_DIGITS,
    _split,
    class_prompts,
    make_corpus,
    target_prompts,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return folder, make_corpus(folder, samples=330, seed=4, shard_size=100)


def rows_of(folder):
    return [r for s in list_shards(str(folder)) for t in ReadShard()(s) for r in t.to_pylist()]


def test_shards_read_back_whole(corpus):
    folder, info = corpus
    rows = rows_of(folder)
    assert [s.name for s in list_shards(str(folder))] == ["00000", "00001", "00002", "00003"]
    assert len(rows) == info.samples == 330
    assert {r["error"] for r in rows} == {None}
    assert len({r["uid"] for r in rows}) == 330
    assert all(Image.open(io.BytesIO(r["image"])).size == (32, 32) for r in rows[:20])


def test_captions_say_what_is_seen(corpus):
    known = {prompt: c for c, prompts in enumerate(class_prompts()) for prompt in prompts}
    rows = rows_of(corpus[0])
    assert len(known) == len(class_prompts()[0]) * 10
    seen = Counter()
    for row in rows:
        seen[CLASSES[known[row["caption"]]]] += 1
        paper = next(
            rgb for name, rgb in PAPERS.items() if f"{name} paper" in row["caption"] or f"on {name}" in row["caption"]
        )
        image = np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB")).astype(float)
        corners = image[[0, 0, -1, -1], [0, -1, 0, -1]].mean(0)
        assert np.abs(corners - paper).max() < 45
        ink = next(
            rgb for name, rgb in INKS.items() if name in row["caption"].split() or f", {name} on" in row["caption"]
        )
        distance = np.abs(image - ink).max(-1)
        assert distance.min() < 60  # some pixel has the ink's colour
    assert set(seen) == set(CLASSES)
    assert TARGET not in " ".join(known)
    assert all(TARGET in prompt and prompt not in known for prompt in target_prompts())


def test_test_pictures_show_other_digits(corpus):
    _, info = corpus
    assert info.test_images.shape == (TEST_DIGITS, 32, 32, 3)
    assert info.test_images.dtype == np.uint8
    assert set(info.test_labels) == set(range(10))
    train, test = _split(4)
    assert len(train[0]) + len(test[0]) == 1797
    other = _split(5)[1]
    assert not np.array_equal(other[0], test[0])


def test_same_seed_same_bytes(corpus, tmp_path):
    folder, info = corpus
    again = make_corpus(tmp_path, samples=330, seed=4, shard_size=100)
    for name in ("00000.tar", "00003.tar"):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()
    np.testing.assert_array_equal(info.test_images, again.test_images)
    assert make_corpus(tmp_path / "other", samples=10, seed=5).samples == 10
    assert (tmp_path / "other" / "00000.tar").read_bytes()[:9000] != (folder / "00000.tar").read_bytes()[:9000]
