"""`audit`: over all shards of a dump, in Ray tasks; uids across shards; what the command prints and returns."""

from __future__ import annotations

import json
import os
import shutil
import tarfile

import numpy as np
import pytest

from tarsift.operators.shards import Shard
from tarsift.pipelines import audit as recipe
from tarsift.pipelines import tasks
from tests.conftest import make_dump, picture, write_shard
from tests.pipelines.test_cli import run

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def whole(tmp_path):
    make_dump(tmp_path / "whole", shards=3, samples=20, flaws=False)
    return tmp_path / "whole"


def test_a_whole_dump(whole, monkeypatch, capsys):
    heard = []
    found = recipe.audit(str(whole), decode=True, progress=heard.append)
    assert found.whole
    assert found.samples == 60
    assert found.problems == {}
    assert [shard.shard for shard in found.shards] == ["00000", "00001", "00002"]
    assert found.bytes == sum(path.stat().st_size for path in whole.iterdir())
    assert heard[-1].finished
    assert heard[-1].samples == 60
    code, out, _ = run(monkeypatch, capsys, "audit", str(whole))
    assert code == 0
    assert "whole: 3 shards, 60 samples" in out


def test_problems_are_counted_and_named_and_the_exit_code_is_4(whole, monkeypatch, capsys):
    damaged = whole / "00001.tar"
    os.truncate(damaged, damaged.stat().st_size // 1024 * 512 + 7)  # not between two blocks
    (whole / "00000_stats.json").write_text('{"successes": 21}')
    code, out, _ = run(monkeypatch, capsys, "audit", str(whole), "--json")
    told = json.loads(out)
    assert code == 4
    assert told["whole"] is False
    assert told["decoded"] is False
    assert told["problems"]["truncated"] == 1
    assert told["problems"]["stats_mismatch"] == 1
    assert [len(shard["problems"]) > 0 for shard in told["shards"]] == [True, True, False]
    code, out, _ = run(monkeypatch, capsys, "audit", str(whole))
    assert code == 4
    assert "2 of 3 shards have problems" in out
    assert "00001: 1 truncated" in out


def test_uids_across_shards_however_they_are_parted(tmp_path, monkeypatch):
    folder = tmp_path / "dump"
    folder.mkdir()
    rng = np.random.default_rng(0)

    def sample(**fields):
        return {"jpg": picture(rng), "txt": b"a caption", **({"json": json.dumps(fields).encode()} if fields else {})}

    write_shard(folder / "a.tar", [sample(uid="one"), sample(uid="two"), sample()], first=0)
    write_shard(folder / "b.tar", [sample(uid="one"), sample(uid="a/000000002"), sample(uid="three")], first=0)
    for per_part in (recipe.UIDS_PER_PART, 2):
        monkeypatch.setattr(recipe, "UIDS_PER_PART", per_part)
        found = recipe.audit(str(folder))
        assert found.problems == {"repeated_uid": 2, "forged_uid": 1}
        first, second = found.shards
        assert [(p.problem, p.examples) for p in first.problems] == [("repeated_uid", ("row 0",))]
        assert {p.problem: p.examples for p in second.problems} == {
            "repeated_uid": ("row 0",),
            "forged_uid": ("row 1",),
        }


def test_a_reader_that_is_killed_costs_its_shard_only(whole, monkeypatch):
    def killing(look, shard: Shard):
        if shard.name == "00001":
            os.kill(os.getpid(), 9)
        return look(shard)

    monkeypatch.setattr(recipe, "_look_at", killing)
    monkeypatch.setattr(tasks, "TASK_OPTIONS", {"max_retries": 0})
    found = recipe.audit(str(whole))
    assert found.problems == {"reader_died": 1}
    assert found.samples == 40
    assert [shard.whole for shard in found.shards] == [True, False, True]


def test_hostile_names_do_not_reach_the_terminal(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "dump"
    make_dump(folder, shards=1, samples=3, flaws=False)
    shutil.move(folder / "00000.tar.gz", folder / "x.tar.gz")
    with tarfile.open(folder / "y.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("\x1b]0;owned\x07\u202ekey.jpg"))
    code, out, _ = run(monkeypatch, capsys, "audit", str(folder))
    assert code == 4
    assert "\x1b]" not in out
    assert "\u202e" not in out
    assert "⟨U+202E⟩key" in out
