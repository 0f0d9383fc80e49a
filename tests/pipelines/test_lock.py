"""One run at a time on a result folder; a dead one is succeeded, and does not come back."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time

import pytest

from tarsift.operators import storage
from tarsift.operators.errors import EXIT_CODES, BusyError, FencedError, StoreError
from tarsift.pipelines import lock
from tarsift.pipelines.ledger import Ledger, RunFile


@pytest.fixture(params=["local", "memory"])
def out(request, tmp_path):
    return str(tmp_path / "out") if request.param == "local" else f"memory://lock-{tmp_path.name}"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    monkeypatch.setattr(lock, "DEAD_AFTER_S", 0.6)


def leave_behind(out: str, **changes) -> lock.Holder:
    """Leave what a holder that never released leaves."""
    about = {"number": 1, "host": "elsewhere", "pid": 1, "started": "1", "since": "then"} | changes
    holder = lock.Holder(**about)
    assert storage.create(lock._url(out, holder.number), lock._bytes(holder))
    return holder


def test_held_beating_and_released(out):
    with lock.hold(out) as holder:
        assert holder.number == 1
        deadline = time.monotonic() + 60
        while not (seen := lock.last_holder(out)) or seen.beat == 0:
            assert time.monotonic() < deadline, "no beat in a minute"
            time.sleep(0.05)
        assert not seen.released
        with lock.hold(out) as again:  # by the same process
            assert again.number == 1
    ended = lock.last_holder(out)
    assert ended
    assert ended.released
    with lock.hold(out) as following:
        assert following.number == 2


def test_what_dead_writers_left_goes_when_it_is_taken_and_when_it_is_let_go(tmp_path):
    left = [tmp_path / "clean" / f".{digit * 16}.tmp" for digit in "ab"]
    storage.put_bytes(str(left[0]), b"of a run before")
    with lock.hold(str(tmp_path)):
        assert not left[0].exists()
        storage.put_bytes(str(left[1]), b"of a worker of this one")
    assert not left[1].exists()


def test_another_process_of_this_machine_is_told_at_once(tmp_path):
    out = str(tmp_path)
    code = "import sys; from tarsift.pipelines.lock import hold\nwith hold(sys.argv[1]): print(1, flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout
        assert child.stdout.readline()
        with pytest.raises(BusyError, match=f"process {child.pid} on") as refused, lock.hold(out):
            pass
        assert refused.value.exit_code == EXIT_CODES["interrupted"]
    finally:
        child.kill()
        child.wait()
    start = time.monotonic()
    with lock.hold(out) as holder:  # nobody waits for a process that is known to be dead
        assert holder.number == 2
    assert time.monotonic() - start < lock.DEAD_AFTER_S


def test_a_holder_elsewhere_is_watched(out):
    holder = leave_behind(out)
    start = time.monotonic()
    with lock.hold(out) as mine:
        assert mine.number == 2
        assert time.monotonic() - start > lock.DEAD_AFTER_S / 2
    holder = leave_behind(out, number=3)
    url = lock._url(out, 3)
    import threading

    def beat() -> None:
        time.sleep(0.1)
        storage.put_bytes(url, json.dumps({**holder.__dict__, "beat": 1}).encode())

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(BusyError, match="elsewhere"), lock.hold(out):
        pass
    thread.join()


def test_of_two_at_once_one_wins(out, monkeypatch):
    monkeypatch.setattr(lock, "_numbers", lambda _: [])  # both looked before either wrote
    leave_behind(out)
    with pytest.raises(BusyError, match="just begun"), lock.hold(out):
        pass


def test_who_took_over_while_a_dead_holder_was_watched_keeps_the_folder(out, monkeypatch):
    leave_behind(out)
    watch = lock._wait_until_dead

    def overtaken(url, holder):
        watch(url, holder)
        leave_behind(out, number=2)  # by one that began to watch a little earlier

    monkeypatch.setattr(lock, "_wait_until_dead", overtaken)
    with pytest.raises(BusyError, match="just begun"), lock.hold(out):
        pass
    assert lock._numbers(out) == [1, 2]


@pytest.mark.parametrize(
    ("host", "kernel", "gone"),
    [
        (platform.node(), lock._kernel(), True),
        (platform.node(), "another boot, or another PID namespace", None),
        ("elsewhere", lock._kernel(), None),
    ],
)
def test_a_number_of_a_process_says_nothing_elsewhere(tmp_path, host, kernel, gone):
    """A container may carry its host's name, and two machines that share a folder the same one."""
    holder = leave_behind(str(tmp_path), host=host, kernel=kernel, started="long ago")
    assert holder.gone() is gone


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")
def test_a_process_that_nobody_takes_note_of_has_ended_all_the_same(tmp_path):
    """As under a container's first process that waits for none of those it inherits."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = lock._start_of(child.pid)
    holder = leave_behind(str(tmp_path), host=platform.node(), kernel=lock._kernel(), pid=child.pid, started=started)
    assert holder.gone() is False
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is still there
    assert holder.gone() is True
    with lock.hold(str(tmp_path)) as mine:
        assert mine.number == 2
    child.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")
def test_boot_and_namespace_are_known():
    assert len(lock._kernel().split()) == 2


@pytest.mark.parametrize("more", [{}, {"of_a_later_version": 1}])
def test_records_of_other_versions_are_read(out, more):
    about = {"number": 1, "host": platform.node(), "pid": 1, "started": "1", "since": "then"}
    storage.put_bytes(lock._url(out, 1), json.dumps(about | more).encode())
    holder = lock.last_holder(out)
    assert holder
    assert holder.gone() is (None if lock._kernel() else True)


def test_a_run_that_was_taken_for_dead_commits_nothing_more(out):
    with lock.hold(out):
        ledger, file = Ledger(out, "embed", "f"), RunFile(out, {"a": 1})
        ledger.commit("s0", {"rows": 1})
        file.save()
        leave_behind(out, number=2)
        with pytest.raises(FencedError, match="took over"):
            ledger.commit("s1", {"rows": 1})
        with pytest.raises(FencedError):
            file.save()
    assert list(ledger.entries()) == ["s0"]
    ledger.commit("s1", {"rows": 1})  # a folder that is not held is nobody's


def test_what_is_no_record_is_passed_over(out):
    storage.put_bytes(lock._url(out, 1), b"{")
    storage.put_bytes(storage.join(out, "lock", "notes.txt"), b"")
    assert lock.last_holder(out) is None
    with lock.hold(out) as holder:
        assert holder.number == 2


def test_a_store_that_is_away_stops_no_beat(out, monkeypatch):
    """Its errors are no OSError; a thread that died of one would have the lock taken for dead."""
    put, failed = storage.put_bytes, []

    def away(url, data):
        if len(failed) < 3 and b'"beat": 0' not in data:
            failed.append(url)
            raise StoreError("nobody there")
        put(url, data)

    with lock.hold(out):
        monkeypatch.setattr(storage, "put_bytes", away)
        deadline = time.monotonic() + 30
        while not (beaten := lock.last_holder(out).beat) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert beaten
    assert len(failed) == 3
    assert lock.last_holder(out).released


def test_letting_go_of_a_store_that_is_away(out, monkeypatch):
    def away(url, data):
        raise StoreError("nobody there")

    with lock.hold(out):
        monkeypatch.setattr(storage, "put_bytes", away)
    assert out not in lock._held
