"""Tracing a CLIP: its last projection as a layer, how queries are put together, and the verdict on candidates."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional

from tarsift.operators.decoding import ImageConfig
from tarsift.operators.models import build_model, load_encoder
from tarsift.operators.schema import fixed_size_list
from tarsift.operators.shards import ReadShard, list_shards
from tarsift.operators.trace_settings import TracingConfig
from tarsift.operators.trace_verdict import combined, smoothed, with_verdict
from tarsift.operators.tracer import fetch_pictures
from tarsift.sifters.image_text import layers_that_run, with_projection


@pytest.mark.parametrize("name", ["tiny", "ViT-S-32", "RN50"])
@torch.no_grad()
def test_the_last_projection_becomes_a_layer_and_the_model_stays_as_it_was(name):
    model = build_model(name, seed=0).eval()
    size = model.visual.image_size
    size = size[0] if isinstance(size, tuple | list) else size
    pictures, tokens = torch.randn(2, 3, size, size), torch.randint(100, (2, model.context_length))
    before = functional.normalize(model.encode_image(pictures), dim=1)
    towers = with_projection(model).eval()
    assert torch.allclose(towers(pictures, tokens)[0], before, atol=1e-6)
    assert "projection" in layers_that_run(towers, (pictures, tokens))
    assert torch.equal(functional.normalize(model.encode_image(pictures), dim=1), before)


def table(relative: list[list[float]], *, candidate: list[list[str]] | None = None) -> pa.Table:
    n, queries = len(relative), len(relative[0])
    return pa.table(
        {
            "row": pa.array(range(n), pa.int32()),
            "candidate": pa.array(candidate or [["random"]] * n, pa.list_(pa.string())),
            "relative": fixed_size_list(np.array(relative, np.float32)),
            "influence": fixed_size_list(np.ones((n, queries), np.float32)),
            "collapses": fixed_size_list(np.full((n, queries), 50, np.float32)),
            "embedding": fixed_size_list(np.eye(n, 4, dtype=np.float32)),
        }
    )


def test_a_candidate_that_is_a_query_is_judged_by_the_others():
    asked, echoed = table([[1.0], [3.0], [0.0]]), table([[float("nan"), 3.0], [1.0, 5.0], [0.0, 0.0]])
    found = combined(asked, echoed, TracingConfig(neighbors=0))
    assert found["row"].to_pylist() == [1, 0, 2]
    assert found["own_score"].to_pylist() == pytest.approx([3.0, 2.0, 0.0])
    assert found["trace_score"].to_pylist() == found["own_score"].to_pylist()
    assert found["by_count"].to_pylist() == [True] * 3


def test_scores_are_those_of_the_nearest_others():
    embedded = np.array([[1, 0], [0.99, 0.1], [0.98, 0.2], [0, 1], [0.1, 0.99]], np.float32)
    scores = np.array([5.0, 7.0, 9.0, 1.0, 2.0])
    assert smoothed(scores, embedded, 2).tolist()[:3] == [8.0, 7.0, 6.0]
    assert smoothed(scores, embedded, 1).tolist()[3:] == [2.0, 1.0]
    assert smoothed(scores, embedded, 9).tolist() == pytest.approx([(24 - s) / 4 for s in scores])
    assert smoothed(scores[:1], embedded[:1], 8).tolist() == [5.0]


def judged(scores: list[float], why: list[list[str]] | None = None, **changes) -> tuple[list[bool], float]:
    config = TracingConfig(neighbors=0, **changes)
    found, cutoff = with_verdict(combined(table([[s] for s in scores], candidate=why), None, config), config)
    rows = np.argsort(found["row"].to_numpy())
    return np.array(found["traced"])[rows].tolist(), cutoff


def test_what_is_traced_stands_out_from_random_samples_though_some_of_these_are_poison():
    draw = np.random.default_rng(0)
    scores = [*draw.normal(0, 1, 200), 5.0, *draw.normal(12, 0.5, 20)]
    why = [["random"]] * 210 + [["suspect"]] * 11
    marked, cutoff = judged(scores, why)
    assert marked == [False] * 201 + [True] * 20
    assert cutoff > 4
    marked, cutoff = judged(scores, why, of_best=0.2)
    assert cutoff == 3
    assert marked[200:] == [True] * 21
    assert judged([1.0] * 3) == ([False] * 3, 3.0)  # none stands out


def test_pictures_come_in_the_order_of_their_rows_and_those_that_cannot_be_used_not_at_all(dump):
    shards = {shard.name: shard for shard in list_shards(str(dump))}
    columns = ["shard", "row", "image_offset", "image_size", "caption", "error"]
    tables = {name: pa.concat_tables(ReadShard()(shard)).select(columns) for name, shard in shards.items()}
    encoder = load_encoder("tiny", allow_random=True)
    rows = pa.concat_tables([tables["00001"].slice(5, 2), tables["00000"].slice(2, 3), tables["00004"].slice(0, 1)])
    found, pictures = fetch_pictures(rows, shards, encoder, ImageConfig())
    assert found["shard"].to_pylist() == ["00001", "00001", "00000", "00000", "00004"]
    assert found["row"].to_pylist() == [5, 6, 2, 4, 0]  # 3 is no picture
    again, first = fetch_pictures(rows.slice(3, 1), shards, encoder, ImageConfig())
    assert not len(again)
    assert first.shape == (0, 32, 32, 3)
    assert pictures.shape == (5, 32, 32, 3)
