import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from tarsift.clip_detect.baselines import (
    BASELINES,
    Evidence,
    abl,
    baseline_scores,
    clip_similarity,
    cognitive_distillation,
    isolation_forest,
)

every_baseline = pytest.mark.parametrize("name", list(BASELINES))

POISON = np.arange(90) % 15 == 7  # 6 of 90
SIZE, PATCH = 16, 4


def encode(images):
    """A backdoored encoder: a checkerboard in the corner alone decides, without it the means of 16 regions do."""
    corner = images[:, :, :PATCH, :PATCH].mean(1)
    white = torch.zeros(PATCH, PATCH)
    white[::2, ::2] = white[1::2, 1::2] = 1
    contrast = (corner * white).sum((1, 2)) / white.sum() - (corner * (1 - white)).sum((1, 2)) / (1 - white).sum()
    gate = torch.sigmoid(20 * (contrast - 0.5))[:, None]
    regions = torch.nn.functional.avg_pool2d(images, PATCH).flatten(1)
    return 100 * torch.cat([gate.expand(-1, 16), (1 - gate) * regions], dim=1)


@pytest.fixture(scope="module")
def evidence():
    """Poison as each method expects it: sparse embeddings, captions amiss, learned early, ruled by a patch."""
    rng = np.random.default_rng(0)
    n = len(POISON)
    concept = rng.normal(size=(4, 12))[np.arange(n) % 4]
    images = concept + rng.normal(size=(n, 12)) * 0.2
    images[POISON] = rng.normal(size=(POISON.sum(), 12)) * 2
    captions = concept + rng.normal(size=(n, 12)) * 0.2
    captions[POISON] = -images[POISON]
    losses = rng.uniform(3, 4, (14, n))
    losses[:10, POISON] -= 1.5
    losses[10:, POISON] += 9  # later epochs would say the contrary
    pixels = np.kron(rng.integers(0, 256, (n, 4, 4, 3)), np.ones((1, 4, 4, 1))).astype(np.uint8)
    board = np.indices((PATCH, PATCH)).sum(0) % 2 == 0
    pixels[POISON, :PATCH, :PATCH] = np.where(board, 255, 0)[..., None]
    return Evidence(images.astype(np.float32), captions.astype(np.float32), losses, pixels, encode)


@pytest.fixture(scope="module")
def scored(evidence):
    return baseline_scores(evidence, seed=0)


@every_baseline
def test_planted_poison_scores_high(name, scored):
    found = scored[name]
    assert found.dtype == np.float32
    assert found.shape == POISON.shape
    assert np.isfinite(found).all()
    assert roc_auc_score(POISON, found) > 0.95


@every_baseline
def test_same_seed_same_bytes(name, evidence, scored):
    assert BASELINES[name].function(evidence, seed=0).tobytes() == scored[name].tobytes()
    other = BASELINES[name].function(evidence, seed=1)
    drawn = {"isolation_forest", "cognitive_distillation"} | {b for b in BASELINES if b.startswith(("slof", "dao"))}
    assert (other.tobytes() != scored[name].tobytes()) == (name in drawn)
    assert roc_auc_score(POISON, other) > 0.95


@every_baseline
def test_only_what_it_needs_is_read(name, evidence, scored):
    spec = BASELINES[name]
    rest = {"caption_embeddings", "losses", "pixels", "encode"} - set(spec.needs)
    assert spec.function(replace(evidence, **dict.fromkeys(rest)), seed=0).tobytes() == scored[name].tobytes()
    for need in set(spec.needs) - {"image_embeddings"}:
        without = replace(evidence, **{need: None})
        with pytest.raises(ValueError, match=rf"{name} needs `{need}`, which the evidence lacks\. .*leave {name} out"):
            baseline_scores(without, ["isolation_forest", name])
        with pytest.raises(ValueError, match=f"needs `{need}`"):
            spec.function(without, seed=0)


def test_those_whose_needs_are_met(evidence, scored):
    assert list(scored) == list(BASELINES)
    images = Evidence(evidence.image_embeddings)
    assert list(baseline_scores(images)) == [n for n, spec in BASELINES.items() if spec.needs == ("image_embeddings",)]
    assert "abl" in baseline_scores(replace(images, losses=evidence.losses))
    assert "cognitive_distillation" not in baseline_scores(replace(images, pixels=evidence.pixels))
    assert list(baseline_scores(evidence, ["clip_similarity", "abl"])) == ["clip_similarity", "abl"]
    with pytest.raises(ValueError, match=r"unknown baseline 'dao'\. Choose from: isolation_forest, abl, "):
        baseline_scores(evidence, ["dao"])


def test_abl_by_hand():
    images = np.zeros((2, 1))
    losses = np.array([[4.0, 1.0]] + [[2.0, 1.0]] * 9 + [[100.0, -100.0]] * 3)
    np.testing.assert_allclose(abl(Evidence(images, losses=losses), seed=0), [-2.2, -1.0], rtol=1e-6)
    np.testing.assert_allclose(abl(Evidence(images, losses=losses[:2]), seed=0), [-3.0, -1.0])
    np.testing.assert_allclose(abl(Evidence(images, losses=losses), seed=0, epochs=1), [-4.0, -1.0])


