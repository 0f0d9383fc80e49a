from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import os
import pickle
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from pydantic import ValidationError
from webdataset import WebDataset  # pyright: ignore[reportAttributeAccessIssue]

from tarsift.operators import storage
from tarsift.operators.errors import (
    END_OF_SHARD,
    IMAGE_USABLE,
    REASONS,
    SHARD_PROBLEMS,
    AccessError,
    ShardError,
    StoreError,
)
from tarsift.operators.schema import SAMPLE_SCHEMA
from tarsift.operators.shards import ReadConfig, ReadShard, Shard, ShardEnd, fetch_member, fetch_members, list_shards
from tests.operators.tars import archive, breaking, by_tarfile, header, member, padded, put, sample


def read(shard: Shard, **settings) -> tuple[list[dict], ShardEnd]:
    """Return a shard's rows and its end, having checked what holds of every reading."""
    tables = list(ReadShard(ReadConfig(**settings), receipts=True)(shard))
    for table in tables:
        assert table.schema == SAMPLE_SCHEMA
        table.validate(full=True)
    last = tables[-1].to_pylist()
    assert len(last) == 1
    assert (last[0]["shard"], last[0]["row"], last[0]["error"]) == (shard.name, -1, END_OF_SHARD)
    end = ShardEnd.model_validate_json(last[0]["key"])
    rows = [row for table in tables[:-1] for row in table.to_pylist()]
    assert [row["row"] for row in rows] == list(range(end.rows))
    for row in rows:
        assert row["error"] is None or row["error"] in REASONS
        assert row["image"] is None or row["error"] is None or row["error"] in IMAGE_USABLE
    assert {problem.problem for problem in end.problems} <= set(SHARD_PROBLEMS)
    return rows, end


def errors(rows: list[dict]) -> list[str | None]:
    return [row["error"] for row in rows]


@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz"])
def test_rows_and_receipt(tmp_path: Path, name: str):
    data = archive(block for i in range(3) for block in sample(f"{i}", caption=f"näh {i}"))
    shard = put(tmp_path / name, data, name="deep/s")
    rows, end = read(shard)
    stored = (tmp_path / name).read_bytes()
    assert end == ShardEnd(rows=3, members=6, sha256=hashlib.sha256(stored).hexdigest(), bytes=len(stored))
    image = b"image of 1" * 7
    assert rows[1] == {
        "shard": "deep/s",
        "row": 1,
        "key": "1",
        "uid": "deep/s/1",
        "image_offset": 2560,
        "image_size": len(image),
        "image": image,
        "caption": "näh 1",
        "label": None,
        "error": None,
    }
    assert data[2560 : 2560 + len(image)] == image
    ranges = [(row["image_offset"], row["image_size"]) for row in (rows[2], rows[0], rows[2])]
    assert fetch_members(shard, ranges) == [rows[2]["image"], rows[0]["image"], rows[2]["image"]]
    assert fetch_member(shard, *ranges[1]) == rows[0]["image"]
    with pytest.raises(ShardError, match="was changed"):
        fetch_member(shard, len(data) - 5, 6)


def test_overlapping_ranges_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="overlap"):
        fetch_members(put(tmp_path / "s.tar", archive(sample("0"))), [(0, 10), (5, 10)])


def test_without_receipts_there_are_only_rows(tmp_path: Path):
    shard = put(tmp_path / "s.tar", archive(sample("0")))
    assert [table.num_rows for table in ReadShard()(shard)] == [1]


def test_batches_are_bounded_in_rows_and_bytes(tmp_path: Path):
    shard = put(tmp_path / "s.tar", archive(b for i in range(40) for b in sample(f"{i}", image=bytes(1000))))
    tables = list(ReadShard(ReadConfig(batch_rows=16))(shard))
    assert [t.num_rows for t in tables] == [16, 16, 8]
    tables = list(ReadShard(ReadConfig(max_batch_bytes=10_000))(shard))
    assert [t.num_rows for t in tables] == [10, 10, 10, 10]
    assert pa.concat_tables(tables)["row"].to_pylist() == list(range(40))


