"""Write the page of a trace: what the model says of the queries, and the training samples that it was traced to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8

from tarsift.operators import storage
from tarsift.operators.decoding import ImageConfig
from tarsift.operators.shards import Shard
from tarsift.operators.trace_verdict import RANDOM
from tarsift.pipelines.report.charts import Histogram, histogram_svg
from tarsift.pipelines.report.pictures import LARGE, Picture, make_thumbnails, thumbnail
from tarsift.pipelines.report.render import render

PAGE, TEMPLATE = "report.html", "trace.html"
CARDS, CAPTIONS, BINS = 48, 12, 60


def write_trace_page(
    folder: str,
    about: dict[str, Any],
    found: pa.Table,
    shards: Sequence[Shard],
    queries: UInt8[np.ndarray, "q h w 3"],
) -> str:
    """Write a trace as one HTML page that works offline, and return where.

    Args:
        about: what is known of the trace.
        found: every candidate, the most probable first.
        queries: the pictures that were asked of.
    """
    best = found.slice(0, CARDS).to_pylist()
    wanted = [
        Picture(row["shard"], row["row"], row["image_offset"], row["image_size"], row["image_sha256"], LARGE)
        for row in best
    ]
    thumbs = make_thumbnails(wanted, {shard.name: shard for shard in shards}, images=ImageConfig())
    traced = found.filter(found["traced"])
    content = {
        "out": storage.without_secrets(folder),
        "about": about,
        "queries": [
            {"shard": name, "row": number, "thumb": thumbnail(picture, LARGE)}
            for number, (name, picture) in enumerate(zip(about["queries"], queries, strict=True))
        ],
        "cards": [
            {**row, "rank": rank, "thumb": thumbs.made.get((row["shard"], row["row"]))}
            for rank, row in enumerate(best, 1)
        ],
        "missing": thumbs.missing,
        "said": Counter(traced["caption"].to_pylist()).most_common(CAPTIONS),
        "shards": len(set(traced["shard"].to_pylist())),
        "chart": histogram_svg(histogram_of(found, about["cutoff"])),
    }
    url = storage.join(folder, PAGE)
    with storage.reachable(url):
        storage.put_bytes(url, render(TEMPLATE, content))
    return url


def histogram_of(found: pa.Table, cutoff: float) -> Histogram:
    """Count scores of random samples, and of all other candidates."""
    scores = np.asarray(found["trace_score"].combine_chunks(), np.float64)
    random = np.array([RANDOM in why for why in found["candidate"].to_pylist()], bool)
    low, high = float(scores.min()), float(max(scores.max(), cutoff))
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    usual, others = (np.histogram(scores[mask], edges)[0] for mask in (random, ~random))
    return Histogram("trace score", low, float(edges[-1]), usual, others, cutoff=cutoff, groups=(RANDOM, "other"))
