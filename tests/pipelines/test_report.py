import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tarsift.clip_detect.threshold import from_ordered_bits, ordered_bits
from tarsift.operators.decoding import ImageConfig
from tarsift.operators.errors import StoreError, UsageError
from tarsift.operators.listing import Shard
from tarsift.pipelines.report import ReportConfig, pictures, write_report
from tarsift.pipelines.report.answers import round_up
from tarsift.pipelines.report.charts import Histogram, columns_svg, histogram_svg, share_svg, short_number, ticks
from tarsift.pipelines.report.folds import Overview, Tally, normalise, quantile, words_of
from tarsift.pipelines.report.gallery import TABLE_STRIP
from tarsift.pipelines.report.looks import looks
from tarsift.pipelines.report.pictures import LARGE, SMALL, thumbnail
from tarsift.pipelines.text import duration, percent, visible
from tests.operators.hostile_decoder import HANG, KILL, hostile
from tests.pipelines.results import Sample, campaign, direction, make_result, picture, tables_of

ALLOWED_TAGS = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "nav",
        "main",
        "header",
        "section",
        "aside",
        "article",
        "footer",
    ),
    *(
        "div",
        "span",
        "p",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "a",
        "b",
        "i",
        "strong",
        "code",
        "pre",
        "bdi",
        "br",
        "blockquote",
    ),
    *("ul", "ol", "li", "dl", "dt", "dd", "table", "thead", "tbody", "tr", "th", "td", "figure", "figcaption"),
    *("details", "summary", "label", "input", "img", "svg", "rect", "path", "line", "text"),
}


class Page(HTMLParser):
    """The page as a browser would see it: tags with attributes, and the text below every id."""

    VOID = ("meta", "input", "img", "br", "rect", "path", "line")

    def __init__(self, html: str):
        super().__init__()
        self.html = html
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts)).replace("\u00a0", " ")

    def part(self, start: str, end: str) -> str:
        """The text from one heading to the next."""
        return self.text.split(start, 1)[1].split(end, 1)[0]

    def pictures(self) -> list[str]:
        return [a["src"] for tag, a in self.tags if tag == "img"]


def report(result, **settings_) -> Page:
    url = write_report(str(result.out), config=ReportConfig(**settings_))
    assert url == f"{result.out}/report.html"
    return Page((result.out / "report.html").read_text(encoding="utf-8"))


def answer(page: Page, question: str) -> str:
    questions = ["Is this a campaign?", "Is the threshold sane?", "Did anything break?", "What can this run see?"]
    after = [*questions, "How to read this page."]
    return page.part(question, after[questions.index(question) + 1])


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    shards = campaign()
    shards["a/00000"][0].error = "undecodable_image"
    shards["a/00000"][0].score = None
    shards["b/00001"][1].caption = None
    shards["b/00001"][2].copies = shards["b/00001"][3].copies = 2
    shards["b/00001"][3].picture = shards["b/00001"][2].picture
    result = make_result(tmp_path_factory.mktemp("planted"), shards, compressed=("b/00001",))
    result.run["counts"]["shard_problems"] = {
        "a/00000": [{"problem": "truncated", "offset": 4096, "detail": "00151.jpg"}]
    }
    result.save_run()
    return result


@pytest.fixture(scope="module")
def page(planted):
    return report(planted)


def test_the_top_says_what_was_done_and_what_it_does_not_mean(page):
    assert "312 samples read from 2 shards: 299 kept, 12 removed, 1 errored." in page.text
    assert "The encoder was trained on this dump." in answer(page, "What can this run see?")
    assert "Up to 5 % is covered." in answer(page, "What can this run see?")
    assert "It cannot see poison that it has not learned." in answer(page, "What can this run see?")
    assert "That a fraction was flagged is no finding" in page.text
    assert "does not mean a clean dump" in page.text


def test_the_planted_group_is_found_with_its_size_and_words(page):
    said = answer(page, "Is this a campaign?")
    assert "Group A: 12 flagged samples look alike" in said
    assert "in 2 shards" in said
    assert (
        "“banana”: 12 of the 12 samples whose caption has this word are flagged (100 %; of all samples 3.9 %)" in said
    )
    group = page.part("The same look", "The same word")
    assert "A 12 flagged samples, captions with “ banana ”" in group
    assert "4 × a ripe banana, lot 0" in group
    words = page.part("The same word", "The same caption")
    assert "banana 12 of 12 100 % 2" in words
    assert "A lot, ripe" in words.replace(" ,", ",")
    assert "a ripe banana, lot 0 4 of 4 100 % 2" in page.part("The same caption", "The highest-scored samples")