def test_the_operator_pickles(tmp_path: Path):
    shard = put(tmp_path / "s.tar", archive(sample("0")))
    reader, again = pickle.loads(pickle.dumps((ReadShard(ReadConfig(batch_rows=1)), shard)))
    assert next(reader(again)).num_rows == 1


@pytest.mark.parametrize("settings", [{"captions": "csv"}, {"captions": "json:"}, {"batch_rows": 0}, {"typo": 1}])
def test_settings_are_checked(settings: dict):
    with pytest.raises(ValidationError):
        ReadConfig(**settings)


@pytest.mark.parametrize("name", ["jpg", "jpeg", "JPG", "Jpeg", "png", "PNG", "webp"])
def test_image_extensions(tmp_path: Path, name: str):
    shard = put(tmp_path / "s.tar", archive([member(f"0.{name}", b"image"), member("0.TXT", b"caption")]))
    rows, _ = read(shard)
    assert (rows[0]["image"], rows[0]["caption"], rows[0]["error"]) == (b"image", "caption", None)


@pytest.mark.parametrize(
    ("parts", "image"),
    [("png jpg", b"jpg"), ("jpg png", b"jpg"), ("webp jpeg png", b"png"), ("webp JPEG", b"JPEG"), ("webp", b"webp")],
)
def test_of_several_images_the_one_is_read_that_is_trained_on(tmp_path: Path, parts: str, image: bytes):
    images = [member(f"0.{part}", part.encode()) for part in parts.split()]
    shard = put(tmp_path / "s.tar", archive([*images, member("0.txt", b"c"), member("0.json", b"{")]))
    [row], _ = read(shard)
    assert (row["image"], fetch_member(shard, row["image_offset"], row["image_size"])) == (image, image)
    assert row["error"] == ("several_images" if len(images) > 1 else "bad_json")
    theirs = WebDataset(shard.url, shardshuffle=False).rename(image="jpg;png;jpeg;webp")
    assert [sample["image"] for sample in theirs] == [image]


def test_of_several_images_the_one_that_is_trained_on_may_be_too_large(tmp_path: Path):
    images = [member("0.jpg", b"x" * 101), member("0.png", b"1")]
    rows, _ = read(put(tmp_path / "s.tar", archive([*images, member("0.txt", b"c")])), max_image_bytes=100)
    assert errors(rows) == ["image_too_large"]


CUT = "ü" * 10


@pytest.mark.parametrize(
    ("members", "caption", "error"),
    [
        ([member("0.txt", b"only text")], "only text", "missing_image"),
        ([member("0.jpg", b"1")], None, "missing_caption"),
        ([member("0.jpg", b"1"), member("0.txt", b"")], None, "missing_caption"),
        ([member("0.jpg", b"1"), member("0.txt", b" \n\t ")], None, "missing_caption"),
        ([member("0.jpg", b"1"), member("0.txt", b"caf\xe9")], "caf�", "caption_not_utf8"),
        ([member("0.jpg", b"1"), member("0.txt", (CUT * 2).encode())], CUT, "caption_too_large"),
        ([member("0.jpg", b"1"), member("0.txt", b"x" + (CUT * 2).encode())], "x" + CUT[1:], "caption_too_large"),
        ([member("0.jpg", b"1"), member("0.txt", b"c"), member("0.json", b"[1]")], "c", "bad_json"),
        ([member("0.jpg", b"1"), member("0.txt", b"c"), member("0.json", b"{")], "c", "bad_json"),
        ([member("0.jpg", b"1"), member("0.txt", b"c"), member("0.json", b"")], "c", "bad_json"),
        ([member("0.jpg", b"1"), member("0.txt", b"c"), member("0.json", b"\xff")], "c", "bad_json"),
        ([member("0.jpg", b"1"), member("0.txt", b"c"), member("0.json", b"[" * 90)], "c", "bad_json"),
        ([member("0.jpg", b"1"), member("0.txt", b"c"), member("0.json", b"{}" + b" " * 100)], "c", "bad_json"),
        ([member("0.jpg", b"x" * 101), member("0.txt", b"c")], "c", "image_too_large"),
        ([member("0.jpg", b""), member("0.txt", b"c")], "c", None),
        ([member("0.jpg", kind=b"2"), member("0.txt", b"c")], "c", "unsupported_member"),
        ([member("0.jpg", b"1"), member("0.txt", kind=b"1")], None, "unsupported_member"),
        ([member("0.jpg", b"1"), member("0.txt", b"c"), member("0.dev", kind=b"3")], "c", "unsupported_member"),
    ],
)
def test_reason_codes(tmp_path: Path, members: list[bytes], caption: str | None, error: str | None):
    shard = put(tmp_path / "s.tar", archive([*members, *sample("1")]))
    rows, end = read(shard, max_caption_bytes=20, max_json_bytes=100, max_image_bytes=100)
    assert (rows[0]["caption"], rows[0]["error"]) == (caption, error)
    assert rows[1]["error"] is None
    assert not end.problems


