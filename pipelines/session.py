"""Ray as tarsift uses it: a session that is already there is used and never shut down."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

import ray

# Tasks and actors are retried a few times and then fail: with Ray's own defaults (without end)
# one sample that kills its decoder would be tried for ever.
TASK_RETRIES = 3
TASK_OPTIONS = {"max_retries": TASK_RETRIES}
ACTOR_OPTIONS = {"max_restarts": -1, "max_task_retries": TASK_RETRIES}  # restarts end when a task's retries do

# Texts by which object stores and networks say "try again"; Ray's own list knows only pyarrow's.
TRANSIENT_ERRORS = (
    "SlowDown",
    "Slow Down",
    "503",
    "500 Internal",
    "ServiceUnavailable",
    "InternalError",
    "RequestTimeout",
    "Connection reset",
    "ConnectionResetError",
    "ClientPayloadError",
    "IncompleteRead",
    "Read timeout",
    "Broken pipe",
)


@contextlib.contextmanager
def session(num_cpus: int | None = None) -> Iterator[None]:
    """Make sure that Ray is there, and leave a Ray that was already there running.

    Joins, in this order: the session of this process, the cluster named by RAY_ADDRESS, a new local
    Ray, which ends with the context.

    Args:
        num_cpus: CPUs of a new local Ray; all of the machine's where None. Ignored when joining.
    """
    mine = not ray.is_initialized()
    if mine:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        address = os.environ.get("RAY_ADDRESS")
        local = {} if address else {"num_cpus": num_cpus, "include_dashboard": False}
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    try:
        with _data_context():
            yield
    finally:
        if mine:
            ray.shutdown()


@contextlib.contextmanager
def _data_context() -> Iterator[None]:
    """Settings of Ray Data while a recipe runs; the user's are put back afterwards."""
    context = ray.data.DataContext.get_current()
    settings = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "enable_auto_log_stats": False,
        "execution_no_progress_timeout_s": 600.0,
        "max_errored_blocks": 0,
        "retried_io_errors": [*context.retried_io_errors, *TRANSIENT_ERRORS],
    }
    before = {name: getattr(context, name) for name in settings}
    loggers = [logging.getLogger(name) for name in ("ray.data", "ray.train", "ray.tune")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # Ray 2.60 announces named parameters for all options; those for retries are not there yet.
            warnings.filterwarnings("ignore", message=".*ray_remote_args.*is deprecated")
            warnings.filterwarnings("ignore", message=".*retried_io_errors.*substring")
            for name, value in settings.items():
                setattr(context, name, value)
            yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, value in before.items():
                setattr(context, name, value)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