def test_the_threshold_is_measured_by_the_group(page):
    said = answer(page, "Is the threshold sane?")
    assert "Flagged is the highest 5 % by suspicion: 4.0 and above." in said.replace("4 and", "4.0 and")
    most, flagged = re.search(r"It covers group A: of (\d+) samples most like it (\d+) are flagged\.", said).groups()
    assert most == flagged
    assert 10 <= int(most) <= 12


def test_the_cards_stand_by_score_with_neighbours_of_both_kinds(planted):
    page = report(planted, samples=3)
    cards = page.part("The highest-scored samples", "Scores and the cut-off")
    assert [float(x) for x in re.findall(r"(\d\.\d+) #\d", cards)] == [4.51, 4.5, 4.41]
    assert cards.count("nearest suspects") == cards.count("nearest kept") == 3
    first = cards.split("nearest suspects")[1].split("nearest kept")
    assert first[0].count("a ripe banana") == 4
    assert first[1].split("#2")[0].count("a photo of thing") == 4


def test_pictures_are_fetched_from_plain_and_compressed_shards(page):
    uris = page.pictures()
    assert len(uris) > 12
    colours = []
    for uri in uris:
        assert uri.startswith("data:image/webp;base64,")
        image = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
        assert image.size == (32, 32)
        colours.append(np.asarray(image.convert("RGB"))[16, 16].astype(int))
    # The first six cards alternate between the shards: yellow pictures, exactly those that were planted.
    assert all(np.abs(c[:2] - (250, 220)).max() < 12 for c in colours[:1])
    alts = [a["alt"] for tag, a in page.tags if tag == "img"]
    assert any("b/00001" in alt for alt in alts)
    assert any("a/00000" in alt for alt in alts)


def test_errors_problems_duplicates_and_throughput_are_listed(page):
    errors = page.part("reason samples became examples", "Duplicates")
    assert "undecodable_image" in errors
    assert "1 errored a/00000 row 0 · a/00000/00000" in errors
    assert "truncated" in errors
    assert "4,096 00151.jpg" in errors
    assert "1 shard of 2 came damaged." in answer(page, "Did anything break?")
    assert "1 sample could not be used (0.3 %)." in answer(page, "Did anything break?")
    duplicates = page.part("share their image bytes", "The run")
    assert "1 image," in duplicates
    assert "2 b/00001 row 2" in duplicates
    assert "embed.detect 2 9 3.0 s 3" in page.part("pass shards samples", "Inputs")


