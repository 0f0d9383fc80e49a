"""Whole runs given images that kill or hang what decodes them: those are lost alone."""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tarsift.pipelines.verify import verify
from tests.conftest import make_dump, picture, write_shard
from tests.operators.hostile_decoder import HANG, KILL, hostile
from tests.pipelines.runs import clean, ray_head, tarsift

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The environment of commands, and of the Ray they join, in which images with a word behind them do harm."""
    with ray_head({"PYTHONPATH": hostile(tmp_path_factory.mktemp("hostile") / "site")}) as environment:
        yield environment | {"COLUMNS": "1000"}


def test_images_that_kill_or_hang_their_decoder_are_lost_alone(tmp_path, encoder, environment):
    make_dump(tmp_path / "dump", shards=3, samples=60, flaws=False)
    rng = np.random.default_rng(9)
    for name, hostile_rows in (("kills", {20: KILL, 40: HANG}), ("hangs", {30: HANG})):
        rows = [{"jpg": picture(rng), "txt": b"a photo of a thing"} for _ in range(60)]
        for row, word in hostile_rows.items():
            rows[row]["jpg"] += word
        write_shard(tmp_path / "dump" / f"{name}.tar", rows, first=0)
    run = clean(tmp_path / "dump", tmp_path / "out", encoder, "--set", "images.timeout_s=3")
    subprocess.run(run, check=True, timeout=400, env=environment)
    flags = pa.concat_tables(pq.read_table(p) for p in sorted((tmp_path / "out" / "flags").glob("*.parquet")))
    assert len(flags) == 300
    lost = flags.filter(pa.compute.is_valid(flags["error"])).select(["shard", "row", "error"]).to_pylist()
    wanted = [("hangs", 30), ("kills", 20), ("kills", 40)]
    assert lost == [{"shard": shard, "row": row, "error": "decoder_died"} for shard, row in wanted]
    assert verify(str(tmp_path / "out")).holds
    look = tarsift("audit", str(tmp_path / "dump"), "--decode", "--json", "-q", "--set", "images.timeout_s=3")
    looked = subprocess.run(look, capture_output=True, timeout=400, env=environment)
    assert looked.returncode == 4
    assert json.loads(looked.stdout)["problems"] == {"decoder_died": 3}


def test_poison_and_pretrain_lose_such_images_alone(tmp_path, environment):
    make_dump(tmp_path / "dump", shards=2, samples=40, flaws=False)
    rows = [{"jpg": picture(np.random.default_rng(i)), "txt": b"a photo of a thing"} for i in range(40)]
    for row in (0, 20, 39):
        rows[row]["jpg"] += KILL
    write_shard(tmp_path / "dump" / "kills.tar", rows, first=0)

    def run(*command):
        return subprocess.run(tarsift(*command), check=True, timeout=300, env=environment, capture_output=True).stdout

    told = run("poison", str(tmp_path / "dump"), "--out", str(tmp_path / "out"), "--rate", "0.9")
    assert b"108 of 120 samples poisoned in " in told
    assert b", 3 unusable samples (decoder_died 3) cannot be; truth: " in told
    told = run("pretrain", str(tmp_path / "out"), "--out", str(tmp_path / "enc.pt"), "--epochs", "1")
    assert told.startswith(b"117 pairs, 1 steps in ")
    assert b", 3 unusable samples (decoder_died 3) skipped: " in told
