import json
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tarsift.operators.errors import UsageError
from tarsift.pipelines import evaluate as evaluating
from tarsift.pipelines.evaluate import LOW_SIMILARITY, evaluate
from tarsift.pipelines.report.charts import Axis, Line, lines_svg
from tarsift.pipelines.report.evaluation import drawn_scores, write_evaluation
from tests.pipelines.results import Sample, make_result
from tests.pipelines.test_cli import run
from tests.pipelines.test_report import ALLOWED_TAGS, Page


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


def drop_scores(result, column, rows):
    """Take a score from some samples of shard 00001, or the whole column where `rows` is None."""
    path = result.out / "scores" / "00001.parquet"
    table = pq.read_table(path)
    at = table.schema.get_field_index(column)
    if rows is None:
        pq.write_table(table.remove_column(at), path)
    else:
        values = [None if i in rows else v for i, v in enumerate(table[column].to_pylist())]
        pq.write_table(table.set_column(at, column, pa.array(values, pa.float32())), path)


@pytest.mark.parametrize("rows", [range(10, 20), None])
def test_a_score_that_only_some_samples_have_is_measured_on_these(ranked, tmp_path, rows):
    drop_scores(ranked, "density", rows)
    truth = write_truth(tmp_path / "t.parquet", [("00001", 19, None, "patch"), ("a/00000", 19, None, "blend")])
    found = evaluate(str(ranked.out), truth)
    partial = found.scores["density"]
    kept = 20 if rows is None else 30
    assert (partial["scored"], partial["scored_poison"]) == (kept, 1)
    assert (found.scores["suspicion"]["scored"], found.scores["suspicion"]["scored_poison"]) == (40, 2)
    assert partial["recall_at_0.2"] == (0.5 if rows is None else 0.0)  # of all planted, the one without it included
    assert found.unscored_poisoned == 0  # others see them
    assert found.note == ""
    assert "density" not in found.attacks["patch"]["scores"]
    assert f"measured on {kept / 40:.0%}".replace("%", " %") in shown(found, tmp_path).text


def test_attacks_of_few_samples_are_marked(tmp_path):
    result = make_result(tmp_path, {"00000": [Sample("x", float(v)) for v in range(60)]})
    rows = [("00000", r, None, "many" if r < 20 else "rare") for r in range(39)]
    found = evaluate(str(result.out), write_truth(tmp_path / "t.parquet", rows))
    assert {name: attack["few"] for name, attack in found.attacks.items()} == {"many": False, "rare": True}
    page = shown(found, tmp_path)
    assert page.text.count("few samples") == 2  # in the list of attacks and over its panel
    assert "Fewer than 20 samples" in page.part("19 planted", "suspicion")
    assert "Fewer than 20 samples" not in page.part("20 planted", "suspicion")


# --- the page


def shown(found, tmp_path) -> Page:
    write_evaluation(found, str(tmp_path / "page.html"))
    return Page((tmp_path / "page.html").read_text(encoding="utf-8"))


def titles(page):
    return re.findall(r'<svg class="chart"[^>]*aria-label="([^"]*)"', page.html)


@pytest.fixture
def several(ranked, tmp_path):
    rows = [("00001", r, None, "patch") for r in (19, 18, 3)] + [("00001", r, None, "blend") for r in (9, 12)]
    return write_truth(tmp_path / "t.parquet", rows)


def test_without_flags_the_page_is_written_beside_the_result(monkeypatch, capsys, ranked, several):
    code, out, err = run(monkeypatch, capsys, "evaluate", str(ranked.out), "--truth", several)
    assert (code, err) == (0, "")
    assert f"page: {ranked.out}/evaluation.html" in out
    page = Page((ranked.out / "evaluation.html").read_text(encoding="utf-8"))
    assert "suspicion finds 40 % of 5 planted samples when the highest 5 % of 40 samples are removed." in page.text
    assert "2 of 5 found In 6 flagged; 4 clean samples lost." in page.text


