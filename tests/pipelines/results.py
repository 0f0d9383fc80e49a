"""Result folders for tests: real shards of small pictures, and the tables that the passes would have written."""

import gzip
import hashlib
import io
import json
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

DIMENSION = 16


def picture(colour: tuple[int, int, int], size: int = 32) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(sink, "JPEG", quality=95)
    return sink.getvalue()


def direction(seed: int, *, near: np.ndarray | None = None, noise: float = 0.02) -> np.ndarray:
    """A random embedding, or one close to `near`."""
    rng = np.random.default_rng(seed)
    drawn = rng.normal(size=DIMENSION)
    return drawn if near is None else near / np.linalg.norm(near) + noise * drawn


@dataclass
class Sample:
    """A sample and what the passes made of it; `score` None = not scored."""

    caption: str | None
    score: float | None
    embedding: np.ndarray = field(default_factory=lambda: np.ones(DIMENSION))
    text: np.ndarray | None = None
    picture: bytes = field(default_factory=lambda: picture((90, 120, 150)))
    flagged: bool = False
    error: str | None = None
    copies: int = 1
    uid: str | None = None

    @property
    def home(self) -> str:
        return "errored" if self.error else ("removed" if self.flagged else "clean")


@dataclass
class Result:
    """Where the pieces of a made-up run lie."""

    out: Path
    shards: dict[str, Path]
    run: dict

    def save_run(self) -> None:
        (self.out / "run.json").write_text(json.dumps(self.run))


def make_result(root: Path, shards: dict[str, list[Sample]], *, compressed: tuple[str, ...] = ()) -> Result:
    """Write shards, embeddings, scores, flags and run.json below `root`."""
    out, paths = root / "out", {}
    for name, samples in shards.items():
        archive, offsets = tar_of(samples)
        path = root / "in" / f"{name}.tar{'.gz' if name in compressed else ''}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(archive, mtime=0) if name in compressed else archive)
        paths[name] = path
        for folder, table in tables_of(name, samples, offsets).items():
            target = out / folder / f"{name}.parquet"
            target.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, target)
    everything = [s for samples in shards.values() for s in samples]
    homes = Counter(s.home for s in everything)
    cutoff = min((s.score for s in everything if s.flagged and s.score is not None), default=None)
    run = {
        "tarsift": "0.1.0",
        "schema_version": 1,
        "created": "2026-01-02T03:04:05+00:00",
        "config": {"flag": {"policy": "fraction", "value": 0.05}},
        "inputs": [{"name": n, "url": str(p), "size": p.stat().st_size} for n, p in paths.items()],
        "versions": {"pyarrow": pa.__version__},
        "encoders": {
            "detect": {
                "name": "tiny",
                "spec": "enc.pt",
                "weights_sha256": "ab" * 32,
                "embed_dim": DIMENSION,
                "image_size": 32,
                "regime": {
                    "code": "trained_on_this_dump",
                    "share": 1.0,
                    "sentence": "The encoder was trained on this dump.",
                    "blind_to": "poison that it has not learned.",
                },
            }
        },
        "reference": {"rows": 64, "candidates": 80, "largest_rate": 0.05, "coverage": "Up to 5 % is covered."},
        "threshold": {"policy": "fraction", "score": "suspicion", "value": 0.05, "cutoff": cutoff},
        "passes": {"embed.detect": {"shards": len(shards), "samples": 9, "elapsed_s": 3.0, "samples_per_s": 3.0}},
        "counts": {
            "read": len(everything),
            "kept": homes["clean"],
            "removed": homes["removed"],
            "errored": homes["errored"],
            "errors": dict(Counter(s.error for s in everything if s.error)),
            "shard_problems": {},
        },
    }
    result = Result(out, paths, run)
    out.mkdir(parents=True, exist_ok=True)
    result.save_run()
    return result


def tar_of(samples: list[Sample]) -> tuple[bytes, list[tuple[int, int]]]:
    """Return an archive of the samples, and offset and size of each image in it."""
    sink, offsets = io.BytesIO(), []
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for i, sample in enumerate(samples):
            for extension, data in (
                ("jpg", sample.picture),
                ("txt", (sample.caption or "").encode("utf-8", "replace")),
            ):
                member = tarfile.TarInfo(f"{i:05d}.{extension}")
                member.size = len(data)
                if extension == "jpg":
                    offsets.append((tar.offset + 512, len(data)))
                tar.addfile(member, io.BytesIO(data))
    return sink.getvalue(), offsets


