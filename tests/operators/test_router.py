"""Routing: a sample's class comes from its caption or its label; classes are counted whatever the order of rows."""

import numpy as np
import pyarrow as pa

from tarsift.operators.router import CountClasses, RouteCaptions, RouteLabels, class_table
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
        "class": 1, "samples": 3, "suspects": 2, "duplicates": 2, "caption": "dog", "status": "mostly_suspects"
    }  # fmt: skip
