import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tarsift.operators.errors import UsageError
from tarsift.pipelines.evaluate import LOW_SIMILARITY, evaluate
from tests.pipelines.results import Sample, make_result


def write_truth(path, rows, *, uids=True):
    shards, numbers, uid, attacks = zip(*rows, strict=True) if rows else ((), (), (), ())
    columns = {
        "shard": pa.array(shards, pa.string()),
        "row": pa.array(numbers, pa.int32()),
        "uid": pa.array(uid, pa.string()),
        "attack": pa.array(attacks, pa.string()),
        "target": pa.array(["banana"] * len(rows), pa.string()),
    }
    pq.write_table(pa.table(columns if uids else {k: columns[k] for k in ("shard", "row")}), path)
    return str(path)


@pytest.fixture
def ranked(tmp_path):
    """Forty samples in two shards and a sub-folder, scores 0 to 39; the highest six are flagged."""
    shards = {}
    for s, name in enumerate(("a/00000", "00001")):
        scores = range(20 * s, 20 * s + 20)
        shards[name] = [Sample(f"caption {v}", float(v), flagged=v >= 34) for v in scores]
    return make_result(tmp_path, shards)


def test_figures_agree_with_counting_by_hand(ranked, tmp_path):
    # Planted are the scores 39, 38, 30 and 5: of 4 x 36 pairs, 36 + 36 + 29 + 4... counted below.
    planted = [("00001", 19), ("00001", 18), ("00001", 10), ("a/00000", 5)]
    truth = write_truth(tmp_path / "t.parquet", [(s, r, f"{s}/{r:05d}", "patch") for s, r in planted])
    result = evaluate(str(ranked.out), truth)
    poison, clean = [39, 38, 30, 5], [v for v in range(40) if v not in (39, 38, 30, 5)]
    won = sum(p > c for p in poison for c in clean) / (len(poison) * len(clean))
    figures = result.scores["suspicion"]
    assert figures["auroc"] == pytest.approx(won)
    assert figures["average_precision"] == pytest.approx((1 + 1 + 3 / 10 + 4 / 35) / 4)
    assert figures["recall_at_0.05"] == 0.5  # the highest 2 of 40
    assert figures["clean_lost_at_0.05"] == 0
    assert figures["recall_at_0.1"] == 0.5  # the highest 4
    assert figures["clean_lost_at_0.1"] == 2
    assert result.flagged == {
        "flagged": 6,
        "caught": 2,
        "recall": 0.5,
        "precision": pytest.approx(1 / 3),
        "clean_lost": 4,
        "clean_lost_share": pytest.approx(4 / 36),
    }
    assert (result.samples, result.poisoned, result.unscored_poisoned) == (40, 4, 0)


def test_measures_are_left_out_but_low_similarity_is_a_score(ranked, tmp_path):
    truth = write_truth(tmp_path / "t.parquet", [("00001", 19, None, "patch")])
    scores = evaluate(str(ranked.out), truth).scores
    assert "clip_similarity" not in scores
    assert "image_norm" not in scores
    assert "duplicate_count" not in scores
    assert scores[LOW_SIMILARITY]["auroc"] == 1.0  # its similarity is the lowest
    assert {"suspicion", "density", "k_distance_k16", "slof_k16"} <= set(scores)


def test_each_attack_is_measured_against_clean_samples_only(ranked, tmp_path):
    rows = [("00001", 19, None, "patch"), ("00001", 18, None, "patch"), ("a/00000", 3, None, "blend")]
    result = evaluate(str(ranked.out), write_truth(tmp_path / "t.parquet", rows))
    assert result.attacks["patch"]["scores"]["suspicion"]["auroc"] == 1.0
    assert result.attacks["blend"]["scores"]["suspicion"]["auroc"] == pytest.approx(3 / 37)
    assert result.attacks["patch"]["scores"]["suspicion"]["clean_lost_at_0.1"] == 2
    assert result.attacks["patch"]["flagged_recall"] == 1.0
    assert result.attacks["blend"]["flagged_recall"] == 0.0
    assert [a["poisoned"] for a in result.attacks.values()] == [1, 2]
    assert result.rows("patch")[0]["average_precision"] == 1.0


def test_planted_samples_without_a_score_count_as_missed(tmp_path):
    samples = [Sample("x", float(v)) for v in range(19)]
    samples.append(Sample("x", None, error="undecodable_image"))
    samples[18].flagged = True
    result = make_result(tmp_path, {"00000": samples})
    truth = write_truth(tmp_path / "t.parquet", [("00000", 18, None, "patch"), ("00000", 19, None, "patch")])
    found = evaluate(str(result.out), truth)
    assert (found.unscored_poisoned, found.errored_poisoned) == (1, 1)
    assert found.scores["suspicion"]["recall_at_0.1"] == 0.5
    assert found.flagged["recall"] == 0.5
    assert found.attacks["patch"]["unscored"] == 1
    assert "1 of 2" in found.note


def test_only_unscored_poison_gives_no_figures_and_says_so(tmp_path):
    samples = [Sample("x", 1.0), Sample("x", None, error="undecodable_image")]
    result = make_result(tmp_path, {"00000": samples})
    found = evaluate(str(result.out), write_truth(tmp_path / "t.parquet", [("00000", 1, None, "patch")]))
    assert found.scores == {}
    assert found.note


