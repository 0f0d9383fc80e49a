from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from tarsift.operators import storage
from tarsift.operators.errors import UsageError
from tarsift.operators.listing import Shard, list_shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("train/00000.tar", "train/00001.tar.gz", "test/00000.tgz", "test/deep/00000.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    for name in ("train/00000.parquet", "train/00000_stats.json", "train/._00000.tar", "train/.hidden.tar"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def names(inputs, **options) -> list[str]:
    return [shard.name for shard in list_shards(inputs, **options)]


EVERYTHING = ["test/00000", "test/deep/00000", "train/00000", "train/00001"]


def test_a_folder_stands_for_all_shards_below_it(folder: Path):
    assert names(str(folder)) == EVERYTHING
    assert names(f"{folder}/") == EVERYTHING
    assert names([f"{folder}/train", f"{folder}/test"]) == [
        "test/00000",
        "test/deep/00000",
        "train/00000",
        "train/00001",
    ]
    assert list_shards(str(folder / "train"))[0] == Shard("00000", str(folder / "train/00000.tar"), 5)


def test_every_way_to_name_them(folder: Path, monkeypatch):
    assert names(f"{folder}/train/00000.tar") == ["00000"]
    assert names(f"{folder}/train/*") == ["00000", "00001"]
    assert names(f"{folder}/t*") == EVERYTHING
    assert names(f"{folder}/*/00000.t*") == ["test/00000", "train/00000"]
    assert names(f"{folder}/**/*.tar") == ["test/deep/00000", "train/00000"]
    assert names(f"{folder}/train/{{00000.tar,00001.tar.gz}}") == ["00000", "00001"]
    assert names(f"{folder}/{{train,test}}") == EVERYTHING
    assert names(f"{folder}/{{train,test}}/*.t*") == ["test/00000", "train/00000", "train/00001"]
    assert names(f"file://{folder}/train") == ["00000", "00001"]
    assert names([f"{folder}/train/00000.tar", f"{folder}/test"]) == ["test/00000", "test/deep/00000", "train/00000"]
    monkeypatch.chdir(folder)
    assert names("train") == ["00000", "00001"]
    assert names(".") == EVERYTHING
    assert list_shards("train/00000.tar")[0].url == str(folder / "train/00000.tar")


def test_names_with_pattern_characters_are_taken_as_they_are(tmp_path: Path):
    for name in ("a[1].tar", "{b}.tar"):
        (tmp_path / name).write_bytes(b"")
        assert names(str(tmp_path / name)) == [name.removesuffix(".tar")]


def test_names_below_a_given_root(folder: Path):
    assert names(f"{folder}/train", root=str(folder)) == ["train/00000", "train/00001"]
    with pytest.raises(UsageError, match="outside the root"):
        names(str(folder), root=str(folder / "train"))


def test_links_to_shards_count_and_other_things_with_their_names_do_not(folder: Path):
    (folder / "link.tar").symlink_to(folder / "train/00000.tar")
    (folder / "folder.tar").mkdir()
    (folder / "folder.tar/x.tar").write_bytes(b"1")
    assert set(names(str(folder))) == {*EVERYTHING, "link", "folder.tar/x"}
    assert names(f"{folder}/folder.tar") == ["x"]


def test_remote_shards():
    root = f"memory://{uuid.uuid4().hex}"
    for i in range(40):
        storage.put_bytes(f"{root}/s/{i:03d}.tar", b"1" * i)
    assert names(root) == [f"s/{i:03d}" for i in range(40)]
    shards = list_shards(f"{root}/s/{{000..039}}.tar")
    assert [(s.name, s.size) for s in shards] == [(f"{i:03d}", i) for i in range(40)]
    assert len(names(f"{root}/*/00?.tar")) == 10
    assert storage.read_bytes(shards[3].url) == b"111"
    with pytest.raises(UsageError, match=r"2 of 42 shards do not exist: 'memory://.*/s/040\.tar', .*041\.tar'"):
        list_shards(f"{root}/s/{{000..041}}.tar")


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ([], "no input is given"),
        ("{folder}/nothing", "does not exist"),
        ("{folder}/empty", "no shard lies in the folder"),
        ("{folder}/train/*.zip", r"no shard matches .*\.tar\.gz"),
        ("{folder}/train/00000.parquet", "is no shard.*in quotes"),
        ("{folder}/train/{{00000..00002}}.tar", r"2 of 3 shards do not exist: .*00001\.tar', .*00002\.tar'\.$"),
        (["{folder}/train/00000.tar", "{folder}/train/7.tar"], "1 of 2 shards do not exist.*in quotes"),
        ("{folder}/train/{{00000..", "braces are not balanced"),
        (["{folder}/train", "{folder}/train/00000.tar"], "is given twice"),
        (["{folder}/train/00000.tar", "memory://x/1.tar"], "different stores|do not exist"),
        ("pipe:aws s3 cp s3://b/x.tar -", "pipes are not run"),
        ("nosuch://x/1.tar", "nosuch"),
        ("", "must not be empty"),
    ],
)
def test_usage_errors_say_what_was_looked_for(folder: Path, inputs, says: str):
    (folder / "empty").mkdir()
    given = [i.format(folder=folder) for i in ([inputs] if isinstance(inputs, str) else inputs)]
    with pytest.raises(UsageError, match=says):
        list_shards(given)


@pytest.mark.parametrize(
    "pattern", ["{0..999999999}.tar", "{0..999999999999999999999999}.tar", "{000..999}/{0..999}/{1..2}.tar"]
)
def test_a_brace_pattern_of_too_many_paths_is_refused(pattern: str):
    with pytest.raises(UsageError, match=r"stands for \d+ paths, over 1000000"):
        list_shards(pattern)


def test_two_stores_at_once_are_refused(folder: Path):
    url = f"memory://{uuid.uuid4().hex}/1.tar"
    storage.put_bytes(url, b"")
    with pytest.raises(UsageError, match="different stores"):
        list_shards([url, str(folder)])


def test_two_shards_of_one_name_are_refused(folder: Path):
    (folder / "train/00000.tar.gz").write_bytes(b"")
    with pytest.raises(UsageError, match=r"the name '00000': .*00000\.tar.* and .*00000\.tar"):
        list_shards(str(folder / "train"))


def test_names_that_are_not_text_are_refused(tmp_path: Path):
    (tmp_path / "a\nb.tar").write_bytes(b"")
    with pytest.raises(UsageError, match="control characters"):
        list_shards(str(tmp_path))
