"""Train a CLIP on the dump that is to be cleaned: only such an encoder has learned what was planted there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from tarsift.operators import storage
from tarsift.operators.checkpoints import load_checkpoint, state_sha256
from tarsift.operators.errors import TarsiftError, UsageError
from tarsift.operators.shards import Shard, list_shards
from tarsift.pipelines.leaving import read_left_out
from tarsift.pipelines.metrics import reported
from tarsift.pipelines.notebook import html_table
from tarsift.pipelines.progress import Event, Listener, silent
from tarsift.pipelines.session import session
from tarsift.pipelines.shard_digests import digest_all, digest_shard
from tarsift.pipelines.text import duration
from tarsift.pipelines.train_job import Job, Origin, find_origin
from tarsift.pipelines.train_settings import PretrainConfig
from tarsift.pipelines.train_workers import patiently, run_workers


@dataclass(frozen=True)
class PretrainSummary:
    """What `pretrain` did; `skipped` counts samples by reason, over one epoch where pairs are in memory.

    `went_on_from` are the steps that earlier calls had done: all of them where the training had ended.
    """

    checkpoint: str
    steps: int
    samples: int
    pairs: int
    loss: float
    skipped: dict[str, int]
    wall_s: float
    weights_sha256: str
    went_on_from: int = 0

    def _repr_html_(self) -> str:
        skipped = ", ".join(f"{reason} {count:,}" for reason, count in self.skipped.items())
        rows = [("pairs", self.pairs), ("steps", self.steps), ("loss", f"{self.loss:.3f}"), ("skipped", skipped or "–")]
        return html_table("tarsift pretrain", [*rows, ("took", duration(self.wall_s))], {"encoder": self.checkpoint})


def pretrain(
    shards: str | Sequence[str] | Sequence[Shard],
    *,
    out: str,
    config: PretrainConfig | None = None,
    force: bool = False,
    progress: Listener = silent,
    **settings: Any,
) -> PretrainSummary:
    """Train a CLIP on shards and write an encoder file that records what it was trained on.

    Runs in a task of Ray's, with several workers in a Ray Train worker group: in the session that is there, else in
    one of its own. Interrupted, the same call goes on from the last snapshot (`OUT.part`): with pairs in memory, one
    worker and a CPU to the same bytes.
    A training that has ended is not done again: where `out` is of the same settings and shards it is left as it is.

    Args:
        shards: paths, globs, brace patterns, folders or URLs; or shards that are listed already.
        out: the encoder file; with workers on several machines, on storage that all of them share.
        config: the settings.
        force: begin anew, whatever there is.
        progress: told of shards digested, and of training as it starts and ends.
        settings: fields of `PretrainConfig` that override.

    Raises:
        UsageError: if a setting is wrong, there are too few pairs, several workers are wanted and `ray[train]` is
            missing, or there is a snapshot of a training with other settings or shards (`ChangedError`).
        Interrupted: if it was asked to stop, and will go on from a snapshot.
    """
    config = PretrainConfig(**{**(config or PretrainConfig()).model_dump(), **settings})
    out, start = storage.absolute(out), time.monotonic()
    if config.losses is not None:
        config = config.model_copy(update={"losses": storage.absolute(config.losses)})
    if config.leave_out is not None:
        config = config.model_copy(update={"leave_out": storage.absolute(config.leave_out)})
    origin = find_origin(config, out)
    found = _listed(shards)
    if config.leave_out is not None:
        read_left_out(config.leave_out, found)  # a wrong one is refused before shards are digested
    if config.batch_size % config.workers:
        raise UsageError(f"batch_size {config.batch_size} cannot be shared among {config.workers} workers evenly.")
    with session(), reported(progress) as progress:
        job = Job(found, digest_all(found, config.read, progress), out, config, origin)
        if not force and (ended := job.ended()):
            progress(Event("pretrain", job.steps, job.steps, ended["samples"], unit="steps", finished=True))
            return PretrainSummary(checkpoint=out, wall_s=time.monotonic() - start, **ended)
        done = job.begin(force=force)
        note = f"goes on from {job.snapshots().url}" if done else ""
        before = done * job.batch_size
        progress(Event("pretrain", done, job.steps, before, unit="steps", note=note))
        metrics = {**_run_job(job, origin), "went_on_from": done}  # workers that died went on from later ones
        progress(Event("pretrain", job.steps, job.steps, metrics["samples"], unit="steps", finished=True))
    return PretrainSummary(checkpoint=out, wall_s=time.monotonic() - start, **metrics)


def pretrain_here(
    shards: str | Sequence[str],
    *,
    out: str,
    config: PretrainConfig,
    force: bool = False,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> PretrainSummary:
    """Do what `pretrain` does in this process, with one worker and without Ray."""
    start = time.monotonic()
    config = config.model_copy(update={"workers": 1})
    origin = find_origin(config, out)
    found = list_shards(shards)
    job = Job(found, [digest_shard(shard, config.read) for shard in found], out, config, origin)
    metrics = None if force else job.ended()
    if metrics is None:
        job.begin(force=force)
        metrics = patiently(lambda asked: _train(job, origin.weights, on_step=on_step, asked=asked))
    return PretrainSummary(checkpoint=out, **metrics, wall_s=time.monotonic() - start)


def _listed(shards: str | Sequence[str] | Sequence[Shard]) -> list[Shard]:
    if isinstance(shards, str):
        return list_shards(shards)
    named = [shard for shard in shards if isinstance(shard, Shard)]
    return named or list_shards([shard for shard in shards if not isinstance(shard, Shard)])


def _run_job(job: Job, origin: Origin) -> dict[str, Any]:
    """Train, and see that what was written can be read here."""
    weights = None
    if origin.weights is not None:
        weights = partial(ray.get, ray.put(dict(origin.weights())))
    config = job.config
    metrics = run_workers(
        partial(_train, job, weights),
        out=job.out,
        workers=config.workers,
        cpus=float(config.threads + config.decoders),
        gpus=config.gpus_per_worker,
    )
    written = state_sha256(load_checkpoint(job.out).state_dict) if storage.exists(job.out) else None
    if written != metrics["weights_sha256"]:
        raise TarsiftError(f"{job.out} was written on another machine: give `out` on storage that all machines share.")
    return metrics


def _train(job: Job, weights: Any, **worker: Any) -> dict[str, Any]:
    from tarsift.pipelines.train_task import train  # with open_clip, which takes seconds to load

    return train(job, weights, **worker)
