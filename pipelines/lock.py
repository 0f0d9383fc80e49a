"""One run at a time on a result folder, also where the other one runs on another machine, or no longer runs.

Whoever works on OUT creates `OUT/lock/<number>.json`, the number one above the highest there, by a
call that only one of two can win. It beats every few seconds until it is released. A holder that
does not beat any more is dead, and the next number may be taken. What it does should it wake up
again is refused: before every commit a holder looks whether the next number is there (fencing). In
the instant between that look and the commit nothing can be lost either, since two runs of one
fingerprint commit the same.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path

from tarsift.operators import storage
from tarsift.operators.errors import AccessError, BusyError, FencedError, StoreError

BEAT_S = 5.0
DEAD_AFTER_S = 30.0  # beats that fail to come for so long; six of them
FOLDER = "lock"


@dataclass(frozen=True)
class Holder:
    """Who works, or worked, on a result folder; times are UTC by the holder's clock."""

    number: int
    host: str
    pid: int
    started: str  # of the process, so that another one with its number is told apart
    since: str
    beat: int = 0
    at: str = ""
    released: bool = False
    kernel: str = ""  # see `_kernel`; records of earlier versions have none

    def gone(self) -> bool | None:
        """Tell whether the process has ended; None if its number says nothing here: another machine, or a container."""
        if (self.host, self.kernel) != (platform.node(), _kernel()):
            return None
        return _start_of(self.pid) != self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


_FIELDS = {field.name for field in fields(Holder)}
_held: dict[str, _Lock] = {}


@contextmanager
def hold(out: str) -> Iterator[Holder]:
    """Hold a result folder; within one process it may be held again by whoever holds it.

    What writers that died have left there unfinished is removed when it is taken and when it is let go.

    Raises:
        BusyError: if another run works on it. Told at once if that runs on this machine, else after
            watching for its beat for up to DEAD_AFTER_S.
    """
    if out in _held:
        yield _held[out].holder
        return
    lock = _Lock(out, _take(out))
    _held[out] = lock
    try:
        with lock:
            storage.remove_unfinished(out, leave=FOLDER)  # of runs before; beats are written meanwhile
            yield lock.holder
            storage.remove_unfinished(out, leave=FOLDER)  # of workers of this one that died
    finally:
        del _held[out]


def fence(out: str) -> None:
    """Refuse to commit for a run that was taken for dead; does nothing for a folder that is not held here.

    Raises:
        FencedError: if another run has taken over.
    """
    if out in _held:
        _held[out].check()


def last_holder(out: str) -> Holder | None:
    """Return who holds, or last held, a result folder; None if nobody ever did."""
    return _newest(out, _numbers(out))


def _newest(out: str, numbers: list[int]) -> Holder | None:
    for number in reversed(numbers):
        holder = _read(out, number)
        if holder:
            return holder
    return None


def _take(out: str) -> Holder:
    numbers = _numbers(out)  # once: who came while a dead holder was watched has the number that is taken below
    before = _newest(out, numbers)
    if before and not before.released:
        _wait_until_dead(out, before)
    number = numbers[-1] + 1 if numbers else 1
    now, pid = _now(), os.getpid()
    me = Holder(number, platform.node(), pid, _start_of(pid), since=now, at=now, kernel=_kernel())
    if not storage.create(_url(out, number), _bytes(me)):
        raise BusyError(f"another run has just begun to work on {out}; wait for it, or give another --out.")
    return me


def _wait_until_dead(out: str, holder: Holder) -> None:
    deadline = time.monotonic() + DEAD_AFTER_S
    while time.monotonic() < deadline:
        gone = holder.gone()
        now = _read(out, holder.number)
        if gone or (now and now.released):
            return
        if gone is False or (now and now.beat != holder.beat):
            raise BusyError(f"{out} is being worked on by {holder}; wait for it, or give another --out.")
        time.sleep(min(1.0, DEAD_AFTER_S / 10))


class _Lock:
    def __init__(self, out: str, holder: Holder) -> None:
        self.out, self.holder = out, holder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="tarsift-lock", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(OSError, StoreError, AccessError):  # then it is taken for dead in a while
            self._put(replace(self.holder, released=True))

    def check(self) -> None:
        if storage.exists(_url(self.out, self.holder.number + 1)):
            raise FencedError(
                f"another run took over {self.out} while this one did not answer for over {DEAD_AFTER_S:g} s; "
                "nothing more is committed here."
            )

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            with suppress(OSError, StoreError, AccessError):  # a store that is away; the next beat may succeed
                self._put(replace(self.holder, beat=self.holder.beat + 1))

    def _put(self, holder: Holder) -> None:
        self.holder = replace(holder, at=_now())
        storage.put_bytes(_url(self.out, holder.number), _bytes(self.holder))


def _numbers(out: str) -> list[int]:
    names = storage.list_files(storage.join(out, FOLDER), ".json")
    return sorted(int(name.removesuffix(".json")) for name in names if name.removesuffix(".json").isdigit())


def _url(out: str, number: int) -> str:
    return storage.join(out, FOLDER, f"{number:08d}.json")


def _bytes(holder: Holder) -> bytes:
    return json.dumps(asdict(holder), indent=1).encode()


def _read(out: str, number: int) -> Holder | None:
    try:
        record = dict(json.loads(storage.read_bytes(_url(out, number))))
        return Holder(**{name: value for name, value in record.items() if name in _FIELDS})  # also of later versions
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _kernel() -> str:
    """Return what tells one numbering of processes from another: boot and PID namespace; "" where there is no /proc.

    Names of machines do not: containers may carry that of their host, and clones that of each other.
    """
    told = []
    with suppress(OSError):
        told.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        told.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(told)


def _start_of(pid: int) -> str:
    """Return when a process of this machine was started, in a unit of the system; "" if there is none.

    One that has ended is none, though its parent may be slow to take note of it, or never do, as in many containers.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZXx" else fields[18]
    except OSError:
        pass
    try:  # no /proc: whether it is there is all that can be told
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        return "running"
    return "running"
