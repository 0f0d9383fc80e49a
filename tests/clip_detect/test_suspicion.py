import json

import numpy as np
import pytest
from pydantic import ValidationError

from tarsift.clip_detect.agreement import CaptionExcess
from tarsift.clip_detect.metrics import auroc, average_precision
from tarsift.clip_detect.neighbors import unit_norm
from tarsift.clip_detect.sampling import keyed_hash, smallest
from tarsift.clip_detect.scores import SCORES
from tarsift.clip_detect.suspicion import (
    DensityRule,
    ScoredRows,
    SmoothingRule,
    SuspicionConfig,
    _fit_excess,
    content_ids,
    draw_pool,
    fit_density,
    fit_smoothing,
    suspicion,
)

SMALL = SuspicionConfig(reference_size=512, banks=2, published_ks=(16, 64))


def planted(rate, *, n=1500, d=24, seed=0):
    """A mixture of ten Gaussians with one tight cluster among them, in no particular order."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(10, d))[rng.integers(0, 10, n)] + rng.normal(size=(n, d)) * 0.5
    poison = np.zeros(n, bool)
    poison[rng.choice(n, max(2, round(rate * n)), replace=False)] = True
    x[poison] = rng.normal(size=d) + rng.normal(size=(poison.sum(), d)) * 0.25
    return x.astype(np.float32), poison


@pytest.mark.parametrize("rate", [0.001, 0.005, 0.02, 0.05])
def test_planted_cluster_is_found_without_knowing_its_rate(rate):
    x, poison = planted(rate)
    columns = suspicion(x, config=SMALL)
    assert auroc(columns["suspicion"], poison) > 0.99
    assert average_precision(columns["suspicion"], poison) > 0.9
    assert auroc(columns["density"], poison) > 0.98
    if rate >= 0.05:  # 26 of 512 in the reference: more than k, and the cluster hides among itself
        assert auroc(columns["slof_k16"], poison) < 0.6
        assert auroc(columns["dao_k16"], poison) < 0.6


def test_columns():
    x, _ = planted(0.01)
    columns = suspicion(x, config=SMALL)
    published = [f"{name}_k{k}" for k in (16, 64) for name in SCORES]
    own = ["multiscale_slof", "multiscale_k_distance", "purified_slof", "density", "suspicion_image", "suspicion"]
    assert list(columns) == published + own
    for column in columns.values():
        assert column.dtype == np.float32
        assert column.shape == (1500,)
        assert np.isfinite(column).all()
    assert abs(np.median(columns["purified_slof"])) < 0.2  # in units of its spread


def test_same_key_same_bits_in_any_order():
    x, _ = planted(0.01, n=800)
    first = suspicion(x, config=SMALL, key=b"key")
    order = np.random.default_rng(1).permutation(800)
    again = suspicion(x[order], config=SMALL, key=b"key", threads=2)
    assert all(again[name].tobytes() == first[name][order].tobytes() for name in first)
    other = suspicion(x, config=SMALL, key=b"other")
    assert (other["suspicion"] != first["suspicion"]).any()


def test_in_parts_equals_in_memory():
    """What a cluster does, with rules that went through files: every part on its own, samples merged."""
    x, _ = planted(0.01)
    config = SMALL.model_copy(update={"candidates": 900, "pool_size": 40})
    ids = content_ids(x)
    hashes = keyed_hash(ids.view(np.uint8).reshape(-1, 8), b"", "reference")
    parts = [np.arange(start, 1500, 3) for start in range(3)]

    merged = np.concatenate([part[smallest(hashes[part], 900)] for part in parts])
    rule = fit_density(x[merged], ids[merged], hashes[merged], config)
    rule = DensityRule.from_state(rule.state()[0], json.loads(json.dumps(rule.state()[1])))
    density = np.empty(1500, np.float32)
    for part in parts:
        density[part] = rule.score(x[part], ids[part])["density"]
    draws = [draw_pool(density[part], hashes[part], rule) for part in parts]

    def take(rows):
        return ScoredRows(x[rows], ids[rows], hashes[rows], density[rows])

    pool, rest = (np.concatenate([part[draw[i]] for part, draw in zip(parts, draws, strict=True)]) for i in (0, 1))
    candidates = merged[smallest(hashes[merged], 900)]
    smoothing = fit_smoothing(take(pool), take(rest), take(candidates), config)
    found = np.empty(1500, np.float32)
    for part in parts:
        found[part] = smoothing.score(x[part], ids[part], density[part])["suspicion"]

    whole = suspicion(x, config=config)
    assert density.tobytes() == whole["density"].tobytes()
    assert found.tobytes() == whole["suspicion"].tobytes()
    assert len(smoothing.ids) == 80
    assert len(np.unique(smoothing.ids)) == 80


def test_rules_survive_files_bit_for_bit(tmp_path):
    x, _ = planted(0.02, n=400)
    ids = content_ids(x)
    density_rule = fit_density(x, ids, ids, SMALL)
    before = density_rule.score(x, ids)
    said, seen = np.random.default_rng(3).normal(size=(2, 400, 8)).astype(np.float32)

    def rows(part):
        return ScoredRows(x[part], ids[part], ids[part], before["density"][part], said[part], seen[part])

    smoothing = fit_smoothing(rows(slice(0, 40)), rows(slice(40, 400)), rows(slice(0, 400)), SMALL)
    for name, rule in (("density", density_rule), ("smoothing", smoothing)):
        arrays, settings = rule.state()
        np.savez(tmp_path / f"{name}.npz", **arrays)
        (tmp_path / f"{name}.json").write_text(json.dumps(settings))

    def load(kind, name):
        with np.load(tmp_path / f"{name}.npz", allow_pickle=False) as arrays:
            return kind.from_state(dict(arrays), json.loads((tmp_path / f"{name}.json").read_text()))

    again = load(DensityRule, "density")
    assert again.config == SMALL
    after = again.score(x, ids)
    assert all(after[name].tobytes() == before[name].tobytes() for name in before)
    smoothed = load(SmoothingRule, "smoothing").score(x, ids, before["density"], said, seen)
    wanted = smoothing.score(x, ids, before["density"], said, seen)
    assert list(smoothed) == ["suspicion_image", "caption_excess", "suspicion", "neighbor_disagreement"]
    assert all(smoothed[name].tobytes() == wanted[name].tobytes() for name in wanted)
    with pytest.raises(ValueError, match="`captions` is needed where the rule was fitted with it"):
        smoothing.score(x, ids, before["density"])
    with pytest.raises(ValueError, match="`witness` is needed where the rule was fitted with it"):
        smoothing.score(x, ids, before["density"], said)
    with pytest.raises(ValueError, match="not a rule of kind 'smoothing-4': got 'density-1'"):
        SmoothingRule.from_state(*density_rule.state())


def test_poison_is_purged_from_the_references():
    x, poison = planted(0.05)
    ids = content_ids(x)
    rule = fit_density(x, ids, ids, SMALL)
    share = np.isin(ids[poison], rule.contaminated.ids).mean()
    assert 0.15 < share < 0.55  # 512 of 1500
    for bank in rule.purified:
        assert not np.isin(ids[poison], bank.ids).any()


def test_trusted_reference_has_no_highest_rate():
    x, poison = planted(0.3)
    trusted = np.random.default_rng(0).permutation(x[~poison])[:400]
    ids = np.arange(400, dtype=np.uint64)
    assert auroc(suspicion(x, config=SMALL)["purified_slof"], poison) < 0.9
    columns = suspicion(x, config=SMALL, reference=(trusted, ids))
    assert auroc(columns["purified_slof"], poison) > 0.99
    assert auroc(columns["density"], poison) > 0.99
    rule = fit_density(x, content_ids(x), content_ids(x), SMALL, reference=(trusted, ids))
    assert rule.trusted
    assert len(rule.purified) == 1  # fewer rows than a reference: all banks would be the same
    assert set(rule.purified[0].ids) == set(rule.contaminated.ids) == set(range(400))


def test_copies_are_one_image_and_stay_finite():
    x, _ = planted(0.01, n=300)
    dump = np.concatenate([x, np.repeat(x[:3], 200, axis=0), np.zeros((50, x.shape[1]), np.float32)])
    columns = suspicion(dump, config=SMALL)
    for column in columns.values():
        assert np.isfinite(column).all()
        assert len({*column[[0, *range(300, 500)]]}) == 1  # every copy has the score of its image
    nearly = dump + np.random.default_rng(0).normal(size=dump.shape).astype(np.float32) * 1e-7
    assert all(np.isfinite(column).all() for column in suspicion(nearly, config=SMALL).values())


@pytest.mark.parametrize("n", [64, 100, 200])
def test_small_dumps(n):
    x, _ = planted(0.02, n=n)
    columns = suspicion(x)
    size = n * 4 // 5
    assert [f"slof_k{k}" in columns for k in (16, 64, 128, 256)] == [k < size for k in (16, 64, 128, 256)]
    assert np.isfinite(columns["suspicion"]).all()
    ids = content_ids(x)
    rule = fit_density(x, ids, ids)
    assert len(rule.contaminated.ids) == size
    assert (columns["density"] >= rule.pool_cutoff).sum() >= 3
    assert rule.left_out_ks == tuple(k for k in (16, 64, 128, 256) if k >= size)


def test_errors_teach():
    x, _ = planted(0.02, n=100)
    with pytest.raises(ValueError, match="63 candidates, at least 64"):
        suspicion(x[:63])
    with pytest.raises(ValueError, match="10 candidates, at least 64"):
        suspicion(np.repeat(x[:10], 10, axis=0))
    with pytest.raises(ValueError, match="20 trusted images, at least 64"):
        suspicion(x, reference=(x[:20], np.arange(20, dtype=np.uint64)))
    one = ScoredRows(x[:1], content_ids(x[:1]), content_ids(x[:1]), np.zeros(1, np.float32))
    with pytest.raises(ValueError, match="1 suspects and 1 others, too few"):
        fit_smoothing(one, one, one)


@pytest.mark.parametrize(
    "settings",
    [{"purge_fraction": 0}, {"purge_fraction": 0.6}, {"contaminated_divisors": ()}, {"published_ks": (1,)}, {"R": 1}],
)
def test_settings_out_of_range(settings):
    with pytest.raises(ValidationError):
        SuspicionConfig(**settings)


def test_coverage_is_said():
    assert SuspicionConfig().coverage == pytest.approx(0.05)
    assert SuspicionConfig(purge_fraction=0.04).coverage == pytest.approx(0.02)
    assert SuspicionConfig(contaminated_divisors=(32, 16)).coverage == pytest.approx(0.025)
    assert "up to 5.0% are covered" in SuspicionConfig().coverage_sentence


def captioned(poison, *, d=12, seed=5):
    """Caption embeddings: those of the poison agree, all others say what they like; and one row has none."""
    rng = np.random.default_rng(seed)
    said = rng.normal(size=(len(poison), d)).astype(np.float32)
    said[poison] = rng.normal(size=d) + rng.normal(size=(poison.sum(), d)) * 0.2
    said[np.flatnonzero(~poison)[0]] = 0
    return said


def test_captions_that_agree_confirm_a_suspicion():
    x, poison = planted(0.02)
    said = captioned(poison)
    columns = suspicion(x, captions=said, config=SMALL)
    image, excess = columns["suspicion_image"].astype(float), columns["caption_excess"].astype(float)
    assert excess[poison].min() > 0.5
    assert abs(np.median(excess[~poison])) < 0.1
    assert excess[np.flatnonzero(~poison)[0]] == 0
    middle = np.median(excess)  # of all, since all are candidates
    standardised = (excess - middle) / (1.4826 * np.median(np.abs(excess - middle)))
    wanted = np.where(image > 0, image * (1 + np.maximum(standardised, 0) / 4), image)
    np.testing.assert_allclose(columns["suspicion"], wanted, rtol=1e-4, atol=1e-5)
    assert suspicion(x, config=SMALL)["suspicion"].tobytes() == columns["suspicion_image"].tobytes()


def test_clean_captions_are_those_of_images_that_are_not_suspicious_whatever_their_density():
    rng = np.random.default_rng(0)
    ids, density = np.arange(100, dtype=np.uint64), rng.normal(size=100).astype(np.float32)
    image = rng.permutation(100).astype(float)
    rows = ScoredRows(rng.normal(size=(100, 4)), ids, ids, density, captions=rng.normal(size=(100, 4)))
    rule = _fit_excess(np.zeros((1, 4), np.float32), rows, image, SuspicionConfig(purge_fraction=0.2))
    assert rule is not None
    assert sorted(rule.ids.tolist()) == np.flatnonzero(image < 80).tolist()


def test_excess_is_the_mean_cosine_with_suspect_neighbours_less_that_with_clean_ones():
    rng = np.random.default_rng(0)
    images, clean = rng.normal(size=(7, 5)), rng.normal(size=(30, 5)).astype(np.float32)
    captions, suspects, of_clean = (unit_norm(rng.normal(size=(n, 6))) for n in (7, 20, 30))
    suspects[4] = 0  # has no caption
    near = np.stack([rng.permutation(20)[:3] for _ in range(7)])
    near[0] = (4, 1, 2)
    ids = np.arange(30, dtype=np.uint64)
    ids[9] = 1000  # the second image itself, which is none of its neighbours
    rule = CaptionExcess(suspects, clean, ids, of_clean, clean_neighbors=2)
    found = rule.score(images.astype(np.float32), np.arange(999, 1006, dtype=np.uint64), captions, near)
    for i in range(7):
        rows = [j for j in near[i] if j != 4]
        suspect = np.mean([captions[i] @ suspects[j] for j in rows])
        order = [j for j in np.argsort(np.linalg.norm(clean - images[i], axis=1)) if (i, j) != (1, 9)]
        assert found[i] == pytest.approx(suspect - np.mean([captions[i] @ of_clean[j] for j in order[:2]]), abs=1e-6)