def test_deep_json_is_bad_json(tmp_path: Path):
    deep = b'{"a":' * 200_000 + b"1" + b"}" * 200_000
    shard = put(tmp_path / "s.tar", archive([*sample("0"), member("0.json", deep)]))
    assert errors(read(shard, max_json_bytes=2 << 20)[0]) == ["bad_json"]


@pytest.mark.parametrize(
    ("fields", "caption", "error"),
    [
        ({"text": "a cat"}, "a cat", None),
        ({"text": ["first", "second"]}, "first", None),
        ({"text": [None, "second"]}, "second", None),
        ({"text": None}, None, "missing_caption"),
        ({"text": ""}, None, "missing_caption"),
        ({"text": []}, None, "missing_caption"),
        ({"text": 7}, None, "missing_caption"),
        ({}, None, "missing_caption"),
        ({"text": "ü" * 40}, "ü" * 25, "caption_too_large"),
        ({"text": "half \ud800"}, "half ���", "caption_not_utf8"),
        ([], None, "bad_json"),
    ],
)
def test_captions_from_json(tmp_path: Path, fields, caption: str | None, error: str | None):
    members = [member("0.jpg", b"1"), member("0.txt", b"not this"), member("0.json", json.dumps(fields).encode())]
    rows, _ = read(put(tmp_path / "s.tar", archive(members)), captions="json:text", max_caption_bytes=50)
    assert (rows[0]["caption"], rows[0]["error"]) == (caption, error)


def test_without_json_its_caption_is_missing(tmp_path: Path):
    rows, _ = read(put(tmp_path / "s.tar", archive(sample("0"))), captions="json:text")
    assert errors(rows) == ["missing_caption"]


@pytest.mark.parametrize(
    ("uid", "expected"),
    [("abc", "abc"), (7, "7"), ("", "s/0"), (None, "s/0"), (True, "s/0"), ({}, "s/0"), ("\ud800", "?")],
)
def test_uid(tmp_path: Path, uid, expected: str):
    shard = put(tmp_path / "s.tar", archive([*sample("0"), member("0.json", json.dumps({"uid": uid}).encode())]))
    assert read(shard)[0][0]["uid"] == expected


def test_keys_that_are_not_utf8_are_shown_with_replacements(tmp_path: Path):
    shard = put(tmp_path / "s.tar", archive([member(b"\xff.jpg", b"1"), member(b"\xff.txt", b"c")]))
    rows, _ = read(shard)
    assert (rows[0]["key"], rows[0]["uid"], rows[0]["error"]) == ("�", "s/�", None)


def test_repeated_and_scattered_samples(tmp_path: Path):
    members = [member("lone.jpg", b"1"), *(b for i in range(40) for b in sample(str(i))), *sample("3")]
    rows, _ = read(put(tmp_path / "s.tar", archive([*members, member("lone.txt", b"late")])))
    assert errors(rows) == ["missing_caption", *[None] * 40, "duplicate_key", "scattered_sample"]
    assert rows[41]["image"] == rows[4]["image"]
    assert rows[42]["caption"] == "late"


