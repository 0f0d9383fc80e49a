"""What a state knows of the shards that came in, without Ray."""

import pytest

from tarsift.operators.errors import ChangedError, TarsiftError, UsageError
from tarsift.operators.listing import Shard
from tarsift.pipelines.nights import State, compare, latest


def shard(name: str, size: int = 10, stamp: str = "a") -> Shard:
    return Shard(name, f"/d/{name}.tar", size, stamp)


def record(night: int, *shards: Shard, **more) -> dict:
    told = {s.name: {"size": s.size, "stamp": s.stamp, "sha256": f"{s.name}{s.size}"} for s in shards}
    return {"night": night, "shards": told, **more}


def state_of(tmp_path, *records: dict) -> State:
    state = State.begin(str(tmp_path / "state"), root="/d", train=True)
    for item in records:
        state.commit(item)
    return state


def test_new_changed_doubtful_and_gone_shards_are_told_apart(tmp_path):
    state = state_of(
        tmp_path, record(1, shard("x/1"), shard("x/2"), shard("y/1")), record(2, shard("x/3"), shard("x/4"))
    )
    listed = [shard("x/1"), shard("x/2", size=11), shard("x/3", stamp="b"), shard("x/5")]
    found = compare(listed, state.seen())
    assert [s.name for s in found.new] == ["x/5"]
    assert [s.name for s in found.changed] == ["x/2"]
    assert [s.name for s in found.doubtful] == ["x/3"]
    assert found.gone == ["x/4"]  # y was not listed: nothing is said of it


def test_a_touched_shard_is_known_by_its_new_stamp_and_a_changed_one_by_its_last_night(tmp_path):
    again = shard("x/2", size=12)
    state = state_of(tmp_path, record(1, shard("x/1"), shard("x/2")), record(2, again, touched={"x/1": "c"}))
    seen = state.seen()
    assert (seen["x/1"]["stamp"], seen["x/1"]["night"]) == ("c", 1)
    assert (seen["x/2"]["size"], seen["x/2"]["night"]) == (12, 2)


def test_a_state_is_read_as_it_was_written_and_its_key_is_its_own(tmp_path):
    state = state_of(tmp_path, record(1, shard("a")))
    again = State.load(str(tmp_path / "state"))
    assert again is not None
    assert (again.content, again.records, again.next) == (state.content, state.records, 2)
    other = State.begin(str(tmp_path / "other"), root="/d", train=True)
    assert other.content["key"] != state.content["key"]
    assert len(bytes.fromhex(state.content["key"])) == 32
    assert State.load(str(tmp_path / "none")) is None


def test_a_night_that_was_begun_keeps_its_shards(tmp_path):
    state = state_of(tmp_path)
    assert state.opened() is None
    state.open([shard("a")], changed=[], gone=[], touched={})
    opened = state.opened()
    assert opened is not None
    assert [Shard(**s) for s in opened["shards"]] == [shard("a")]
    state.commit(record(1, shard("a")))
    assert state.opened() is None


def test_a_record_is_put_once_and_a_lost_one_is_noticed(tmp_path):
    state = state_of(tmp_path, record(1, shard("a")), record(2, shard("b")))
    behind = State(state.folder, state.content, state.records[:1])
    with pytest.raises(ChangedError, match="another ingestion"):
        behind.commit(record(2, shard("c")))
    (tmp_path / "state" / "records" / "0001.json").unlink()
    with pytest.raises(TarsiftError, match="no night 1"):
        State.load(state.folder)


def test_a_state_of_a_later_version_is_refused(tmp_path):
    state = state_of(tmp_path)
    place = tmp_path / "state" / "state.json"
    place.write_text(place.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(UsageError, match="later tarsift"):
        State.load(state.folder)


def test_what_old_nights_do_without_is_removed_and_their_verdicts_stay(tmp_path):
    state = state_of(tmp_path, *(record(n, shard(str(n))) for n in range(1, 6)))
    files = []
    for night in range(1, 6):
        files += [
            tmp_path / "state" / place
            for place in (
                f"nights/{night:04d}/embeddings/detect/1.parquet",
                f"nights/{night:04d}/flags/1.parquet",
                f"nights/{night:04d}/encoder.pt",
                f"reference/{night:04d}/about.json",
            )
        ]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
    state.clear(keep=3)
    left = {str(file.relative_to(tmp_path / "state")) for file in files if file.exists()}
    assert {f"nights/{n:04d}/flags/1.parquet" for n in range(1, 6)} <= left
    assert {name for name in left if "embeddings" in name or "encoder.pt" in name} == {
        name
        for n in (3, 4, 5)
        for name in (f"nights/{n:04d}/embeddings/detect/1.parquet", f"nights/{n:04d}/encoder.pt")
    }
    assert {name for name in left if "reference" in name} == {f"reference/{n:04d}/about.json" for n in (4, 5)}
    assert state.clear(keep=3) == []


def test_values_of_nights_are_those_that_are_there():
    records = [{"spreads": {"a": 1}}, {"spreads": {}}, {"spreads": {"a": 3}}, {}]
    assert list(latest(records, "spreads", "a")) == [1, 3]
