"""Trainings on workers of Ray's: stopped, killed and with a worker that dies, they end as undisturbed ones do."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ray.exceptions import RayTaskError, WorkerCrashedError
from ray.train import ControllerError, WorkerGroupError

from tarsift.operators.checkpoints import state_sha256
from tarsift.operators.errors import TarsiftError, UsageError
from tarsift.operators.models import load_checkpoint
from tarsift.pipelines import stopping, tasks, train_workers
from tarsift.pipelines.pretrain import PretrainConfig, pretrain, pretrain_here
from tarsift.pipelines.train_workers import _cause, _of_a_death, patiently, run_workers
from tests.conftest import make_dump
from tests.pipelines.runs import tarsift


class HealthCheckError(Exception):
    """As Ray Train's own, which says by which error a worker was missed."""

    health_check_failure = WorkerCrashedError()


@pytest.mark.parametrize(
    ("failures", "kind", "again"),
    [
        ({0: UsageError("wrong"), 1: RuntimeError("connection closed by peer")}, UsageError, False),
        ({0: RuntimeError("connection closed by peer"), 1: HealthCheckError()}, WorkerCrashedError, True),
        ({1: RuntimeError("connection closed by peer")}, RuntimeError, True),
        ({0: ValueError("a defect")}, ValueError, False),
    ],
)
def test_what_is_behind_a_failed_training(failures, kind, again):
    cause = _cause(WorkerGroupError("several lines", failures))
    assert isinstance(cause, kind)
    assert _of_a_death(cause, workers=2) is again
    assert _of_a_death(RuntimeError("of a single worker"), workers=1) is False
    assert isinstance(_cause(ControllerError(TarsiftError("x"))), TarsiftError)
    assert str(_cause(ValueError("none of Ray Train's"))) == "none of Ray Train's"
    of_a_task = RayTaskError("train", "a traceback", ValueError("a defect"))
    assert isinstance(_cause(of_a_task), ValueError)
    assert isinstance(_cause(of_a_task.as_instanceof_cause()), ValueError)


class Dies:
    """Work that ends its process so many times, or raises, and counts its calls in a folder."""

    def __init__(self, folder: Path, times: int, error: Exception | None = None) -> None:
        self.folder, self.times, self.error = folder, times, error

    def __call__(self, *, rank, device, wrap, asked) -> tuple[int, str, bool]:
        calls = len(list(self.folder.iterdir()))
        (self.folder / f"{calls}").touch()
        if self.error is not None:
            raise self.error
        if calls < self.times:
            os.kill(os.getpid(), signal.SIGKILL)
        return rank, device.type, asked()


def alone(work: Dies) -> tuple[int, str, bool]:
    return run_workers(work, out=str(work.folder / "e.pt"), workers=1, cpus=1.0, gpus=0.0)


@pytest.mark.parametrize("dies", [1, 99])
def test_a_worker_that_dies_is_replaced_a_few_times(ray_session, tmp_path, monkeypatch, dies):
    monkeypatch.setattr(train_workers, "TASK_RETRIES", 1)
    with contextlib.nullcontext() if dies == 1 else pytest.raises(WorkerCrashedError):
        assert alone(Dies(tmp_path, dies)) == (0, "cpu", False)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("error", [UsageError("wrong"), ValueError("a defect")])
def test_an_error_of_a_worker_is_raised_as_it_was(ray_session, tmp_path, error):
    with pytest.raises(type(error), match=str(error)) as raised:
        alone(Dies(tmp_path, 0, error))
    assert type(raised.value) is type(error)
    assert len(list(tmp_path.iterdir())) == 1


def test_work_that_has_no_room_yet_is_given_up_when_asked_to_stop(ray_session, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "SOON_S", 0.5)
    threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        run_workers(Dies(tmp_path, 0), out=str(tmp_path / "e.pt"), workers=1, cpus=999.0, gpus=0.0)
    assert not list(tmp_path.iterdir())