def test_the_page_can_load_and_run_nothing(page):
    style = re.search(r"<style>(.*?)</style>", page.html, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert f"style-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert {tag for tag, _ in page.tags} <= ALLOWED_TAGS
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
        assert (attributes.get("src") or "data:").startswith("data:")
        assert (attributes.get("href") or "#").startswith("#")
    assert "url(" not in style
    assert "@import" not in style


def test_pictures_are_blurred_until_asked_for(page):
    style = re.search(r"<style>(.*?)</style>", page.html, re.S)[1]
    assert re.search(r"\.pic img \{[^}]*filter: blur", style)
    toggles = [a for t, a in page.tags if t == "input"]
    assert toggles[0]["id"] == "pictures"
    assert not any("checked" in a for a in toggles)
    assert len(toggles) == 1 + len(page.pictures())


HOSTILE = [
    "<script>alert(1)</script>",
    "</style><script src=//evil.example/x.js></script>",
    '"><img src=x onerror=alert(1)>',
    "</title></head><body onload=alert(1)>",
    "{{ 7 * 7 }} {% raw %}",
    "javascript:alert(1)",
]


def test_hostile_captions_names_and_uids_stay_text(tmp_path):
    shards = campaign()
    samples = shards["a/00000"]
    for i, text in enumerate(HOSTILE):
        samples[i].caption = samples[i].uid = text
        samples[i].score, samples[i].flagged = 9.0 - i / 10, True
    for i in range(10, 24):
        samples[i].caption, samples[i].flagged = "<script>alert(2)</script> offer", True
        samples[i].score = 8.0
    result = make_result(tmp_path, shards)
    result.run["config"]["note"] = HOSTILE[1]
    result.run["counts"]["shard_problems"] = {"a/00000": [{"problem": "truncated", "offset": 1, "detail": HOSTILE[0]}]}
    result.run["encoders"]["detect"]["name"] = HOSTILE[2]
    result.run["versions"][HOSTILE[0]] = HOSTILE[1]
    result.save_run()
    page = report(result)
    assert {tag for tag, _ in page.tags} <= ALLOWED_TAGS
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    for text in HOSTILE:
        assert text in page.text
    assert "49" not in page.part("#5", "nearest")
    # repeated: it is a group of its own, and still text
    assert "<script>alert(2)</script> offer 14 of 14" in page.part("The same caption", "The highest-scored samples")


def test_bidirectional_and_control_characters_are_shown_not_obeyed(tmp_path):
    shards = campaign()
    sample = shards["a/00000"][0]
    sample.caption, sample.score, sample.flagged = "pay \u202egpj.exe\u202c \x1b[31m\x00 zero\u200bwidth", 9.0, True
    page = report(make_result(tmp_path, shards))
    assert not set("\u202e\u202c\x1b\x00\u200b") & set(page.html)
    assert "pay ⟨U+202E⟩gpj.exe⟨U+202C⟩ ⟨U+001B⟩[31m⟨U+0000⟩ zero⟨U+200B⟩width" in page.text


def test_a_missing_shard_leaves_placeholders(tmp_path):
    result = make_result(tmp_path, campaign())
    result.shards["b/00001"].unlink()
    page = report(result)
    assert page.pictures()
    assert "no picture" in page.text
    assert "its shard cannot be read" in page.text
    assert "of this page could not be shown" in answer(page, "Did anything break?")


def test_a_changed_shard_never_shows_other_pictures(tmp_path):
    result = make_result(tmp_path, campaign(), compressed=("b/00001",))
    other = campaign()
    for samples in other.values():
        for sample in samples:
            sample.picture = picture((0, 0, 255))
    again = make_result(tmp_path / "other", other, compressed=("b/00001",))
    for name, path in result.shards.items():
        path.write_bytes(again.shards[name].read_bytes())
    result.shards["a/00000"].write_bytes(result.shards["a/00000"].read_bytes()[:2000])
    page = report(result)
    assert page.pictures() == []
    assert "its shard was changed since it was read" in page.text


def test_a_picture_that_cannot_be_decoded_is_a_placeholder(tmp_path):
    shards = campaign()
    bomb = bytearray(picture((1, 2, 3)))
    at = bomb.find(b"\xff\xc0")
    bomb[at + 5 : at + 9] = b"\xff\xff\xff\xff"  # 65535 x 65535 pixels
    shards["a/00000"][5].picture = bytes(bomb)
    shards["a/00000"][14].picture = b"GIF89a not a picture"
    page = report(make_result(tmp_path, shards))
    assert "1 picture (too_many_pixels)" in page.text
    assert "1 picture (undecodable_image)" in page.text


@pytest.mark.parametrize("word", [KILL, HANG])
def test_a_picture_that_kills_its_decoder_is_left_out_alone(tmp_path, monkeypatch, word):
    """Also one whose decoder does not end: the page is written when its time is over."""
    shards = campaign()
    shards["a/00000"][5].picture += word
    monkeypatch.setenv("PYTHONPATH", hostile(tmp_path / "site"))
    monkeypatch.setattr("tarsift.pipelines.report.gallery.ImageConfig", lambda: ImageConfig(timeout_s=2))
    result = make_result(tmp_path, shards)
    page = report(result)
    assert "1 picture (decoder_died)" in page.text
    html = (result.out / "report.html").read_text()
    assert 0 < html.count('">no picture</span>') < 10 < html.count("data:image/webp")


def test_the_page_stays_small_whatever_the_pictures_are():
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    sizes = {edge: len(thumbnail(noise, edge).uri) for edge in (LARGE, SMALL)}
    defaults = ReportConfig()
    strips = defaults.groups * (defaults.strip + 2 * min(defaults.strip, TABLE_STRIP))
    small = strips + defaults.samples * 2 * defaults.neighbors
    assert defaults.samples * sizes[LARGE] + small * sizes[SMALL] < 2_600_000


def test_nothing_flagged(tmp_path):
    shards = campaign(planted=0)
    page = report(make_result(tmp_path, shards))
    assert "300 kept, 0 removed, 0 errored" in page.text
    assert "Nothing was flagged" in answer(page, "Is this a campaign?")
    assert "Nothing was flagged" in answer(page, "Is the threshold sane?")
    assert "Every sample was read and has its place." in answer(page, "Did anything break?")
    assert "No sample has an error." in page.text
    assert page.part("The highest-scored samples", "Scores").count("nearest kept") == 48


def test_flagged_by_chance_nothing_stands_out(tmp_path):
    shards = campaign(planted=0)
    for samples in shards.values():
        for sample in samples[-6:]:
            sample.flagged = True
    page = report(make_result(tmp_path, shards))
    assert "Nothing stands out" in answer(page, "Is this a campaign?")
    assert "There is no yardstick" in answer(page, "Is the threshold sane?")
    assert "No group of flagged images lies closer together" in page.text


def test_a_campaign_stands_before_a_tighter_natural_subject(tmp_path):
    shards = campaign()
    subject = direction(77)
    for samples in shards.values():
        for i in range(10):
            near = direction(8000 + len(samples), near=subject, noise=0.005)
            colour = picture((20, 5 + len(samples) % 250, 10 * i))
            samples.append(Sample("a black seven", 1.5 + i / 100, near, picture=colour, flagged=True))
    page = report(make_result(tmp_path, shards))
    said = answer(page, "Is this a campaign?")
    assert "Group A: 12 flagged samples look alike" in said
    assert "Less strong: group B." in said
    assert "B 20 flagged samples, captions with “ black ”" in page.part("The same look", "The same word")


def test_a_group_that_the_cut_off_halves_asks_for_more(tmp_path):
    shards = campaign(planted=40)
    banana = [s for samples in shards.values() for s in samples if s.caption.startswith("a ripe banana")]
    for i, sample in enumerate(sorted(banana, key=lambda s: -s.score)):
        sample.flagged = i < 24
    result = make_result(tmp_path, shards)
    said = answer(report(result), "Is the threshold sane?")
    assert "Perhaps it flags too few" in said
    assert "“banana”: of 40 samples with it 24 are flagged" in said
    assert "--fraction 0.15" in said  # twice 24 of 340, rounded up


def test_a_group_far_above_the_cut_off_says_how_little_would_do(tmp_path):
    shards = campaign()
    for samples in shards.values():
        for sample in samples:
            sample.flagged = sample.flagged or sample.score > 0.8
    said = answer(report(make_result(tmp_path, shards)), "Is the threshold sane?")
    assert "It covers what stands out" in said
    assert re.search(r"within the highest 3\.85 %: --fraction 0\.039 would remove them too, and 58 samples fewer", said)


@pytest.mark.parametrize("scored", [False, True])
def test_shards_without_samples_or_scores(tmp_path, scored):
    failed = Sample("x", None, error="undecodable_image")
    page = report(make_result(tmp_path, {"00000": [failed] * 3 if scored else [], "00001": []}))
    assert f"{3 if scored else 0} samples read from 2 shards" in page.text
    assert "No sample was scored." in page.text


def test_a_shard_whose_table_is_gone_is_named(tmp_path):
    result = make_result(tmp_path, campaign())
    (result.out / "flags" / "b" / "00001.parquet").unlink()
    page = report(result)
    assert "This page covers 156 samples of 312; 1 shard could not be read back." in answer(page, "Did anything break?")
    assert "b/00001 : a pass has no table for it" in page.text


def test_passes_out_of_date_and_lost_samples_are_said(tmp_path):
    result = make_result(tmp_path, campaign())
    result.run["stale"] = ["write"]
    result.run["counts"]["kept"] -= 1
    result.save_run()
    said = answer(report(result), "Did anything break?")
    assert "Read is not kept + removed + errored" in said
    assert "Out of date, as an earlier pass was made anew: write." in said


def test_what_is_needed_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"no run\.json"):
        write_report(str(tmp_path))
    result = make_result(tmp_path, campaign())
    for path in (result.out / "flags").rglob("*.parquet"):
        path.unlink()
    with pytest.raises(UsageError, match="tarsift flag"):
        write_report(str(result.out))


