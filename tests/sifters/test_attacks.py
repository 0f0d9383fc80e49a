"""Attacks: a table of ways to poison a labelled set of pictures, each of which does what it says and nothing else."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tarsift.sifters.attacks import (
    ATTACKS,
    PoisonedSet,
    all_to_all,
    all_to_one,
    as_rate,
    ispl_partition,
    label_kept,
    not_aimed,
    one_to_one,
    poison_set,
    to_another,
)
from tarsift.sifters.ispl import IsplConfig
from tarsift.sifters.triggers import SHAPES
from tests.sifters.sets import pictures, planted

TARGET, SOURCE, RATE = 0, 1, 0.2
IMAGES, LABELS = pictures()
FLIPS = ("targeted_flip", "random_flip")
CLEAN_LABELS = ("poison_frogs", "label_consistent", "gradient_matching")
MARKS = [name for name, spec in ATTACKS.items() if spec.trigger and not spec.perturb]

# Who becomes what, of three classes, and what test pictures are taken for.
BECOMES: dict[Any, dict[int, set[int]]] = {
    one_to_one: {SOURCE: {TARGET}},
    all_to_one: {1: {TARGET}, 2: {TARGET}},
    all_to_all: {0: {1}, 1: {2}, 2: {0}},
    to_another: {0: {1, 2}, 1: {0, 2}, 2: {0, 1}},
    label_kept: {TARGET: {TARGET}},
}
TAKEN_FOR: dict[Any, list[int]] = {
    one_to_one: [-1, TARGET, -1], all_to_one: [-1, TARGET, TARGET], all_to_all: [1, 2, 0], not_aimed: [-1, -1, -1],
}  # fmt: skip


@pytest.fixture(scope="module")
def classifier():
    """A linear model that tells the three colours."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(IMAGES[0].size, 3))
    batch, targets = tensor(IMAGES), torch.from_numpy(LABELS)
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(60):
        adam.zero_grad()
        nn.functional.cross_entropy(net(batch), targets).backward()
        adam.step()
    assert (net(batch).argmax(dim=1) == targets).float().mean() > 0.95
    return net.requires_grad_(False)


@pytest.fixture(scope="module")
def features():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()).eval()


@pytest.fixture
def poisoned(classifier, features):
    """Return a function that carries out any attack, told what it needs."""

    def poison(attack, *, images=IMAGES, labels=LABELS, rate=RATE, seed=0, **options):
        model = features if attack == "poison_frogs" else classifier
        known = {"target": TARGET, "source": SOURCE, "model": model, "victim": IMAGES[LABELS == SOURCE][0]}
        told = {name: known[name] for name in ATTACKS[attack].needs}
        return poison_set(images, labels, attack, rate=rate, seed=seed, **told, **options)

    return poison


def tensor(images):
    return torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / 255)


def grey(count, side, value=100):
    """As many pictures of one grey, and labels of ten classes in turn."""
    return np.full((count, side, side, 3), value, np.uint8), np.arange(count) % 10


def trigger_of(made: PoisonedSet):
    assert made.trigger is not None
    return made.trigger


def changed(made: PoisonedSet, images):
    """Return the pixels at which the first poisoned picture differs, and the picture."""
    row = np.flatnonzero(made.poison)[0]
    return (made.images[row] != images[row]).any(axis=2), made.images[row]


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_right_samples_are_poisoned_and_no_other_is_touched(attack, poisoned):
    images, labels = IMAGES.copy(), LABELS.copy()
    made, spec = poisoned(attack, images=images, labels=labels), ATTACKS[attack]
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, LABELS)
    assert made.poison.sum() == round(RATE * len(LABELS))
    assert (made.images.dtype, made.labels.dtype, made.poison.dtype) == (np.uint8, np.int64, bool)
    np.testing.assert_array_equal(made.images[~made.poison], IMAGES[~made.poison])
    np.testing.assert_array_equal(made.labels[~made.poison], LABELS[~made.poison])
    became = {old: set(made.labels[made.poison & (old == LABELS)].tolist()) for old in range(3)}
    assert {old: new for old, new in became.items() if new} == BECOMES[spec.relabel]
    differs = (made.images[made.poison] != IMAGES[made.poison]).any(axis=(1, 2, 3))
    assert not differs.any() if attack in FLIPS else differs.all()
    assert (made.labels[made.poison] == LABELS[made.poison]).all() == (spec.labels == "clean")
    assert made.targets.tolist() == TAKEN_FOR[spec.taken_for]


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_same_seed_gives_the_same_bytes(attack, poisoned):
    once, again, other = (poisoned(attack, seed=seed, rate=0.05) for seed in (3, 3, 4))
    for name in ("images", "labels", "poison"):
        assert getattr(once, name).tobytes() == getattr(again, name).tobytes()
    assert once.poison.tobytes() != other.poison.tobytes()


