"""What each worker of a training does: load its pairs, train, keep snapshots; the first one writes the encoder file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import torch

from tarsift import __version__
from tarsift.operators.errors import Interrupted, TarsiftError
from tarsift.operators.models import (
    build_model,
    build_tokenizer,
    load_weights,
    preprocessing,
    save_checkpoint,
    weights_sha256,
)
from tarsift.operators.shards import Shard
from tarsift.pipelines.pair_losses import PairLosses
from tarsift.pipelines.pairs import (
    Batch,
    PairReader,
    PairReaderWithout,
    PairStream,
    cached_batches,
    load_pairs,
    streamed_batches,
)
from tarsift.pipelines.snapshots import Snapshots
from tarsift.pipelines.train_job import METRICS, Job
from tarsift.pipelines.training import Training, gathered, seeded, torch_threads, train_clip


def train(
    job: Job,
    weights: Callable[[], Mapping[str, torch.Tensor]] | None,
    *,
    rank: int = 0,
    device: Any = "cpu",
    wrap: Callable[[Any], Any] = lambda towers: towers,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    asked: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train as worker `rank` of those in the job's settings; worker 0 writes snapshots and the encoder file."""
    config, world = job.config, job.config.workers
    snapshots = job.snapshots()
    kept = snapshots.read()
    done = kept["training"]["step"] if kept else 0
    if gathered(torch.tensor([done], device=device), world).unique().numel() > 1:
        raise TarsiftError(f"not all workers see {snapshots.url}: give `out` on storage that all machines share.")
    with torch_threads(config.threads), seeded([config.seed, rank, done], device):
        model: Any = build_model(job.architecture, seed=config.seed)
        if kept is None and weights is not None:
            load_weights(model, weights(), f"{config.base}")
        data = _load(job, rank, done, asked)
        _refuse_other_pairs([data.pairs, (kept or {}).get("pairs", data.pairs)], world, device)
        record = None
        if data.names is not None and config.losses is not None:
            record = PairLosses(data.names, data.epochs(job.steps), gathered=partial(gathered, world=world))
            record.values = kept["losses"] if kept else record.values
        if kept and rank:  # the random state that is kept is that of worker 0
            kept["training"] |= {"random": torch.get_rng_state(), "random_cuda": None}
        normalize = preprocessing(job.architecture)
        log = train_clip(
            model,
            data.batches,
            steps=job.steps,
            config=config.train,
            normalize=(normalize.mean, normalize.std),
            device=device,
            rank=rank,
            world=world,
            wrap=wrap,
            on_step=on_step,
            on_pairs=record,
            after_step=_Keep(job, snapshots, record, rank, asked, data.pairs),
            state=kept and kept["training"],
        )
    tail = log.losses[-20:]
    metrics = {
        "steps": job.steps,
        "samples": job.steps * job.batch_size,
        "pairs": data.pairs,
        "loss": sum(tail) / len(tail),
        "skipped": dict(data.skipped + log.skipped),
        "weights_sha256": weights_sha256(model),
    }
    if rank == 0:
        if record is not None:
            record.write(f"{config.losses}", {"version": __version__, "weights_sha256": metrics["weights_sha256"]})
        _save(job, model, metrics)
        snapshots.remove()
    return {**metrics, "went_on_from": done}


def _refuse_other_pairs(found: Sequence[int], world: int, device: Any) -> None:
    """Stop if the pairs are not those of the other workers and of the snapshot: some decoder died only once."""
    if gathered(torch.tensor(found, device=device), world).unique().numel() > 1:
        raise Interrupted(
            "an image was decoded in one reading of the pairs and not in another one, so that they are not the same; "
            "run the same command again, if need be with --force."
        )


@dataclass
class _Keep:
    """After a step: a snapshot where one is due, and the end of training if that was asked for."""

    job: Job
    snapshots: Snapshots
    record: PairLosses | None
    rank: int
    asked: Callable[[], bool]
    pairs: int

    def __call__(self, training: Training) -> None:
        if training.step == self.job.steps:
            return
        stop = self.asked()
        if self.rank == 0 and (stop or self.snapshots.due()):
            losses = self.record.values if self.record else None
            state = {"training": training.state_dict(), "losses": losses, "pairs": self.pairs}
            self.snapshots.write(training.step, state)
        if stop:
            raise Interrupted(
                f"stopped after {training.step} of {self.job.steps} steps, which {self.snapshots.url} keeps; "
                "run the same command again to go on."
            )


def _save(job: Job, model: torch.nn.Module, metrics: Mapping[str, Any]) -> None:
    config = job.config
    save_checkpoint(
        job.out,
        model,
        config=job.architecture,
        shards={digest.name: digest.sha256 for digest in job.digests},
        steps=metrics["steps"],
        samples=metrics["samples"],
        seed=config.seed,
        base=job.base,
        extra={
            "tarsift": __version__,
            "model": config.model or (job.base.name if job.base else "tiny"),
            "tokenizer": job.architecture["text_cfg"].get("hf_tokenizer_name") or "open_clip byte-pair encoding",
            "settings": config.model_dump(mode="json"),
            "job": job.identity(),
            **{name: metrics[name] for name in METRICS},
        },
    )


@dataclass(frozen=True)
class _Data:
    """A worker's batches without end, what was skipped so far, and the number of pairs.

    `names` has a row per pair in memory, None where they are streamed; `joint` pairs make a batch of all workers.
    """

    batches: Iterator[Batch]
    skipped: Counter[str]
    pairs: int
    joint: int
    names: pa.Table | None = None

    def epochs(self, steps: int) -> int:
        return math.ceil(steps / (self.pairs // self.joint))


def _load(job: Job, rank: int, done: int, asked: Callable[[], bool]) -> _Data:
    """Load this worker's part of the pairs, or open them as a stream, from the step after `done` on."""
    config, world = job.config, job.config.workers
    settings = preprocessing(job.architecture)
    tokenizer = build_tokenizer(job.architecture, config.model or "")
    how = (job.image_size, settings.interpolation, settings.resize_mode, config.read, config.images)
    reader = PairReaderWithout(*how, job.left_out.samples) if job.left_out else PairReader(*how)
    share = job.batch_size // world
    damage = Counter(problem.split(":")[0] for digest in job.digests for problem in digest.problems)
    if job.in_memory:
        cache = load_pairs(reader, _until(asked, job.shards), tokenizer, most=job.most)
        pairs = len(cache.captions)
        share = min(share, pairs // world)
        batches = cached_batches(cache, batch_size=share, seed=config.seed, rank=rank, world=world, start=done)
        return _Data(batches, cache.skipped + damage, pairs, share * world, cache.names)
    seen = done * job.batch_size / job.pairs
    stream = PairStream(
        reader, job.shards, tokenizer, batch_size=share, seed=config.seed, shuffle=config.shuffle,
        rank=rank, world=world, start=seen,
    )  # fmt: skip
    return _Data(streamed_batches(stream, decoders=config.decoders), damage, job.pairs, job.batch_size)


def _until(asked: Callable[[], bool], shards: Iterable[Shard]) -> Iterator[Shard]:
    for shard in shards:
        if asked():
            raise Interrupted("stopped before training; run the same command again.")
        yield shard