def tables_of(name: str, samples: list[Sample], offsets: list[tuple[int, int]]) -> dict[str, pa.Table]:
    """Return the tables of one shard by folder; a shard without samples has `shard` and `row` alone."""
    base = {
        "shard": pa.array([name] * len(samples), pa.string()),
        "row": pa.array(range(len(samples)), pa.int32()),
    }
    folders = ("embeddings/detect", "scores", "flags")
    if not samples:
        return {folder: pa.table(base) for folder in folders}
    digests = pa.array([hashlib.sha256(s.picture).digest() for s in samples], pa.binary(32))
    scores = [s.score for s in samples]
    errors = pa.array([s.error for s in samples], pa.string())
    base |= {
        "key": pa.array([f"{i:05d}" for i in range(len(samples))]),
        "uid": pa.array([s.uid or f"{name}/{i:05d}" for i, s in enumerate(samples)]),
    }
    embeddings = base | {
        "image_offset": pa.array([at for at, _ in offsets], pa.int64()),
        "image_size": pa.array([size for _, size in offsets], pa.int64()),
        "caption": pa.array([s.caption for s in samples], pa.string()),
        "error": errors,
        "image_sha256": digests,
        "image_embedding": vectors([None if s.score is None else s.embedding for s in samples]),
        "text_embedding": vectors(
            [None if s.caption is None else (s.embedding if s.text is None else s.text) for s in samples]
        ),
    }
    scored = base | {
        "image_sha256": digests,
        "duplicate_count": pa.array([s.copies for s in samples], pa.int32()),
        "clip_similarity": pa.array([None if s is None else 0.5 - s / 100 for s in scores], pa.float32()),
        "image_norm": pa.array([None if s is None else 1.0 for s in scores], pa.float32()),
        "k_distance_k16": pa.array([None if s is None else 1 + s / 50 for s in scores], pa.float32()),
        "slof_k16": pa.array(
            [None if s is None else (i * 7919) % 101 / 101 for i, s in enumerate(scores)], pa.float32()
        ),
        "multiscale_slof": pa.array(scores, pa.float32()),
        "density": pa.array(scores, pa.float32()),
        "suspicion": pa.array(scores, pa.float32()),
        "error": errors,
    }
    flags = base | {
        "flagged": pa.array([s.flagged for s in samples]),
        "reasons": pa.array([["suspicion"] if s.flagged else [] for s in samples], pa.list_(pa.string())),
        "home": pa.array([s.home for s in samples]),
    }
    return {folder: pa.table(columns) for folder, columns in zip(folders, (embeddings, scored, flags), strict=True)}


def vectors(rows: list[np.ndarray | None]) -> pa.FixedSizeListArray:
    values = np.stack([np.zeros(DIMENSION) if r is None else r for r in rows]).astype(np.float16)
    mask = pa.array([r is None for r in rows])
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), DIMENSION, mask=mask)


def campaign(*, clean: int = 150, planted: int = 12) -> dict[str, list[Sample]]:
    """Two shards: random samples with low scores, and planted ones that lie close together and are flagged."""
    centre, text = direction(1), direction(2)
    shards: dict[str, list[Sample]] = {}
    for s, name in enumerate(("a/00000", "b/00001")):
        samples = [
            Sample(
                caption=f"a photo of thing {i % 50} in place {(i * 13 + s) % 40}",
                score=i / clean,
                embedding=direction(1000 * s + i + 10),
                picture=picture((i % 256, (i * 3) % 256, 100 + 50 * s)),
            )
            for i in range(clean)
        ]
        for i in range(planted // 2):
            samples.insert(
                5 + 9 * i,
                Sample(
                    caption=f"a ripe banana, lot {i % 3}",
                    score=4 + i / 10 + s / 100,
                    embedding=direction(5000 + 100 * s + i, near=centre),
                    text=direction(7000 + 100 * s + i, near=text),
                    picture=picture((250, 220, 10 + 100 * s + 15 * (i % 6))),
                    flagged=True,
                ),
            )
        shards[name] = samples
    return shards
