"""One Ray task per item, a few per CPU at once, results as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray

from tarsift.pipelines.session import TASK_OPTIONS

Item = TypeVar("Item")
PER_CPU = 2  # one that computes and one that waits for storage, or for its arguments


def side_by_side(
    function: Callable[..., Any],
    calls: Iterable[tuple[Item, tuple[Any, ...]]],
    *,
    num_returns: int = 1,
    max_retries: int | None = None,
) -> Iterator[tuple[Item, list[ray.ObjectRef]]]:
    """Call a function in Ray tasks and yield each item when its first result is there, in any order.

    Args:
        calls: items with the arguments of their call; taken up as there is room.
        num_returns: results of a call; those after the first need not be fetched.
        max_retries: how often a call whose worker died is tried again; a few times where None.

    Yields:
        The item and its results. `ray.get` of the first raises what the call raised, or a `RayError` if its
        worker died as often as a task is retried.
    """
    retries: dict[str, Any] = TASK_OPTIONS if max_retries is None else {"max_retries": max_retries}
    task: Any = ray.remote(num_cpus=1, num_returns=num_returns, **retries)(function)
    limit = max(2, PER_CPU * int(ray.cluster_resources().get("CPU", 1)))
    waiting = iter(calls)
    running: dict[ray.ObjectRef, tuple[Item, list[ray.ObjectRef]]] = {}
    more = True
    while more or running:
        while more and len(running) < limit:
            call = next(waiting, None)
            if call is None:
                more = False
                break
            item, arguments = call
            results = task.remote(*arguments)
            results = results if isinstance(results, list) else [results]
            running[results[0]] = item, results
        if running:
            finished, _ = ray.wait(list(running), num_returns=1)
            yield running.pop(finished[0])
