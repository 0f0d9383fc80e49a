import copy

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from tarsift.sifters import ispl as module
from tarsift.sifters.ispl import IsplConfig, beta, compatible_sets, ispl, iterations_of, modal_vote
from tarsift.sifters.training import LabelledSet, batches_of
from tests.sifters.sets import pictures, planted

QUICK = IsplConfig(repeats=1, rounds=4, share=0.24, voter_epochs=20, self_rounds=6)


def labelled(images, labels):
    return LabelledSet(images, labels, network=QUICK.network, fit=QUICK.fit, seed=0, device="cpu")


def test_poison_is_dropped_and_most_clean_samples_are_kept():
    images, labels, poison = planted()
    result = ispl(images, labels, config=QUICK, seed=1)
    assert result.kept is not None
    assert result.kept[poison].mean() < 0.2
    assert result.kept[~poison].mean() > 0.9
    assert roc_auc_score(poison, result.score) > 0.95
    assert result.facts == {"voters": 4}
    assert ((result.details["votes"] * 4) % 1 == 0).all()


def test_the_same_seed_gives_the_same_bytes():
    images, labels, _ = planted(300)
    once, again, other = (ispl(images, labels, config=QUICK, seed=seed) for seed in (3, 3, 4))
    assert once.score.tobytes() == again.score.tobytes()
    assert once.score.tobytes() != other.score.tobytes()


@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_run_that_was_broken_off_goes_on_to_the_same_bytes(after):
    images, labels, _ = planted(300)
    config = QUICK.model_copy(update={"repeats": 2, "rounds": 3})
    states, steps = [], []
    whole = ispl(images, labels, config=config, seed=2, save=lambda state: states.append(copy.deepcopy(state)))
    assert len(states) == 6
    again = ispl(images, labels, config=config, seed=2, state=states[after], on_step=lambda step, _: steps.append(step))
    assert again.score.tobytes() == whole.score.tobytes()
    assert (again.details["votes"] == whole.details["votes"]).all()
    assert steps[0] == (after + 2 if after < 4 else 6)


def test_a_set_that_is_too_small_to_be_taken_apart_is_one_set():
    images, _, _ = planted(4)
    assert ispl(images, np.array([0, 1, 2, 3]), config=QUICK).facts == {"voters": 1}


def test_as_many_sets_as_the_settings_say_and_none_of_them_twice():
    images, labels, _ = planted(600)
    found = list(compatible_sets(labelled(images, labels), QUICK))
    assert len(found) == 4
    rows = torch.cat(found)
    assert len(rows) == len(rows.unique())
    assert all(0.22 * 600 < len(part) < 0.34 * 600 for part in found[:3])


@pytest.mark.parametrize(
    ("share", "betas"),
    [(0.12, [0.36, 0.24, 0.12, 0.12, 0.12]), (0.5, [1.0, 0.5, 0.5, 0.5]), (1.0, [1.0, 1.0, 1.0])],
)
def test_the_schedule(share, betas):
    iterations = iterations_of(share)
    assert [round(beta(i, iterations, share), 6) for i in range(iterations)] == betas


def test_trimming_keeps_the_lowest_losses_and_some_of_every_class():
    targets, losses = torch.tensor([0] * 10 + [1] * 10), torch.arange(20.0)
    assert module._trim(losses, targets, 0.25).nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 10]


def test_a_sample_is_drawn_from_each_class():
    given = labelled(np.zeros((52, 4)), np.array([0] * 40 + [1] * 11 + [2]))
    rows = module._sample(given, torch.arange(52), 0.25)
    assert np.bincount(given.targets[rows]).tolist() == [10, 3, 1]
    assert len(rows.unique()) == len(rows)


def test_ties_of_votes_are_drawn_by_the_seed():
    counts = np.tile([3, 3, 0], (400, 1))
    once, again, other = (modal_vote(counts, seed=seed) for seed in (0, 0, 1))
    assert (once == again).all()
    assert (once != other).any()
    assert 150 < (once == 0).sum() < 250
    assert not (once == 2).any()
    assert modal_vote(np.array([[2, 3, 1]]), seed=0).tolist() == [1]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 127, 128, 129, 300])
def test_every_row_is_in_a_batch_and_no_batch_has_one(size):
    batches = list(batches_of(torch.arange(size), 128, torch.Generator().manual_seed(0)))
    assert sorted(torch.cat(batches).tolist()) == list(range(size))
    assert all(2 <= len(batch) <= 128 for batch in batches) or size == 1


def test_low_losses_are_kept_only_if_asked_for():
    images, labels, _ = planted(400)
    config = QUICK.model_copy(update={"self_rounds": 0})
    plain, more = (
        ispl(images, labels, config=config.model_copy(update={"keep_low_losses": low})).kept for low in (False, True)
    )
    assert plain is not None
    assert more is not None
    assert (more | plain == more).all()
    assert all(more[labels == label].mean() >= 0.5 for label in range(5))


def test_a_tiny_set_is_sifted():
    images, labels, _ = planted(24)
    labels[:2] = (0, 1)
    result = ispl(images, labels, config=QUICK)
    assert np.isfinite(result.score).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("network", ["small-cnn", "preact-resnet18"])
def test_a_gpu_learns_as_well_as_a_cpu(network):
    images, labels = pictures(600)
    accuracy = {}
    for device in ("cpu", "cuda"):
        given = LabelledSet(images, labels, network=network, fit=QUICK.fit, seed=0, device=device)
        learner = given.fresh()
        learner.fit(given.rows, epochs=8, draw=given.draw)
        accuracy[device] = float((learner.judge(given.rows).argmax(dim=1) == given.targets).float().mean())
    assert accuracy["cuda"] > accuracy["cpu"] - 0.05
