"""The training loop of a small CLIP: a plain function over batches, alone or one of several workers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import open_clip
import torch
from jaxtyping import Float32, Int64
from torch import nn
from torch.nn.functional import cross_entropy

from tarsift.operators.models import preprocessing
from tarsift.pipelines.pairs import Batch
from tarsift.pipelines.train_settings import LR, TrainConfig

MAX_LOGIT_SCALE = math.log(100)  # as Radford et al. 2021 (arXiv 2103.00020), section 2.5


@dataclass
class TrainLog:
    """What training did: the loss of every step, and the samples that were skipped, by reason."""

    losses: list[float] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


@dataclass
class Training:
    """A training between two steps; its state dict is what it takes to go on from there as if nothing had been.

    `step` counts the steps done. The random state is that of dropout and the like.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    log: TrainLog = field(default_factory=TrainLog)
    step: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain types only; it holds the tensors themselves, no copies."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": torch.tensor(self.log.losses, dtype=torch.float64),
            "skipped": dict(self.log.skipped),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back, or on, to a state."""
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.log = TrainLog(state["losses"].tolist(), Counter(state["skipped"]))
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)


def train_clip(
    model: nn.Module,
    batches: Iterator[Batch],
    *,
    steps: int,
    config: TrainConfig,
    normalize: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world: int = 1,
    wrap: Callable[[nn.Module], nn.Module] = lambda towers: towers,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    on_pairs: Callable[[Batch, Float32[torch.Tensor, " b"]], None] | None = None,
    after_step: Callable[[Training], None] = lambda training: None,
    state: Mapping[str, Any] | None = None,
) -> TrainLog:
    """Train a CLIP in place for a number of steps.

    Args:
        model: an open_clip model; it is moved to `device`.
        batches: without end; this worker's part of each joint batch. With `state`, the first one is that of its step.
        steps: optimiser steps.
        config: the optimiser's settings.
        normalize: mean and standard deviation per channel; None = open_clip's.
        rank, world: this worker and how many there are, in an initialised process group.
        wrap: what makes a module train in step with other workers (DistributedDataParallel).
        on_step: told the steps done and the loss.
        on_pairs: told the loss of every pair of a batch, in which the model had not learned from that batch yet.
        after_step: told last of each step, with the training as it can be kept.
        state: of a `Training` of the same settings, to go on from.
    """
    mean, std = normalize or (preprocessing({}).mean, preprocessing({}).std)
    shift = torch.tensor(mean, device=device) * 255
    scale = torch.tensor(std, device=device) * 255
    model.to(device=device, memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue]
    towers = wrap(Towers(model))
    loss_of = open_clip.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, config.beta2),
        fused=True,
    )
    training = Training(model, optimizer, torch.device(device))
    if state is not None:
        training.load_state_dict(state)
    low = (training.device.type == "cuda" and config.precision != "fp32") or config.precision == "bf16"
    for step in range(training.step, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, config)
        batch = next(batches)
        images = ((batch.pixels.to(device, non_blocking=True).float() - shift) / scale).permute(0, 3, 1, 2)
        with torch.autocast(training.device.type, torch.bfloat16, enabled=low):
            logits = loss_of.get_logits(*towers(images, batch.tokens))
            right = loss_of.get_ground_truth(device, len(images))
            loss = (cross_entropy(logits[0], right) + cross_entropy(logits[1], right)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)  # pyright: ignore[reportCallIssue]
            if on_pairs:
                each = [cross_entropy(towards.float(), right, reduction="none") for towards in logits]
                on_pairs(batch, (each[0] + each[1]) / 2)
        training.step = step + 1
        training.log.losses.append(loss.item())
        training.log.skipped.update(batch.skipped)
        on_step(step + 1, training.log.losses[-1])
        after_step(training)
    model.eval()
    return training.log


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Return the rate of a step, counted from 0: a linear rise, then half a cosine over all steps."""
    rise = min(config.warmup_steps, math.ceil(steps / 10))
    return (config.lr or LR) * min(1.0, (step + 1) / max(1, rise)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


class Towers(nn.Module):
    """Both towers in one module, so that what synchronises workers sees a single forward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, images: Float32[torch.Tensor, "b 3 size size"], tokens: Int64[torch.Tensor, "b length"]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # Captions repeat within a batch; each distinct one is encoded once.
        distinct, which = torch.unique(tokens, dim=0, return_inverse=True)
        texts = encode_trimmed(self.model, distinct, images.device)[which.to(images.device)]
        pictures = self.model.encode_image(images)  # pyright: ignore[reportCallIssue]
        unit = nn.functional.normalize
        return unit(pictures, dim=-1), unit(texts, dim=-1), self.model.logit_scale.exp()  # pyright: ignore


def encode_trimmed(
    model: Any, tokens: Int64[torch.Tensor, "b length"], device: torch.device
) -> Float32[torch.Tensor, "b d"]:
    """Encode captions without the padding behind the longest of them.

    A causal text tower that pools at the end token cannot see what is behind it, so the embeddings
    are those of `model.encode_text`; other text towers get all of it.
    """
    kind = type(model)
    stock = kind is open_clip.CLIP and isinstance(model.text_projection, nn.Parameter)
    if not stock or model.attn_mask is None or model.text_pool_type != "argmax":
        return model.encode_text(tokens.to(device))
    ends = tokens.argmax(dim=1)
    length = int(ends.max()) + 1
    x = model.token_embedding(tokens[:, :length].to(device)) + model.positional_embedding[:length]
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    x = model.ln_final(x)
    return x[torch.arange(len(x), device=device), ends.to(device)] @ model.text_projection


def gathered(values: torch.Tensor, world: int) -> torch.Tensor:
    """Return the values of all workers, in the order of their ranks."""
    if world == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world)]
    torch.distributed.all_gather(parts, values)
    return torch.cat(parts)


@contextmanager
def seeded(seeds: Sequence[int], device: str | torch.device = "cpu") -> Iterator[None]:
    """Draw from a random state of its own inside the block, as dropout does; the caller's is left as it was."""
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(np.random.SeedSequence(list(seeds)).generate_state(1)[0]))
        yield


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Compute on this many threads inside the block; left alone, OpenMP spins on all cores of a shared machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
