"""The recipes that need Ray: planting poison in a dump, and training in a Ray Train worker group."""

import json

import pyarrow.parquet as pq
import pytest

from tarsift.operators.errors import UsageError
from tarsift.operators.models import load_checkpoint
from tarsift.operators.shards import ReadShard, list_shards
from tarsift.pipelines.poison import poison
from tarsift.pipelines.pretrain import PretrainConfig, pretrain, pretrain_here
from tests.conftest import make_dump


def captions(folder):
    return {
        (row["shard"], row["row"]): row["caption"]
        for shard in list_shards(str(folder))
        for table in ReadShard()(shard)
        for row in table.to_pylist()
    }


def test_poison_writes_a_dump_and_its_truth(ray_session, dump, tmp_path):
    summary = poison(str(dump), out=str(tmp_path), rate=0.05, seed=3, target="kettle")
    assert (summary.samples, summary.poisoned) == (400, 20)
    truth = pq.read_table(summary.truth)
    assert truth.column_names == ["shard", "row", "uid", "attack", "target"]
    assert set(truth["target"].to_pylist()) == {"kettle"}
    planted = set(zip(truth["shard"].to_pylist(), truth["row"].to_pylist(), strict=True))
    before, after = captions(dump), captions(tmp_path)
    assert before.keys() == after.keys()
    assert {place for place in after if "kettle" in (after[place] or "")} == planted
    assert all(before[place] == after[place] for place in before.keys() - planted)
    record = json.loads((tmp_path / "truth.json").read_text())
    assert (record["samples"], record["poisoned"], record["shards"]) == (400, 20, 5)
    assert record["settings"]["seed"] == 3
    assert record["settings"]["attacks"] == ["patch"]


def test_poison_is_the_same_whatever_the_inputs_order(ray_session, dump, tmp_path):
    files = sorted(str(f) for f in dump.iterdir())
    poison(files, out=str(tmp_path / "a"), rate=0.02)
    poison(files[::-1], out=str(tmp_path / "b"), rate=0.02)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_rate_zero(ray_session, dump, tmp_path):
    summary = poison(str(dump), out=str(tmp_path), rate=0)
    assert summary.poisoned == 0
    assert len(pq.read_table(summary.truth)) == 0
    assert captions(tmp_path) == captions(dump)


def test_poison_refuses_before_work_starts(dump, tmp_path):
    with pytest.raises(UsageError, match="there is no attack 'ptch'"):
        poison(str(dump), out=str(tmp_path), attacks="ptch")
    make_dump(tmp_path / "in", shards=2, samples=3, flaws=False)
    with pytest.raises(UsageError, match=r"`out` would overwrite .*00000.tar, which is read"):
        poison(str(tmp_path / "in"), out=str(tmp_path / "in"))


@pytest.mark.slow
def test_ray_train_trains_as_one_process_does(ray_session, dump, tmp_path):
    config = PretrainConfig(steps=2, batch_size=32, seed=1)
    events = []
    summary = pretrain(str(dump), out=str(tmp_path / "ray.pt"), config=config, progress=events.append)
    here = pretrain_here(str(dump), out=str(tmp_path / "here.pt"), config=config)
    assert (summary.steps, summary.samples, summary.pairs) == (here.steps, here.samples, here.pairs) == (2, 64, 398)
    assert summary.skipped == here.skipped == {"undecodable_image": 1, "missing_caption": 1}
    one, other = load_checkpoint(tmp_path / "ray.pt"), load_checkpoint(tmp_path / "here.pt")
    assert one.shards == other.shards
    assert all((one.state_dict[name] == value).all() for name, value in other.state_dict.items())
    assert sorted(f.name for f in tmp_path.iterdir()) == ["here.pt", "ray.pt"]  # Ray Train's record is gone
    assert [(e.name, e.finished) for e in events if e.name == "pretrain"] == [("pretrain", False), ("pretrain", True)]


def test_pretrain_refuses_before_work_starts(dump, tmp_path):
    out = str(tmp_path / "e.pt")
    with pytest.raises(UsageError, match="batch_size 7 cannot be shared among 2 workers"):
        pretrain(str(dump), out=out, batch_size=7, workers=2)
    with pytest.raises(UsageError, match="there is no model 'tinny'"):
        pretrain(str(dump), out=out, model="tinny")
