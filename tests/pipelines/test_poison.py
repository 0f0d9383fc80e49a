"""Whole dumps: planting poison in them, and training on them in a Ray Train worker group."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from tarsift.clip_detect.triggers import draw
from tarsift.operators.decoding import ImageConfig
from tarsift.operators.errors import UsageError
from tarsift.operators.models import load_checkpoint
from tarsift.operators.poison import PoisonConfig
from tarsift.operators.shards import ReadShard, list_shards
from tarsift.pipelines.poison import poison, poison_here
from tarsift.pipelines.pretrain import PretrainConfig, pretrain, pretrain_here
from tests.conftest import make_dump, picture, write_shard
from tests.operators.hostile_decoder import EAT, HANG, KILL, LATER, hostile


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


def test_poison_here_is_the_same(ray_session, dump, tmp_path):
    settings = {"attacks": ("patch", "one-image"), "rate": 0.02}
    one = poison(str(dump), out=str(tmp_path / "a"), **settings)
    other = poison_here(str(dump), out=str(tmp_path / "b"), config=PoisonConfig(**settings))
    assert one.unusable == other.unusable == {"undecodable_image": 1, "missing_caption": 1}
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def write_dump(folder, hostile_rows):
    """Write two shards of 40 samples, with a word behind the pictures of some of (shard, row)."""
    folder.mkdir()
    rng = np.random.default_rng(2)
    for shard in range(2):
        rows = [{"txt": f"a thing {i}".encode(), "jpg": picture(rng)} for i in range(40)]
        for (name, row), word in hostile_rows.items():
            rows[row]["jpg"] += word if name == f"{shard:05d}" else b""
        write_shard(folder / f"{shard:05d}.tar", rows, first=40 * shard)
    return str(folder)


def rows_of(folder):
    tables = [table for shard in list_shards(str(folder)) for table in ReadShard()(shard)]
    return {(row["shard"], row["row"]): row for table in tables for row in table.to_pylist()}


def planted(summary):
    rows = pq.read_table(summary.truth).to_pylist()
    return {(row["shard"], row["row"]): row["attack"] for row in rows}


@pytest.fixture
def environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", hostile(tmp_path / "site"))


@pytest.mark.parametrize(
    ("words", "timeout_s", "unusable"),
    [
        ({3: KILL, 4: EAT, 39: KILL}, 30, {"decoder_died": 2, "undecodable_image": 1}),
        ({0: HANG}, 3, {"decoder_died": 1}),
    ],
)
def test_images_that_kill_their_decoder_are_left_as_they_are(environment, tmp_path, words, timeout_s, unusable):
    words = {("00001", row): word for row, word in words.items()}
    dump = write_dump(tmp_path / "in", words)
    config = PoisonConfig(rate=0.9, images=ImageConfig(timeout_s=timeout_s))
    summary = poison_here(dump, out=str(tmp_path / "out"), config=config)
    assert (summary.samples, summary.poisoned) == (80, 72)
    assert summary.unusable == unusable
    assert json.loads((tmp_path / "out" / "truth.json").read_text())["unusable"] == summary.unusable
    assert not planted(summary).keys() & words.keys()
    before, after = rows_of(dump), rows_of(tmp_path / "out")
    same = {place for place in before if before[place]["image"] == after[place]["image"]}
    assert same == words.keys()
    assert all(before[place]["caption"] == after[place]["caption"] for place in before.keys() - planted(summary).keys())


@pytest.mark.parametrize("attack", ["patch", "one-image"])
def test_an_image_that_kills_its_decoder_only_later_is_replaced_by_another(environment, tmp_path, attack):
    """As many samples are poisoned as was asked for, and they are those that an undecodable image would leave."""
    settings = PoisonConfig(attacks=(attack,), rate=0.1)
    undisturbed = planted(poison_here(write_dump(tmp_path / "plain", {}), out=str(tmp_path / "a"), config=settings))
    drawn = sorted(undisturbed, key=lambda place: draw("sample {}:{}".format(*place), seed=0))
    dying = set(drawn[:1] if attack == "one-image" else drawn[:2])  # the first one is what is repeated
    dump = write_dump(tmp_path / "in", dict.fromkeys(dying, LATER))
    summary = poison_here(dump, out=str(tmp_path / "b"), config=settings)
    assert (summary.poisoned, summary.unusable) == (len(undisturbed), {"decoder_died": len(dying)})
    before, after = rows_of(dump), rows_of(tmp_path / "b")
    assert {place for place in before if before[place]["image"] == after[place]["image"]} == dying
    assert {p for p in before if before[p]["caption"] != after[p]["caption"]} == planted(summary).keys()
    assert len({after[place]["image"] for place in planted(summary)}) == (1 if attack == "one-image" else 8)
    broken = write_dump(tmp_path / "broken", dict.fromkeys(dying, KILL))
    assert planted(poison_here(broken, out=str(tmp_path / "c"), config=settings)) == planted(summary)


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
