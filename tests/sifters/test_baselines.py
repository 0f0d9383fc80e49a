import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from tarsift.sifters.baselines import BASELINES, BaselineConfig, clip_entropy, sift_by
from tests.sifters.sets import pictures, planted

QUICK = BaselineConfig(epochs=8, models=2, trims=2, inversion_steps=20)


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_scores_features_and_pictures_the_same_way_each_time(name):
    images, labels, _ = planted(300)
    once, again = (sift_by(name, images, labels, config=QUICK, seed=2).score for _ in range(2))
    assert once.dtype == np.float32
    assert once.shape == (300,)
    assert np.isfinite(once).all()
    assert once.tobytes() == again.tobytes()
    pixels, classes = pictures(40, side=8)
    few = QUICK.model_copy(update={"epochs": 1, "early_epochs": 1, "inversion_steps": 2})
    assert np.isfinite(sift_by(name, pixels, classes, config=few).score).all()


def test_loss_scan_suspects_what_is_learned_first():
    images, labels, _ = planted(rate=0.0)
    hard = np.random.default_rng(0).random(len(labels)) < 0.1
    labels = np.where(hard, (labels + 1) % 5, labels)
    assert roc_auc_score(hard, sift_by("loss_scan", images, labels, config=QUICK).score) < 0.1


# What each finds here, by its nature.
FINDS = {"dcm": 0.8, "spectral_signatures": 0.8, "activation_clustering": 0.6, "diluted_loss": 0.9}


@pytest.mark.parametrize("name", FINDS)
def test_planted_poison_has_high_scores(name):
    images, labels, poison = planted()
    score = sift_by(name, images, labels, config=QUICK).score
    target = labels == 0  # poison is in one class
    assert roc_auc_score(poison[target], score[target]) > FINDS[name]


def test_distances_to_class_means_by_hand():
    features = np.array([[0.0, 0], [2, 0], [1, 4], [5, 1], [5, 5]])
    labels = np.array([0, 0, 0, 1, 1])
    standardised = (features - features.mean(axis=0)) / features.std(axis=0)
    means = np.stack([standardised[:3].mean(axis=0), standardised[3:].mean(axis=0)])
    expected = np.linalg.norm(standardised - means[labels], axis=1)
    assert np.allclose(sift_by("dcm", features, labels).score, expected, rtol=1e-5)


def test_a_witness_that_is_sure_of_another_class_and_one_that_is_sure_of_none():
    classes = np.eye(3)
    images = np.array([[1.0, 0, 0], [0, 1, 0], [1, 1, 1]])
    result = clip_entropy(images, classes, np.array([0, 0, 0]), temperature=0.1)
    assert result.score[0] < result.score[2] < result.score[1]
    assert np.allclose(result.details["entropy"], [0.001, 0.001, np.log(3)], atol=2e-3)
    assert np.allclose(result.details["against_label"], [0, 10, np.log(3)], atol=1e-3)


def test_an_unknown_baseline_is_named():
    with pytest.raises(ValueError, match=r"no baseline 'dcn': choose one of dcm, mi_dcm"):
        sift_by("dcn", np.zeros((4, 2)), np.array([0, 1, 0, 1]))
