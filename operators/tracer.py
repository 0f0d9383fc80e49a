"""Tracing as an operator: a CLIP model as what is traced, its curvature, and a slice of candidates as a job."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float32, UInt8
from torch.utils.data import Dataset

from tarsift.clip_detect.neighbors import unit_norm
from tarsift.operators import storage
from tarsift.operators.decoding import ImageConfig, UnusableImage
from tarsift.operators.errors import UsageError
from tarsift.operators.isolation import IsolatedDecoder
from tarsift.operators.models import load_encoder
from tarsift.operators.schema import append, fixed_size_list, places_of
from tarsift.operators.shards import Shard, fetch_members
from tarsift.operators.storage import join
from tarsift.operators.towers import LoadedEncoder, encode_captions, encode_images
from tarsift.operators.trace_settings import TracingConfig
from tarsift.operators.trace_verdict import Question
from tarsift.sifters.delta_influence import Traced, ask, judge, queries_at_once, queries_of
from tarsift.sifters.image_text import ImageText, choose_concepts, layers_that_run, with_projection
from tarsift.sifters.influence import Batch, Factors, fit_factors, has_kronfluence

MICRO_BATCH = 64
FACTORS, BANKS = "factors", "banks.npz"
PROJECTION = "projection"
LAYERS = {"projection": (PROJECTION,), "image": (PROJECTION, "model.visual."), "both": ("",)}  # of `Towers`


@dataclass(frozen=True)
class Banks:
    """Pairs that the loss of a pair is taken against: embeddings (k, d) at unit length."""

    images: Float32[np.ndarray, "k d"]
    captions: Float32[np.ndarray, "k d"]


class Pairs(Dataset[Batch]):
    """Pictures (n, h, w, 3) uint8 with captions, as the towers take them: one by one, so that few are floats."""

    def __init__(self, encoder: LoadedEncoder, pictures: np.ndarray, captions: Sequence[str]) -> None:
        self.pictures, self.tokens = pictures, encoder.tokenizer(list(captions))
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.mean, encoder.std))

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, row: int) -> Batch:
        pixels = torch.from_numpy(np.ascontiguousarray(self.pictures[row].transpose(2, 0, 1))).float()
        return pixels.div_(255).sub_(self.mean).div_(self.std), self.tokens[row]


def embed_captions(encoder: LoadedEncoder, captions: Sequence[str]) -> Float32[np.ndarray, "n d"]:
    """Return captions at unit length."""
    return unit_norm(encode_captions(encoder, captions, micro_batch=MICRO_BATCH))


@torch.no_grad()
def scale_of(encoder: LoadedEncoder) -> float:
    """Return what a model's cosines are multiplied by."""
    return float(encoder.model.logit_scale.exp())  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


def subject_of(encoder: LoadedEncoder, banks: Banks, concepts: Sequence[str], config: TracingConfig) -> ImageText:
    """Return a model as influence sees it.

    Raises:
        UsageError: if the layers that are to count cannot be followed.
    """
    device = next(encoder.model.parameters()).device
    net = with_projection(encoder.model).eval()
    size = encoder.image_size
    probe = Pairs(encoder, np.zeros((1, size, size, 3), np.uint8), ["a"])[0]
    ran = layers_that_run(net, tuple(part[None].to(device) for part in probe))
    tracked = [layer for layer in ran if layer.startswith(LAYERS[config.layers])]
    if not tracked:
        raise UsageError(f"{encoder.name} has no layers {config.layers!r} that can be followed: set `layers` to image.")
    net.requires_grad_(False)
    for layer in tracked:  # what lies before the first of them needs no slopes
        net.get_submodule(layer).requires_grad_(True)
    return ImageText(
        net=net,
        images=torch.from_numpy(banks.images).to(device),
        captions=torch.from_numpy(banks.captions).to(device),
        concepts=torch.from_numpy(embed_captions(encoder, concepts)).to(device),
        scale=scale_of(encoder),
        tracked=tracked,
    )


def said_of(encoder: LoadedEncoder, question: Question) -> Float32[np.ndarray, "q c"]:
    """Return the cosine of each picture with each concept: what the model says of it has the highest."""
    pictures = unit_norm(encode_images(encoder, question.pictures, micro_batch=MICRO_BATCH))
    return pictures @ embed_captions(encoder, question.concepts).T