def test_every_attack_has_a_panel_of_three_charts(ranked, several, tmp_path):
    found = evaluate(str(ranked.out), several)
    page = shown(found, tmp_path)
    panels = [attributes["id"] for tag, attributes in page.tags if attributes.get("class") == "panel"]
    assert panels == ["attack-1", "attack-2"]
    drawn = titles(page)
    assert [title.split("; ")[0] for title in drawn[3:6]] == [
        "ROC curves for attack blend",
        "Precision over recall for attack blend",
        "Recall over the removed fraction for attack blend",
    ]
    assert len(drawn) == 9
    assert sum("for all poison" in title for title in drawn) == 3
    panels = 3
    assert page.html.count('class="line line-0"') == panels * (3 + 2)  # in each chart, in the key and in the table
    patch = found.attacks["patch"]["scores"]["suspicion"]
    row = page.part("3 planted", "other score").split("suspicion")[-1]
    assert f"{patch['auroc']:.3f} {patch['average_precision']:.3f}" in row


def test_a_single_attack_is_shown_once(ranked, tmp_path):
    found = evaluate(str(ranked.out), write_truth(tmp_path / "t.parquet", [("00001", 19, None, "patch")]))
    page = shown(found, tmp_path)
    assert "Attack patch" in page.text
    assert len(titles(page)) == 3
    assert "Attack by attack" not in page.text


def test_an_attack_beside_poison_without_a_name_has_its_panel(ranked, tmp_path):
    rows = [("00001", 19, None, "patch"), ("00001", 12, None, None)]
    page = shown(evaluate(str(ranked.out), write_truth(tmp_path / "t.parquet", rows)), tmp_path)
    assert "All poison together" in page.text
    assert len(titles(page)) == 6


def test_passwords_in_addresses_are_kept_out(ranked, several, tmp_path):
    found = replace(evaluate(str(ranked.out), several), truth="s3://me:secret@bucket/truth.parquet")
    assert found.to_json()["truth"] == "s3://***@bucket/truth.parquet"
    assert "secret" not in shown(found, tmp_path).html


def test_names_of_strangers_stay_text(tmp_path):
    name = "</title></svg><script>alert(1)</script>\u202e\x1b[31m"
    result = make_result(tmp_path / "<b>", {"00000": [Sample("x", float(v)) for v in range(40)]})
    path = result.out / "scores" / "00000.parquet"
    table = pq.read_table(path)
    hostile = '"><img src=x onerror=alert(1)>'
    pq.write_table(table.append_column(hostile, pa.array(np.arange(40) % 7, pa.float32())), path)
    rows = [("00000", 39, None, name), ("00000", 34, None, "blend"), ("00000", 20, None, "")]
    page = shown(evaluate(str(result.out), write_truth(tmp_path / "t.parquet", rows)), tmp_path)
    assert {tag for tag, _ in page.tags} <= ALLOWED_TAGS
    for _, attributes in page.tags:
        assert not [a for a in attributes if a.startswith("on") or a == "style"]
        assert (attributes.get("href") or "#").startswith("#")
    assert "</title></svg><script>alert(1)</script>⟨U+202E" in page.text
    assert hostile in page.text
    assert "(no name)" in page.text
    assert not set("\u202e\x1b") & set(page.html)
    assert "default-src 'none'" in next(a["content"] for _, a in page.tags if a.get("http-equiv"))


def test_a_page_can_be_put_elsewhere(monkeypatch, capsys, ranked, several, tmp_path):
    import fsspec

    place = "memory://pages/evaluation.html"
    code, out, _ = run(monkeypatch, capsys, "evaluate", str(ranked.out), "--truth", several, "--page", place, "--json")
    try:
        assert code == 0
        assert json.loads(out)["samples"] == 40  # and nothing beside it
        assert b"All poison together" in fsspec.filesystem("memory").cat("/pages/evaluation.html")
        assert not (ranked.out / "evaluation.html").exists()
    finally:
        fsspec.filesystem("memory").rm("/pages", recursive=True)


def test_where_no_page_can_be_written_the_figures_come_all_the_same(monkeypatch, capsys, ranked, several):
    (ranked.out / "evaluation.html").mkdir()  # root may write everywhere else
    command = ("evaluate", str(ranked.out), "--truth", several, "--json")
    code, out, err = run(monkeypatch, capsys, *command)
    assert code == 0
    assert json.loads(out)["poisoned"] == 5
    assert "no page:" in err
    assert "--page" in err
    code, out, err = run(monkeypatch, capsys, *command, "--page", str(ranked.out / "evaluation.html"))
    assert code == 2  # asked for by name
    assert json.loads(out)["poisoned"] == 5
    assert "evaluation.html" in err


