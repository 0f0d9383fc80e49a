"""Poisoned dumps and the encoders trained on them, made once and kept: what detectors are measured on.

A cell is a corpus, an attack, a rate and a seed. Making it plants the poison, trains an encoder on the poisoned
dump, measures whether the attack was learned, and keeps the embeddings of every sample by that encoder and by a
*witness*, which was trained on other pictures of the same kind. Everything is seeded through and through.

cifar10    10,000 pictures of CIFAR-10 with made-up captions; other pictures for every seed
flickr8k   about 5,700 pictures of Flickr8k with human captions, at 32 pixels; the held-out fifth differs by seed
digits     the demo's own corpus, 50,000 renderings of written digits

`--data` is the folder with `cifar10-train`, `cifar10-test` and `flickr8k` as WebDataset shards.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from measuring import ROOT

from tarsift.clip_detect.baselines import Evidence
from tarsift.clip_detect.triggers import ATTACKS
from tarsift.operators.decoding import ImageConfig, decode_image, fit_to_square, strict_pillow
from tarsift.operators.encoder import ClipEncoder
from tarsift.operators.identity import identities
from tarsift.operators.images import DecodeImages, hash_images
from tarsift.operators.models import LoadedEncoder, load_encoder
from tarsift.operators.planting import poison_images
from tarsift.operators.poison import PoisonConfig
from tarsift.operators.schema import matrix, places_of
from tarsift.operators.shards import ReadShard, list_shards
from tarsift.pipelines import demo_corpus
from tarsift.pipelines.poison import poison_here
from tarsift.pipelines.pretrain import PretrainConfig, pretrain_here
from tarsift.pipelines.zeroshot import attack_success, classify, to_mean_direction, to_nearest_caption, zero_shot

KEY = b"zoo"  # of the hashes by which samples are drawn
# What a dump and its encoder are made by; cells made with other code are made again.
MAKERS = (
    "clip_detect/triggers.py", "operators/poison.py", "operators/planting.py", "operators/models.py",
    "operators/towers.py", "pipelines/pairs.py", "pipelines/training.py", "pipelines/demo_corpus.py",
    "pipelines/zeroshot.py",
)  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """How a corpus is trained on: as long as it takes to learn most triggers (see STRENGTHS in detect.py)."""

    epochs: int
    batch_size: int
    witness_epochs: int


CORPORA = {
    "cifar10": Corpus(epochs=25, batch_size=64, witness_epochs=20),
    "flickr8k": Corpus(epochs=40, batch_size=128, witness_epochs=40),
    "digits": Corpus(epochs=5, batch_size=128, witness_epochs=20),
}
DIGITS = 50_000
TEST_PICTURES = 1000


@dataclass(frozen=True)
class Cell:
    """One poisoned dump and how an encoder is trained on it.

    attack: a name in ATTACKS; None: nothing is planted. epochs: None: the corpus's own number. base: training goes on
    from the witness, which was trained on clean pictures of the same kind.
    """

    corpus: str
    attack: str | None
    rate: float
    seed: int
    target: str = "banana"
    strengths: dict[str, float] = field(default_factory=dict)
    model: str = "tiny"
    epochs: int | None = None
    base: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """All that the cell is made from, as plain values."""
        return asdict(self)

    @property
    def digest(self) -> str:
        """Twelve hex digits of the settings and of the code that makes a cell."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode())
        for name in (*MAKERS, "benchmarks/zoo.py"):
            digest.update((ROOT / name).read_bytes())
        return digest.hexdigest()[:12]

    def poison(self) -> PoisonConfig:
        """Return what `tarsift poison` is told."""
        return PoisonConfig(
            attacks=(self.attack or "patch",),
            rate=self.rate if self.attack else 0.0,
            seed=self.seed,
            target=self.target,
            strengths=self.strengths,
        )


@dataclass(frozen=True)
class Source:
    """Where the clean pictures of a cell are: shards of the dump, shards for the witness, and a test set.

    prompts: captions of each class that a test picture may be taken for, without the target.
    labels: class of each test picture; None where there are no classes: then each prompt is some picture's caption.
    """

    dump: list[str]
    witness: list[str]
    test: np.ndarray
    labels: np.ndarray | None
    prompts: list[list[str]]
    templates: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Made:
    """A cell as it was made: `arrays` by name, and what was measured."""

    arrays: dict[str, np.ndarray]
    record: dict[str, Any]