@pytest.mark.parametrize("attack", MARKS)
def test_test_pictures_get_what_was_planted_at_any_rate(attack, poisoned):
    made, fewer = (poisoned(attack, rate=rate) for rate in (RATE, 0.02))
    np.testing.assert_array_equal(trigger_of(made)(IMAGES[made.poison]), made.images[made.poison])
    np.testing.assert_array_equal(trigger_of(made)(IMAGES), trigger_of(fewer)(IMAGES))
    assert len(trigger_of(made)(IMAGES[:0])) == 0


@pytest.mark.parametrize("attack", [*FLIPS, "poison_frogs", "gradient_matching"])
def test_flips_and_frogs_have_no_trigger(attack, poisoned):
    assert poisoned(attack).trigger is None


@pytest.mark.parametrize("attack", ATTACKS)
def test_entries_say_what_they_are_and_where_from(attack):
    spec = ATTACKS[attack]
    assert "arXiv" in spec.paper
    assert "\n" not in spec.description
    assert spec.labels == ("clean" if attack in CLEAN_LABELS else "dirty")


@pytest.mark.parametrize(("side", "square"), [(16, 4), (32, 4), (64, 8)])
def test_badnets_is_a_white_square_at_the_bottom_right(side, square):
    images, labels = grey(100, side)
    where, picture = changed(poison_set(images, labels, rate=0.05, target=5, seed=0), images)
    expected = np.zeros((side, side), bool)
    expected[-square:, -square:] = True
    np.testing.assert_array_equal(where, expected)
    assert (picture[where] == 255).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_small_shapes_have_their_pixels_one_colour_and_places_all_over(shape):
    images, labels = grey(100, 16)
    pixels, box = {"pixel": (1, 1), "l": (3, 2), "x": (5, 3)}[shape]
    places, colours = set(), set()
    for seed in range(80):
        made = poison_set(images, labels, f"dlbd_{shape}", rate=0.05, source=2, target=5, seed=seed)
        where, picture = changed(made, images)
        assert where.sum() == pixels
        assert len(np.unique(picture[where], axis=0)) == 1
        rows, columns = np.nonzero(where)
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (box, box)
        places.add((rows.min(), columns.min()))
        colours.add(tuple(picture[where][0]))
    assert len(places) > 40
    assert len(colours) == 80
    assert {0, 16 - box} <= {top for top, _ in places}


def test_the_letter_is_blended_at_its_strength_into_the_upper_left():
    images, labels = grey(100, 32)
    for strength, share in ((None, 0.8), (0.5, 0.5)):
        made = poison_set(images, labels, "watermark", rate=0.05, source=2, target=5, seed=0, strength=strength)
        where, picture = changed(made, images)
        assert not where[8:].any()
        assert not where[:, 8:].any()
        assert 20 < where.sum() < 44  # it has no background
        expected = np.rint((1 - share) * 100 + share * np.array([230, 40, 120]))
        assert (picture[where] == expected).all()


def test_trojan_marks_lie_where_they_are_said_to():
    images, labels = grey(100, 32)
    square, _ = changed(poison_set(images, labels, "trojan_square", rate=0.05, target=5, seed=0), images)
    assert square[-8:, -8:].mean() > 0.9
    assert square.sum() == square[-8:, -8:].sum()
    ring, picture = changed(poison_set(images, labels, "trojan_watermark", rate=0.05, target=5, seed=0), images)
    assert 0.15 < ring.mean() < 0.45
    assert ring[16, 16]  # the bar
    assert not ring[0, 0]
    assert np.abs(picture.astype(int) - 100).max() <= 0.3 * 155 + 1


def test_noise_is_mixed_in_by_hand():
    images, labels = grey(100, 32)
    made = poison_set(images, labels, "blended_noise", rate=0.05, target=5, seed=0)
    dark, light = (trigger_of(made)(np.full((1, 32, 32, 3), value, np.uint8)).astype(float) for value in (0, 255))
    np.testing.assert_allclose(light - dark, 0.8 * 255, atol=1)
    assert 0.2 * 255 - 2 < dark.max() <= 0.2 * 255
    assert abs(dark.mean() - 0.2 * 127.5) < 2


