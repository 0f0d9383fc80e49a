"""Pieces of HTML for notebooks: they show what the report shows, and text by strangers stays text."""

import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tarsift.operators.errors import UsageError
from tarsift.pipelines.report import ReportConfig, shown, write_report
from tarsift.pipelines.report.charts import Axis, Line, lines_svg
from tests.conftest import picture
from tests.pipelines.results import campaign, make_result

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)> \u202e</style></div>"


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    shards = campaign()
    for samples in shards.values():
        for sample in samples[:40]:
            sample.caption = HOSTILE
    return make_result(tmp_path_factory.mktemp("planted"), shards)


def body(piece: shown.Shown) -> str:
    """The piece behind its style, when it is known to load, run and close nothing."""
    assert len(repr(piece)) < 80
    style, _, rest = piece._repr_html_().partition("</style>")
    assert style.startswith("<style>.tarsift {")
    assert rest.startswith('<div class="tarsift">')
    assert rest.endswith("</div>")
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append((tag, dict(attrs)))
    parser.feed(rest)
    assert not {tag for tag, _ in tags} & {"script", "style", "link", "iframe", "object"}
    for _, attributes in tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith("#")
    return rest


def test_the_style_is_for_the_piece_alone():
    """Rules stand inside those of one class, and the variables of the page become variables of the piece."""
    style = shown.gallery([]).html.partition("</style>")[0].removeprefix("<style>.tarsift {")
    assert ":root" not in style
    assert style.count("{") + 1 == style.count("}")
    assert ".pic:hover img { filter: none; }" in style
    assert "blur(" in style


def test_a_gallery_shows_pictures_of_every_kind_and_text_as_text():
    jpeg = picture(np.random.default_rng(0))
    pixels = np.asarray(Image.open(io.BytesIO(jpeg)))
    images = [jpeg, pixels, Image.fromarray(pixels).convert("L"), b"<html>", None]
    rows = [{"photo": image, "text": HOSTILE, "suspicion": 1.23456, "who": "<b>", "none": None} for image in images]
    rows[1]["text"] = None
    html = body(shown.gallery(iter(rows), image="photo", caption="text", values=["suspicion", "who", "none", "absent"]))
    assert html.count("data:image/webp") == 3
    assert html.count("no picture") == 2
    assert "1 picture (undecodable_image), 1 picture (missing_image)" in html.replace("\n", "")
    assert html.count("no caption") == 1
    assert "&lt;script&gt;alert(1)" in html
    assert "\u202e" not in html
    assert (html.count("1.23"), html.count("&lt;b&gt;"), html.count("none</dt>")) == (5, 5, 0)
    with pytest.raises(UsageError, match="images are given as bytes"):
        shown.gallery([{"image": 3}])


def test_cards_are_those_of_the_report(planted):
    html = body(shown.flagged_samples(str(planted.out), samples=5, neighbors=3))
    page = Path(write_report(str(planted.out), config=ReportConfig(samples=5, neighbors=3, groups=0))).read_text()
    cards = re.findall(r'<article class="card">.*?</article>', page, re.DOTALL)
    assert len(cards) == 5
    assert all(card in html for card in cards)
    assert (html.count("nearest suspects"), html.count("nearest kept")) == (5, 5)
    assert "&lt;script&gt;alert(1)" in html


def test_groups_are_those_of_the_report(planted):
    html = body(shown.flagged_groups(str(planted.out), groups=2))
    page = Path(write_report(str(planted.out), config=ReportConfig(samples=0, neighbors=0, groups=2))).read_text()
    groups = re.findall(r'<article class="group".*?</article>', page, re.DOTALL)
    assert groups
    assert all(group in html for group in groups)
    assert html.count("data:image/webp") >= 5


def test_a_folder_that_is_no_result_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"run\.json"):
        shown.flagged_samples(str(tmp_path))


def test_charts_stand_below_their_titles():
    scores = np.array([0.0, 1.0, np.nan, 9.0])
    histogram = shown.distribution("suspicion", scores, scores > 5, groups=("clean", "poison"), cutoff=4.0)
    assert "2 clean and 1 poison samples from 0 to 9, cut-off 4" in histogram
    apart = shown.distribution("k_distance", np.array([0.5, 0.7]), np.array([False, True]))
    assert "1 kept and 1 flagged samples from 0.5 to 0.7" in apart
    assert "0 kept and 0 flagged" in shown.distribution("none", np.array([np.nan]), np.array([True]))
    line = Line("recall", "line-0", np.array([0.0, 1.0]), np.array([0.0, 1.0]))
    marks = (0.0, 0.5, 1.0)
    curve = lines_svg([line], x=Axis("removed, %", marks), y=Axis("found, %", marks), summary="recall")
    html = body(shown.drawn({"Scores & more": histogram, "Recall": curve}))
    assert html.count("<svg") == 2
    assert html.index("Scores &amp; more") < html.index("Recall")