def test_a_page_without_figures_says_why(ranked, tmp_path):
    page = shown(evaluate(str(ranked.out), write_truth(tmp_path / "t.parquet", [])), tmp_path)
    assert "0 planted samples among 40 samples." in page.text
    assert "nothing was planted" in page.text
    assert titles(page) == []


def test_an_attack_without_a_score_has_no_charts(tmp_path):
    samples = [Sample("x", float(v)) for v in range(30)] + [Sample("x", None, error="undecodable_image")]
    result = make_result(tmp_path, {"00000": samples})
    rows = [("00000", 30, None, "bomb"), ("00000", 29, None, "patch")]
    page = shown(evaluate(str(result.out), write_truth(tmp_path / "t.parquet", rows)), tmp_path)
    assert "None of these samples has a score" in page.part("1 without a score", "patch")
    assert len(titles(page)) == 6


def test_attacks_without_end_do_not_make_a_page_without_end(ranked, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluating, "MOST_CURVES", 2)
    rows = [("00001", r, None, ("a", "b", "c", "c", "d", "d", "d")[r]) for r in range(7)]
    found = evaluate(str(ranked.out), write_truth(tmp_path / "t.parquet", rows))
    assert list(found.curves) == [None, "c", "d"]
    assert list(found.attacks) == ["a", "b", "c", "d"]
    page = shown(found, tmp_path)
    assert len(titles(page)) == 9
    assert "2 attacks with fewer samples not shown" in page.text


def test_curves_are_for_python_and_not_in_the_json(ranked, several):
    found = evaluate(str(ranked.out), several)
    assert set(found.curves) == {None, "patch", "blend"}
    curve = found.curves["patch"]["suspicion"].removal
    assert np.interp(0.2, curve.x, curve.y) == pytest.approx(
        found.attacks["patch"]["scores"]["suspicion"]["recall_at_0.2"]
    )
    assert "curves" not in found.to_json()


def test_of_scores_that_differ_in_k_one_is_drawn(ranked, several):
    for path in (ranked.out / "scores").rglob("*.parquet"):
        table = pq.read_table(path, partitioning=None)
        for k in (32, 64):
            table = table.append_column(f"slof_k{k}", table["slof_k16"])
        pq.write_table(table, path)
    names = drawn_scores(evaluate(str(ranked.out), several))
    assert names[0] == "suspicion"
    assert len(names) == len({name.split("_k")[0] for name in names}) == 5


def path_of(svg):
    numbers = [float(v) for v in re.search(r'class="line l" d="M([^"]*)"', svg)[1].split()]
    return np.array(numbers).reshape(-1, 2)


def test_a_straight_line_bends_on_a_logarithmic_axis():
    share = np.array([0.0, 1.0])
    axis = Axis("x", (0.001, 0.01, 0.1, 1.0), logarithmic=True)
    points = path_of(lines_svg([Line("l", "l", share, share)], x=axis, y=Axis("y", (0.0, 1.0)), summary="s"))
    left, right, top, bottom = 34, 344 - 14, 26, 262 - 40
    expected = 10 ** (3 * (points[:, 0] - left) / (right - left) - 3)
    # Coordinates are rounded to 0.1 of 296 pixels for three decades: 0.12 per cent of x, and of 196 for y.
    np.testing.assert_allclose((bottom - points[:, 1]) / (bottom - top), expected, atol=0.0015)
    assert [points[0, 0], points[-1, 0]] == [left, right]


def test_steps_hold_from_the_point_before():
    axis = Axis("x", (0.0, 1.0))
    line = Line("l", "l", np.array([0.5, 1.0]), np.array([1.0, 0.0]), steps=True)
    points = path_of(lines_svg([line], x=axis, y=axis, summary="s"))
    np.testing.assert_array_equal(points, [[34, 26], [182, 26], [182, 222], [330, 222]])