def taken_for(encoder: LoadedEncoder, question: Question) -> Bool[np.ndarray, " q"]:
    """Tell of which pictures the model says the first of the captions."""
    return said_of(encoder, question).argmax(axis=1) == 0


def concepts_of(encoder: LoadedEncoder, says: str, captions: Sequence[str], config: TracingConfig) -> tuple[str, ...]:
    """Return what is said, and captions that say other things; alone where none does."""
    distinct = list(dict.fromkeys(captions))
    embedded = embed_captions(encoder, [says, *distinct])
    others = choose_concepts(embedded[0], embedded[1:], most=config.concepts - 1, apart=config.apart)
    return (says, *(distinct[row] for row in others))


def echo_of(
    found: pa.Table,
    question: Question,
    encoder: LoadedEncoder,
    shards: Mapping[str, Shard],
    images: ImageConfig,
    config: TracingConfig,
) -> Question | None:
    """Ask of the best candidates too, where the model says the same of them; None where there is no such."""
    best, pictures = fetch_pictures(found.slice(0, config.echoes), shards, encoder, images)
    if not len(best):
        return None
    places = places_of(best)
    chosen = np.flatnonzero(taken_for(encoder, Question(pictures, question.concepts)))
    samples = tuple(places[row] for row in chosen)
    return Question(pictures[chosen], question.concepts, samples) if samples else None


def fit_curvature(
    encoder: LoadedEncoder, pictures: UInt8[np.ndarray, "n h w 3"], captions: Sequence[str], config: TracingConfig
) -> tuple[Factors, Banks]:
    """Fit what all traces of a model share, on a random sample of the pairs it was trained on."""
    few = slice(config.bank)
    banks = Banks(
        unit_norm(encode_images(encoder, pictures[few], micro_batch=MICRO_BATCH)),
        embed_captions(encoder, captions[few]),
    )
    subject = subject_of(encoder, banks, captions[:2], config)
    return fit_factors(subject, Pairs(encoder, pictures, captions), config.method, seed=config.seed), banks


def trace(
    encoder: LoadedEncoder,
    curvature: tuple[Factors, Banks],
    question: Question,
    pictures: UInt8[np.ndarray, "n h w 3"],
    captions: Sequence[str],
    config: TracingConfig,
) -> Traced:
    """Return what the model's saying so owes to each of some pairs, by each query."""
    factors, banks = curvature
    subject = subject_of(encoder, banks, question.concepts, config)
    queries = []
    for number, picture in enumerate(question.pictures):
        changed, said = queries_of(picture, 0, len(question.concepts), config.method, seed=config.seed + number)
        queries.append(Pairs(encoder, changed, [question.concepts[label] for label in said]))
    found = ask(subject, factors, queries, Pairs(encoder, pictures, captions), config.method)
    return judge(found, config.method, groups=_groups(subject.tracked or ()))


def _groups(tracked: Sequence[str]) -> list[list[int]]:
    """Return which layers are judged together: the last projection by itself, and all of them."""
    alone = [row for row, layer in enumerate(tracked) if layer == PROJECTION]
    return [group for group in (alone, list(range(len(tracked)))) if group]


def refuse_too_large(encoder: LoadedEncoder, config: TracingConfig) -> None:
    """Find out before any work what a job would find.

    Raises:
        UsageError: the slopes of a query take too much memory; or see `subject_of`; or the curvature takes an extra
            that is not installed.
    """
    if config.method.hessian == "ekfac" and not has_kronfluence():
        raise UsageError(
            "tracing takes the extra `influence` (pip install 'tarsift[influence]'); without it there is "
            "--set method.hessian=identity, which is less sure."
        )
    nothing = np.zeros((1, encoder.embed_dim), np.float32)
    subject = subject_of(encoder, Banks(nothing, nothing), ["a"], config)
    try:
        queries_at_once(subject, config.method)
    except ValueError as error:
        raise UsageError(f"{error} Give --set layers=projection, or raise --set method.memory_gb.") from None


