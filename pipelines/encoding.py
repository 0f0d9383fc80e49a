"""The encoder as a stage of a Dataset: a pool of actors on GPUs; on CPUs tasks, whose workers keep what they loaded.

To load torch, open_clip and a model takes seconds. Actors end with their Dataset, that is with each wave of shards and
each encoder of a run; workers of tasks serve the next one. That is for CPUs alone: Ray ends workers that had a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray

from tarsift.operators.encoder_settings import EncoderConfig
from tarsift.operators.schema import append
from tarsift.pipelines.commit import SINK_CPUS
from tarsift.pipelines.config import ResourcesConfig
from tarsift.pipelines.session import ACTOR_OPTIONS, TASK_OPTIONS, gpu_share

# Ray fuses a stage into the one behind it when both ask for the same resources; reading and decoding
# would then run in the encoders' workers. Ray Data keeps a part of the CPUs back for every stage; with these shares
# (and those of the sink) it still runs a reader per CPU beside an encoder per CPU.
READ_CPUS = 0.5
ENCODE_CPUS = 0.2
SHARDS_PER_WORKER = 8  # one takes seconds to start; for fewer shards another one is not worth it
KEPT_S = 30.0  # longer than from one wave to the next
KIND = "TARSIFT_WORKER"  # by the environment they start with Ray tells workers apart: those that read load no model
ENCODERS = "encoder"  # the kind of those that have torch and open_clip loaded


class EncodeRole:
    """Map: `ClipEncoder`, with torch only where it is made; it can name what it appends, and leave columns out.

    Args:
        encoder, weights_sha256: as of `ClipEncoder`.
        prefix: before the names of what is appended; with one, `image_norm` is not.
        without: columns that go, besides `pixels`.
    """

    def __init__(
        self, encoder: EncoderConfig, weights_sha256: str, prefix: str = "", without: Sequence[str] = ()
    ) -> None:
        from tarsift.operators.encoder import ClipEncoder

        self.encode = ClipEncoder(encoder, weights_sha256=weights_sha256)
        self.prefix, self.without = prefix, ["pixels", *without]

    def __call__(self, table: pa.Table) -> pa.Table:
        given = [name for name in ("pixels", "caption", "error") if name in table.column_names]
        made = self.encode(table.select(given))
        new = {self.prefix + name: made[name] for name in made.column_names if name not in given}
        if self.prefix:
            new.pop(f"{self.prefix}image_norm", None)  # as in the files of scores
        return append(table.drop_columns([n for n in self.without if n in table.column_names]), new)


def encode_rows(
    rows: ray.data.Dataset,
    maker: Callable[..., Callable[[pa.Table], pa.Table]],
    arguments: Mapping[str, Any],
    resources: ResourcesConfig,
    *,
    shards: int | None,
    kind: str = ENCODERS,
) -> ray.data.Dataset:
    """Map the rows of a Dataset by an encoder that each worker loads once.

    On CPUs many shards get an encoder and a reader per CPU, and whichever of the two has more to do takes the time:
    a large encoder nearly all of it, a small one little.

    Args:
        maker: makes, of `arguments`, what maps tables: `EncodeRole`.
        shards: how many the rows are of; None if that is not known.
        kind: of the workers on CPUs, each of which keeps one encoder: those that run side by side in one Dataset
            are to have workers of different kinds.
    """
    batches = {"batch_size": resources.batch_size, "batch_format": "pyarrow"}
    cluster = ray.cluster_resources()
    if per_worker := gpu_share(resources):
        workers = resources.workers or max(1, int(cluster.get("GPU", 0) / per_worker))
        pool = ray.data.ActorPoolStrategy(min_size=1 if shards is None else workers, max_size=workers)
        options = {"num_gpus": per_worker, "compute": pool, **ACTOR_OPTIONS}
        return rows.map_batches(maker, fn_constructor_kwargs=dict(arguments), **batches, **options)
    cpus = int(cluster.get("CPU", 1))
    most = cpus // resources.threads
    if shards is not None:
        most = min(most, -(-shards // SHARDS_PER_WORKER))
    workers = resources.workers or max(1, most)
    # Encoders that held every CPU would wait for ever for what reads and writes beside them.
    share = max(cpus - READ_CPUS - SINK_CPUS, SINK_CPUS) / workers
    return rows.map_batches(
        encode,  # pyright: ignore[reportArgumentType]  # its stubs know no keywords
        fn_kwargs={"maker": maker, "arguments": dict(arguments)},
        compute=ray.data.TaskPoolStrategy(workers),
        num_cpus=min(resources.cpus_per_worker or ENCODE_CPUS, share),
        runtime_env=environment_of(kind),
        **batches,
        **TASK_OPTIONS,
    )


def environment_of(kind: str) -> dict[str, Any]:
    """Return the `runtime_env` of tasks whose workers are of a kind, and serve no tasks of another one."""
    return {"env_vars": {KIND: kind}}


class Kept:
    """The latest thing that was made in this process, let go when it has not been used for a while.

    Args:
        seconds: how long.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._made: tuple[Any, Any] | None = None
        self._timer: threading.Timer | None = None

    def use(self, maker: Callable[..., Callable[..., Any]], arguments: Mapping[str, Any], value: Any) -> Any:
        """Call on `value` what `maker` makes of `arguments`, or has made of the same ones before."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            wanted = (maker, dict(arguments))
            if self._made is None or self._made[0] != wanted:
                self._made = None  # before there are two
                self._made = wanted, maker(**arguments)
            try:
                return self._made[1](value)
            finally:
                self._timer = threading.Timer(self._seconds, self._let_go)
                self._timer.daemon = True
                self._timer.start()

    def _let_go(self) -> None:
        with self._lock:
            self._made = None


_kept = Kept(KEPT_S)


def encode(
    table: pa.Table, *, maker: Callable[..., Callable[[pa.Table], pa.Table]], arguments: dict[str, Any]
) -> pa.Table:
    """Map a table by the encoder that this worker keeps."""
    return _kept.use(maker, arguments, table)