def test_an_empty_truth_says_that_nothing_was_planted(ranked, tmp_path):
    found = evaluate(str(ranked.out), write_truth(tmp_path / "t.parquet", []))
    assert found.poisoned == 0
    assert found.scores == {}
    assert found.flagged is None
    assert "nothing was planted" in found.note


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (("00007", 1, None, "patch"), "shard '00007'"),
        (("00001", 20, None, "patch"), "row 20"),
        (("00001", -1, None, "patch"), "row -1"),
    ],
)
def test_a_truth_of_other_shards_is_refused_with_numbers(ranked, tmp_path, row, words):
    truth = write_truth(tmp_path / "t.parquet", [("00001", 3, None, "patch"), row])
    with pytest.raises(UsageError, match="1 of 2 samples") as error:
        evaluate(str(ranked.out), truth)
    assert words in str(error.value)
    assert "2 shards, 00001 to a/00000, with 40 samples" in str(error.value)


def test_a_truth_with_other_uids_is_refused(ranked, tmp_path):
    truth = write_truth(tmp_path / "t.parquet", [("00001", 3, "somebody/else", "patch")])
    with pytest.raises(UsageError, match="another uid"):
        evaluate(str(ranked.out), truth)


def test_a_sample_named_twice_is_refused(ranked, tmp_path):
    truth = write_truth(tmp_path / "t.parquet", [("00001", 3, None, "patch")] * 2)
    with pytest.raises(UsageError, match="twice"):
        evaluate(str(ranked.out), truth)


def test_a_truth_needs_no_more_than_shard_and_row(ranked, tmp_path):
    rows = [("00001", 19, None, None)]
    found = evaluate(str(ranked.out), write_truth(tmp_path / "t.parquet", rows, uids=False))
    assert found.scores["suspicion"]["auroc"] == 1.0
    assert found.attacks == {}


def test_missing_pieces_are_usage_errors(ranked, tmp_path):
    truth = write_truth(tmp_path / "t.parquet", [("00001", 19, None, "patch")])
    with pytest.raises(UsageError, match="no truth at"):
        evaluate(str(ranked.out), str(tmp_path / "none.parquet"))
    (tmp_path / "broken.parquet").write_bytes(b"not parquet")
    with pytest.raises(UsageError, match="no Parquet file"):
        evaluate(str(ranked.out), str(tmp_path / "broken.parquet"))
    pq.write_table(pa.table({"shard": ["00001"]}), tmp_path / "lacking.parquet")
    with pytest.raises(UsageError, match="lacks the column 'row'"):
        evaluate(str(ranked.out), str(tmp_path / "lacking.parquet"))
    with pytest.raises(UsageError, match=r"run\.json"):
        evaluate(str(tmp_path / "nowhere"), truth)


def test_without_flags_the_scores_are_still_measured(ranked, tmp_path):
    for path in (ranked.out / "flags").rglob("*.parquet"):
        path.unlink()
    truth = write_truth(tmp_path / "t.parquet", [("00001", 19, None, "patch")])
    found = evaluate(str(ranked.out), truth)
    assert found.flagged is None
    assert found.scores["suspicion"]["auroc"] == 1.0
    assert found.attacks["patch"]["flagged_recall"] is None


def test_flags_of_another_run_are_refused(ranked, tmp_path):
    path = ranked.out / "flags" / "00001.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    truth = write_truth(tmp_path / "t.parquet", [("00001", 19, None, "patch")])
    with pytest.raises(UsageError, match="flags of 39 samples and scores of 40"):
        evaluate(str(ranked.out), truth)


def test_an_evaluation_is_plain_json_and_is_written(ranked, tmp_path):
    truth = write_truth(tmp_path / "t.parquet", [("00001", 19, None, "patch"), ("00001", 2, None, "blend")])
    found = evaluate(str(ranked.out), truth, json=str(tmp_path / "eval.json"))
    written = json.loads((tmp_path / "eval.json").read_text())
    assert written == json.loads(json.dumps(found.to_json()))
    assert {"samples", "poisoned", "unscored_poisoned", "scores", "flagged", "attacks"} <= set(written)
    keys = {"auroc", "average_precision", "recall_at_0.01", "recall_at_0.05", "recall_at_0.1", "clean_lost_at_0.05"}
    assert keys <= set(written["scores"]["suspicion"])


def test_rows_stand_by_average_precision(ranked, tmp_path):
    truth = write_truth(tmp_path / "t.parquet", [("00001", 19, None, "patch"), ("00001", 12, None, "patch")])
    values = [row["average_precision"] for row in evaluate(str(ranked.out), truth).rows()]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) > 1
    assert np.isfinite(values).all()


def test_shards_without_samples_are_passed_over(tmp_path):
    result = make_result(tmp_path, {"00000": [], "00001": [Sample("x", 1.0), Sample("x", 2.0)]})
    found = evaluate(str(result.out), write_truth(tmp_path / "t.parquet", [("00001", 1, None, "patch")]))
    assert found.scores["suspicion"]["auroc"] == 1.0
