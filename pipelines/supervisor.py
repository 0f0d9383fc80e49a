"""The command as a parent that only waits: Ray ends the process that drives it without a word when its daemon dies.

So does the system's memory killer. The parent tells both from an end on purpose, and exits with 75 where running
again helps.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress

from tarsift.operators.errors import AGAIN, EXIT_CODES
from tarsift.pipelines import json_log

_WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
_PR_SET_PDEATHSIG, _SI_KERNEL = 1, 0x80  # of Linux


def supervised(work: Callable[[], None]) -> int:
    """Do `work` in a child process and return the exit code.

    Signals that ask the command to stop reach the child; if the command is killed, so is the child (on Linux).

    Args:
        work: returns, or raises SystemExit; any other exception is printed and exit code 1.

    Returns:
        What the child said it exits with; 75 if it was ended before it said anything. Twice, since in the child
        this function returns as well: exit with what it returns.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    heard, said = os.pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)  # so that none is lost between the lines below
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(heard)
        _die_with(parent)
        code = _exit_code(work)
        os.write(said, bytes([code]))
        return code
    os.close(said)
    status = _wait(child)
    code = os.read(heard, 1)
    if code:
        return code[0]
    how = f"by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "by Ray, whose daemon is gone"
    message = f"the process that drives Ray was ended {how}; {AGAIN}"
    if json_log.asked_for():
        json_log.write_error(message, EXIT_CODES["interrupted"])
    else:
        sys.stderr.write(f"error: {message}\n")
    return EXIT_CODES["interrupted"]


def _wait(child: int) -> int:
    """Hand requests to stop on to the child until it has ended; return its status."""
    while True:
        number, from_terminal = _next_signal()
        if number == signal.SIGCHLD:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return status
        elif not from_terminal:  # a terminal sends Ctrl-C to both
            with suppress(ProcessLookupError):
                os.kill(child, number)


def _next_signal() -> tuple[int, bool]:
    if sys.platform == "linux":
        told = signal.sigwaitinfo(_WATCHED)
        return told.si_signo, told.si_signo == signal.SIGINT and told.si_code == _SI_KERNEL
    number = signal.sigwait(_WATCHED)
    return number, number == signal.SIGINT


def _exit_code(work: Callable[[], None]) -> int:
    try:
        work()
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return EXIT_CODES["failed"]
    return EXIT_CODES["done"]


def _die_with(parent: int) -> None:
    """Be killed when the parent is; elsewhere than on Linux the child goes on alone, and finishes its work."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(EXIT_CODES["interrupted"])
