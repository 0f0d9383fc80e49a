"""One training of a CLIP: what it starts from and depends on, and whether it has begun or ended."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tarsift.operators import storage
from tarsift.operators.architectures import model_config
from tarsift.operators.checkpoints import Base, load_checkpoint, state_sha256
from tarsift.operators.encoder_info import short_name
from tarsift.operators.encoder_settings import is_file_alone
from tarsift.operators.errors import AccessError, Interrupted, TarsiftError, UsageError
from tarsift.operators.shards import Shard
from tarsift.operators.towers import LoadedEncoder
from tarsift.pipelines.leaving import read_left_out
from tarsift.pipelines.pair_losses import are_of
from tarsift.pipelines.shard_digests import ShardDigest
from tarsift.pipelines.snapshots import VERSION, Snapshots
from tarsift.pipelines.train_settings import FURTHER_LR, LR, PretrainConfig

METRICS = ("pairs", "loss", "skipped", "weights_sha256")  # that an encoder file tells of its own training


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
    name = short_name(config.base)
    architecture, base, weights = _read_base(config.base, name)
    if config.model is not None and _towers(model_config(config.model)) != _towers(architecture):
        raise UsageError(f"{name} is no {config.model}: leave `--model` out, the architecture is that of the base.")
    if storage.absolute(out) in (storage.absolute(part) for part in (config.base, config.base.partition(":")[2])):
        raise UsageError(f"{out} is the base itself, which is needed until training is done: give another `out`.")
    return Origin(architecture, base, weights)


def _read_base(spec: str, name: str) -> tuple[dict[str, Any], Base, Callable[[], Mapping[str, torch.Tensor]]]:
    """Return architecture, description and weights of a base; an encoder file of tarsift's says all of it."""
    if is_file_alone(spec) and storage.exists(spec):
        file = load_checkpoint(spec)
        base = Base(name, state_sha256(file.state_dict), file.trained_on, file.total_steps, file.unknown_base)
        return file.config, base, lambda: file.state_dict
    from tarsift.operators.models import load_encoder  # with open_clip, which takes seconds to load

    encoder = load_encoder(spec)
    if encoder.config is None:
        raise UsageError(
            f"{spec} cannot be trained further: give an encoder file, ARCHITECTURE:FILE or ARCHITECTURE:TAG."
        )
    return encoder.config, base_of(encoder, name), encoder.model.state_dict


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

    def identity(self) -> dict[str, Any]:
        """Return the settings as files tell them, with the version of how they are understood and all of reading.

        A snapshot does without the latter: that the pairs are the same is seen when they are loaded.
        """
        read = self.config.read.model_dump(mode="json")
        return {"version": VERSION, "read": read, **self.snapshots().settings}

    def snapshots(self) -> Snapshots:
        return Snapshots(self.out, self.settings(), every_s=self.config.snapshot_s)

    def begin(self, *, force: bool) -> int:
        """Return the steps that are done already; with `force` none, whatever there is."""
        if force:
            self.snapshots().remove()
        return self.snapshots().step()

    def ended(self) -> dict[str, Any] | None:
        """Return the metrics of this very training if it has come to its end before, None if not.

        That is what the encoder file says of itself, where its weights are those that were written.
        """
        if not storage.exists(self.out):
            return None
        try:
            file = load_checkpoint(self.out)
        except (AccessError, Interrupted):
            raise
        except TarsiftError:  # something else, which is replaced
            return None
        if file.extra.get("job") != self.identity():
            return None
        digest = state_sha256(file.state_dict)
        if file.extra["weights_sha256"] != digest:
            return None
        if self.config.losses is not None and not are_of(self.config.losses, digest):
            return None
        own = {name: file.extra[name] for name in METRICS}
        return {"steps": file.steps, "samples": file.samples, **own, "went_on_from": file.steps}
