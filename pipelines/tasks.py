"""One Ray task per item, a few per CPU at once, results as they come; none is waited for for ever, or left behind."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from tarsift.operators.errors import UsageError
from tarsift.pipelines.failures import stalled
from tarsift.pipelines.session import TASK_OPTIONS, stall_timeout_s

Item = TypeVar("Item")
PER_CPU = 2  # one that computes and one that waits for storage, or for its arguments
SOON_S = 10.0  # in which calls that nobody waits for may end by themselves
CANCEL_S = 5.0  # in which a task that is cancelled ends, unless its process does not move at all
NAMED = 3  # items that an error names


def side_by_side(
    function: Callable[..., Any],
    calls: Iterable[tuple[Item, tuple[Any, ...]]],
    *,
    num_returns: int = 1,
    max_retries: int | None = None,
    num_cpus: float = 1,
    num_gpus: float = 0,
    at_once: int | None = None,
    timeout_s: float | None = None,
) -> Iterator[tuple[Item, list[ray.ObjectRef]]]:
    """Call a function in Ray tasks and yield each item when its first result is there, in any order.

    Args:
        calls: items with the arguments of their call; taken up as there is room.
        num_returns: results of a call; those after the first need not be fetched.
        max_retries: how often a call whose worker died is tried again; a few times where None.
        num_cpus: of a call; 0 where Ray Data may hold all that there are.
        num_gpus: of a call; its share of one, or several.
        at_once: calls at most at a time; a few per CPU where None.
        timeout_s: seconds in which some call must end; those of the session where None.

    Yields:
        The item and its results. `ray.get` of the first raises what the call raised, or a `RayError` if its
        worker died as often as a task is retried.

    Raises:
        TarsiftError: see `next_done`. However it ends, no call runs on.
    """
    retries: dict[str, Any] = TASK_OPTIONS if max_retries is None else {"max_retries": max_retries}
    task: Any = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, num_returns=num_returns, **retries)(function)
    limit = at_once or max(2, PER_CPU * int(ray.cluster_resources().get("CPU", 1)))
    waiting = iter(calls)
    running: dict[ray.ObjectRef, Item] = {}
    promised: dict[ray.ObjectRef, list[ray.ObjectRef]] = {}
    more = True
    try:
        while more or running:
            while more and len(running) < limit:
                call = next(waiting, None)
                if call is None:
                    more = False
                    break
                item, arguments = call
                results = task.remote(*arguments)
                results = results if isinstance(results, list) else [results]
                running[results[0]], promised[results[0]] = item, results
            if running:
                done = next_done(running, function, timeout_s)
                yield running.pop(done), promised.pop(done)
    finally:
        leave(running)


def run_task(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call a function in one Ray task and return what it returns.

    Raises:
        TarsiftError: see `next_done`.
    """
    task: Any = ray.remote(num_cpus=1, **TASK_OPTIONS)(function)
    running = {task.remote(*arguments, **named): ""}
    try:
        done = next_done(running, function)
        del running[done]
        return ray.get(done)
    finally:
        leave(running)


def checked_task(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Do as `run_task`; what the function finds wrong with its arguments is a `UsageError`.

    Raises:
        UsageError: for a ValueError of the function.
        TarsiftError: see `next_done`.
    """
    try:
        return run_task(function, *arguments, **named)
    except RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise UsageError(str(error.cause)) from None
        raise


def next_done(
    running: Mapping[ray.ObjectRef, Any], function: Callable[..., Any], timeout_s: float | None = None
) -> ray.ObjectRef:
    """Wait for the first of the calls of a function to end; `running` names what each works on.

    Raises:
        TarsiftError: if none has ended within `timeout_s`, or the `stall_timeout_s` of the session.
    """
    limit = timeout_s or stall_timeout_s()
    done, _ = ray.wait(list(running), num_returns=1, timeout=limit)
    if done:
        return done[0]
    names = [str(getattr(item, "name", item)) for item in running.values()]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    named = ", ".join(filter(None, names[:NAMED]))
    raise stalled(limit, f"{function.__name__}{f' ({named}{more})' if named else ''}", smaller="smaller shards")


def leave(running: Collection[ray.ObjectRef]) -> None:
    """See to it that calls whose results nobody wants any more end: in a Ray that goes on they would write on.

    Those that end soon are waited for, and only the others cancelled: Ray 2.60 ends the process that drives it,
    without a word, when a call that it is to cancel has just ended by itself.
    """
    if not running or not ray.is_initialized():
        return
    with suppress(RayError):  # Ray is lost, and they with it
        _, left = ray.wait(list(running), num_returns=len(running), timeout=SOON_S)
        for call in left:
            ray.cancel(call, force=True)
        if left:
            ray.wait(left, num_returns=len(left), timeout=CANCEL_S)
