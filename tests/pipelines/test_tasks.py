"""Tasks side by side: none is waited for without end, and none goes on when nobody waits for it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from tarsift.operators.errors import TarsiftError
from tarsift.operators.shards import Shard
from tarsift.pipelines import tasks
from tarsift.pipelines.session import session
from tarsift.pipelines.tasks import next_done, run_task, side_by_side


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(tasks, "SOON_S", 0.2)


def never_ends(folder: str, number: int = 0) -> None:
    """Leave a file that names the process, and stay."""
    Path(folder, f"{number}.{os.getpid()}").touch()
    time.sleep(600)


def ends(number: int, *, more: int = 0) -> int:
    return number + more


def one_ends(folder: str, number: int) -> int:
    """Do so when all others have begun."""
    if number:
        never_ends(folder, number)
    while len(os.listdir(folder)) < 1:
        time.sleep(0.01)
    return number


def alive(folder: Path) -> list[str]:
    """Return the processes of tasks that have begun and are still there."""
    return [path.name for path in folder.iterdir() if Path(f"/proc/{path.suffix[1:]}").exists()]


def wait_until_none_is_alive(folder: Path) -> None:
    assert list(folder.iterdir()), "none has begun"
    deadline = time.monotonic() + 60
    while alive(folder):
        assert time.monotonic() < deadline, alive(folder)
        time.sleep(0.05)


def test_every_result_comes_with_its_item(ray_session):
    found = {
        name: ray_session.get(result) for name, (result,) in side_by_side(ends, ((str(i), (i,)) for i in range(9)))
    }
    assert found == {str(i): i for i in range(9)}
    assert run_task(ends, 1, more=2) == 3


def test_a_task_that_never_ends_is_told_and_cancelled(ray_session, tmp_path):
    run_task(ends, 0)  # so that a worker is there
    shards = [Shard(name=f"s{i}", url="", size=0) for i in range(2)]
    calls = ((shard, (str(tmp_path), i)) for i, shard in enumerate(shards))
    says = r"no progress for 3 s in never_ends \(s0, s1\)"
    with pytest.raises(TarsiftError, match=says) as told, session(stall_timeout_s=3):
        list(side_by_side(never_ends, calls))
    assert "resources.stall_timeout_s" in str(told.value)
    wait_until_none_is_alive(tmp_path)


def test_one_task_alone_is_told_and_cancelled_too(ray_session, tmp_path):
    run_task(ends, 0)
    with pytest.raises(TarsiftError, match=r"no progress for 3 s in never_ends\. Run"), session(stall_timeout_s=3):
        run_task(never_ends, str(tmp_path))
    wait_until_none_is_alive(tmp_path)


@pytest.mark.parametrize("how", ["raises", "stops"])
def test_who_stops_early_leaves_no_task_behind(ray_session, tmp_path, how):
    """In a notebook Ray goes on, and would write on into a folder that somebody else works on by then."""
    calls = ((i, (str(tmp_path), i)) for i in range(6))

    def consume() -> None:
        for number, _ in side_by_side(one_ends, calls):
            assert number == 0
            if how == "raises":
                raise OSError("the disk is full")
            break

    if how == "raises":
        with pytest.raises(OSError, match="full"):
            consume()
    else:
        consume()
    wait_until_none_is_alive(tmp_path)


def test_an_error_names_a_few(monkeypatch):
    ray = pytest.importorskip("ray")
    calls: Any = {i: str(i) for i in range(7)}
    monkeypatch.setattr(ray, "wait", lambda calls, **options: ([], calls))
    with pytest.raises(TarsiftError, match=r"in ends \(0, 1, 2 and 4 more\)\."):
        next_done(calls, ends)