def test_without_stored_embeddings_the_rest_is_shown(tmp_path):
    result = make_result(tmp_path, campaign())
    for path in (result.out / "embeddings").rglob("*.parquet"):
        table = pq.read_table(path, partitioning=None)
        pq.write_table(table.drop_columns(["image_embedding", "text_embedding"]), path)
    page = report(result)
    assert "Image embeddings were not stored" in page.text
    assert "“banana”: 12 of the 12" in answer(page, "Is this a campaign?")
    assert page.pictures()
    for path in (result.out / "embeddings").rglob("*.parquet"):
        path.unlink()
    page = report(result)
    assert "There are no stored embeddings" in page.text
    assert page.pictures() == []


def test_pictures_can_be_left_out(planted):
    page = report(planted, pictures=False)
    assert page.pictures() == []
    assert "Pictures were left out on request." in page.text


def test_compressed_shards_are_read_again_only_up_to_the_limit(tmp_path):
    result = make_result(tmp_path, campaign(), compressed=("a/00000", "b/00001"))
    page = report(result, max_scan_bytes=1)  # the first one is always read
    alts = {re.search(r"[ab]/0000\d", a["alt"])[0] for tag, a in page.tags if tag == "img"}
    assert len(alts) == 1
    assert "compressed shard: reading it again would take too long" in page.text