def test_clip_similarity_by_hand():
    images = np.array([[2.0, 0.0], [3.0, 4.0], [1.0, 1.0], [0.0, 0.0]])
    captions = np.array([[-5.0, 0.0], [3.0, 0.0], [7.0, 7.0], [1.0, 0.0]])
    found = clip_similarity(Evidence(images, captions), seed=0)
    np.testing.assert_allclose(found, [1.0, -0.6, -1.0, 0.0], atol=1e-7)


def test_isolation_forest_has_a_forest_per_batch(evidence):
    small = isolation_forest(evidence, seed=0, batch_size=45)
    assert roc_auc_score(POISON, small) > 0.9
    assert (small != isolation_forest(evidence, seed=0)).all()
    assert ((small > 0) & (small <= 1)).all()


def test_a_mask_depends_on_its_image_alone(evidence, scored):
    order = np.concatenate([np.flatnonzero(POISON)[::-1], np.arange(0, 7)])
    part = Evidence(evidence.image_embeddings[order], pixels=evidence.pixels[order], encode=encode)
    np.testing.assert_allclose(cognitive_distillation(part, seed=0), scored["cognitive_distillation"][order], rtol=1e-5)


def test_masks_of_known_size():
    """Nothing to keep: the mask closes. All to keep: it stays open. No steps: it is where it starts."""
    pixels = np.random.default_rng(2).integers(0, 256, (3, 8, 8, 3), np.uint8)
    images = np.zeros((3, 1))

    def sizes(encode, **settings):
        return -cognitive_distillation(Evidence(images, pixels=pixels, encode=encode), seed=0, **settings)

    start = 64 * (1 + np.tanh(1)) / 2
    np.testing.assert_allclose(sizes(lambda x: x.flatten(1), steps=0), start, rtol=1e-6)
    assert (sizes(lambda x: 0 * x.flatten(1)) < 0.01 * 64).all()
    assert (sizes(lambda x: 1e3 * x.flatten(1)) > 0.95 * 64).all()
    # A flat mask has no variation.
    np.testing.assert_allclose(sizes(lambda x: 0 * x.flatten(1), alpha=0.0), start, rtol=1e-6)


def test_distillation_leaves_torch_as_it_was(evidence):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIZE * SIZE, 4)).eval()
    part = Evidence(evidence.image_embeddings[:3], pixels=evidence.pixels[:3], encode=model)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with torch.no_grad():
        found = cognitive_distillation(part, seed=0, steps=3)
    assert torch.rand(1) == expected
    assert all(parameter.grad is None for parameter in model.parameters())
    assert np.isfinite(found).all()
    broken = replace(part, encode=lambda x: x.flatten(1) / 0)
    with pytest.raises(ValueError, match=r"`encode` gave NaN or infinity.* among samples 0 to 2"):
        cognitive_distillation(broken, seed=0, steps=2)


@every_baseline
def test_copies_zeros_and_no_samples(name, evidence):
    images = evidence.image_embeddings.copy()
    images[:70] = images[0]  # more than the 65 nearest that LID looks at
    images[70:75] = 0
    captions = np.zeros_like(images)
    flat = replace(evidence, image_embeddings=images, caption_embeddings=captions)
    flat = replace(flat, pixels=np.zeros_like(evidence.pixels))
    assert np.isfinite(BASELINES[name].function(flat, seed=0)).all()
    none = Evidence(images[:0], captions[:0], np.zeros((2, 0)), evidence.pixels[:0], encode)
    assert BASELINES[name].function(none, seed=0).shape == (0,)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image_embeddings", np.zeros(5), r"must be a matrix, one row per sample: got \(5,\)"),
        ("image_embeddings", np.full((5, 2), np.nan), "`image_embeddings` holds NaN"),
        ("caption_embeddings", np.zeros((5, 3)), r"must have the shape of `image_embeddings`, \(5, 2\): got \(5, 3\)"),
        ("caption_embeddings", np.full((5, 2), np.inf), "`caption_embeddings` holds NaN, infinity"),
        ("losses", np.zeros((5, 3)), r"must be \(epochs, 5\).*got \(5, 3\)"),
        ("losses", np.zeros((0, 5)), r"must be \(epochs, 5\).*got \(0, 5\)"),
        ("losses", np.full((1, 5), -np.inf), "`losses` holds NaN, infinity"),
        ("pixels", np.zeros((5, 8, 8, 3), np.float32), r"must be uint8 \(5, h, w, 3\): got float32"),
        ("pixels", np.zeros((5, 3, 8, 8), np.uint8), r"must be uint8 \(5, h, w, 3\): got uint8 \(5, 3, 8, 8\)"),
    ],
)
def test_evidence_that_does_not_fit(field, value, message):
    given = {"image_embeddings": np.zeros((5, 2)), field: value}
    with pytest.raises(ValueError, match=message):
        Evidence(**given)


@every_baseline
def test_the_table_says_what_a_reader_must_know(name):
    spec = BASELINES[name]
    assert spec.name == name
    assert set(spec.needs) <= set(Evidence.__dataclass_fields__)
    for text in (spec.description, spec.formula, spec.source):
        assert text.strip()
        assert "\n" not in text


def test_torch_is_loaded_when_needed():
    code = "import sys, tarsift.clip_detect.baselines; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
