"""Whole runs that are disturbed from outside: asked to stop, run twice at once, given images that kill decoders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tarsift.pipelines.lock import last_holder
from tarsift.pipelines.verify import verify
from tests.conftest import make_dump, picture, write_shard
from tests.operators.hostile_decoder import HANG, KILL, hostile
from tests.pipelines.runs import clean, contents, records, tarsift, wait_for

pytestmark = pytest.mark.slow


def test_asked_to_stop_and_run_twice_at_once(undisturbed):
    out, before = undisturbed / "stopped", {}
    command = clean(undisturbed / "dump", out, undisturbed / "enc.pt")
    for name, number in (("embed.detect", signal.SIGTERM), ("score", signal.SIGINT), ("write", signal.SIGTERM)):
        child = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE)
        wait_for(child, out, name)
        child.send_signal(number)
        _, told = child.communicate(timeout=60)
        assert child.returncode == 75, told.decode()
        assert b"run the same command again" in told
        assert b"Traceback" not in told
        for passed, entries in before.items():
            assert entries == {shard: records(out, passed)[shard] for shard in entries}, passed
        before[name] = records(out, name)
    holder = last_holder(str(out))
    last = subprocess.Popen(command, start_new_session=True)
    while last_holder(str(out)) == holder:  # it is held before Ray is there
        assert last.poll() is None
        time.sleep(0.01)
    refused = subprocess.run(command, capture_output=True, timeout=120)
    assert refused.returncode == 75
    assert b"is being worked on by process" in refused.stderr
    assert last.wait(timeout=300) == 0
    for passed, entries in before.items():
        assert entries == {shard: records(out, passed)[shard] for shard in entries}, passed
    assert contents(out) == contents(undisturbed / "whole")


def test_images_that_kill_or_hang_their_decoder_are_lost_alone(tmp_path, encoder):
    make_dump(tmp_path / "dump", shards=3, samples=60, flaws=False)
    rng = np.random.default_rng(9)
    for name, hostile_rows in (("kills", {20: KILL, 40: HANG}), ("hangs", {30: HANG})):
        rows = [{"jpg": picture(rng), "txt": b"a photo of a thing"} for _ in range(60)]
        for row, word in hostile_rows.items():
            rows[row]["jpg"] += word
        write_shard(tmp_path / "dump" / f"{name}.tar", rows, first=0)
    environment = os.environ | {"PYTHONPATH": hostile(tmp_path / "site")}
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


def test_poison_and_pretrain_lose_such_images_alone(tmp_path):
    make_dump(tmp_path / "dump", shards=2, samples=40, flaws=False)
    rows = [{"jpg": picture(np.random.default_rng(i)), "txt": b"a photo of a thing"} for i in range(40)]
    for row in (0, 20, 39):
        rows[row]["jpg"] += KILL
    write_shard(tmp_path / "dump" / "kills.tar", rows, first=0)
    environment = os.environ | {"PYTHONPATH": hostile(tmp_path / "site"), "COLUMNS": "1000"}

    def run(*command):
        return subprocess.run(tarsift(*command), check=True, timeout=300, env=environment, capture_output=True).stdout

    told = run("poison", str(tmp_path / "dump"), "--out", str(tmp_path / "out"), "--rate", "0.9")
    assert b"108 of 120 samples poisoned in " in told
    assert b", 3 unusable samples (decoder_died 3) cannot be; truth: " in told
    told = run("pretrain", str(tmp_path / "out"), "--out", str(tmp_path / "enc.pt"), "--epochs", "1")
    assert told.startswith(b"117 pairs, 1 steps in ")
    assert b", 3 unusable samples (decoder_died 3) skipped: " in told