def test_another_score_can_rule_the_page(tmp_path):
    result = make_result(tmp_path, campaign())
    result.run["threshold"] = {"policy": "score", "score": "slof_k16", "value": 0.9, "cutoff": 0.9}
    result.save_run()
    page = report(result)
    assert "Sorted by slof_k16." in page.text
    assert "Flagged is slof_k16 of at least 0.9" in answer(page, "Is the threshold sane?")
    result.run["threshold"]["score"] = "no_such"
    result.save_run()
    with pytest.raises(UsageError, match="no_such"):
        write_report(str(result.out))


def test_a_shard_with_too_many_flags_is_named(tmp_path):
    shards = campaign()
    shards["c/00002"] = [Sample(f"offer {i}", 3 + i / 100, direction(9000 + i), flagged=i < 60) for i in range(100)]
    page = report(make_result(tmp_path, shards))
    assert "c/00002 100 60 60 %" in page.part("shards that stand out", "Errors")


def test_the_same_run_gives_the_same_page(planted, page):
    assert report(planted, threads=1).html == page.html


def test_a_remote_result_folder(planted):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(planted.out), "/results/out", recursive=True)
    try:
        assert write_report("memory://results/out") == "memory://results/out/report.html"
        assert b"Group A" in memory.cat("/results/out/report.html")
    finally:
        memory.rm("/results", recursive=True)


# --- what the page is made of


def folds():
    overview = Overview("suspicion", ("suspicion", "density"), 20, 15, b"key")
    centre = direction(1).astype(np.float32)
    tally = Tally(
        "suspicion",
        {"suspicion": (0.0, 3.0)},
        captions=["a ripe banana, lot 1"],
        words=["banana", "photo"],
        centres=(centre / np.linalg.norm(centre))[None],
        radii=np.array([0.3], np.float32),
        levels=np.array([4.2, 0.5], np.float32),
    )
    return {"overview": overview, "tally": tally}


@pytest.fixture(scope="module")
def joined():
    tables = []
    for name, samples in campaign().items():
        samples[0].error = "missing_caption"
        samples[2].copies = samples[3].copies = 2
        samples[3].picture = samples[2].picture
        parts = tables_of(name, samples, [(0, 1)] * len(samples))
        table = parts["scores"]
        for column in ("home", "flagged"):
            table = table.append_column(column, parts["flags"][column])
        for column in ("caption", "image_embedding"):
            table = table.append_column(column, parts["embeddings/detect"][column])
        tables.append(table)
    return pa.concat_tables(tables)


def plain(value):
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("name", ["overview", "tally"])
@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 312), max_size=4), order=st.randoms(use_true_random=False))
def test_folds_do_not_depend_on_how_rows_are_split(name, joined, cuts, order):
    fold = folds()[name]
    whole = fold.add(fold.init(), joined)
    ends = [0, *sorted(cuts), len(joined)]
    parts = [joined.slice(a, b - a) for a, b in pairwise(ends)]
    order.shuffle(parts)
    states = [fold.add(fold.init(), part) for part in parts]
    state = fold.init()
    for other in states:
        state = fold.merge(other, state)
    got, expected = plain(fold.finish(state)), plain(fold.finish(whole))
    if name == "overview":
        assert got["copies"] == pytest.approx(expected["copies"])
        got.pop("copies"), expected.pop("copies")
    assert got == expected


