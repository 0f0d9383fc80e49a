"""Every command on an S3 server that fails now and then: poison, the passes, and what is asked of the result."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tarsift.operators.poison import PoisonConfig
from tarsift.pipelines.poison import poison_here
from tests.conftest import make_dump, make_encoder
from tests.pipelines.runs import ray_head, tarsift
from tests.pipelines.store import Store, files_of, s3_server

pytest.importorskip("s3fs")
pytestmark = pytest.mark.slow
RATE = 0.05
FEW_REQUESTS = 0.3  # so that commands of a dozen requests meet a failure, too
DUMP, OUT = "s3://bucket/poisoned", "s3://bucket/out"
AGAIN = re.compile(r"[1-9][0-9,]* requests to the store were tried again")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    make_dump(folder / "dump", shards=3, samples=60, flaws=False)
    make_encoder(folder / "enc.pt", folder / "dump")
    return folder


@pytest.fixture(scope="module")
def store(folder) -> Iterator[Store]:
    with s3_server(seed=1) as running:
        files = files_of(running)
        files.mkdir("bucket")
        files.put(str(folder / "dump"), "bucket/dump", recursive=True)
        yield running


@pytest.fixture(scope="module")
def run(store) -> Iterator[Callable[..., str]]:
    """Runs a command and returns what it says, having checked that it ended well and did meet failures."""
    with ray_head(store.environment) as environment:

        def run(*arguments: str, rate: float = RATE) -> str:
            store.rate, before = rate, store.failures.total()
            try:
                ended = subprocess.run(
                    tarsift(*arguments), env=environment, capture_output=True, timeout=300, text=True
                )
            finally:
                store.rate = 0.0
            assert ended.returncode == 0, ended.stderr[-3000:]
            assert store.failures.total() > before, "no request failed: nothing was tried"
            return ended.stdout

        yield run


# One after the other: each works on what those before it left.


def test_poison(run, store, folder):
    said = run("poison", "s3://bucket/dump", "--out", DUMP, "--rate", "0.05", rate=FEW_REQUESTS)
    assert AGAIN.search(said)
    poison_here(str(folder / "dump"), out=str(folder / "poisoned"), config=PoisonConfig(rate=0.05))
    files = files_of(store)
    for file in (folder / "poisoned").iterdir():
        assert files.cat_file(f"bucket/poisoned/{file.name}") == file.read_bytes()


def test_audit(run):
    said = run("audit", DUMP, rate=FEW_REQUESTS)
    assert "whole: 3 shards, 180 samples" in said
    assert AGAIN.search(said)


def test_the_passes_one_by_one(run, store, folder):
    encoder = f"detect={folder / 'enc.pt'}"
    said = run("embed", DUMP, "--out", OUT, "--encoder", encoder, "--set", "suspicion.published_ks=[8, 16]")
    assert "180 samples of 3 shards embedded" in said
    assert "180 samples scored" in run("score", OUT)
    assert "of 180 samples flagged" in run("flag", OUT, "--fraction", "0.1")
    assert "samples kept" in run("write", OUT)
    assert "report: " in run("report", OUT)
    run_json = json.loads(files_of(store).cat_file("bucket/out/run.json"))
    assert sum(figures["repeated_requests"] for figures in run_json["passes"].values()) > 0


def test_sift_and_select(run, store, folder):
    make_encoder(folder / "features.pt", seed=1)
    small = ["sift.routing.class_size=30", "sift.routing.smallest=8", "sift.most_duplicates=1"]
    settings = [argument for setting in small for argument in ("--set", setting)]
    said = run("sift", OUT, "--encoder", f"features={folder / 'features.pt'}", *settings)
    assert "of 180 samples sifted" in said
    assert "failed" not in said
    assert "chosen       5 of" in run("select", OUT, "--clean", "5")
    assert files_of(store).find("bucket/out/selected")
    assert not files_of(store).exists("bucket/out/sift/.gathered")


def test_verify(run):
    said = run("verify", OUT)
    assert "holds: 3 shards" in said
    assert AGAIN.search(said)


def test_status(run):
    assert "complete" in run("status", OUT, rate=FEW_REQUESTS)


def test_evaluate(run, store):
    said = run("evaluate", OUT, "--truth", f"{DUMP}/truth.parquet", "--json", rate=FEW_REQUESTS)
    assert json.loads(said)["poisoned"] == 9
    assert files_of(store).exists("bucket/out/evaluation.html")


def test_ingest(run, store, folder):
    """State, pictures and encoders in the store: a night, none, and one more."""
    make_dump(folder / "before", shards=1, samples=40, flaws=False, seed=9)
    make_encoder(folder / "base.pt", folder / "before", seed=2)
    make_encoder(folder / "witness.pt", folder / "before", seed=3)
    roles = [f"--encoder={role}={folder / file}" for role, file in (("detect", "base.pt"), ("witness", "witness.pt"))]
    small = [f"--set={s}" for s in ("suspicion.published_ks=[8]", "suspicion.reference_size=64", "ingest.epochs=1")]
    command = ["ingest", "s3://bucket/arrivals", "--state", "s3://bucket/state", *roles, *small]
    files = files_of(store)
    for name in ("00000.tar", "00002.tar.gz"):
        files.put(str(folder / "dump" / name), f"bucket/arrivals/{name}")
    assert "night 1" in run(*command)
    assert "nothing new" in run(*command, rate=FEW_REQUESTS)
    files.put(str(folder / "dump" / "00001.tar"), "bucket/arrivals/00001.tar")
    assert "night 2" in run(*command)
    record = json.loads(files.cat_file("bucket/state/records/0002.json"))
    assert list(record["shards"]) == ["00001"]
    assert record["counts"]["read"] == 60
    assert files.exists("bucket/state/nights/0002/encoder.pt")
    assert b"Night 2" in files.cat_file("bucket/state/report.html")
