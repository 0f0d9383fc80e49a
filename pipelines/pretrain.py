"""Train a CLIP on the dump that is to be cleaned: only such an encoder has learned what was planted there."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow.fs
import ray
from pydantic import BaseModel, ConfigDict, Field

from tarsift import __version__
from tarsift.operators import storage
from tarsift.operators.decoding import ImageConfig
from tarsift.operators.errors import TarsiftError, UsageError
from tarsift.operators.models import (
    build_model,
    build_tokenizer,
    load_checkpoint,
    model_config,
    preprocessing,
    save_checkpoint,
)
from tarsift.operators.shards import ReadConfig, ReadShard, Shard, ShardEnd, list_shards
from tarsift.pipelines.pairs import PairReader, PairStream, cached_batches, load_pairs, streamed_batches
from tarsift.pipelines.progress import Event, Listener, silent
from tarsift.pipelines.session import TASK_OPTIONS, session
from tarsift.pipelines.training import TrainConfig, torch_threads, train_clip


class PretrainConfig(BaseModel):
    """What is trained, on how much, and with which machines."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(default="tiny", description="`tiny`, a JSON config of stock towers, or an open_clip name")
    epochs: int = Field(default=20, ge=1, description="passes over the pairs; only whole batches count")
    steps: int | None = Field(default=None, ge=1, description="optimiser steps, in place of `epochs`")
    batch_size: int = Field(default=128, ge=2, description="pairs per step, over all workers")
    seed: int = Field(default=0, description="of the first weights and of the order of the pairs")
    train: TrainConfig = Field(default=TrainConfig(), description="the optimiser")
    threads: int = Field(default=1, ge=1, description="threads, and CPUs reserved, per worker")
    workers: int = Field(default=1, ge=1, description="processes that train in step")
    gpus_per_worker: float | None = Field(default=None, ge=0, description="None = one where the cluster has GPUs")
    decoders: int = Field(default=0, ge=0, description="processes per worker that decode streamed shards")
    cache_bytes: int = Field(default=2 << 30, ge=0, description="pixels up to this size are kept in memory")
    shuffle: int = Field(default=5000, ge=1, description="pairs in the shuffle buffer of streamed shards")
    read: ReadConfig = Field(default=ReadConfig(), description="where captions are")
    images: ImageConfig = Field(default=ImageConfig(), description="which images are usable")


@dataclass(frozen=True)
class PretrainSummary:
    """What `pretrain` did; `skipped` counts samples by reason, over one epoch where pairs are in memory."""

    checkpoint: str
    steps: int
    samples: int
    pairs: int
    loss: float
    skipped: dict[str, int]
    wall_s: float


@dataclass(frozen=True)
class ShardDigest:
    """A shard as it was found before training: its SHA-256, its usable pairs, and what is wrong with it."""

    name: str
    sha256: str
    pairs: int
    problems: list[str] = field(default_factory=list)


def pretrain(
    shards: str | Sequence[str],
    *,
    out: str,
    config: PretrainConfig | None = None,
    progress: Listener = silent,
    **settings: Any,
) -> PretrainSummary:
    """Train a CLIP on shards and write an encoder file that records what it was trained on.

    Runs in a Ray Train worker group: in the session that is there, else in one of its own.

    Args:
        shards: paths, globs, brace patterns, folders or URLs.
        out: the encoder file; with workers on several machines, on storage that all of them share.
        config: the settings.
        progress: told of shards digested, and of training as it starts and ends.
        settings: fields of `PretrainConfig` that override.

    Raises:
        UsageError: if a setting is wrong, `ray[train]` is missing, or there are too few pairs.
    """
    config = PretrainConfig(**{**(config or PretrainConfig()).model_dump(), **settings})
    model_config(config.model)
    out = storage.absolute(out)
    found = list_shards(shards)
    if config.batch_size % config.workers:
        raise UsageError(f"batch_size {config.batch_size} cannot be shared among {config.workers} workers evenly.")
    start = time.monotonic()
    with session():
        digests = _digest_all(found, config, progress)
        job = _Job(found, digests, out, config)
        progress(Event("pretrain", 0, job.steps, unit="steps"))
        metrics = _run_workers(job)
    progress(Event("pretrain", job.steps, job.steps, samples=metrics["samples"], unit="steps", finished=True))
    return PretrainSummary(checkpoint=out, wall_s=time.monotonic() - start, **metrics)