def fetch_pictures(
    table: pa.Table, shards: Mapping[str, Shard], encoder: LoadedEncoder, images: ImageConfig
) -> tuple[pa.Table, UInt8[np.ndarray, "n h w 3"]]:
    """Return the rows of a table whose pictures can be used, and these at the encoder's size.

    Args:
        table: shard, image_offset, image_size.

    Raises:
        ShardError: if a shard is shorter than that.
        OSError: if one cannot be opened.
    """
    size, rows, pictures = encoder.image_size, [], []
    names = np.asarray(table["shard"].combine_chunks())
    how = {"interpolation": encoder.interpolation, "resize_mode": encoder.resize_mode}
    with IsolatedDecoder(size, **how, config=images) as decode:
        for name in dict.fromkeys(names.tolist()):
            mine = np.flatnonzero(names == name)
            places = table.select(["image_offset", "image_size"]).take(mine)
            ranges = list(zip(*(column.to_pylist() for column in places.columns), strict=True))
            found = zip(mine.tolist(), fetch_members(shards[name], ranges), strict=True)
            for (row, _), pixels in decode.each(found, lambda item: item[1]):
                if pixels is not None and not isinstance(pixels, UnusableImage):
                    rows.append(row)
                    pictures.append(pixels)
    order = np.argsort(rows)
    stacked = np.stack(pictures)[order] if rows else np.zeros((0, size, size, 3), np.uint8)
    return table.take(np.array(rows, np.int64)[order]), stacked


@dataclass(frozen=True)
class FitCurvature:
    """Job: fit the curvature on some pairs, and keep it in a folder.

    Args:
        spec: of the encoder.
        out: folder of `banks.npz` and `factors/`.
    """

    spec: str
    shards: Mapping[str, Shard]
    images: ImageConfig
    out: str
    config: TracingConfig
    device: str = "cpu"

    def __call__(self, pairs: pa.Table) -> int:
        """Return how many pairs could be used."""
        encoder = load_encoder(self.spec, device=self.device)
        pairs, pictures = fetch_pictures(pairs, self.shards, encoder, self.images)
        factors, banks = fit_curvature(encoder, pictures, pairs["caption"].to_pylist(), self.config)
        for name, content in factors.items():
            storage.put_bytes(join(self.out, FACTORS, name), content)
        sink = io.BytesIO()
        np.savez(sink, images=banks.images, captions=banks.captions)
        storage.put_bytes(join(self.out, BANKS), sink.getvalue())
        return len(pairs)


def load_curvature(folder: str) -> tuple[Factors, Banks]:
    """Return what `FitCurvature` kept."""
    with np.load(io.BytesIO(storage.read_bytes(join(folder, BANKS))), allow_pickle=False) as file:
        banks = Banks(file["images"], file["captions"])
    names = storage.list_files(join(folder, FACTORS), "")
    return {name: storage.read_bytes(join(folder, FACTORS, name)) for name in names}, banks


@dataclass(frozen=True)
class TraceSlice:
    """Job: trace some candidates.

    Args:
        curvature: folder of `FitCurvature`.
    """

    spec: str
    shards: Mapping[str, Shard]
    images: ImageConfig
    curvature: str
    question: Question
    config: TracingConfig
    device: str = "cpu"

    def __call__(self, candidates: pa.Table) -> pa.Table:
        """Return the candidates whose pictures can be used, with what each query says of them.

        Columns `relative`, `influence` and `collapses` of lists with one value per query, NaN in `relative` where the
        candidate is the query; and `embedding` of the picture, at unit length.
        """
        encoder = load_encoder(self.spec, device=self.device)
        candidates, pictures = fetch_pictures(candidates, self.shards, encoder, self.images)
        captions = candidates["caption"].to_pylist()
        embedded = unit_norm(encode_images(encoder, pictures, micro_batch=MICRO_BATCH))
        if not captions:
            found = np.zeros((3, len(self.question.pictures), 0), np.float32)
        else:
            traced = trace(encoder, load_curvature(self.curvature), self.question, pictures, captions, self.config)
            found = np.stack([traced.relative, traced.influence, traced.counts])
        places = places_of(candidates)
        for query, place in enumerate(self.question.samples):
            if place in places:
                found[0, query, places.index(place)] = np.nan
        names = ("relative", "influence", "collapses", "embedding")
        columns = zip(names, (*(values.T for values in found), embedded), strict=True)
        return append(candidates, {name: fixed_size_list(values) for name, values in columns})