def test_folds_count_what_is_there(joined):
    overview, tally = folds().values()
    seen = overview.add(overview.init(), joined)
    assert seen["rows"] == 312
    assert seen["judged"] == 310
    assert seen["homes"] == {"clean": 298, "removed": 12, "errored": 2}
    assert seen["errors"][("missing_caption", True)] == (
        2,
        [("a/00000", 0, "a/00000/00000"), ("b/00001", 0, "b/00001/00000")],
    )
    assert [-score for score, _, _ in seen["top"][:2]] == pytest.approx([4.51, 4.5])
    assert len(seen["top"]) == 20
    assert len({h for h, _, _ in seen["background"]}) == 15
    assert seen["copies"] == [4, 0, 2.0]
    counts = tally.add(tally.init(), joined)
    assert counts["caption"].tolist() == [[4, 4]]
    assert counts["word"].tolist() == [[12, 12], [298, 0]]
    assert counts["look"].tolist() == [[12, 12]]
    assert counts["levels"].tolist()[0] == 8
    assert counts["bins:suspicion"].sum(axis=0).tolist() == [298, 12]
    assert counts["beyond:suspicion"].tolist() == [12]


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50))
def test_ordered_bits_keep_the_order(values):
    array = np.array(values, np.float32)
    codes = ordered_bits(array)
    assert (from_ordered_bits(codes) == array).all()
    assert (array[np.argsort(codes, kind="stable")] == np.sort(array)).all()


@pytest.mark.parametrize("share", [0.01, 0.5, 0.95, 1.0])
def test_quantiles_come_out_to_one_part_in_128(share):
    values = np.random.default_rng(0).normal(size=20_000).astype(np.float32)
    coarse = np.bincount(ordered_bits(values) >> np.uint32(16), minlength=1 << 16)
    expected = np.quantile(values, share)
    assert quantile(coarse, share) == pytest.approx(expected, rel=1 / 64, abs=0.01)


def test_captions_are_compared_in_one_form():
    texts = pa.array(["  A  Ripe\tBanana ", "a ri\u200bpe banana", "\uff21 ripe banana", None, "STRASSE"])
    assert normalise(texts).to_pylist() == ["a ripe banana"] * 3 + [None, "strasse"]


def test_words_are_counted_once_a_caption():
    rows, words = words_of(pa.array(["the cat, the dog", None, "", "l'été 2024 x", "写真 的"]))
    found = sorted(zip(rows.tolist(), words.to_pylist(), strict=True))
    assert found == [(0, "cat"), (0, "dog"), (0, "the"), (3, "2024"), (3, "été"), (4, "写真")]


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_a_tight_cluster_is_one_group_and_the_rest_is_none():
    rng = np.random.default_rng(3)
    centre = unit(rng.normal(size=(1, 32)))
    suspects = unit(np.concatenate([rng.normal(size=(200, 32)), centre + 0.05 * rng.normal(size=(40, 32))]))
    background = unit(rng.normal(size=(1000, 32)))
    (group,) = looks(suspects, background)
    assert set(group.members) <= set(range(200, 240))
    assert len(group.members) >= 36
    assert group.tightness > 2
    inside = np.linalg.norm(suspects - group.centre, axis=1) <= group.radius
    assert inside[list(group.members)].mean() >= 0.9
    assert not inside[:200].any()
    assert group.agreement is None


def test_a_cluster_that_the_dump_has_too_is_no_group():
    rng = np.random.default_rng(4)
    centre = unit(rng.normal(size=(1, 32)))

    def common(n):
        return unit(centre + 0.05 * rng.normal(size=(n, 32)))

    suspects = np.concatenate([unit(rng.normal(size=(100, 32))), common(40)])
    background = np.concatenate([unit(rng.normal(size=(500, 32))), common(500)])
    assert looks(suspects, background) == []


def test_two_clusters_are_two_groups_and_captions_are_compared():
    rng = np.random.default_rng(5)
    centres = unit(rng.normal(size=(2, 32)))
    suspects = unit(
        np.concatenate([c + 0.05 * rng.normal(size=(n, 32)) for c, n in zip(centres, (30, 12), strict=True)])
    )
    background = unit(rng.normal(size=(600, 32)))
    alike = unit(np.concatenate([np.tile(centres[0], (30, 1)), rng.normal(size=(12, 32))]))
    there = np.ones(len(suspects), bool)
    texts = (unit(rng.normal(size=(600, 32))), np.ones(600, bool))
    first, second = looks(suspects, background, texts=(alike, there), background_texts=texts)
    assert (len(first.members), len(second.members)) == (30, 12)
    assert first.agreement == pytest.approx(1.0, abs=1e-5)
    assert abs(second.agreement) < 0.2
    assert abs(first.around) < 0.2


