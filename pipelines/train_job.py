"""One training of a CLIP: what it starts from and depends on, and what each of its workers does."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import torch
from pydantic import BaseModel, ConfigDict, Field

from tarsift import __version__
from tarsift.operators import storage
from tarsift.operators.decoding import ImageConfig
from tarsift.operators.encoder import short_name
from tarsift.operators.errors import Interrupted, TarsiftError, UsageError
from tarsift.operators.models import (
    Base,
    build_model,
    build_tokenizer,
    load_encoder,
    load_weights,
    model_config,
    preprocessing,
    save_checkpoint,
    weights_sha256,
)
from tarsift.operators.shards import ReadConfig, Shard
from tarsift.operators.towers import LoadedEncoder
from tarsift.pipelines.leaving import PairReaderWithout, read_left_out
from tarsift.pipelines.pair_losses import PairLosses
from tarsift.pipelines.pairs import Batch, PairReader, PairStream, cached_batches, load_pairs, streamed_batches
from tarsift.pipelines.snapshots import Snapshots
from tarsift.pipelines.training import (
    FURTHER_LR,
    LR,
    TrainConfig,
    Training,
    gathered,
    seeded,
    torch_threads,
    train_clip,
)


class PretrainConfig(BaseModel):
    """What is trained, on how much, and with which machines."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = Field(
        default=None,
        description="`tiny`, a JSON config of stock towers, or an open_clip name; None = that of `base`, else `tiny`",
    )
    base: str | None = Field(
        default=None,
        description="encoder to train further: enc.pt of `pretrain`, ARCHITECTURE:FILE or ARCHITECTURE:TAG; "
        "None = random weights",
    )
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
    snapshot_s: float = Field(
        default=60.0,
        ge=0,
        description="seconds between snapshots from which an interrupted training goes on (streamed shards: at about "
        "the same place); more where writing one takes over a twentieth of that; 0 = after every step",
    )
    losses: str | None = Field(
        default=None, description="Parquet file for the loss of every pair in every epoch (shard, key, losses)"
    )
    leave_out: str | None = Field(
        default=None, description="Parquet file with shard and key of samples that are not trained on"
    )
    read: ReadConfig = Field(default=ReadConfig(), description="where captions are")
    images: ImageConfig = Field(default=ImageConfig(), description="which images are usable")


@dataclass(frozen=True)
class ShardDigest:
    """A shard as it was found before training: its SHA-256, its usable pairs, and what is wrong with it."""

    name: str
    sha256: str
    pairs: int
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Origin:
    """What training begins with: an architecture and, where a base is trained further, that and its weights."""

    architecture: dict[str, Any]
    base: Base | None = None
    weights: Callable[[], Mapping[str, torch.Tensor]] | None = None


def find_origin(config: PretrainConfig, out: str) -> Origin:
    """Find the architecture, and the base if there is one; refuses what does not go together."""
    if config.losses is not None and storage.absolute(config.losses) == storage.absolute(out):
        raise UsageError(f"`losses` and `out` are both {out}: give another file for one of them.")
    if config.base is None:
        return Origin(model_config(config.model or "tiny"))
    encoder = load_encoder(config.base)
    name = short_name(config.base)
    if encoder.config is None:
        raise UsageError(
            f"{config.base} cannot be trained further: give an encoder file, ARCHITECTURE:FILE or ARCHITECTURE:TAG."
        )
    if config.model is not None and _towers(model_config(config.model)) != _towers(encoder.config):
        raise UsageError(f"{name} is no {config.model}: leave `--model` out, the architecture is that of the base.")
    if storage.absolute(out) in (storage.absolute(part) for part in (config.base, config.base.partition(":")[2])):
        raise UsageError(f"{out} is the base itself, which is needed until training is done: give another `out`.")
    return Origin(encoder.config, base_of(encoder, name), encoder.model.state_dict)


def base_of(encoder: LoadedEncoder, name: str) -> Base:
    """Return what the file of a training that goes on from an encoder says of it."""
    unknown = encoder.unknown_base or (name if encoder.trained_on is None else None)
    return Base(name, encoder.weights_sha256, encoder.trained_on or {}, encoder.steps, unknown)


def _towers(architecture: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in architecture.items() if name != "preprocess_cfg"}


class Job:
    """All that a worker needs to know."""

    def __init__(
        self, shards: list[Shard], digests: list[ShardDigest], out: str, config: PretrainConfig, origin: Origin
    ) -> None:
        self.shards, self.digests, self.out = shards, digests, out
        self.architecture, self.base = origin.architecture, origin.base
        lr = config.train.lr or (FURTHER_LR if self.base else LR)
        self.config = config.model_copy(update={"train": config.train.model_copy(update={"lr": lr})})
        self.left_out = read_left_out(config.leave_out, shards) if config.leave_out else None
        self.most = sum(digest.pairs for digest in digests)
        self.pairs = self.most - (len(self.left_out.samples) if self.left_out else 0)
        if self.pairs < 2:
            raise UsageError(f"there is nothing to train on: {len(shards)} shards with {self.pairs} usable pairs.")
        self.batch_size = min(config.batch_size, self.pairs // config.workers * config.workers)
        self.steps = config.steps or config.epochs * (self.pairs // self.batch_size)
        size = self.architecture["vision_cfg"].get("image_size", 224)  # open_clip's default
        self.image_size = int(size[0] if isinstance(size, tuple | list) else size)
        needed = self.most * self.image_size**2 * 3
        self.in_memory = needed <= config.cache_bytes
        if config.losses is not None and not self.in_memory:
            raise UsageError(
                f"`losses` needs all pairs in memory: they take {needed} bytes, and `cache_bytes` is "
                f"{config.cache_bytes}. Raise that to as much, or train without `losses`."
            )

    def settings(self) -> dict[str, Any]:
        """Return what the trained weights depend on, apart from how the work is spread."""
        config = self.config
        shards = json.dumps([(digest.name, digest.sha256) for digest in self.digests])
        return {
            "architecture": self.architecture,
            "base": self.base.weights_sha256 if self.base else None,
            "shards": hashlib.sha256(shards.encode()).hexdigest()[:16],
            "steps": self.steps,
            "batch_size": self.batch_size,
            "captions": config.read.captions,
            "in_memory": self.in_memory,
            "shuffle": None if self.in_memory else config.shuffle,
            "losses": config.losses is not None,
            **({"left_out": self.left_out.digest} if self.left_out else {}),
            **config.model_dump(mode="json", include={"seed", "train", "images"}),
        }

    def snapshots(self) -> Snapshots:
        return Snapshots(self.out, self.settings(), every_s=self.config.snapshot_s)

    def begin(self, *, force: bool) -> int:
        """Return the steps that are done already; with `force` none, whatever there is."""
        if force:
            self.snapshots().remove()
        return self.snapshots().step()


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
    }
    weights_digest = weights_sha256(model)
    if rank == 0:
        if record is not None:
            record.write(f"{config.losses}", {"version": __version__, "weights_sha256": weights_digest})
        _save(job, model, metrics)
        snapshots.remove()
    return {**metrics, "weights_sha256": weights_digest, "went_on_from": done}


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
            **{name: metrics[name] for name in ("pairs", "loss", "skipped")},
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