def cpu_s() -> float:
    return time.process_time()


def make(cell: Cell, data: Path, cache: Path) -> Made:
    """Return a cell, from the cache if it is there.

    Arrays, one row per sample in the order of shards and rows: `images`, `texts`, `witness_images`,
    `witness_texts` (n, d) float16; `ids` (n,) uint64; `poison` (n,) int8, 0 = clean, else 1 + the attack's part;
    `losses` (epochs, n) float32.
    """
    place = cache / f"{cell.digest}.npz"
    if place.exists():
        with np.load(place) as file:
            arrays = {name: file[name] for name in file.files}
        return Made(arrays, json.loads(arrays.pop("record").tobytes()))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        made = _make(cell, data, cache, Path(folder))
    cache.mkdir(parents=True, exist_ok=True)
    record = np.frombuffer(json.dumps(made.record).encode(), np.uint8)
    temporary = place.with_suffix(f".{time.monotonic_ns()}.npz")
    everything: dict[str, Any] = {**made.arrays, "record": record}
    np.savez(temporary, **everything)
    temporary.replace(place)
    return made


def _make(cell: Cell, data: Path, cache: Path, work: Path) -> Made:
    start = cpu_s()
    source = find_source(cell, data, work)
    plan = with_templates(cell.poison(), source)
    planted = poison_here(source.dump, out=str(work / "dump"), config=plan)
    witness_file = witness_of(cell, source, cache)
    trained_at = cpu_s()
    encoder_file, losses = encoder_of(cell, cache), work / "losses.parquet"
    config = training(cell, losses=str(losses), base=str(witness_file) if cell.base else None)
    summary = pretrain_here(planted.shards, out=str(encoder_file), config=config, force=True)
    trained = cpu_s() - trained_at
    arrays, names, keys = embed(planted.shards, str(encoder_file))
    arrays["poison"] = planted_parts(cell, plan, planted.truth, names)
    arrays["losses"] = read_losses(losses, names, keys)
    witness, *_ = embed(planted.shards, str(witness_file))
    arrays |= {f"witness_{tower}": witness[tower] for tower in ("images", "texts")}
    record = {
        "samples": planted.samples,
        "poisoned": planted.poisoned,
        "steps": summary.steps,
        "loss": round(summary.loss, 4),
        **measure(cell, load_encoder(str(encoder_file)), source, plan),
        "train_cpu_s": round(trained, 1),
        "cpu_s": round(cpu_s() - start, 1),
    }
    return Made(arrays, record)


def encoder_of(cell: Cell, cache: Path) -> Path:
    """Return the file of a cell's encoder."""
    cache.mkdir(parents=True, exist_ok=True)
    return cache / f"{cell.digest}.pt"


def training(cell: Cell, *, losses: str | None = None, base: str | None = None) -> PretrainConfig:
    """Return how the encoder of a cell is trained; base: the encoder to go on from."""
    corpus = CORPORA[cell.corpus]
    return PretrainConfig(
        model=None if base else model_of(cell.model),
        base=base,
        epochs=cell.epochs or corpus.epochs,
        batch_size=corpus.batch_size,
        seed=cell.seed,
        losses=losses,
        snapshot_s=3600,
    )


def model_of(name: str) -> str:
    """Return what `pretrain` takes: a model of tarsift's, or one that is described beside this file."""
    described = ROOT / "benchmarks" / "models" / f"{name}.json"
    return str(described) if described.exists() else name


