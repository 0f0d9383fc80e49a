"""Unlearning: each method does to a model what it says, and the two that repair one do."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional

from tarsift.sifters.settings import UnlearnConfig
from tarsift.sifters.unlearn import METHODS, WITHOUT_FORGOTTEN, unlearn
from tests.sifters.digits import TARGET, Made, as_floats, patched_digits, samples_of

QUICK = UnlearnConfig(
    steps=60, exact_steps=200, batch_size=64, augmented=False, rate=0.05, scrub_ascents=5, ibau_rounds=4,
    ibau_ascents=2, ibau_solves=2,
)  # fmt: skip


def forgotten(method: str, made: Made) -> np.ndarray:
    """What is to be forgotten: the poison, or all that is not surely clean."""
    return made.poison | (np.arange(len(made.poison)) >= 500) if method in WITHOUT_FORGOTTEN else made.poison


def repaired(method: str, seed: int = 1, config: UnlearnConfig = QUICK) -> torch.nn.Module:
    made = patched_digits()
    return unlearn(made.net, samples_of(made), forgotten(method, made), method, config=config, seed=seed)


@torch.no_grad()
def rates(net: torch.nn.Module) -> tuple[float, float]:
    """Return how many pictures with the patch are taken for the target, and the accuracy on those without."""
    made = patched_digits()
    guesses = net(as_floats(made.test)).argmax(dim=1).numpy()
    triggered = net(as_floats(made.triggered)).argmax(dim=1).numpy()
    return float((triggered == TARGET).mean()), float((guesses == made.test_labels).mean())


@torch.no_grad()
def loss_of(net: torch.nn.Module, mask: np.ndarray) -> float:
    made = patched_digits()
    logits = net(as_floats(made.images[mask]))
    return float(functional.cross_entropy(logits, torch.from_numpy(made.labels[mask])))


@pytest.mark.parametrize("method", list(METHODS))
def test_a_seed_gives_one_network_and_the_given_one_stays(method):
    made = patched_digits()
    before = copy.deepcopy(made.net.state_dict())
    random = torch.get_rng_state()
    once, again = repaired(method), repaired(method)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, made.net.state_dict()[name]) for name, value in before.items())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in once.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in once.state_dict().items())
    assert not once.training


@pytest.mark.parametrize("method", ["eu", "cf"])
def test_a_model_is_repaired(method):
    success, accuracy = rates(patched_digits().net)
    assert success > 0.9
    fixed = rates(repaired(method, config=QUICK.model_copy(update={"steps": 300, "exact_steps": 600})))
    assert fixed[0] < 0.05
    assert fixed[1] > accuracy - 0.02


def test_dampening_makes_weights_smaller_and_nothing_else():
    before = dict(patched_digits().net.named_parameters())
    after = dict(repaired("ssd").named_parameters())
    ratios = torch.cat([(after[name] / before[name]).flatten() for name in before])
    assert ratios.min() >= 0
    assert ratios.max() <= 1
    assert 0 < (ratios < 1).float().mean() < 0.5


@pytest.mark.parametrize("method", ["scrub", "badt"])
def test_students_do_worse_on_what_is_forgotten_and_not_on_the_rest(method):
    made = patched_digits()
    student = repaired(method)
    assert loss_of(student, made.poison) > 2 * loss_of(made.net, made.poison)
    assert loss_of(student, ~made.poison) < 1


def test_a_game_against_triggers_costs_the_trigger_and_little_accuracy():
    success, accuracy = rates(patched_digits().net)
    fixed = rates(repaired("ibau", config=QUICK.model_copy(update={"ibau_rounds": 60, "ibau_ascents": 5})))
    assert fixed[0] < success - 0.2
    assert fixed[1] > accuracy - 0.05


def test_forgetting_others_repairs_nothing():
    made = patched_digits()
    at_random = np.random.default_rng(0).permutation(made.poison)
    config = QUICK.model_copy(update={"exact_steps": 600})
    kept = unlearn(made.net, samples_of(made), at_random, "eu", config=config)
    assert rates(kept)[0] > 0.8


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "prayer"}, "no method 'prayer'"),
        ({"forget": np.zeros(1400, bool)}, "0 of 1400"),
        ({"forget": np.ones(1400, bool)}, "1400 of 1400"),
        ({"forget": np.ones(7, bool)}, "one entry per sample"),
        ({"forget": np.zeros(1400, int)}, "int64"),
        ({"labels": np.zeros(3, np.int64)}, "one entry per sample"),
    ],
)
def test_what_is_refused(changes, says):
    made = patched_digits()
    given = {"labels": made.labels, "forget": made.poison, "method": "cf"} | changes
    with pytest.raises(ValueError, match=says):
        unlearn(made.net, samples_of(made, given["labels"]), given["forget"], given["method"], config=QUICK)


def test_weights_that_cannot_be_drawn_anew_are_told():
    class Scale(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by = torch.nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.by

    made = patched_digits()
    net = torch.nn.Sequential(*copy.deepcopy(made.net), Scale())
    with pytest.raises(ValueError, match="layer '9'"):
        unlearn(net, samples_of(made), made.poison, "eu", config=QUICK)
