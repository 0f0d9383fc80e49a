"""A night that is killed at every step, and one attempted twice at once: the state is whole."""

import json
import os
import shutil
import signal
import subprocess
import time

import pyarrow.parquet as pq
import pytest

from tests.conftest import make_dump, make_encoder
from tests.pipelines.runs import tarsift

SMALL = ("suspicion.published_ks=[8]", "suspicion.reference_size=64", "suspicion.candidates=200", "ingest.epochs=1")


def ingest(folder, state, *more: str) -> list[str]:
    roles = [f"--encoder={role}={folder / file}" for role, file in (("detect", "base.pt"), ("witness", "witness.pt"))]
    return tarsift("ingest", str(folder / "dump"), "--state", str(state), *roles, *(f"--set={s}" for s in SMALL), *more)


@pytest.fixture(scope="module")
def world(tmp_path_factory, joined):
    """Encoders, a state of one night, and the shards of a second one."""
    folder = tmp_path_factory.mktemp("ingest-kill")
    make_dump(folder / "before", shards=2, samples=60, flaws=False, seed=9)
    make_encoder(folder / "base.pt", folder / "before")
    make_encoder(folder / "witness.pt", folder / "before", seed=1)
    make_dump(folder / "all", shards=4, samples=80)
    (folder / "dump").mkdir()
    for name in ("00000.tar", "00001.tar"):
        shutil.copy2(folder / "all" / name, folder / "dump" / name)
    subprocess.run(ingest(folder, folder / "one", "-q"), env=joined, check=True, timeout=300)
    for name in ("00002.tar", "00003.tar.gz"):
        shutil.copy2(folder / "all" / name, folder / "dump" / name)
    return folder


# What is there when a step has begun, in the order of the steps.
STEPS = (
    "nights/0002/encoder.pt",
    "nights/0002/standing/about.json",
    "nights/0002/ledger/score/00002.json",
    "reference/0002/pictures/00000.tar",
)


@pytest.fixture(scope="module")
def twice(world, joined):
    """A state in which the second night was attempted, and once more while that was on: how the other attempt ended."""
    state = world / "twice"
    shutil.copytree(world / "one", state)
    first = subprocess.Popen(ingest(world, state, "-q"), env=joined, start_new_session=True)
    wait_for(state / "nights" / "0002" / "night.json", first)
    second = subprocess.run(ingest(world, state, "-q"), env=joined, timeout=300, capture_output=True, text=True)
    assert first.wait(timeout=300) == 0
    return state, second


def wait_for(path, child) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert child.poll() is None, f"ended before {path}"
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
def test_a_night_killed_at_every_step_ends_as_one_that_was_not(world, twice, joined, tmp_path):
    (undisturbed, _), state = twice, tmp_path / "state"
    shutil.copytree(world / "one", state)
    killed, ended = 0, False
    for step in STEPS:
        if (state / step).exists():  # done before the last kill was
            continue
        child = subprocess.Popen(ingest(world, state, "-q"), env=joined, start_new_session=True)
        wait_for(state / step, child)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        killed += 1
        records = sorted(path.name for path in (state / "records").iterdir())
        ended = step == STEPS[-1] and records == ["0001.json", "0002.json"]  # its record follows within milliseconds
        assert ended or records == ["0001.json"]
    assert killed - ended >= 3
    done = subprocess.run(ingest(world, state, "--json"), env=joined, check=True, timeout=300, capture_output=True)
    assert json.loads(done.stdout)["night"] == (None if ended else 2)
    for role in ("detect", "witness"):
        a, b = (pq.read_table(place / "reference" / "0002" / role / "rows.parquet") for place in (state, undisturbed))
        assert a.equals(b)
    for folder in ("scores", "flags"):
        for name in ("00002", "00003"):
            a, b = (pq.read_table(p / "nights" / "0002" / folder / f"{name}.parquet") for p in (state, undisturbed))
            assert a.equals(b)
    records = [json.loads((place / "records" / "0002.json").read_text()) for place in (state, undisturbed)]
    for record in records:
        del record["ended"], record["seconds"]
    assert records[0] == records[1]


@pytest.mark.slow
def test_of_two_attempts_at_once_one_is_told_to_come_again(world, twice, joined):
    state, second = twice
    assert second.returncode == 75
    assert "is being worked on by" in second.stderr
    after = subprocess.run(ingest(world, state, "--json"), env=joined, check=True, timeout=300, capture_output=True)
    assert json.loads(after.stdout)["night"] is None
