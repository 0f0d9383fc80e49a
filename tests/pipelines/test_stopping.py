"""Requests to stop: noted while something is being finished, raised afterwards, raised at once when repeated."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from tarsift.pipelines.stopping import handlers_kept, patient, stop_on_sigterm


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stop_on_sigterm()
    yield
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
    with handlers_kept():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
