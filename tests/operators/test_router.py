"""Routing: a sample's class comes from its caption or its label; classes are counted whatever the order of rows."""

import numpy as np
import pyarrow as pa

from tarsift.operators.router import CountClasses, LowestPerClass, RouteCaptions, RouteLabels, class_table
from tarsift.operators.schema import fixed_size_list
from tarsift.sifters.problems import ClassRule


def test_a_caption_goes_to_the_nearest_class_whatever_its_length():
    rule = ClassRule(np.eye(3, dtype=np.float32), least=0.8)
    captions = np.array([[0, 5, 0.1], [0.2, 0, 0.01], [1, 1, 1], [0, 0, 0]], np.float16)
    table = pa.table(
        {"row": range(5), "text_embedding": fixed_size_list(np.vstack([captions, captions[:1]]), np.arange(5) < 4)}
    )
    routed = RouteCaptions(rule)(table)
    assert routed["class"].to_pylist() == [1, 0, -1, -1, -1]
    assert routed.column_names == ["row", "class", "class_cosine"]
    assert routed["class_cosine"].to_pylist()[0] > 0.99


def test_the_lowest_of_each_class_are_found_in_any_order_and_grouping():
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "shard": ["s"] * 90,
            "row": pa.array(range(90), pa.int32()),
            "uid": [str(i) for i in range(90)],
            "class": pa.array(np.arange(90) % 3, pa.int32()),
            "sift_rank": pa.array(rng.permutation(90) / 90, pa.float32(), mask=np.arange(90) > 80),
            "suspicion": pa.array(rng.normal(size=90), pa.float32()),
        }
    )
    fold = LowestPerClass(np.array([4, 0, 2]), key=b"")
    whole = fold.finish(fold.add(fold.init(), table))
    ranks = np.asarray(table["sift_rank"].fill_null(9).combine_chunks())
    expected = sorted(
        [*np.argsort(ranks + 9 * (np.arange(90) % 3 != 0))[:4], *np.argsort(ranks + 9 * (np.arange(90) % 3 != 2))[:2]]
    )
    assert whole["row"].to_pylist() == expected
    parts = [fold.add(fold.init(), part) for part in (table.slice(50), table.slice(0, 20), table.slice(20, 30))]
    assert fold.finish(fold.merge(fold.merge(parts[1], parts[0]), parts[2])).equals(whole)
    trusted = LowestPerClass(np.array([4, 0, 2]), key=b"", cutoff=0.0)
    assert max(trusted.finish(trusted.add(trusted.init(), table))["suspicion"].to_pylist()) < 0


def test_a_label_is_a_class():
    routed = RouteLabels()(pa.table({"row": range(3), "label": pa.array([4, None, 0], pa.int32())}))
    assert routed["class"].to_pylist() == [4, -1, 0]


def scored(classes, scores, copies, captions, cosines):
    return pa.table(
        {
            "class": pa.array(classes, pa.int32()),
            "class_cosine": pa.array(cosines, pa.float32()),
            "caption": captions,
            "duplicate_count": pa.array(copies, pa.int32()),
            "suspicion": pa.array(scores, pa.float32()),
        }
    )


def test_classes_are_counted_in_any_order_and_grouping():
    table = scored(
        [0, 1, 1, -1, 1, 0, 2],
        [1, 9, 5, 9, 0, 9, None],
        [1, 2, 1, 1, 3, 1, 1],
        ["a cat", "a dog", "the dog", "x", "dog", None, "lost"],
        [0.9, 0.7, 0.95, 0.1, 0.95, 0.2, 0.9],
    )
    fold = CountClasses(3, score="suspicion", cutoff=5)
    whole = fold.finish(fold.add(fold.init(), table))
    assert whole.samples.tolist() == [2, 3, 0]
    assert whole.suspects.tolist() == [1, 2, 0]
    assert whole.duplicates.tolist() == [0, 2, 0]
    assert whole.captions == ("a cat", "dog", "")
    assert whole.unrouted == 1
    halves = [fold.add(fold.init(), part) for part in (table.slice(4), table.slice(0, 4))]
    merged = fold.merge(*halves)
    assert merged.captions == whole.captions
    assert (merged.samples == whole.samples).all()
    assert (merged.suspects == whole.suspects).all()
    rows = class_table(whole, ["sifted", "mostly_suspects", "too_small"]).to_pylist()
    assert rows[1] == {
        "class": 1, "name": None, "samples": 3, "suspects": 2, "duplicates": 2, "caption": "dog",
        "status": "mostly_suspects",
    }  # fmt: skip
    named = class_table(whole, ["sifted"] * 3, ["cat", "dog", "cow"])
    assert named["name"].to_pylist() == ["cat", "dog", "cow"]