def test_what_was_done_before_a_request_counts(monkeypatch):
    def work(asked):
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()
        return "done"

    assert patiently(work) == "done"

    def twice(asked):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    patiently(twice)  # signals that come together are one request
    monkeypatch.setattr(stopping, "REPEAT_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        patiently(twice)


EPOCHS = 100  # of five steps: long enough that it is still on when it is hit for the third time


@pytest.fixture
def folder(tmp_path) -> Path:
    make_dump(tmp_path / "dump", shards=2, samples=60)
    return tmp_path


def start(folder: Path) -> subprocess.Popen[str]:
    flags = ["--batch-size", "20", "--epochs", str(EPOCHS), "--snapshot-s", "0.2"]
    flags += ["--losses", str(folder / "e.parquet")]
    command = tarsift("pretrain", str(folder / "dump"), "--out", str(folder / "e.pt"), *flags)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kept(folder: Path) -> int:
    """Return the step of the snapshot, 0 if there is none."""
    try:
        with open(folder / "e.pt.part", "rb") as file:
            return json.loads(file.readline())["step"]
    except FileNotFoundError:
        return 0


def wait_for_a_snapshot(folder: Path, child: subprocess.Popen[str]) -> None:
    before, deadline = kept(folder), time.monotonic() + 300
    while kept(folder) <= before:
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def training_workers(child: subprocess.Popen[str]) -> list[int]:
    """Return the processes below a command that train."""
    parents, workers = {}, []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if b"ray::_train_alone" in (process / "cmdline").read_bytes():
                workers.append(int(process.name))

    def is_below(process: int) -> bool:
        return process == child.pid or (process in parents and is_below(parents[process]))

    return [worker for worker in workers if is_below(worker)]


def wait_for_the_end(processes: list[int]) -> None:
    deadline = time.monotonic() + 120
    while any(Path(f"/proc/{process}").exists() for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_stopped_killed_and_bereft_of_a_worker_it_ends_as_undisturbed(folder):
    out = folder / "e.pt"
    child = start(folder)
    wait_for_a_snapshot(folder, child)
    child.terminate()
    told, _ = child.communicate(timeout=300)
    assert child.returncode == 75, told
    assert "run the same command again to go on" in told
    assert sorted(f.name for f in folder.iterdir()) == ["dump", "e.pt.part"]

    child = start(folder)
    wait_for_a_snapshot(folder, child)
    left = training_workers(child)
    child.kill()
    child.communicate(timeout=300)
    wait_for_the_end(left)  # they train on, and keep snapshots, until Ray misses the command
    done = kept(folder)

    child = start(folder)
    wait_for_a_snapshot(folder, child)
    (worker,) = training_workers(child)
    os.kill(worker, signal.SIGKILL)
    told, _ = child.communicate(timeout=300)
    assert child.returncode == 0, told
    assert f"{5 * EPOCHS} steps ({done} of them before)" in told

    config = PretrainConfig(batch_size=20, epochs=EPOCHS, losses=str(folder / "here.parquet"))
    here = pretrain_here(str(folder / "dump"), out=str(folder / "here.pt"), config=config)
    assert state_sha256(load_checkpoint(out).state_dict) == here.weights_sha256
    assert (folder / "e.parquet").read_bytes() == (folder / "here.parquet").read_bytes()
    # A writer that is killed leaves what it had under a name of its own.
    left = sorted(f.name for f in folder.iterdir() if f.suffix != ".tmp")
    assert left == ["dump", "e.parquet", "e.pt", "here.parquet", "here.pt"]


@pytest.mark.slow
def test_two_workers_go_on_and_record_the_losses_of_both(ray_session, folder):
    out, file = str(folder / "e.pt"), str(folder / "l.parquet")
    config = PretrainConfig(batch_size=20, steps=12, losses=file, snapshot_s=0)

    def crash(step: int, loss: float) -> None:
        if step == 4:
            raise OSError("in the fourth step")

    with pytest.raises(OSError, match="in the fourth step"):
        pretrain_here(str(folder / "dump"), out=out, config=config, on_step=crash)
    summary = pretrain(str(folder / "dump"), out=out, config=config, workers=2)
    assert (summary.went_on_from, summary.steps, summary.samples) == (3, 12, 240)
    losses = pq.read_table(file)["losses"].to_pylist()
    seen = [sum(row[epoch] is not None for row in losses) for epoch in range(3)]
    assert seen == [100, 100, 40]  # 118 pairs, five batches an epoch
    assert load_checkpoint(out).extra["settings"]["workers"] == 2


@pytest.mark.slow
def test_errors_of_workers_are_raised_as_they_were(ray_session, folder):
    """Without being tried again, and with nothing left behind."""
    with pytest.raises(ValueError, match="2 readers need as many shards, got 1"):
        pretrain(str(folder / "dump" / "00000.tar"), out=str(folder / "e.pt"), cache_bytes=0, workers=2, steps=1)
    assert [f.name for f in folder.iterdir()] == ["dump"]
