"""The page of an ingestion: every night is on it, what stands out is told, and strangers' text does nothing."""

import re
from pathlib import Path

import numpy as np
import pytest

from tarsift.clip_detect.drift import Spread
from tarsift.pipelines.report.nights import bars_svg, page, write_nights_page

HOSTILE = '<script>alert(1)</script> "banana"'


def record(night: int, *, far: int = 0, **more) -> dict:
    rng = np.random.default_rng(night)
    values = np.concatenate([rng.normal(size=5000 - far), rng.normal(8, 1, size=far)])
    spread = Spread.of(values)
    assert spread is not None
    return {
        "night": night,
        "ended": f"2026-03-{night:02d}T02:30:00+00:00",
        "shards": {f"a/{night}-{i}": {} for i in range(5)},
        "changed": [],
        "counts": {"read": 5000, "kept": 4740, "removed": 250, "errored": 10},
        "reference": {"rows": 20480},
        "spreads": {"suspicion": spread.to_json(), "clip_similarity": spread.to_json()},
        "findings": [],
        "drift": [],
        "seconds": {"clean": 40.0},
        **more,
    }


@pytest.fixture
def records() -> list[dict]:
    finding = {
        "value": 3.2, "members": 41, "oddness": 5.0, "excess": 0.64, "tightness": 2.0,
        "captions": [[HOSTILE, 30], ["a banana", 11]], "samples": [["a/6-0", 12]],
    }  # fmt: skip
    told = ["suspicion: 1.80% of the samples are above 3.1, where 1.00% were (z 5.2)"]
    return [*(record(n) for n in range(1, 6)), record(6, far=50, findings=[finding], drift=told), record(7)]


def test_every_night_is_on_the_page_and_what_stands_out_is_told(records, tmp_path):
    url = write_nights_page(str(tmp_path), records, ["clip_similarity"])
    html = Path(url).read_text()
    assert len(re.findall(r'href="nights/\d{4}/report.html"', html)) == 7
    assert "Night 7: no finding, no drift." in html
    assert "<b>41 suspects</b>" in html
    assert "suspicion: 1.80%" in html
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_the_fuller_tail_is_the_tallest_bar_and_marked(records):
    [suspicion, similarity] = page("s", records, ["clip_similarity"])["charts"]
    heights = [float(h) for h in re.findall(r'<rect [^>]*height="([\d.]+)"', suspicion["svg"])]
    kinds = re.findall(r'<rect class="(\w+)"', suspicion["svg"])
    assert np.argmax(heights) == 5
    assert heights[5] > 1.5 * np.median(heights)
    assert kinds == ["kept"] * 5 + ["flagged"] + ["kept"]
    assert "below" in similarity["name"]
    assert "flagged" not in similarity["svg"]


def test_a_chart_of_nothing_but_zeros_is_drawn():
    assert 'height="0.0"' in bars_svg("none", [1, 2], [0.0, 0.0], [False, False])
