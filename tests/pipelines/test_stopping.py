"""Requests to stop: noted while something is being finished, raised afterwards, raised at once when repeated."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading

import pytest

from tarsift.pipelines import stopping
from tarsift.pipelines.stopping import handlers_kept, patient, stop_if_asked, stop_on_signals


@pytest.fixture(autouse=True, params=["program", "library"])
def handlers(request, monkeypatch):
    """As `tarsift` sets them, or Python's own; both raise KeyboardInterrupt."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(stopping, "_asked", False)
    monkeypatch.setattr(stopping, "REPEAT_S", 0.0)
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    if request.param == "program":
        stop_on_signals()
    else:
        for number in before:
            signal.signal(number, signal.default_int_handler)
    yield request.param
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_noted_and_raised_at_the_end(number):
    steps = []

    def work() -> None:
        with patient() as asked:
            steps.append(asked())
            send(number)
            steps.append(asked())
            steps.append("finished")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == [False, True, "finished"]
    with pytest.raises(KeyboardInterrupt):
        send(number)


def test_a_second_request_is_raised_at_once():
    steps = []

    def work() -> None:
        with patient():
            send(signal.SIGTERM)
            send(signal.SIGINT)
            steps.append("finished")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == []


def test_signals_that_come_together_are_one_request(monkeypatch):
    """As where a process group is signalled, and the supervisor hands on what it got."""
    monkeypatch.setattr(stopping, "REPEAT_S", 60.0)
    monkeypatch.setattr(stopping, "_asked_at", -math.inf)
    steps = []

    def work() -> None:
        with patient():
            send(signal.SIGTERM)
            send(signal.SIGTERM)
            steps.append("finished")
            monkeypatch.setattr(stopping, "REPEAT_S", 0.0)
            send(signal.SIGTERM)  # long after
            steps.append("never")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == ["finished"]


def test_a_repeated_signal_does_not_abort_what_the_first_one_began(handlers, monkeypatch):
    """Shards whose rows are all there are committed after a request; that must not be interrupted by its echo."""
    monkeypatch.setattr(stopping, "REPEAT_S", 60.0)
    monkeypatch.setattr(stopping, "_asked_at", -math.inf)
    steps = []

    def work() -> None:
        try:
            send(signal.SIGINT)
        except KeyboardInterrupt:
            if handlers == "program":
                send(signal.SIGINT)  # before `patient` has begun
            with patient():
                send(signal.SIGINT)
                steps.append("finished")
            raise

    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == ["finished"]


def test_handlers_of_others_and_other_threads_are_left_alone():
    seen = []
    signal.signal(signal.SIGTERM, lambda *_: seen.append("mine"))
    with patient() as asked:
        send(signal.SIGTERM)
        assert not asked()
    assert seen == ["mine"]

    def elsewhere() -> None:
        with patient() as asked:
            seen.append(asked())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == ["mine", False]


def test_a_handler_that_is_replaced_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with handlers_kept():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_request_that_was_swallowed_is_raised_later(handlers):
    stop_if_asked()
    with contextlib.suppress(BaseException):  # as a finalizer does
        send(signal.SIGTERM)
    if handlers == "program":
        with pytest.raises(KeyboardInterrupt):
            stop_if_asked()


def test_a_request_that_a_finalizer_swallows_is_kept_without_a_traceback(handlers, capsys):
    class Last:
        def __del__(self):
            send(signal.SIGTERM if handlers == "program" else signal.SIGINT)
            for _ in range(1000):  # the handler runs between two of these
                pass

    Last()
    told = capsys.readouterr().err
    if handlers == "program":
        assert told == ""
        with pytest.raises(KeyboardInterrupt):
            stop_if_asked()
    else:
        assert "KeyboardInterrupt" in told


def test_other_errors_of_finalizers_are_told(capsys):
    class Last:
        def __del__(self):
            raise ValueError("mine")

    Last()
    assert "ValueError: mine" in capsys.readouterr().err