def test_too_few_to_compare_gives_no_groups():
    rows = unit(np.random.default_rng(0).normal(size=(20, 8)))
    assert looks(rows[:4], rows) == []
    assert looks(rows, rows[:3]) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (None, ""),
        ("a\n b\t\u3000c", "a b c"),
        ("x\u202ey", "x⟨U+202E⟩y"),
        ("\ud800", "⟨U+D800⟩"),
        ("a" + "\u0301" * 50 + "b", "a\u0301\u0301b"),
        ("family \U0001f468\u200d\U0001f469", "family \U0001f468\u200d\U0001f469"),
        ("\U000e0041tag", "⟨U+E0041⟩tag"),
        ("ab" * 200, "ab" * 140 + " … (+120 characters)"),
    ],
)
def test_text_by_strangers_is_made_visible(text, shown):
    assert visible(text) == shown


def test_numbers_are_written_short():
    assert [short_number(v) for v in (0, 0.0421, 3.14159, 950, 12_345, 3_318_333, -2.5, float("inf"))] == [
        "0", "0.0421", "3.14", "950", "12.3k", "3.3M", "-2.5", "–",
    ]  # fmt: skip
    assert [percent(v).replace("\u00a0", " ") for v in (0.05, 1.0, 0.00012, 0.123, None)] == [
        "5 %", "100 %", "0.012 %", "12.3 %", "–",
    ]  # fmt: skip
    assert [duration(v) for v in (0.81, 41.2, 185, 7810, None)] == ["0.8 s", "41 s", "3 min 5 s", "2 h 10 min", "–"]
    assert [round_up(v) for v in (0, 0.00966, 0.0097, 0.05, 3.0)] == [0.0, 0.0097, 0.0097, 0.05, 0.99]


def test_ticks_are_round_and_inside():
    for low, high in ((0, 1), (-1.7, 5.4), (1.04, 1.29), (0, 3e6), (2, 2)):
        marks = ticks(low, high)
        assert 1 <= len(marks) <= 13
        assert all(low - 1e-9 <= m <= high + 1e-9 for m in marks)


def test_charts_say_their_numbers_to_a_screen_reader():
    chart = Histogram("slof", 0.0, 1.0, np.array([5, 0, 3]), np.array([0, 0, 2]), beyond=1, cutoff=0.7)
    svg = histogram_svg(chart)
    assert 'role="img"' in svg
    assert "slof: 8 kept and 2 flagged samples from 0 to 1, cut-off 0.7" in svg
    assert svg.count("z") >= 3
    assert histogram_svg(Histogram("<x>", 0.0, 1.0, np.zeros(4, int), np.zeros(4, int))).count("&lt;x&gt;") == 2
    assert 'width="36.0"' in share_svg(0.5)
    assert "50.0%" in columns_svg(np.array([0.5, 0.0]), expected=0.25)
    assert len(columns_svg(np.random.default_rng(0).random(100_000), expected=0.5)) < 20_000


def test_the_resolved_configuration_is_on_the_page(planted, page):
    assert "policy: fraction" in page.part("Resolved configuration", "Versions")
    assert json.loads((planted.out / "run.json").read_text())["versions"]["pyarrow"] in page.text
    assert f"tarsift flag {planted.out} --fraction 0.02 && tarsift write {planted.out}" in page.text


def test_a_store_that_is_away_leaves_gaps_after_one_attempt(monkeypatch):
    asked = []

    def away(shard, ranges):
        asked.append(len(ranges))
        raise StoreError("nobody there")

    monkeypatch.setattr(pictures, "fetch_members", away)
    wanted = [pictures.Picture(shard="s", row=i, offset=512 * i, size=9, sha256=None, edge=9) for i in range(3)]
    found = pictures.make_thumbnails(wanted, {"s": Shard("s", "s3://b/s.tar", 9)}, images=ImageConfig())
    assert found.missing == {"its shard cannot be read": 3}
    assert asked == [3]
