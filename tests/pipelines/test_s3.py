"""The main job on an S3 server over HTTP: the same bytes as on a disk, also where the store fails now and then."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tarsift.operators import retry, storage
from tarsift.operators.access import CHECKS
from tarsift.operators.errors import AccessError, StoreError
from tarsift.operators.retry import take_repeated
from tarsift.operators.shards import ReadConfig, ReadShard, Shard, ShardEnd, list_shards
from tarsift.pipelines.ledger import Ledger
from tests.conftest import make_dump, make_encoder, picture, write_shard
from tests.pipelines.runs import clean, contents, tarsift
from tests.pipelines.store import Store, files_of, s3_server, stored

pytest.importorskip("s3fs")
pytestmark = pytest.mark.slow
SHARDS, SAMPLES = 4, 60


@pytest.fixture(scope="module")
def dump(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("s3") / "dump"
    make_dump(folder, shards=SHARDS, samples=SAMPLES)
    return folder


@pytest.fixture(scope="module")
def encoder(dump) -> str:
    return make_encoder(dump.parent / "enc.pt", dump)


@pytest.fixture(scope="module")
def on_disk(dump, encoder) -> dict[str, bytes]:
    out = dump.parent / "out"
    subprocess.run(clean(dump, out, encoder), check=True, timeout=300)
    return contents(out)


@pytest.fixture(scope="module")
def store(dump):
    with s3_server() as running:
        files = files_of(running)
        files.mkdir("bucket")
        files.put(str(dump), "bucket/dump", recursive=True)
        yield running


def run(arguments: list[str], store: Store, **changes: str) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | store.environment | changes
    return subprocess.run(arguments, env=environment, capture_output=True, timeout=500)


def test_the_same_bytes_as_on_a_disk_while_a_twentieth_of_requests_fails(store, dump, on_disk, encoder):
    store.rate = 0.05
    out = "bucket/out"
    ended = run(clean("s3://bucket/dump", f"s3://{out}", encoder), store)
    store.rate = 0.0
    assert ended.returncode == 0, ended.stderr.decode()[-3000:]
    assert stored(store, out) == on_disk
    assert store.failures["503"] > 0
    assert store.failures["reset"] > 0
    files = files_of(store)
    passes = json.loads(files.cat_file(f"{out}/run.json"))["passes"]
    repeated = sum(figures["repeated_requests"] for name, figures in passes.items() if name != "report")
    assert repeated > 0
    told = re.search(r"([\d,]+) requests? to the store failed", files.cat_file(f"{out}/report.html").decode())
    assert told is not None
    assert int(told[1].replace(",", "")) >= repeated


@pytest.fixture
def here(store, monkeypatch) -> Store:
    """The store as this process sees it, waiting next to nothing before it asks again."""
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)
    return store


def test_a_long_listing_is_read_to_its_end(here):
    files_of(here).pipe({f"bucket/many/{i:05d}.tar": b"" for i in range(1005)})  # a page holds 1000
    assert len(list_shards("s3://bucket/many/")) == 1005


def test_a_ledger_of_more_records_than_a_listing_holds(here):
    records = {f"{i:05d}": {"shard": f"{i:05d}", "fingerprint": "f", "rows": i} for i in range(1005)}
    put = {f"bucket/long/ledger/p/{name}.json": json.dumps(record).encode() for name, record in records.items()}
    files_of(here).pipe(put)
    here.rate = 0.01
    assert Ledger("s3://bucket/long", "p", "f").entries() == records
    here.rate = 0.0


def large_shard(path: Path) -> Shard:
    """Write a shard of 20 MB, which takes more than one request for a block."""
    rng = np.random.default_rng(0)
    samples = [{"jpg": picture(rng) + rng.bytes(100_000), "txt": b"a caption"} for _ in range(200)]
    write_shard(path, samples, first=0)
    assert path.stat().st_size > 2 * storage.BLOCK_BYTES
    return Shard("large", "s3://bucket/large.tar", path.stat().st_size)


def test_a_large_shard_is_read_on_in_its_middle(here, tmp_path):
    shard = large_shard(tmp_path / "large.tar")
    files_of(here).put(str(tmp_path / "large.tar"), "bucket/large.tar")
    here.resets.clear()
    here.break_off = 3
    take_repeated()
    *tables, last = ReadShard(receipts=True)(shard)
    end = ShardEnd.model_validate_json(last["key"][0].as_py())
    assert end.sha256 == hashlib.sha256((tmp_path / "large.tar").read_bytes()).hexdigest()
    assert (end.rows, end.problems, end.repeated) == (200, (), 3)
    assert len(here.resets) == 3
    assert not any(asked.startswith("bytes=0-") for asked in here.resets)
    local = list(ReadShard()(Shard("large", str(tmp_path / "large.tar"), 0)))
    assert pa.concat_tables(tables) == pa.concat_tables(local)


@pytest.mark.parametrize(("code", "kind"), [("ExpiredToken", StoreError), ("AccessDenied", AccessError)])
def test_access_that_ends_in_the_middle_of_a_shard(here, tmp_path, code, kind):
    shard = large_shard(tmp_path / "large.tar")
    files_of(here).put(str(tmp_path / "large.tar"), "bucket/large.tar")
    here.refusal, here.refuse_from = code, 1
    before = here.failures[code]
    tables = ReadShard(ReadConfig(batch_rows=20), receipts=True)(shard)
    assert len(next(tables)) == 20
    said = re.escape(f": {code}: No.; {CHECKS[code]}")
    with pytest.raises(kind, match=rf"cannot read bucket/large.tar at byte \d+{said}"):
        list(tables)
    here.refusal = ""
    assert here.failures[code] == before + 1


def test_what_is_wrong_with_access_is_said_at_once(store):
    ended = run(tarsift("audit", "s3://bucket/nothing/"), store)
    assert ended.returncode == 2
    assert b"does not exist" in ended.stderr
    ended = run(tarsift("audit", "s3://no-such-bucket/x/"), store)
    assert ended.returncode == 2
    without = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "")
    environment = {k: v for k, v in (os.environ | store.environment).items() if k not in without}
    environment |= {"AWS_SHARED_CREDENTIALS_FILE": "/nonexistent", "AWS_CONFIG_FILE": "/nonexistent"}
    ended = subprocess.run(tarsift("audit", "s3://bucket/dump/"), env=environment, capture_output=True, timeout=120)
    assert ended.returncode == 2
    assert b"check credentials" in ended.stderr
    assert b"Traceback" not in ended.stderr
