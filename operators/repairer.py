"""Repairing a CLIP as jobs: unlearning in memory, and what a model says before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import UInt8

from tarsift.clip_detect.neighbors import unit_norm
from tarsift.operators.decoding import ImageConfig
from tarsift.operators.models import build_model, load_encoder
from tarsift.operators.repair_settings import RepairConfig
from tarsift.operators.shards import Shard
from tarsift.operators.towers import LoadedEncoder, encode_images
from tarsift.operators.trace_verdict import Question
from tarsift.operators.tracer import MICRO_BATCH, embed_captions, fetch_pictures, scale_of, taken_for
from tarsift.sifters.image_text import Paired, Towers
from tarsift.sifters.unlearn import unlearn

RANKS = 5  # captions among which a picture's own is to be


@dataclass(frozen=True)
class UnlearnPairs:
    """Job: unlearn some pairs in memory.

    Args:
        method: one that is not done by training over all shards.
    """

    spec: str
    shards: Mapping[str, Shard]
    images: ImageConfig
    method: str
    config: RepairConfig
    device: str = "cpu"

    def __call__(self, forgotten: pa.Table, retained: pa.Table) -> dict[str, torch.Tensor]:
        """Return the weights afterwards.

        Raises:
            ValueError: nothing is left to forget or to keep to, or the model cannot be built anew.
        """
        encoder = load_encoder(self.spec, device=self.device)
        parts = [fetch_pictures(rows, self.shards, encoder, self.images) for rows in (forgotten, retained)]
        captions = [caption for rows, _ in parts for caption in rows["caption"].to_pylist()]
        pictures = np.concatenate([pictures for _, pictures in parts])
        forget = np.arange(len(pictures)) < len(parts[0][0])
        encoder.model.requires_grad_(True)
        net = Towers(encoder.model)
        samples = paired(encoder, pictures, captions)
        after = unlearn(
            net, samples, forget, self.method, config=self.config.unlearn, seed=self.config.seed,
            anew=lambda seed: Towers(self._untrained(encoder, seed)),
        )  # fmt: skip
        model: torch.nn.Module = after.model  # pyright: ignore[reportAssignmentType]
        return {name: value.detach().cpu() for name, value in model.state_dict().items()}

    def _untrained(self, encoder: LoadedEncoder, seed: int) -> torch.nn.Module:
        if encoder.config is None:
            raise ValueError(f"{encoder.name} does not say what it is built from.")
        return build_model(encoder.config, seed=seed).to(next(encoder.model.parameters()).device)


def paired(encoder: LoadedEncoder, pictures: UInt8[np.ndarray, "n h w 3"], captions: Sequence[str]) -> Paired:
    """Return pairs as unlearning sees them."""
    device = next(encoder.model.parameters()).device
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (encoder.mean, encoder.std))
    planes = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).to(device)
    return Paired(planes, encoder.tokenizer(list(captions)).to(device), mean, std, scale_of(encoder))


@dataclass(frozen=True)
class Examine:
    """Job: what a model says of pictures, and how well it finds captions.

    Args:
        shards: those of the dump; held: those of the pairs on which retrieval is measured.
        question: the pictures that were asked of; None: nothing was traced.
    """

    shards: Mapping[str, Shard]
    held: Mapping[str, Shard]
    images: ImageConfig
    question: Question | None

    def __call__(self, spec: str, forgotten: pa.Table, held: pa.Table) -> dict[str, float]:
        """Return shares, 0 to 1.

        `queries` and `forgotten`: of which it says what was traced; `recall_at_5`: held pairs whose own caption is
        among the five nearest of all distinct ones.
        """
        encoder = load_encoder(spec)
        out: dict[str, float] = {}
        if self.question is not None:
            _, pictures = fetch_pictures(forgotten, self.shards, encoder, self.images)
            out["queries"] = _saying(encoder, self.question)
            out["forgotten"] = _saying(encoder, Question(pictures, self.question.concepts))
        held, pictures = fetch_pictures(held, self.held, encoder, self.images)
        return out | {"recall_at_5": retrieval(encoder, pictures, held["caption"].to_pylist())}


def retrieval(encoder: LoadedEncoder, pictures: UInt8[np.ndarray, "n h w 3"], captions: Sequence[str]) -> float:
    """Return the share of pictures whose caption is among the nearest of all distinct ones."""
    distinct = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
    cosines = (
        unit_norm(encode_images(encoder, pictures, micro_batch=MICRO_BATCH)) @ embed_captions(encoder, list(distinct)).T
    )
    own = np.take_along_axis(cosines, np.array([[distinct[caption]] for caption in captions]), axis=1)
    return float(np.mean((cosines > own).sum(axis=1) < RANKS))


def _saying(encoder: LoadedEncoder, question: Question) -> float:
    if not len(question.pictures):
        return 0.0
    return float(np.mean(taken_for(encoder, question)))