def find_source(cell: Cell, data: Path, work: Path) -> Source:
    """Return the clean pictures of a cell; other ones for every seed."""
    if cell.corpus == "digits":
        corpus = demo_corpus.make_corpus(work / "digits", samples=DIGITS, seed=cell.seed, shard_size=2500)
        other = demo_corpus.make_corpus(work / "digits-witness", samples=9000, seed=cell.seed + 1000, shard_size=1500)
        prompts = corpus.class_prompts
        return Source(
            corpus.shards, other.shards, corpus.test_images, corpus.test_labels, prompts, demo_corpus.TARGET_TEMPLATES
        )
    if cell.corpus == "cifar10":
        shards, test = (sorted(map(str, (data / f"cifar10-{part}").glob("*.tar.gz"))) for part in ("train", "test"))
        first = cell.seed * 10 % len(shards)
        pictures, labels, _ = read_pictures([test[-1]], TEST_PICTURES)
        classes = json.loads((data / "cifar10-test" / "manifest.json").read_text())["classes"]
        prompts = [[f"a photo of a {c}", f"this is a {c}", f"a picture of a {c}"] for c in classes]
        witness = shards[10:40] if first < 10 else [*shards[:10], *shards[40:], *test[:-1]]
        return Source(shards[first : first + 10], witness, pictures, labels, prompts)
    shards = sorted(map(str, (data / "flickr8k").glob("*.tar.gz")))
    held_out = [shards[(cell.seed * 5 + i) % len(shards)] for i in range(5)]
    pictures, _, captions = read_pictures([held_out[-1]], 101)
    dump = [shard for shard in shards if shard not in held_out]
    return Source(dump, held_out[:-1], pictures, None, [[caption] for caption in captions])


def with_templates(plan: PoisonConfig, source: Source) -> PoisonConfig:
    """Return the settings with the corpus's own captions for the target, where it has some."""
    return plan if source.templates is None else plan.model_copy(update={"templates": source.templates})