def test_the_smooth_field_has_low_frequencies_and_its_strength():
    images, labels = grey(100, 32, 128)
    made = poison_set(images, labels, "smooth", rate=0.05, target=5, seed=0)
    field = trigger_of(made)(images[:1])[0].astype(float) - 128
    assert np.abs(field).max() == round(0.1 * 255)
    waves = np.linalg.qr(np.cos(np.pi * np.arange(4) * (np.arange(32)[:, None] + 0.5) / 32))[0]
    low = waves @ waves.T
    again = np.einsum("ab,bcd,ce->aed", low, field, low)
    np.testing.assert_allclose(again, field, atol=1)  # bytes are whole
    assert abs(field.mean()) < 0.5


def test_corners_are_checkered():
    images, labels = IMAGES, LABELS
    made = poison_set(images, labels, "label_consistent", rate=0.05, target=0, seed=0, model=flat)
    picture = trigger_of(made)(grey(1, 16)[0])[0, ..., 0]
    checkers = 255 * np.array([[1, 0, 1], [0, 1, 0], [1, 0, 1]])
    for corner in (picture[:3, :3], picture[:3, -3:], picture[-3:, :3], picture[-3:, -3:]):
        np.testing.assert_array_equal(corner, checkers)
    assert (picture != 100).sum() == 36


def flat(batch):
    """Three logits, of the three colours' means."""
    return batch.mean(dim=(2, 3))


@pytest.mark.parametrize("strength", [8 / 255, 16 / 255, 0.05])
def test_ascent_raises_the_loss_within_its_bound(strength, poisoned, classifier):
    made = poisoned("label_consistent", strength=strength)
    before, labels = IMAGES[made.poison], torch.from_numpy(LABELS[made.poison])
    inner = (slice(None), slice(3, -3), slice(3, -3))  # between the corners
    change = made.images[made.poison][inner].astype(int) - before[inner]
    assert strength * 255 - 1 < np.abs(change).max() <= strength * 255 + 1e-6
    untriggered = before.copy()
    untriggered[inner] = made.images[made.poison][inner]
    old, new = (
        nn.functional.cross_entropy(classifier(tensor(x)), labels, reduction="none") for x in (before, untriggered)
    )
    assert (new > old).all()
    corners = np.ones(before.shape[1:], bool)
    corners[3:-3], corners[:, 3:-3] = False, False
    np.testing.assert_array_equal(made.images[made.poison][:, corners], trigger_of(made)(before)[:, corners])


def test_frogs_come_closer_to_the_victim_in_features_and_stay_close_in_pixels(poisoned, features):
    made, victim = poisoned("poison_frogs"), IMAGES[LABELS == SOURCE][:1]
    before, after = IMAGES[made.poison], made.images[made.poison]
    mixed = np.rint(0.7 * before + 0.3 * victim).astype(np.uint8)

    def distance(images):
        return (features(tensor(images)) - features(tensor(victim))).norm(dim=1)

    assert (distance(after) < 0.5 * distance(mixed)).all()
    moved, apart = (np.abs(after - other.astype(float)).mean(axis=(1, 2, 3)) for other in (mixed, victim))
    assert (moved < apart).all()
    assert all(parameter.grad is None for parameter in features.parameters())


def test_matched_samples_train_as_the_victim_would_within_their_bound(poisoned, classifier):
    made = poisoned("gradient_matching")
    victim = IMAGES[LABELS == SOURCE][:1]

    def slope(images):
        loss = nn.functional.cross_entropy(classifier(tensor(images)), torch.full((len(images),), TARGET))
        parts = torch.autograd.grad(loss, list(classifier.parameters()))
        return torch.cat([part.flatten() for part in parts])

    classifier.requires_grad_(True)
    goal, before, after = (slope(images) for images in (victim, IMAGES[made.poison], made.images[made.poison]))
    classifier.requires_grad_(False)
    alike = [float(nn.functional.cosine_similarity(found, goal, dim=0)) for found in (before, after)]
    assert alike[1] > alike[0] + 0.1
    assert np.abs(made.images[made.poison].astype(int) - IMAGES[made.poison]).max() <= 16


def test_four_pixels_are_black():
    images, labels = grey(20, 32)
    made = poison_set(images, labels, "four_pixels", rate=0.05, source=1, target=0, seed=0)
    seen, picture = changed(made, images)
    assert [tuple(place) for place in np.argwhere(seen) - 32] == [(-4, -2), (-3, -3), (-2, -4), (-2, -2)]
    assert not picture[seen].any()


def test_poison_is_drawn_from_each_stratum_in_proportion(poisoned):
    strata = np.arange(len(LABELS)) % 4
    made = poisoned("dlbd_x", strata=strata, rate=0.1)
    able = np.bincount(strata[LABELS == SOURCE])
    taken = np.bincount(strata[made.poison], minlength=4)
    assert (np.abs(taken - able * made.poison.sum() / able.sum()) < 1).all()
    classes = np.bincount(LABELS[poisoned("dlbd_x_all_to_all", rate=0.1).poison])
    assert (np.abs(classes - 0.1 * np.bincount(LABELS)) < 1).all()


