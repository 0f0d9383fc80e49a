"""Files of class names: read before any work, refused with a sentence, and not to be changed under a run."""

import pytest

from tarsift.operators.errors import ChangedError, UsageError
from tarsift.pipelines.class_names import class_names_of, read_class_names, with_class_names
from tarsift.pipelines.config import load_config


@pytest.fixture
def file(tmp_path):
    (tmp_path / "names.txt").write_text("ant\n\n  bee \nélan\n")
    return tmp_path / "names.txt"


def routed(file):
    return with_class_names(load_config(settings=[f"sift.route={file}"]))


def test_names_are_the_lines_that_say_something(file):
    assert read_class_names(str(file)) == ["ant", "bee", "élan"]


def test_a_relative_path_means_the_same_elsewhere(file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = routed("names.txt")
    monkeypatch.chdir("/")
    assert config.sift.route == str(file)
    assert class_names_of(config) == ["ant", "bee", "élan"]


def test_the_digest_is_of_the_names_and_only_there_where_there_are_some(file):
    config = routed(file)
    file.write_text("ant\nbee\n\nélan")
    assert routed(file) == config
    file.write_text("bee\nant\nélan")
    assert routed(file).sift.names_sha256 != config.sift.names_sha256
    back = config.model_copy(update={"sift": config.sift.model_copy(update={"route": "cls"})})
    assert with_class_names(back).sift.names_sha256 is None
    assert class_names_of(back) == []


def test_names_that_change_under_a_run_end_it(file):
    config = routed(file)
    file.write_text("ant\nwasp\n")
    with pytest.raises(ChangedError, match="has changed"):
        class_names_of(config)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no file of class names"),
        (b"ant\n\n", "it names 1"),
        (b"", "it names 0"),
        (b"ant\nbee\nant\n", "'ant' more than once"),
        (b"\xff\xfe\x00", "no UTF-8"),
    ],
)
def test_what_is_refused(tmp_path, content, says):
    if content is not None:
        (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(UsageError, match=says):
        routed(tmp_path / "names.txt")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UsageError, match="there is no file"):
        routed(tmp_path)
