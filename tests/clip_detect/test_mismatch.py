import json

import numpy as np
import pytest

from tarsift.clip_detect.metrics import auroc
from tarsift.clip_detect.mismatch import MismatchConfig, MismatchRule, fit_mismatch
from tarsift.clip_detect.neighbors import unit_norm

COLUMNS = ["caption_distance", "lemon_image", "lemon_caption", "caption_unmatched", "safeclip", "caption_mismatch"]
BLIND = "caption_unmatched"  # to a caption that is of another image, but none of a kind


def pairs(n=900, *, wrong=0.03, missing=2, d=16, seed=0):
    """Pairs of ten subjects, as a witness embeds them; some captions are of another subject, some are missing."""
    rng = np.random.default_rng(seed)
    subjects = rng.normal(size=(10, d))
    of_image = rng.integers(0, 10, n)
    mismatched = np.zeros(n, bool)
    mismatched[rng.choice(np.arange(missing, n), round(wrong * n), replace=False)] = True
    of_caption = np.where(mismatched, (of_image + rng.integers(1, 10, n)) % 10, of_image)
    images = subjects[of_image] + rng.normal(size=(n, d)) * 0.5
    captions = subjects[of_caption] + rng.normal(size=(n, d)) * 0.5
    captions[:missing] = 0
    ids = rng.integers(0, 2**63, n).astype(np.uint64)
    return images.astype(np.float32), captions.astype(np.float32), ids, mismatched


def test_captions_of_another_subject_are_found_by_every_score():
    images, captions, ids, mismatched = pairs()
    columns = fit_mismatch(images, captions, ids, ids).score(images, captions, ids)
    assert list(columns) == COLUMNS
    for name in COLUMNS:
        assert (auroc(columns[name][2:], mismatched[2:]) > 0.95) == (name != BLIND), name


def test_captions_that_fit_no_image_are_found():
    images, captions, ids, _ = pairs(wrong=0)
    captions[2:12] = -4 * np.ones(16) + np.random.default_rng(2).normal(size=(10, 16)) * 0.3
    rule = fit_mismatch(images, captions, ids, ids, MismatchConfig(neighbors=16))
    columns = rule.score(images, captions, ids)
    planted = np.arange(2, 900) < 12
    assert auroc(columns["caption_unmatched"][2:], planted) > 0.99
    assert auroc(columns["caption_mismatch"][2:], planted) > 0.95


def test_a_pair_without_a_caption_has_no_score_and_all_others_have():
    images, captions, ids, _ = pairs()
    columns = fit_mismatch(images, captions, ids, ids).score(images, captions, ids)
    for column in columns.values():
        assert column.dtype == np.float32
        assert np.isnan(column[:2]).all()
        assert np.isfinite(column[2:]).all()


def test_terms_are_those_of_the_definition():
    images, captions, ids, _ = pairs(200)
    config = MismatchConfig(reference_size=100, neighbors=3, distance_decay=0.7, trust_decay=2.0)
    rule = fit_mismatch(images, captions, ids, ids, config)
    columns = rule.score(images, captions, ids)
    x, y = unit_norm(images).astype(np.float64), unit_norm(captions).astype(np.float64)
    rows = [int(np.flatnonzero(ids == i)[0]) for i in rule.reference.ids]
    assert len(rows) == 100
    for i in (5, rows[0], 77):
        others = [j for j in rows if j != i]
        assert columns["caption_distance"][i] == pytest.approx(1 - x[i] @ y[i], abs=1e-6)
        for name, near, far in (("lemon_image", x, y), ("lemon_caption", y, x)):
            nearest = sorted(others, key=lambda j, near=near: np.linalg.norm(near[i] - near[j]))[:3]
            weights = [np.exp(-0.7 * (1 - near[i] @ near[j]) - 2.0 * (1 - x[j] @ y[j])) for j in nearest]
            terms = [1 - far[i] @ far[j] for j in nearest]
            assert columns[name][i] == pytest.approx(np.average(terms, weights=weights), abs=1e-6)
        best = sorted(1 - x[j] @ y[i] for j in others)[:3]
        assert columns["caption_unmatched"][i] == pytest.approx(np.mean(best), abs=1e-6)


def test_the_mixture_never_prefers_worse_pairs():
    images, captions, ids, _ = pairs(3000, wrong=0.1)
    columns = fit_mismatch(images, captions, ids, ids).score(images, captions, ids)
    order = np.argsort(columns["caption_distance"][2:])
    assert (np.diff(columns["safeclip"][2:][order]) >= -1e-5).all()


def test_order_and_company_do_not_matter_and_files_keep_every_bit(tmp_path):
    images, captions, ids, _ = pairs(400)
    rule = fit_mismatch(images, captions, ids, ids)
    order = np.random.default_rng(1).permutation(400)
    again = fit_mismatch(images[order], captions[order], ids[order], ids[order])
    arrays, settings = rule.state()
    np.savez(tmp_path / "rule.npz", **arrays)
    with np.load(tmp_path / "rule.npz", allow_pickle=False) as file:
        loaded = MismatchRule.from_state(dict(file), json.loads(json.dumps(settings)))
    whole = rule.score(images, captions, ids)
    parts = [rule.score(images[i : i + 7], captions[i : i + 7], ids[i : i + 7]) for i in range(0, 400, 7)]
    alone = {name: np.concatenate([part[name] for part in parts]) for name in whole}
    for other in (again.score(images, captions, ids), loaded.score(images, captions, ids), alone):
        assert all(whole[name].tobytes() == other[name].tobytes() for name in whole)
    with pytest.raises(ValueError, match="not a rule of kind 'mismatch-1'"):
        MismatchRule.from_state(arrays, {"rule": "density-1"})


def test_too_few_captions():
    images, captions, ids, _ = pairs(100)
    captions[:60] = 0
    with pytest.raises(ValueError, match="too few images with a caption for the caption side: 40, at least 64"):
        fit_mismatch(images, captions, ids, ids)
