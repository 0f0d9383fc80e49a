"""The main job on an S3 server over HTTP: the same bytes as on a disk, also where the store fails now and then."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import make_dump, make_encoder
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
    assert files_of(store).exists(f"{out}/report.html")
    assert store.failures["503"] > 0
    assert store.failures["reset"] > 0


def test_a_long_listing_is_read_to_its_end(store, monkeypatch):
    files = files_of(store)
    files.pipe({f"bucket/many/{i:05d}.tar": b"" for i in range(1005)})  # a page holds 1000
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    from tarsift.operators.shards import list_shards

    assert len(list_shards("s3://bucket/many/")) == 1005


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