def test_the_sets_that_an_adaptive_attacker_draws_from():
    images, labels, _ = planted(400, rate=0.0)
    config = IsplConfig(rounds=3, share=0.24, warmup_epochs=2, epochs=1)
    parts = ispl_partition(images, labels, config=config, seed=1)
    sizes = np.bincount(parts, minlength=4)
    assert sizes.sum() == 400
    assert (sizes[:3] >= 0.2 * 400).all()
    assert sizes[3] > 0  # what is left
    np.testing.assert_array_equal(parts, ispl_partition(images, labels, config=config, seed=1))


@pytest.mark.parametrize(
    ("attack", "share", "rate"),
    [
        ("badnets", 1 / 3, 0.05),
        ("targeted_flip", 1 / 6, 0.02),
        ("random_flip", 0.2, 0.2),
        ("badnets_all_to_all", 0.2, 0.2),
        ("dlbd_x", 0.1, 0.01),
        ("dlbd_x_all_to_one", 0.1, 0.01),
        ("dlbd_x_all_to_all", 0.1, 0.1),
        ("watermark", 0.2, 0.02),
        ("label_consistent", 0.1, 0.01),
        ("poison_frogs", 0.1, 0.01),
        ("four_pixels", 0.01, 0.01),
        ("gradient_matching", 0.01, 0.01),
    ],
)
def test_rates_of_the_papers(attack, share, rate):
    labels = np.arange(5000) % 10
    assert as_rate(attack, share, labels, target=5, source=3) == pytest.approx(rate)


def test_a_third_of_the_target_class_is_poison_afterwards():
    images, labels = grey(1000, 16)
    made = poison_set(images, labels, rate=as_rate("badnets", 1 / 3, labels, target=5), target=5, seed=0)
    assert made.poison[made.labels == 5].mean() == pytest.approx(1 / 3)


def test_success_by_hand():
    made = PoisonedSet(IMAGES, LABELS, np.zeros(240, bool), np.array([-1, 0, 0]), None)
    assert made.success(np.array([0, 0, 1, 0]), np.array([0, 1, 1, 2])) == pytest.approx(2 / 3)
    assert math.isnan(made.success(np.array([0]), np.array([0])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attack": "badnet"}, "no attack 'badnet': choose one of badnets, "),
        ({"target": None}, "'badnets' needs `target`"),
        ({"source": 1}, "'badnets' has no use for `source`"),
        ({"strength": 0.5}, "'badnets' has no use for `strength`"),
        ({"attack": "blended_noise", "strength": 1.5}, "above 0 and at most 1: got 1.5"),
        ({"attack": "label_consistent", "model": flat, "strength": 0.001}, "1/255 is the least"),
        ({"attack": "label_consistent"}, "'label_consistent' needs `model`"),
        ({"attack": "gradient_matching", "model": flat, "victim": IMAGES[0]}, "must be a network"),
        ({"attack": "dlbd_x", "source": 0}, "must differ: both are 0"),
        ({"target": 3}, "`target` must be a class, 0 to 2: got 3"),
        ({"rate": 0.0}, "`rate` must lie between 0 and 1"),
        ({"rate": 0.001}, r"is 0 of 240 samples, and this attack can poison 1 to \d+"),
        ({"attack": "dlbd_x", "source": 1, "rate": 0.9}, "is 216 of 240 samples"),
        ({"strata": np.zeros(3)}, "one group per sample"),
        ({"images": IMAGES[:, :8]}, "of 16 pixels and more: got uint8"),
        ({"images": IMAGES / 255}, "must be uint8"),
        ({"labels": LABELS[1:]}, "240 whole numbers"),
        (
            {"attack": "poison_frogs", "model": flat, "victim": IMAGES[0, :, :8]},
            r"`victim` must be uint8 \(16, 16, 3\)",
        ),
    ],
)
def test_wrong_arguments_are_told(options, message):
    given = {"images": IMAGES, "labels": LABELS, "rate": 0.1, "target": TARGET, "seed": 0} | options
    with pytest.raises(ValueError, match=message):
        poison_set(given.pop("images"), given.pop("labels"), **given)


def test_wrong_shares_are_told():
    with pytest.raises(ValueError, match="a share of the target: give `target`"):
        as_rate("badnets", 0.3, LABELS)
    with pytest.raises(ValueError, match="`share` must lie between 0 and 1: got 5"):
        as_rate("badnets", 5, LABELS, target=0)
