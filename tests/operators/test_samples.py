from __future__ import annotations

import io
from collections.abc import Iterable

import pytest

from tarsift.operators.samples import SETTLED_RUNS, Placed, scan_members, split_name
from tarsift.operators.tar import TarDamage
from tests.operators.tars import archive, member, sample


def scan(members: Iterable[bytes], **options) -> list[Placed]:
    return list(scan_members(io.BytesIO(archive(members)), **options))


def rows(*names: str, **options) -> list[int | None]:
    return [placed.row for placed in scan((member(name) for name in names), **options)]


@pytest.mark.parametrize(
    ("name", "key", "part"),
    [
        ("000.cls", "000", "cls"),
        ("d/000.jpg", "d/000", "jpg"),
        ("d.e/000.JPG", "d.e/000", "jpg"),
        ("a.b00.jpg", "a.b00", "jpg"),
        ("a.b01.jpg", "a.b01", "jpg"),
        ("www.example.com.jpeg", "www.example.com", "jpeg"),
        ("0001.seg.png", "0001", "seg.png"),
        ("0001.Depth.PNG", "0001", "depth.png"),
        ("0001.npy.gz", "0001", "npy.gz"),
        ("0001.seg.npy.gz", "0001", "seg.npy.gz"),
        ("a.b.seg.png", "a.b", "seg.png"),
        ("seg.png", "seg", "png"),
        ("v1.gz", "v1", "gz"),
        ("./000.jpg", "./000", "jpg"),
        ("README", "", ""),
        ("d.e/README", "", ""),
        (".DS_Store", "", ""),
        ("d/._000.jpg", "", ""),
        ("__MACOSX/000.jpg", "__MACOSX/000", "jpg"),  # webdataset trains on it
        ("__MACOSX/._000.jpg", "", ""),  # its part `_000.jpg` is no image to webdataset
        ("d/.jpg", "d/", "jpg"),
        ("d.e/f/.TXT", "d.e/f/", "txt"),
        ("d/.seg.jpg", "", ""),
        ("d/.npy", "", ""),
        (".jpg", "", ""),
        ("e.jpg/", "e", "jpg"),  # as tarfile gives it, without the slash, where PAX has it
        ("000.", "", ""),
        ("folder/", "", ""),
        ("", "", ""),
        ("日本.jpg", "日本", "jpg"),
    ],
)
def test_key_and_part(name: str, key: str, part: str):
    assert split_name(name) == (key, part)


def test_a_name_of_a_megabyte_is_split_in_one_go():
    roles = ".seg" * (1 << 18)
    assert split_name(f"x{roles}.jpg") == ("x", f"{roles[1:]}.jpg")


def test_an_ordinary_shard():
    assert rows("0.jpg", "0.txt", "0.json", "1.txt", "1.jpg", "1.json", "2.jpg") == [0, 0, 0, 1, 1, 1, 2]


def test_dotted_keys_are_samples_of_their_own():
    assert rows("a.b00.jpg", "a.b00.txt", "a.b01.jpg", "a.b01.txt") == [0, 0, 1, 1]


def test_all_images_then_all_captions_then_all_json():
    n = 3 * SETTLED_RUNS
    names = [f"{i}.{part}" for part in ("jpg", "txt", "json") for i in range(n)]
    assert rows(*names) == list(range(n)) * 3


def test_interleaved_samples():
    names = ["0.jpg", "1.jpg", "0.txt", "1.txt", "2.jpg", "3.jpg", "3.txt", "2.txt"]
    assert rows(*names) == [0, 1, 0, 1, 2, 3, 3, 2]


def test_a_missing_caption_holds_nothing_back():
    names = ["lone.jpg"] + [f"{i}.{part}" for i in range(40) for part in ("jpg", "txt")]
    placed = scan(member(name) for name in names)
    assert [p.row for p in placed] == [0] + [i + 1 for i in range(40) for _ in range(2)]
    for p in placed:
        assert p.row is not None
        assert p.row - p.closed <= SETTLED_RUNS + 2


def test_a_late_member_begins_a_row_that_repeats_the_key():
    names = ["lone.jpg"] + [f"{i}.{part}" for i in range(40) for part in ("jpg", "txt")] + ["lone.txt", "lone.jpg"]
    late = scan(member(name) for name in names)[-2:]
    assert [(p.row, p.repeats) for p in late] == [(41, True), (41, True)]


def test_the_lookahead_is_bounded_by_bytes():
    names = [f"{i}.{part}" for part in ("jpg", "txt") for i in range(20)]
    assert rows(*names) == list(range(20)) * 2
    # Members here are 512 bytes; when 0.txt comes, 0.jpg is 20 of them behind.
    assert rows(*names, lookahead_bytes=20 * 512) == list(range(20)) * 2
    placed = scan((member(name) for name in names), lookahead_bytes=20 * 512 - 1)
    assert [p.row for p in placed] == list(range(40))
    assert [p.repeats for p in placed] == [False] * 20 + [True] * 20
    for p in placed:
        assert p.row is not None
        assert p.row - p.closed <= 20


def test_one_key_with_endless_parts_is_not_one_sample():
    placed = scan(member(f"a.{i}x") for i in range(600))
    assert [p.row for p in placed] == [i // 256 for i in range(600)]
    assert [p.repeats for p in placed] == [i >= 256 for i in range(600)]


def test_repeats_side_by_side():
    placed = scan(member(name) for name in ["a.jpg", "a.txt", "a.jpg", "a.txt", "b.jpg", "b.JPG", "b.txt"])
    assert [(p.row, p.repeats) for p in placed] == [
        (0, False),
        (0, False),
        (1, True),
        (1, True),
        (2, False),
        (3, True),
        (3, True),
    ]


def test_repeats_far_apart():
    members = [block for i in [*range(50), 3] for block in sample(str(i))]
    placed = scan(members)
    assert [(p.row, p.repeats) for p in placed[-3:]] == [(49, False), (50, True), (50, True)]


def test_strays_have_no_row_and_part_no_sample():
    placed = scan(
        [member("d/", kind=b"5"), member("0.jpg"), member("README"), member("0.txt"), member("dev", kind=b"3")]
    )
    assert [p.row for p in placed] == [None, 0, None, 0, None]


def test_links_belong_to_the_sample_of_their_name():
    placed = scan(
        [member("0.jpg", kind=b"2"), member("0.txt", b"1"), member("1.jpg", b"1"), member("1.txt", kind=b"1")]
    )
    assert [(p.row, p.member.type) for p in placed] == [(0, "symlink"), (0, "file"), (1, "file"), (1, "link")]


def test_closed_never_goes_back_and_no_closed_row_gets_a_member():
    names = [f"{i % 7 if i % 3 else i}.{part}" for i in range(80) for part in ("jpg", "txt", "json")]
    closed = 0
    for p in scan(member(name) for name in names):
        assert p.closed >= closed
        assert p.row is not None
        assert p.row >= p.closed
        closed = p.closed
    assert closed > 10


@pytest.mark.parametrize(("name", "row"), [("0.txt", 0), ("1.jpg", 1)])
def test_the_member_in_which_the_archive_ends_has_a_row(name: str, row: int):
    data = member("0.jpg", b"1") + member(name, b"2" * 600)[:-500]
    placed = []
    with pytest.raises(TarDamage):  # noqa: PT012 (what came before the damage counts)
        for p in scan_members(io.BytesIO(data)):
            placed.append(p)
    assert [(p.row, p.cut) for p in placed] == [(0, False), (row, True)]