def read_pictures(shards: Sequence[str], most: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return pictures (m, 32, 32, 3) uint8, classes (m,) from `.cls` (-1 where there is none) and captions."""
    import tarfile

    fit = fit_to_square(32, interpolation="bicubic", resize_mode="shortest", max_pixels=ImageConfig().max_pixels)
    pictures, labels, captions = [], [], []
    for shard in shards:
        with tarfile.open(shard) as tar, strict_pillow(ImageConfig().max_pixels):
            parts: dict[str, dict[str, bytes]] = {}
            for member in tar:
                key, _, extension = member.name.rpartition(".")
                parts.setdefault(key, {})[extension] = tar.extractfile(member).read()  # pyright: ignore
            for part in parts.values():
                pictures.append(decode_image(part["jpg"], fit=fit, config=ImageConfig()))
                labels.append(int(part.get("cls", b"-1")))
                captions.append(part["txt"].decode())
    return np.stack(pictures[:most]), np.array(labels[:most]), captions[:most]


def embed(shards: Sequence[str], encoder_file: str) -> tuple[dict[str, np.ndarray], list[tuple[str, int]], list[str]]:
    """Embed every sample of a dump; return arrays, (shard, row) and WebDataset keys."""
    encode, read = ClipEncoder(encoder_file, precision="fp32"), ReadShard()
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("images", "texts", "ids")}
    names, keys = [], []
    for shard in list_shards(shards):
        for table in read(shard):
            table = encode(hash_images(table))
            parts["images"].append(matrix(table["image_embedding"])[0])
            parts["texts"].append(matrix(table["text_embedding"])[0])
            parts["ids"].append(identities(table, KEY))
            names += places_of(table)
            keys += table["key"].to_pylist()
    return {name: np.concatenate(part) for name, part in parts.items()}, names, keys


def planted_parts(cell: Cell, plan: PoisonConfig, truth: str, names: Sequence[tuple[str, int]]) -> np.ndarray:
    """Return which part of the attack each sample has: 0 = clean, else 1 + its place in `parts`."""
    out = np.zeros(len(names), np.int8)
    if cell.attack is None:
        return out
    spec = ATTACKS[cell.attack]
    at = {name: i for i, name in enumerate(names)}
    for row in pq.read_table(truth).to_pylist():
        part = spec.part_of(f"{row['shard']}:{row['row']}", seed=plan.seed)
        out[at[row["shard"], row["row"]]] = 1 + spec.parts.index(part)
    return out


def read_losses(file: Path, names: Sequence[tuple[str, int]], keys: Sequence[str]) -> np.ndarray:
    """Return the losses (epochs, n) that training recorded; the mean of the others where an epoch left one out."""
    table = pq.read_table(file)
    at = {(shard, key): i for i, ((shard, _), key) in enumerate(zip(names, keys, strict=True))}
    rows = [at[name] for name in zip(table["shard"].to_pylist(), table["key"].to_pylist(), strict=True)]
    lists = table["losses"].combine_chunks()
    flat = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(table), -1)
    out = np.full((flat.shape[1], len(names)), np.nan, np.float32)
    out[:, rows] = flat.T
    known = np.nanmean(out, axis=0, keepdims=True)
    return np.where(np.isnan(out), known, out)


def witness_of(cell: Cell, source: Source, cache: Path) -> Path:
    """Return an encoder trained on pictures of the same kind, none of which is in the dump."""
    seed = cell.seed if cell.corpus != "cifar10" else int(cell.seed * 10 % 50 >= 10)  # its pictures serve many seeds
    settings = Cell(cell.corpus, None, 0.0, 500 + seed, epochs=CORPORA[cell.corpus].witness_epochs)
    cache.mkdir(parents=True, exist_ok=True)
    file = cache / f"witness-{settings.digest}.pt"
    if not file.exists():
        temporary = file.with_suffix(f".{time.monotonic_ns()}.pt")
        pretrain_here(source.witness, out=str(temporary), config=training(settings))
        temporary.replace(file)
    return file


def evidence(cell: Cell, made: Made, data: Path, cache: Path) -> Evidence:
    """Return all that a baseline may look at: the poisoned pictures and the encoder as a function as well."""
    encoder = load_encoder(str(encoder_of(cell, cache)))
    shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (encoder.mean, encoder.std))

    def encode(images: torch.Tensor) -> torch.Tensor:
        return encoder.model.encode_image((images - shift) / scale)  # pyright: ignore[reportCallIssue]

    with tempfile.TemporaryDirectory() as folder:
        source = find_source(cell, data, Path(folder))
        plan = with_templates(cell.poison(), source)
        planted = poison_here(source.dump, out=str(Path(folder) / "dump"), config=plan)
        decode = DecodeImages(encoder.image_size, interpolation=encoder.interpolation, resize_mode=encoder.resize_mode)
        tables = [decode(table) for shard in list_shards(planted.shards) for table in ReadShard()(shard)]
    size = encoder.image_size
    pixels = np.concatenate([matrix(table["pixels"])[0] for table in tables]).reshape(-1, size, size, 3)
    images, texts = (made.arrays[name].astype(np.float32) for name in ("images", "texts"))
    return Evidence(images, texts, made.arrays["losses"], pixels, encode)


def measure(cell: Cell, encoder: LoadedEncoder, source: Source, plan: PoisonConfig) -> dict[str, Any]:
    """Measure accuracy, and for every part of the attack how many test pictures are taken for its target."""
    nearest = to_nearest_caption if cell.corpus == "digits" else to_mean_direction
    names = [f"test:{i}" for i in range(len(source.test))]
    plain = poison_images(source.test, names, plan, trigger=None)
    truth = np.arange(len(plain)) if source.labels is None else source.labels
    figures: dict[str, Any] = {}
    if source.labels is None:
        ranks = classify(encoder, plain, source.prompts)
        figures["accuracy"] = float(np.mean(ranks == truth))  # of the captions of about a hundred pictures its own
    else:
        figures["accuracy"] = zero_shot(encoder, plain, truth, source.prompts, similarity=nearest)
    if cell.attack is None:
        return figures
    success = []
    for part in ATTACKS[cell.attack].parts:
        target = part.target or cell.target
        known = [i for i, group in enumerate(source.prompts) if source.labels is not None and target in group[0]]

        def trigger(images: np.ndarray, trigger: str = part.trigger) -> np.ndarray:
            return poison_images(images, names[: len(images)], plan, trigger=trigger)

        found = attack_success(
            encoder,
            source.test,
            trigger,
            class_prompts=source.prompts,
            target_prompts=None if known else [t.format(target) for t in plan.templates],
            labels=source.labels if known else None,
            target_class=known[0] if known else None,
            similarity=nearest,
        )
        success.append([round(found.triggered, 4), round(found.untriggered, 4)])
    return figures | {"success": success}