def test_images_first_are_joined_with_their_captions(tmp_path: Path):
    names = [f"{i}.{part}" for part in ("jpg", "txt") for i in range(60)]
    rows, _ = read(put(tmp_path / "s.tar", by_tarfile([(name, name.encode()) for name in names])))
    assert [(r["image"], r["caption"], r["error"]) for r in rows] == [
        (f"{i}.jpg".encode(), f"{i}.txt", None) for i in range(60)
    ]


def test_strays_are_no_rows(tmp_path: Path):
    strays = [member("d/", kind=b"5"), member("README", b"r"), member(".DS_Store", b""), member("fifo", kind=b"6")]
    rows, end = read(put(tmp_path / "s.tar", archive([*strays, *sample("d/0"), *strays])))
    assert [row["key"] for row in rows] == ["d/0"]
    assert end.members == 10


@pytest.mark.parametrize("extra", [b"", b"README"])
def test_a_shard_without_samples(tmp_path: Path, extra: bytes):
    rows, end = read(put(tmp_path / "s.tar", archive([member(extra)] if extra else [])))
    assert not rows
    assert not end.problems


SHARD = archive(b for i in range(4) for b in [*sample(str(i)), member(f"{i}.json", b"{}")])


def test_a_cut_shard_gives_what_was_before_the_cut(tmp_path: Path):
    whole, _ = read(put(tmp_path / "whole.tar", SHARD))
    for cut in range(0, len(SHARD) - 1, 128):
        rows, end = read(put(tmp_path / "cut.tar", SHARD[:cut]))
        members, rest = divmod(cut, 1024)
        if cut >= 12 * 1024 + 1024:
            assert (rows, end.problems) == (whole, ())
            continue
        problem = "no_end_marker" if rest == 0 or members >= 12 else "truncated"
        assert [p.problem for p in end.problems] == [problem]
        assert end.members == min(members, 12)
        # A row is whole with its image and caption; it is cut if a member of it is, or if it lacks one.
        samples, parts = divmod(members, 3)
        named = members < 12 and rest >= 512  # the header of a cut member is there
        expected: list[str | None] = [None] * min(samples, 4)
        if members < 12 and (parts or named):
            expected.append("truncated_member" if named or parts == 1 else None)
        assert errors(rows) == expected, cut
        for row, known in zip(rows, whole, strict=False):
            if row["error"] is None:
                assert row == known


@pytest.mark.filterwarnings("error")
def test_without_receipts_damage_is_warned_of(tmp_path: Path):
    shard = put(tmp_path / "s.tar", SHARD[:5000])
    with pytest.warns(RuntimeWarning, match=r"s\.tar: 2 samples read, then truncated: .*\(byte 4096\)"):
        list(ReadShard()(shard))


def test_a_folder_that_is_named_like_a_shard(tmp_path: Path):
    (tmp_path / "folder.tar").mkdir()
    rows, end = read(Shard("s", str(tmp_path / "folder.tar"), 0))
    assert not rows
    assert (end.rows, end.sha256, [p.problem for p in end.problems]) == (0, "", ["unreadable"])


def test_a_shard_that_cannot_be_reached_does_not_end_as_one_without_rows(tmp_path: Path, monkeypatch):
    with pytest.raises(StoreError, match=r"nothing\.tar: it was listed, and is gone"):
        read(Shard("s", str(tmp_path / "nothing.tar"), 0))
    (tmp_path / "loop.tar").symlink_to("loop.tar")
    with pytest.raises(StoreError, match=r"loop\.tar: .*run the same command again"):
        read(Shard("s", str(tmp_path / "loop.tar"), 0))
    for error, kind in ((PermissionError("no"), AccessError), (OSError(errno.EIO, "broken"), StoreError)):
        monkeypatch.setattr(storage, "open_read", lambda url, error=error: breaking(SHARD[:4096], error))
        with pytest.raises(kind, match=r"cannot read the shard dump/s\.tar"):
            read(Shard("s", "dump/s.tar", len(SHARD)))


