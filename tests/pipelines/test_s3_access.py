"""Access that is refused: every command says so at once, and what to check. Nothing of this needs a server."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tarsift.operators import storage
from tarsift.operators.access import CHECKS
from tarsift.pipelines.cli import app
from tests.conftest import make_dump, make_encoder
from tests.pipelines.store import REFUSALS, Store, s3_proxy

s3fs = pytest.importorskip("s3fs")
# A wrong region is asked for by the driver, and tried, before it gives up.
MOST_REQUESTS = 4
COMMANDS = {
    "audit": ("audit", "s3://bucket/dump/"),
    "audit of files": ("audit", "s3://bucket/dump/00000.tar"),
    "audit of a pattern": ("audit", "s3://bucket/dump/*.tar"),
    "embed": ("embed", "s3://bucket/dump/", "--out", "s3://bucket/out", "--encoder", "detect=enc.pt"),
    "embed into": ("embed", "DUMP", "--out", "s3://bucket/out", "--encoder", "detect=enc.pt"),
    "clean": ("clean", "s3://bucket/dump/", "--out", "s3://bucket/out", "--encoder", "detect=enc.pt"),
    "verify": ("verify", "s3://bucket/out"),
    "status": ("status", "s3://bucket/out"),
    "score": ("score", "s3://bucket/out"),
    "flag": ("flag", "s3://bucket/out"),
    "write": ("write", "s3://bucket/out"),
    "report": ("report", "s3://bucket/out"),
    "evaluate": ("evaluate", "s3://bucket/out", "--truth", "truth.parquet"),
    "poison": ("poison", "s3://bucket/dump/", "--out", "poisoned"),
    "poison into": ("poison", "DUMP", "--out", "s3://bucket/poisoned"),
    "pretrain": ("pretrain", "s3://bucket/dump/", "--out", "enc.pt"),
}


@pytest.fixture(scope="module")
def refusing() -> Iterator[Store]:
    with s3_proxy() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield store
        s3fs.S3FileSystem.clear_instance_cache()


def refused(store: Store, *arguments: str) -> str:
    """Return what a command says, having checked that it ends as it should and did not ask again and again."""
    before = store.requests
    ended = CliRunner().invoke(app, arguments)
    assert isinstance(ended.exception, storage.UsageError), ended.exception
    assert 1 <= store.requests - before <= MOST_REQUESTS
    return str(ended.exception)


@pytest.mark.parametrize("code", REFUSALS)
def test_what_to_check_is_said(refusing, code: str):
    refusing.refusal = code
    told = refused(refusing, *COMMANDS["audit"])
    assert told.startswith(f"'s3://bucket/dump/' cannot be reached: {code}: No.; ")
    assert told.endswith(CHECKS[code])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_it(refusing, tmp_path, monkeypatch, command: str):
    monkeypatch.chdir(tmp_path)
    make_dump(tmp_path / "DUMP", shards=1, samples=2, flaws=False)
    make_encoder(tmp_path / "enc.pt")
    refusing.refusal = "ExpiredToken"  # which, later in a run, is what running again mends, and no usage error
    told = refused(refusing, *COMMANDS[command])
    assert "'s3://bucket/" in told
    # A request without a body, such as that for one file, is told a number and no code.
    assert "cannot be reached: " in told
    assert "renew the credentials" in told


def test_a_truth_that_is_refused(refusing, tmp_path):
    (tmp_path / "run.json").write_text('{"inputs": [{"name": "a"}]}')
    (tmp_path / "scores").mkdir()
    pq.write_table(pa.table({"shard": ["a"], "row": [0], "dao_k8": [1.0]}), tmp_path / "scores" / "a.parquet")
    refusing.refusal = "AccessDenied"
    told = refused(refusing, "evaluate", str(tmp_path), "--truth", "s3://bucket/truth.parquet")
    assert told.startswith("'s3://bucket/truth.parquet' cannot be reached")
