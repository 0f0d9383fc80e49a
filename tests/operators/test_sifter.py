"""The sifting job and what its verdicts come to: by identity, with a reason for every sample that has none."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score

from tarsift.operators import sifter as jobs
from tarsift.operators.grouped import read_groups, write_grouped
from tarsift.operators.schema import fixed_size_list
from tarsift.operators.sifter import (
    JoinVerdicts,
    SiftConfig,
    SiftProblem,
    choose_classes,
    largest_problem,
    problem_seed,
    ranks_within,
    samples_of,
)
from tarsift.sifters.methods import RESUMABLE
from tarsift.sifters.problems import Problem
from tarsift.sifters.settings import IsplConfig, MetaSiftConfig, SifterConfig
from tests.sifters.sets import planted


@pytest.fixture(scope="module")
def gathered(tmp_path_factory):
    """Three shards with the features of a planted set, grouped by class; which rows are poison."""
    folder = tmp_path_factory.mktemp("gathered")
    images, labels, poison = planted(600)
    truth = {}
    for shard in range(3):
        mine = np.arange(shard, 600, 3)
        rows = np.random.default_rng(shard).permutation(len(mine)).astype(np.int32)
        truth |= {(f"s/{shard}", row): is_poison for row, is_poison in zip(rows.tolist(), poison[mine], strict=True)}
        table = pa.table(
            {
                "shard": [f"s/{shard}"] * len(mine),
                "row": rows,
                "class": pa.array(labels[mine], pa.int32()),
                "image_embedding": fixed_size_list(images[0, mine]),
                "view_embeddings": fixed_size_list(images[1:, mine].transpose(1, 0, 2).reshape(len(mine), -1)),
            }
        )
        (folder / "s").mkdir(exist_ok=True)
        write_grouped(f"{folder}/s/{shard}.parquet", table, "class")
    return str(folder), truth


def test_a_problem_is_judged_and_its_verdicts_go_by_identity(gathered, tmp_path):
    folder, truth = gathered
    job = SiftProblem(folder, ("s/0", "s/1", "s/2"), str(tmp_path), SiftConfig())
    problem = Problem("0-0", (0, 1, 2, 3, 4))
    told = job(problem)
    assert (told["rows"], told["classes"]) == (600, 5)
    verdicts = read_groups(f"{tmp_path}/0-0.parquet").to_pylist()
    assert {(row["shard"], row["row"]) for row in verdicts} == truth.keys()
    poison = [truth[row["shard"], row["row"]] for row in verdicts]
    assert roc_auc_score(poison, [row["rank"] for row in verdicts]) > 0.9
    first = (tmp_path / "0-0.parquet").read_bytes()
    job(problem)
    assert (tmp_path / "0-0.parquet").read_bytes() == first


def test_a_problem_holds_the_samples_of_its_classes_alone(gathered, tmp_path):
    folder, _ = gathered
    job = SiftProblem(folder, ("s/0", "s/1", "s/2"), str(tmp_path), SiftConfig())
    job(Problem("1-0", (1, 3)))
    verdicts = read_groups(f"{tmp_path}/1-0.parquet", ["s/1"])
    assert set(verdicts["class"].to_pylist()) == {1, 3}
    assert set(verdicts["shard"].to_pylist()) == {"s/1"}


@pytest.mark.parametrize("sifter", RESUMABLE)
def test_a_sifter_goes_on_where_it_was_broken_off_but_not_under_other_settings(gathered, tmp_path, monkeypatch, sifter):
    folder, _ = gathered
    ispl = IsplConfig(repeats=1, rounds=3, voter_epochs=2, self_rounds=1)
    method = SifterConfig(sifter=sifter, ispl=ispl, meta_sift=MetaSiftConfig(sifters=2, batch_size=20))
    monkeypatch.setattr("tarsift.sifters.meta_sift.STEPS_KEPT", 25)
    job = SiftProblem(folder, ("s/0", "s/1", "s/2"), str(tmp_path), SiftConfig(method=method), fingerprint="a")
    problem = Problem("0-0", (0, 1, 2))
    saved, keep = [], jobs.save_state
    monkeypatch.setattr(jobs, "save_state", lambda url, state: (keep(url, state), saved.append(url)))
    job(problem)
    undisturbed, often = (tmp_path / "0-0.parquet").read_bytes(), len(saved)
    assert often > 1
    assert not Path(saved[0]).exists()

    def stopped(url, state):
        keep(url, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "save_state", stopped)
        with pytest.raises(KeyboardInterrupt):
            job(problem)
    saved.clear()
    job(problem)
    assert len(saved) == often - 1
    assert (tmp_path / "0-0.parquet").read_bytes() == undisturbed
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "save_state", stopped)
        with pytest.raises(KeyboardInterrupt):
            job(problem)
    saved.clear()
    replace(job, fingerprint="b")(problem)
    assert len(saved) == often


def test_seeds_differ_by_problem_and_not_by_place():
    assert problem_seed(Problem("0-1", (1,)), 0) == problem_seed(Problem("0-1", (2, 3)), 0)
    assert len({problem_seed(Problem(name, ()), seed) for name in ("0-0", "0-1", "1-0") for seed in (0, 1)}) == 6


def test_views_lie_behind_the_plain_one():
    plain = np.arange(6, dtype=np.float32).reshape(3, 2)
    views = np.stack([plain + 10, plain + 20], axis=1).reshape(3, 4)
    table = pa.table({"image_embedding": fixed_size_list(plain), "view_embeddings": fixed_size_list(views)})
    assert samples_of(table).tolist() == [plain.tolist(), (plain + 10).tolist(), (plain + 20).tolist()]


def test_pixels_become_pictures():
    pictures = np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3), np.uint8)
    table = pa.table({"pixels": fixed_size_list(pictures.reshape(2, -1))})
    assert (samples_of(table) == pictures).all()


def test_ranks_are_within_classes_and_equal_for_equal_scores():
    score, labels = np.array([5.0, 1, 1, 3, 9, 9]), np.array([0, 0, 0, 0, 1, 1])
    assert ranks_within(score, labels).tolist() == [0.875, 0.25, 0.25, 0.625, 0.5, 0.5]


def test_every_sample_is_told_its_rank_or_why_it_has_none():
    verdicts = pa.table({"row": pa.array([0, 2, 0], pa.int32()), "rank": pa.array([0.9, 0.2, 0.7], pa.float32())})
    table = pa.table(
        {
            "row": pa.array([0, 1, 2, 3, 4], pa.int32()),
            "class": pa.array([0, -1, 0, 1, 0], pa.int32()),
            "suspicion": pa.array([2.0, 3.0, -1.0, None, 5.0], pa.float32()),
        }
    )
    joined = JoinVerdicts(verdicts, ["sifted", "over_budget"], weight=1.0)(table)
    assert joined["sift_status"].to_pylist() == ["sifted", "unrouted", "sifted", "over_budget", "failed"]
    assert joined["sift_rank"].to_pylist() == [pytest.approx(0.8), None, pytest.approx(0.2), None, None]
    assert joined["suspicion_sifted"].to_pylist() == [pytest.approx(3.2), 3.0, -1.0, None, 5.0]


def test_without_any_verdict_nothing_changes():
    none = pa.table({"row": pa.array([], pa.int32()), "rank": pa.array([], pa.float32())})
    table = pa.table({"row": pa.array([7], pa.int32()), "class": pa.array([0], pa.int32()), "suspicion": [1.5]})
    joined = JoinVerdicts(none, ["mostly_duplicates"], weight=1.0)(table)
    assert joined.to_pylist()[0]["sift_status"] == "mostly_duplicates"
    assert joined["suspicion_sifted"].to_pylist() == [1.5]


def test_classes_that_cannot_be_sifted_say_why():
    samples, suspects, duplicates = np.array([100, 1, 100, 100]), np.array([2, 0, 60, 0]), np.array([0, 0, 0, 51])
    assert choose_classes(samples, suspects, duplicates, SiftConfig()) == [
        "sifted", "too_small", "mostly_suspects", "mostly_duplicates"
    ]  # fmt: skip


def test_a_budget_goes_to_the_classes_with_most_suspects():
    samples = np.full(40, 100)
    suspects = np.arange(40)
    status = choose_classes(samples, suspects, np.zeros(40), SiftConfig(budget=4))  # of 10 classes, each sifted twice
    assert [label for label, said in enumerate(status) if said == "sifted"] == list(range(20, 40))
    assert set(status[:20]) == {"over_budget"}


def test_memory_is_that_of_the_largest_problem():
    problem, needed = largest_problem([Problem("a", (0, 1)), Problem("b", (2,))], np.array([10, 20, 25]), 100)
    assert (problem.name, needed) == ("a", 9000)
