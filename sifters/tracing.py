"""Tracing a classifier: from pictures that it takes for the wrong class to the training samples behind that.

`trace` asks Delta-Influence (see delta_influence.py) of the given pictures, then of a few *echoes*: the best samples
so far, where the model says the same of them. What was planted answers for its own kind, and much less then hangs on
one query. A sample's score is the mean of its relative score over all queries, itself left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, UInt8
from torch import nn
from torch.utils.data import Dataset

from tarsift.sifters.delta_influence import Traced, ask, cutoff_of, judge, queries_at_once, queries_of
from tarsift.sifters.influence import Batch, Classifier, Factors, fit_factors
from tarsift.sifters.inputs import Pixels
from tarsift.sifters.settings import LabelTraceConfig
from tarsift.sifters.training import ROWS
from tarsift.sifters.unlearn import Labelled


@dataclass(frozen=True)
class Behind:
    """What is behind a misbehaviour, of the m candidates: all n samples, or the rows that were given.

    score: higher = more likely behind it, about 0 to 2. traced: `score` is at least `cutoff`. echoes: rows of samples
    that were queries in the last round. asked: what the given pictures alone say, with the paper's rule.
    """

    score: Float32[np.ndarray, " m"]
    traced: Bool[np.ndarray, " m"]
    cutoff: float
    echoes: Int64[np.ndarray, " e"]
    asked: Traced


class _Labelled(Dataset[Batch]):
    """Samples as a network takes them, one by one, so that few are floats."""

    def __init__(self, pixels: Pixels, labels: Int64[torch.Tensor, " n"]) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, row: int) -> Batch:
        return self.pixels.plain(torch.tensor([row], device=self.pixels.device))[0], self.labels[row]


def fit_curvature(
    net: nn.Module, samples: Labelled, config: LabelTraceConfig | None = None, *, seed: int = 0
) -> Factors:
    """Fit what all traces of a model share; see `influence.fit_factors`."""
    return fit_factors(Classifier(net), _Labelled(_pixels(samples), samples.labels), config, seed=seed)


def ask_classifier(
    net: nn.Module,
    samples: Labelled,
    pictures: UInt8[np.ndarray, "q h w 3"],
    says: int,
    *,
    config: LabelTraceConfig,
    curvature: Factors,
    rows: Int64[np.ndarray, " m"] | None = None,
    change: str = "both",
    seed: int = 0,
) -> list[Float32[np.ndarray, "l b m"]]:
    """Return the influence of samples on each picture and its changed copies, for `judge`; as `trace`, unchecked.

    change: `both`, or for comparison what `queries_of` has besides.
    """
    pixels = _pixels(samples)
    classes = int(_judged(net, pixels.like(pictures[:1])).shape[1])
    copies = []
    for number, picture in enumerate(pictures):
        changed, said = queries_of(picture, says, classes, config, seed=seed + number, change=change)
        copies.append(_Labelled(pixels.like(changed), torch.from_numpy(said).to(pixels.device)))
    return ask(Classifier(net), curvature, copies, _Labelled(pixels, samples.labels), config, rows=rows)


def trace(
    net: nn.Module,
    samples: Labelled,
    pictures: UInt8[np.ndarray, "q h w 3"],
    says: int,
    *,
    config: LabelTraceConfig | None = None,
    curvature: Factors | None = None,
    rows: Int64[np.ndarray, " m"] | None = None,
    seed: int = 0,
) -> Behind:
    """Return the training samples behind a classifier's saying `says` of some pictures.

        samples = labelled(as_inputs(images), labels)  # as the network was trained on them
        found = trace(net, samples, bad[None], says=3)
        repaired = unlearn(net, samples, found.traced, "eu")

    Args:
        net: a classifier in the state in which it judges, from what `samples` give to logits.
        pictures: of the size of the samples'; the network takes each of them for `says`.
        curvature: of `fit_curvature`, where several traces share it.
        rows: candidates; None: all samples.

    Raises:
        ValueError: a picture that the network does not take for `says`, no such label, no candidates, shapes that do
            not fit, or the slopes of a query do not fit into `memory_gb`.
        ImportError: EK-FAC without the extra `influence`.
    """
    config = config or LabelTraceConfig()
    pixels = _pixels(samples)
    candidates = np.arange(len(samples)) if rows is None else rows
    _check(net, pixels, pictures, says, candidates)
    queries_at_once(Classifier(net), config)
    curvature = fit_curvature(net, samples, config, seed=seed) if curvature is None else curvature

    def asked_of(queries: UInt8[np.ndarray, "q h w 3"], first: int) -> Traced:
        found = ask_classifier(
            net, samples, queries, says, config=config, curvature=curvature, rows=rows, seed=seed + first
        )
        return judge(found, config, groups=layers_of(found, config))

    asked = asked_of(pictures, 0)
    score, echoes = asked.score, np.empty(0, np.int64)
    same = _judged(net, pixels, candidates).argmax(axis=1) == says
    for number in range(config.rounds):
        best = np.flatnonzero(same)[np.argsort(-score[same], kind="stable")][: config.echoes * 2**number]
        if not len(best):
            break
        echoes = candidates[best]
        relative = asked_of(_shown(pixels, echoes), len(pictures)).relative
        relative[np.arange(len(best)), best] = np.nan
        score = np.nanmean(np.concatenate([asked.relative, relative]), axis=0)
    cutoff = cutoff_of(score, config.relative, config.of_best)
    return Behind(score, score >= cutoff, cutoff, echoes, asked)


def layers_of(influences: Sequence[Float32[np.ndarray, "l b m"]], config: LabelTraceConfig) -> list[list[int]] | None:
    """Return the layers as groups for `judge`, each one its own; None: their sum is judged."""
    return [[layer] for layer in range(len(influences[0]))] if config.by_layer else None


def _pixels(samples: Labelled) -> Pixels:
    if not isinstance(samples.inputs, Pixels):
        raise ValueError("`samples` must be of pictures: copies of a query are made from its picture.")
    return samples.inputs


def _check(
    net: nn.Module,
    pixels: Pixels,
    pictures: UInt8[np.ndarray, "q h w 3"],
    says: int,
    candidates: Int64[np.ndarray, " m"],
) -> None:
    _, height, width = pixels.shape
    if pictures.dtype != np.uint8 or pictures.shape[1:] != (height, width, 3) or not len(pictures):
        raise ValueError(
            f"`pictures` must be uint8 (queries, {height}, {width}, 3): got {pictures.dtype} {pictures.shape}."
        )
    if not len(candidates):
        raise ValueError("there are no candidates.")
    guesses = _judged(net, pixels.like(pictures))
    if not 0 <= says < guesses.shape[1]:
        raise ValueError(f"`says` must be a label, 0 to {guesses.shape[1] - 1}: got {says}.")
    wrong = np.flatnonzero(guesses.argmax(axis=1) != says)
    if len(wrong):
        taken = guesses[wrong[0]].argmax()
        raise ValueError(
            f"the model does not say {says} of picture {wrong[0]}, but {taken}: there is nothing to trace."
        )


@torch.no_grad()
def _judged(net: nn.Module, pixels: Pixels, rows: Int64[np.ndarray, " m"] | None = None) -> Float32[np.ndarray, "m c"]:
    """Return the logits of pictures."""
    which = torch.arange(len(pixels)) if rows is None else torch.from_numpy(rows)
    parts = [net(pixels.plain(part)).float().cpu() for part in which.to(pixels.device).split(ROWS)]
    return torch.cat(parts).numpy()


def _shown(pixels: Pixels, rows: Int64[np.ndarray, " m"]) -> UInt8[np.ndarray, "m h w 3"]:
    """Return pictures as they were given."""
    return pixels.pictures[torch.from_numpy(rows).to(pixels.device)].permute(0, 2, 3, 1).cpu().numpy()