def pretrain_here(
    shards: str | Sequence[str],
    *,
    out: str,
    config: PretrainConfig,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> PretrainSummary:
    """Do what `pretrain` does in this process, with one worker and without Ray."""
    found = list_shards(shards)
    start = time.monotonic()
    job = _Job(found, [digest_shard(shard, config.read) for shard in found], out, config)
    return PretrainSummary(checkpoint=out, **_train(job, on_step=on_step), wall_s=time.monotonic() - start)


def digest_shard(shard: Shard, read: ReadConfig) -> ShardDigest:
    """Read a shard once, for its digest and the number of its pairs."""
    pairs = 0
    end = None
    for table in ReadShard(read, receipts=True)(shard):
        if table["row"][0].as_py() < 0:
            end = ShardEnd.model_validate_json(table["key"][0].as_py())
        else:
            pairs += len(table) - max(table["image"].null_count, table["caption"].null_count)
    assert end is not None  # a reader with receipts always ends with one
    return ShardDigest(shard.name, end.sha256, pairs, [str(problem) for problem in end.problems])


@dataclass
class _Job:
    """All that a worker needs to know."""

    shards: list[Shard]
    digests: list[ShardDigest]
    out: str
    config: PretrainConfig

    def __post_init__(self) -> None:
        self.pairs = sum(digest.pairs for digest in self.digests)
        if self.pairs < 2:
            raise UsageError(f"there is nothing to train on: {len(self.shards)} shards with {self.pairs} usable pairs.")
        self.batch_size = min(self.config.batch_size, self.pairs // self.config.workers * self.config.workers)
        self.steps = self.config.steps or self.config.epochs * (self.pairs // self.batch_size)


def _train(
    job: _Job,
    *,
    rank: int = 0,
    device: Any = "cpu",
    wrap: Callable[[Any], Any] = lambda towers: towers,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> dict[str, Any]:
    """Train as worker `rank` of those in the job's settings; worker 0 writes the encoder file."""
    config = job.config
    with torch_threads(config.threads):
        architecture = model_config(config.model)
        model: Any = build_model(architecture, seed=config.seed)
        batches, skipped, pairs = _batches(job, rank, model.visual.image_size)
        normalize = preprocessing(architecture)
        log = train_clip(
            model,
            batches,
            steps=job.steps,
            config=config.train,
            normalize=(normalize.mean, normalize.std),
            device=device,
            rank=rank,
            world=config.workers,
            wrap=wrap,
            on_step=on_step,
        )
    tail = log.losses[-20:]
    metrics = {
        "steps": job.steps,
        "samples": job.steps * job.batch_size,
        "pairs": pairs,
        "loss": sum(tail) / len(tail),
        "skipped": dict(skipped + log.skipped),
    }
    if rank == 0:
        save_checkpoint(
            job.out,
            model,
            config=architecture,
            shards={digest.name: digest.sha256 for digest in job.digests},
            steps=metrics["steps"],
            samples=metrics["samples"],
            seed=config.seed,
            extra={
                "tarsift": __version__,
                "model": config.model,
                "tokenizer": architecture["text_cfg"].get("hf_tokenizer_name") or "open_clip byte-pair encoding",
                "settings": config.model_dump(mode="json"),
                "pairs": pairs,
                "loss": metrics["loss"],
                "skipped": metrics["skipped"],
            },
        )
    return metrics


def _batches(job: _Job, rank: int, image_size: Any) -> tuple[Any, Counter[str], int]:
    """Return this worker's batches without end, what was skipped so far, and the number of pairs."""
    config = job.config
    architecture = model_config(config.model)
    settings = preprocessing(architecture)
    size = image_size[0] if isinstance(image_size, tuple | list) else int(image_size)
    tokenizer = build_tokenizer(architecture, config.model)
    reader = PairReader(size, settings.interpolation, settings.resize_mode, config.read.captions, config.images)
    order = {"seed": config.seed, "rank": rank, "world": config.workers}
    share = job.batch_size // config.workers
    damage = Counter(problem.split(":")[0] for digest in job.digests for problem in digest.problems)
    if job.pairs * size * size * 3 <= config.cache_bytes:
        cache = load_pairs(reader, job.shards, tokenizer, most=job.pairs)
        pairs = len(cache.captions)
        share = min(share, pairs // config.workers)
        return cached_batches(cache, batch_size=share, **order), cache.skipped + damage, pairs
    stream = PairStream(reader, job.shards, tokenizer, batch_size=share, shuffle=config.shuffle, **order)
    return streamed_batches(stream, decoders=config.decoders), damage, job.pairs


def _digest_all(shards: Sequence[Shard], config: PretrainConfig, progress: Listener) -> list[ShardDigest]:
    """Digest all shards as Ray tasks."""
    task = ray.remote(digest_shard).options(**TASK_OPTIONS)
    pending = {task.remote(shard, config.read): i for i, shard in enumerate(shards)}
    done: dict[int, ShardDigest] = {}
    while pending:
        ready, _ = ray.wait(list(pending))
        for ref in ready:
            done[pending.pop(ref)] = ray.get(ref)
        progress(Event("digest", len(done), len(shards), finished=not pending))
    return [done[i] for i in range(len(shards))]


def _run_workers(job: _Job) -> dict[str, Any]:
    """Train in a Ray Train worker group; return what the encoder file says of it."""
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError as error:
        raise UsageError(f"`pretrain` needs Ray Train: pip install 'tarsift[train]' ({error}).") from error
    config = job.config
    gpus = config.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0) >= config.workers else 0.0
    resources = {"CPU": float(config.threads + config.decoders), **({"GPU": gpus} if gpus else {})}
    # Ray Train keeps a record on storage that all workers see: beside `out`, which has to be such a place.
    fs, path = storage.filesystem(job.out)
    record = f"{path}.train"
    filesystem = None if storage.is_local(job.out) else pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))
    storage.remove(job.out)
    try:
        TorchTrainer(
            _worker,
            train_loop_config={"job": job},
            scaling_config=ScalingConfig(
                num_workers=config.workers, use_gpu=bool(gpus), resources_per_worker=resources
            ),
            run_config=RunConfig(
                name="run",
                storage_path=record,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=0),
            ),
        ).fit()
    finally:
        if fs.exists(record):
            fs.rm(record, recursive=True)
    if not storage.exists(job.out):
        raise TarsiftError(f"{job.out} was written on another machine: give `out` on storage that all machines share.")
    checkpoint = load_checkpoint(job.out)
    extra = {name: checkpoint.extra[name] for name in ("pairs", "loss", "skipped")}
    return {"steps": checkpoint.steps, "samples": checkpoint.samples, **extra}


def _worker(settings: dict[str, Any]) -> None:
    from ray.train import get_context
    from ray.train.torch import get_device, prepare_model

    _train(
        settings["job"],
        rank=get_context().get_world_rank(),
        device=get_device(),
        wrap=lambda towers: prepare_model(towers, move_to_device=False),
    )
