import numpy as np
import pytest

from tarsift.sifters.problems import (
    UNROUTED,
    ClassRule,
    RoutingConfig,
    classes_by_caption,
    classes_by_name,
    make_problems,
)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def topics(sizes: list[int], *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return captions about so many topics, and the topic of each."""
    rng = np.random.default_rng(seed)
    which = np.repeat(np.arange(len(sizes)), sizes)
    return unit(rng.normal(size=(len(sizes), 24))[which] + 0.15 * rng.normal(size=(len(which), 24))), which


def test_captions_of_one_topic_are_one_class():
    captions, which = topics([200, 200, 200, 200])
    rule = classes_by_caption(captions, 800, RoutingConfig(class_size=200, smallest=50, largest=400))
    classes, cosines = rule.assign(captions)
    assert len(rule.centers) == 4
    assert len({(a, b) for a, b in zip(which, classes, strict=True)}) == 4
    assert cosines.min() > 0.6
    assert np.allclose(np.linalg.norm(rule.centers, axis=1), 1, atol=1e-5)


def test_small_classes_are_merged_and_large_ones_split():
    captions, _ = topics([600, 300, 40, 30, 30])
    config = RoutingConfig(class_size=200, smallest=60, largest=250)
    sizes = np.bincount(classes_by_caption(captions, 1000, config).assign(captions)[0])
    assert sizes.min() >= 60
    assert sizes.max() <= 300  # split at 250, before small ones were added


def test_a_sample_stands_for_the_whole():
    captions, _ = topics([100] * 6)
    of_all = classes_by_caption(captions, 6000, RoutingConfig(class_size=1000, smallest=300, largest=2000))
    assert len(of_all.centers) == 6


def test_one_caption_repeated_is_a_class_that_cannot_be_split():
    captions = np.concatenate([np.tile(topics([1], seed=3)[0], (500, 1)), topics([100, 100])[0]])
    rule = classes_by_caption(captions, 700, RoutingConfig(class_size=100, smallest=20, largest=150))
    sizes = np.bincount(rule.assign(captions)[0])
    assert sizes.max() == 500


def test_a_dump_too_small_for_two_classes():
    with pytest.raises(ValueError, match="too few for two classes of 1500"):
        classes_by_caption(topics([50, 50])[0], 100)


def test_captions_like_no_name_are_unrouted():
    names = np.eye(3, dtype=np.float32)
    captions = np.concatenate([unit(np.array([[1, 0.1, 0], [0, 1, 0.9], [-1, -1, -1]])), np.zeros((1, 3))])
    classes, cosines = classes_by_name(names, RoutingConfig(least_cosine=0.5)).assign(captions)
    assert classes.tolist() == [0, 1, UNROUTED, UNROUTED]
    assert cosines[0] == pytest.approx(1 / np.sqrt(1.01), abs=1e-6)


def test_batches_do_not_matter():
    captions, _ = topics([3000, 3000])
    rule = ClassRule(captions[[0, 3000]])
    whole = rule.assign(captions)[0]
    assert (np.concatenate([rule.assign(part)[0] for part in np.split(captions, 6)]) == whole).all()


def test_every_class_is_in_one_problem_of_each_repeat_and_its_like_are_elsewhere():
    rng = np.random.default_rng(0)
    pairs = np.repeat(rng.normal(size=(20, 32)), 2, axis=0) + 0.05 * rng.normal(size=(40, 32))  # near-synonyms
    config = RoutingConfig(classes_per_problem=10, repeats=3)
    problems = make_problems(unit(pairs), np.full(40, 100), config, seed=5)
    assert len({problem.name for problem in problems}) == len(problems) == 12
    for repeat in range(3):
        mine = [problem for problem in problems if problem.name.startswith(f"{repeat}-")]
        assert sorted(label for problem in mine for label in problem.classes) == list(range(40))
        assert all(len(problem.classes) == 10 for problem in mine)
    together = sum({2 * i, 2 * i + 1} <= set(problem.classes) for problem in problems for i in range(20))
    assert together <= 2  # of 60; by chance there would be about 14
    assert problems == make_problems(unit(pairs), np.full(40, 100), config, seed=5)
    assert problems != make_problems(unit(pairs), np.full(40, 100), config, seed=6)
    assert {p.classes for p in problems[:4]} != {p.classes for p in problems[4:8]}


def test_empty_classes_and_those_left_out_are_in_no_problem():
    centers = unit(np.random.default_rng(0).normal(size=(6, 8)))
    sizes = np.array([5, 0, 5, 5, 5, 5])
    [problem] = make_problems(centers, sizes, RoutingConfig(repeats=1), leave_out=[3])
    assert problem.classes == (0, 2, 4, 5)
    with pytest.raises(ValueError, match="1 of 6 classes can be sifted"):
        make_problems(centers, sizes, leave_out=[0, 2, 3, 4])