@pytest.mark.parametrize(
    ("data", "problem", "samples"),
    [
        (b"", "no_end_marker", 0),
        (b"<html><body>404</body></html>", "truncated", 0),
        (b"<html>" * 1000, "bad_header", 0),
        (SHARD + b"x", "trailing_data", 4),
        (SHARD[:6144] + b"\xff" * 512 + SHARD[6656:], "bad_header", 2),
    ],
)
def test_damage(tmp_path: Path, data: bytes, problem: str, samples: int):
    rows, end = read(put(tmp_path / "s.tar", data))
    assert [p.problem for p in end.problems] == [problem]
    assert end.sha256 == hashlib.sha256(data).hexdigest()
    assert errors(rows) == [None] * samples


def test_trailing_data_cuts_no_sample(tmp_path: Path):
    data = archive([*sample("0"), member("1.jpg", b"1")]) + b"x"
    assert errors(read(put(tmp_path / "s.tar", data))[0]) == [None, "missing_caption"]


def test_rows_come_while_the_shard_is_read(tmp_path: Path):
    image = bytes(100_000)
    members = [member("lone.jpg", image), *(b for i in range(400) for b in sample(str(i), image=image))]
    shard = put(tmp_path / "s.tar", archive(members))
    members.clear()
    tracemalloc.start()
    try:
        assert sum(t.num_rows for t in ReadShard(ReadConfig(batch_rows=8))(shard)) == 401
        assert tracemalloc.get_traced_memory()[1] < 10 << 20  # of 40 MB
    finally:
        tracemalloc.stop()


def test_a_cut_gzip_shard_is_noticed_at_every_byte(tmp_path: Path):
    packed = gzip.compress(SHARD)
    path = tmp_path / "s.tar.gz"
    for cut in range(len(packed)):
        path.write_bytes(packed[:cut])
        rows, end = read(Shard("s", str(path), cut))
        assert end.bytes == cut
        assert [p.problem for p in end.problems] == [
            "gzip_damage" if cut > 2 else "truncated" if cut else "no_end_marker"
        ]
        assert all(error in (None, "truncated_member") for error in errors(rows))


def test_a_hostile_size_is_one_cut_row(tmp_path: Path):
    huge = header(b"1.jpg", b"\x80" + (10 << 30).to_bytes(11, "big")) + padded(b"not 10 GB")
    rows, end = read(put(tmp_path / "s.tar", b"".join(sample("0")) + huge))
    assert errors(rows) == [None, "truncated_member"]
    assert (rows[1]["key"], rows[1]["image"], rows[1]["image_size"]) == ("1", None, None)
    assert [(p.problem, p.offset) for p in end.problems] == [("truncated", 2048)]


@pytest.mark.skipif(not os.environ.get("TARSIFT_DATA"), reason="TARSIFT_DATA names no folder with data sets")
def test_real_shards():
    folder = Path(os.environ["TARSIFT_DATA"])
    manifests = sorted(folder.glob("*/manifest.json"))
    assert manifests
    for manifest in manifests:
        known = json.loads(manifest.read_text())["shards"][:3]
        shards = list_shards([str(manifest.parent / entry["file"]) for entry in known])
        for shard, entry in zip(shards, known, strict=True):
            rows, end = read(shard)
            assert end.sha256 == entry["sha256"]
            assert not end.problems
            assert set(errors(rows)) == {None}
            image = io.BytesIO(fetch_member(shard, rows[-1]["image_offset"], rows[-1]["image_size"])).read()
            assert image == rows[-1]["image"]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (b"7", 7),
        (b" 12\n", 12),
        (b"0", 0),
        (b"-1", None),
        (b"cat", None),
        (b"", None),
        (b"9" * 30, None),
        (b"99999999999", None),
    ],
)
def test_a_class_is_a_whole_number_and_nothing_else(tmp_path: Path, text: bytes, label: int | None):
    members = [*sample("0"), member("0.cls", text), *sample("1")]
    rows, _ = read(put(tmp_path / "s.tar", archive(members)))
    assert [row["label"] for row in rows] == [label, None]
    assert errors(rows) == [None, None]
