"""Ray as tarsift uses it: a session that is already there is used and never shut down."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import ray
from ray._private import services
from ray.exceptions import AuthenticationError

from tarsift.operators.errors import Interrupted, UsageError
from tarsift.pipelines.config import ResourcesConfig
from tarsift.pipelines.failures import failures_told
from tarsift.pipelines.stopping import handlers_kept

# Tasks and actors are retried a few times and then fail: with Ray's own defaults (without end)
# one sample that kills its decoder would be tried for ever.
TASK_RETRIES = 3
TASK_OPTIONS: dict[str, Any] = {"max_retries": TASK_RETRIES}
# Restarts without end, since they end when the retries of a task do.
ACTOR_OPTIONS: dict[str, Any] = {"max_restarts": -1, "max_task_retries": TASK_RETRIES}

STALL_TIMEOUT_S = 270.0
REACH_S = 10.0  # in which a Ray that is there takes a connection; Ray itself would go on trying for minutes

# Of pixels, as they go to the encoder. A worker holds a few blocks: half a gigabyte where they have Ray's own 128 MiB.
BLOCK_BYTES = 8 << 20

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


def map_tables(
    ds: ray.data.Dataset,
    function: Callable[..., pa.Table | Iterator[pa.Table]],
    arguments: Mapping[str, Any],
    **options: Any,
) -> ray.data.Dataset:
    """Map a function of one Arrow table over the blocks of a Dataset, each block whole, as tasks.

    Args:
        arguments: keywords of `function`.
        options: of `map_batches`, such as `num_cpus`.
    """
    return ds.map_batches(
        function,  # pyright: ignore[reportArgumentType]  # its stubs know no keywords
        fn_kwargs=dict(arguments),
        batch_size=None,
        batch_format="pyarrow",
        **{**TASK_OPTIONS, **options},
    )


@contextlib.contextmanager
def session(num_cpus: int | None = None, *, stall_timeout_s: float = STALL_TIMEOUT_S) -> Iterator[None]:
    """Make sure that Ray is there, and leave a Ray that was already there running.

    Joins, in this order: the session of this process, the cluster named by RAY_ADDRESS, one that `ray start` runs
    on this machine; else there is a new local Ray, which ends with the context.

    Args:
        num_cpus: CPUs of a new local Ray; all of the machine's where None. Ignored when joining.
        stall_timeout_s: seconds without any progress after which a Dataset, or a wait for tasks, fails.

    Raises:
        UsageError, Interrupted: if a Ray cannot be joined; see `_joining`.
        TarsiftError: for what Ray raises in the block; see `failures_told`.
    """
    mine = not ray.is_initialized()
    if mine:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        address, local = os.environ.get("RAY_ADDRESS"), {}  # without an address Ray finds what `ray start` runs
        if known_address() is None:
            address, local = "local", _local_options(num_cpus)
        with handlers_kept(), contextlib.nullcontext() if local else _joining(address):
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    try:
        with failures_told(), data_settings(ray.data.DataContext.get_current(), stall_timeout_s):
            yield
    finally:
        if mine:
            ray.shutdown()


def stall_timeout_s() -> float:
    """Return the seconds without any progress after which work in the present session fails."""
    return ray.data.DataContext.get_current().execution_no_progress_timeout_s


def gpu_share(resources: ResourcesConfig) -> float:
    """GPUs of one encoder or job: as asked for, else one where the cluster has any."""
    if resources.gpus_per_worker is not None:
        return resources.gpus_per_worker
    return 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0


def known_address() -> str | None:
    """Return the address of the Ray that a new session joins; None if it starts one."""
    if given := os.environ.get("RAY_ADDRESS"):
        return None if given == "local" else given
    started = services.find_bootstrap_address(None)  # of the last `ray start`; a Ray that is killed leaves it behind
    services.find_gcs_addresses.cache_clear()
    return started if started and started in services.find_gcs_addresses() else None


@contextlib.contextmanager
def _joining(address: str | None) -> Iterator[None]:
    """Say in one sentence why a Ray cannot be joined, be it before the block or by what `ray.init` raises in it.

    Args:
        address: as of RAY_ADDRESS; None for what `ray start` runs on this machine.

    Raises:
        UsageError: if it is no address, nothing is at `auto`, a token is lacking or another one, or versions differ.
        Interrupted: if nobody answers: what is started again may find a head that has been, too.
    """
    there = "on this machine" if address in (None, "auto") else f"at {address}"
    if address is not None and "://" not in address:
        _reach(address)
    try:
        yield
    except (AuthenticationError, ConnectionError) as error:
        if isinstance(error, AuthenticationError) or "InvalidAuthToken" in repr(error.__cause__):
            raise UsageError(
                f"the Ray {there} asks for a token, and this process has none or another one: set RAY_AUTH_MODE=token, "
                "and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to that of the cluster."
            ) from error
        raise Interrupted(f"the Ray {there} does not answer ({error}).") from error
    except RuntimeError as error:  # such as versions that differ
        raise UsageError(f"the Ray {there} cannot be joined: {' '.join(str(error).split())}") from error


def _reach(address: str) -> None:
    try:
        host, _, port = str(services.canonicalize_bootstrap_address(address)).rpartition(":")
    except ValueError:
        raise UsageError(f"RAY_ADDRESS={address} is no address of a Ray: give host:port, auto or local.") from None
    except ConnectionError:
        raise UsageError(
            "RAY_ADDRESS=auto, and no Ray runs on this machine: `ray start` one, or unset it for one of this run's own."
        ) from None
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
    except OSError as error:
        raise Interrupted(f"RAY_ADDRESS={address}: no Ray answers at {host}:{port} ({error}); is it up?") from error


def _local_options(num_cpus: int | None) -> dict[str, Any]:
    # Ray ends workers over one per CPU after a second without work, and a new one costs seconds of imports. Stages
    # that ask for a part of a CPU have more workers than that, and come and go.
    workers = {"num_workers_soft_limit": 2 * (num_cpus or os.cpu_count() or 1) + 4}
    # None is left to Ray, which knows the limits of a container.
    return {"num_cpus": num_cpus, "include_dashboard": False, "_system_config": workers}


@contextlib.contextmanager
def data_settings(context: ray.data.DataContext, stall_timeout_s: float, **more: Any) -> Iterator[None]:
    """Settings of Ray Data while a recipe runs, and `more`; the user's are put back afterwards.

    Args:
        context: the present one, or that of a Dataset, which keeps the one it was made in.
    """
    settings = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "enable_auto_log_stats": False,
        "execution_no_progress_timeout_s": stall_timeout_s,
        "target_max_block_size": BLOCK_BYTES,
        "max_errored_blocks": 0,
        "raise_original_map_exception": True,  # else an error of ours is text inside one of Ray's
        "retried_io_errors": [*context.retried_io_errors, *TRANSIENT_ERRORS],
        **more,
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
            warnings.filterwarnings("ignore", message="The maximum number of concurrent tasks")  # of few shards
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
