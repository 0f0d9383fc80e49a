"""What the embed pass costs beside a bare loop: samples per CPU-second and per second, side by side.

Four contenders do the same work on the same shards (read, SHA-256, decode, resize, both towers,
Parquet): a bare loop in one process, two of them side by side (a busy machine's CPU-second does
less than an idle one's), webdataset with a DataLoader, and tarsift's embed pass on Ray Data. CPU
seconds are user + system of a contender's process and of all below it, Ray's own daemons included,
looked up in /proc ten times a second. In one process a contender embeds the first `--warm` samples,
which shows start-up, then the first `--skip` and then all of them: the difference of these two is
the steady state, in which what every pass starts anew cancels out. Contenders take turns.

    python benchmarks/encode.py --json benchmarks/results/encode.json

The bars: tarsift at 0.9 of the bare loop's samples per CPU-second or more with the light encoder
`tiny`, and at 0.97 or more with RN50. Weights are random: they cost what trained ones do.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import webdataset as wds
from measuring import CpuMeter, hardware, write_shards
from PIL import Image

from tarsift.operators.decoding import ImageConfig, decode_image, fit_to_square, strict_pillow
from tarsift.operators.encoder_settings import EncoderConfig
from tarsift.operators.models import LoadedEncoder, build_model, load_encoder, model_config, save_checkpoint
from tarsift.operators.schema import fixed_size_list
from tarsift.operators.shards import ReadShard, list_shards
from tarsift.operators.towers import cosines, encode_captions, encode_images, norms
from tarsift.pipelines.commit import ROW_GROUP_ROWS, parquet_options

MICRO_BATCH = 64
BARS = {"tiny": 0.9, "RN50": 0.97}
WORKERS = 2


class Setup(NamedTuple):
    """What a contender encodes with; batch and actors are tarsift's alone."""

    spec: str
    batch: int
    actors: int


# Samples to warm up with (enough to start every worker that Ray will use), samples left out, samples in all; RN50
# on a CPU takes a fifth of a second for one.
PLANS = {"tiny": (43_008, 2_048, 43_008), "RN50": (512, 128, 1_024)}
# Batch and actors: as many as keep two CPUs busy. One actor of `tiny` waits for its readers, RN50 is all the work.
SIZES = {"tiny": (512, 1), "RN50": (64, 2)}


def waves(samples: int, *, side: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield procedural JPEGs with a caption each; 200 pictures take turns, no two captions are equal."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:side, 0:side] / side
    pictures = []
    for _ in range(min(200, samples)):
        f = rng.uniform(2, 30, (3, 2))
        smooth = np.stack([np.sin(a * x + b * y) for a, b in f], -1) * 90 + 128
        noise = np.asarray(Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).resize((side, side)))
        buffer = io.BytesIO()
        Image.fromarray((0.6 * smooth + 0.4 * noise).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        pictures.append(buffer.getvalue())
    for i in range(samples):
        caption = f"a photo of {i % 97} things, {i} of them seen from the side of number {i * 7919 % 1009}"
        yield pictures[i % len(pictures)], caption.encode()


class Decode:
    """Image bytes to pixels; the one decoder that all contenders use."""

    def __init__(self, encoder: LoadedEncoder) -> None:
        self.config = ImageConfig()
        self.fit = fit_to_square(
            encoder.image_size,
            interpolation=encoder.interpolation,
            resize_mode=encoder.resize_mode,
            max_pixels=self.config.max_pixels,
        )

    def __call__(self, image: bytes) -> np.ndarray:
        return decode_image(image, fit=self.fit, config=self.config)


def embedded(encoder: LoadedEncoder, pixels: np.ndarray, captions: list[str]) -> dict[str, pa.Array]:
    """Encode a batch and return the columns of it that are written."""
    image = encode_images(encoder, pixels, micro_batch=MICRO_BATCH).astype(np.float16)
    text = encode_captions(encoder, captions, micro_batch=MICRO_BATCH).astype(np.float16)
    return {
        "caption": pa.array(captions),
        "image_embedding": fixed_size_list(image),
        "image_norm": pa.array(norms(image)),
        "text_embedding": fixed_size_list(text),
        "clip_similarity": pa.array(cosines(image, text)),
    }


def write_table(table: pa.Table, path: Path) -> None:
    """Write Parquet with the options that tarsift uses."""
    pq.write_table(table, path, row_group_size=ROW_GROUP_ROWS, **parquet_options(table.schema))


def place(spec: str) -> LoadedEncoder:
    torch.set_num_threads(1)
    encoder = load_encoder(spec)
    encoder.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return encoder


class Cost(NamedTuple):
    """What embedding so many samples took."""

    cpu_s: float
    wall_s: float
    samples: int


def run_bare(shards: Sequence[str], out: Path, setup: Setup) -> int:
    """Embed shards in one process and one loop."""
    encoder = place(setup.spec)
    decode, samples = Decode(encoder), 0
    with strict_pillow(ImageConfig().max_pixels):
        for shard in list_shards(list(shards)):
            tables = []
            for table in ReadShard()(shard):
                images = table["image"].to_pylist()
                digests = [hashlib.sha256(image).digest() for image in images]
                pixels = np.stack([decode(image) for image in images])
                columns = embedded(encoder, pixels, table["caption"].to_pylist())
                for name in ("shard", "row", "key", "uid", "image_offset", "image_size", "error"):
                    columns[name] = table[name]
                tables.append(pa.table({**columns, "image_sha256": pa.array(digests, pa.binary(32))}))
                samples += len(images)
            write_table(pa.concat_tables(tables), out / f"{shard.name}.parquet")
    return samples


def run_pair(shards: Sequence[str], out: Path, setup: Setup) -> int:
    """Embed shards with two bare loops side by side, each with half of them, in processes that stay."""
    futures = [pair().submit(run_bare, shards[half::2], out, setup) for half in range(2)]
    return sum(future.result() for future in futures)


@functools.cache
def pair() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"))


class Prepare:
    """What a DataLoader worker does to a sample."""

    def __init__(self, decode: Decode) -> None:
        self.decode = decode

    def __call__(self, sample: dict[str, Any]) -> tuple[str, str, str, bytes, int, np.ndarray]:
        image = sample["jpg"]
        with strict_pillow(self.decode.config.max_pixels):
            pixels = self.decode(image)
        shard, caption = Path(sample["__url__"]).stem, sample["txt"].decode()
        return shard, sample["__key__"], caption, hashlib.sha256(image).digest(), len(image), pixels


def run_webdataset(shards: Sequence[str], out: Path, setup: Setup) -> int:
    """Embed shards as webdataset and a DataLoader would have it: workers decode, this process encodes."""
    encoder = place(setup.spec)
    stream = wds.WebDataset(list(shards), shardshuffle=False).map(Prepare(Decode(encoder))).batched(256)  # pyright: ignore[reportAttributeAccessIssue]
    loader = wds.WebLoader(stream, batch_size=None, num_workers=WORKERS)  # pyright: ignore[reportAttributeAccessIssue]
    tables: dict[str, list[pa.Table]] = {}
    samples = 0
    for shard, key, caption, digest, size, pixels in loader:
        columns = embedded(encoder, np.asarray(pixels), list(caption))
        columns |= {"shard": pa.array(shard), "key": pa.array(key), "image_size": pa.array(np.asarray(size))}
        table = pa.table({**columns, "image_sha256": pa.array(list(digest), pa.binary(32))})
        tables.setdefault(shard[0], []).append(table)  # each shard has one worker, and batches that mix two are rare
        samples += len(key)
    for name, parts in tables.items():
        write_table(pa.concat_tables(parts), out / f"{name}.parquet")
    return samples


def run_tarsift(shards: Sequence[str], out: Path, setup: Setup) -> int:
    """Embed shards with the embed pass on Ray Data, in the session that is there."""
    from tarsift.pipelines.config import CleanConfig, ResourcesConfig
    from tarsift.pipelines.embed import embed

    encoder = EncoderConfig(spec=setup.spec, micro_batch=MICRO_BATCH)
    resources = ResourcesConfig(batch_size=setup.batch, workers=setup.actors)
    config = CleanConfig(encoders={"detect": encoder}, resources=resources)
    embed(list(shards), str(out), config=config)
    return sum(pq.read_metadata(file).num_rows for file in (out / "embeddings" / "detect").glob("*.parquet"))


CONTENDERS: dict[str, Callable[[Sequence[str], Path, Setup], int]] = {
    "bare": run_bare,
    "pair": run_pair,
    "webdataset": run_webdataset,
    "tarsift": run_tarsift,
}


def run_alone(contender: str, jobs: Sequence[Sequence[str]], setup: Setup) -> None:
    """Run a contender on one list of shards after the other in this process; print the samples of each."""
    with ExitStack() as stack:
        if contender == "tarsift":
            from tarsift.pipelines.session import session

            stack.enter_context(session())
        for shards in jobs:
            with tempfile.TemporaryDirectory() as out:
                print(SAMPLES, CONTENDERS[contender](shards, Path(out), setup), flush=True)


def measure(contender: str, jobs: Sequence[Sequence[str]], setup: Setup) -> list[Cost]:
    """Do `run_alone` in a process of its own, watched from here; what the watching takes is not counted."""
    request = json.dumps({"contender": contender, "jobs": jobs, "setup": setup})
    command = [sys.executable, str(Path(__file__).resolve()), "--one", request]
    costs = []
    cpu_s, since = 0.0, time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, CpuMeter(process.pid) as meter:
        assert process.stdout
        for line in process.stdout:
            if line.startswith(SAMPLES):
                cpu_now, now = meter.seconds(), time.monotonic()
                costs.append(Cost(cpu_now - cpu_s, now - since, int(line.split()[1])))
                cpu_s, since = cpu_now, now
    if process.returncode:
        raise RuntimeError(f"{contender} ended with {process.returncode}.")
    return costs


SAMPLES = "samples:"


def compare(
    name: str, folder: Path, *, warm: int, skip: int, samples: int, side: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """Yield one record per contender and repeat: start-up with the first `warm` samples, and the steady state.

    Raises:
        RuntimeError: if a contender did not embed every sample.
    """
    shards = [str(path) for path in write_shards(folder / "shards", waves(samples, side=side), per_shard=skip // 2)]
    spec = str(folder / "enc.pt")
    setup = Setup(spec, *SIZES[name])
    save_checkpoint(spec, build_model(name, seed=0), config=model_config(name), shards={}, steps=0, samples=0, seed=0)
    for repeat in range(repeats):
        for contender in CONTENDERS:
            jobs = [shards[: 2 * warm // skip], shards[:2], shards]  # a shard holds half of `skip`
            first, short, whole = measure(contender, jobs, setup)
            if (first.samples, short.samples, whole.samples) != (warm, skip, samples):
                raise RuntimeError(f"{contender} embedded {short.samples} and {whole.samples} of {skip} and {samples}.")
            yield {
                "encoder": name,
                "contender": contender,
                "repeat": repeat,
                "image_side": side,
                "first": first._asdict(),
                "short": short._asdict(),
                "whole": whole._asdict(),
                "samples_per_cpu_s": (samples - skip) / (whole.cpu_s - short.cpu_s),
                "samples_per_s": (samples - skip) / (whole.wall_s - short.wall_s),
            }


def summarise(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, per encoder, the medians of every contender and their share of the bare loop's."""
    rows = []
    for name in dict.fromkeys(r["encoder"] for r in records):
        medians = {
            contender: {
                key: statistics.median(r[key] for r in records if (r["encoder"], r["contender"]) == (name, contender))
                for key in ("samples_per_cpu_s", "samples_per_s")
            }
            for contender in CONTENDERS
        }
        for contender, median in medians.items():
            share, beside = (median["samples_per_cpu_s"] / medians[n]["samples_per_cpu_s"] for n in ("bare", "pair"))
            row = {"encoder": name, "contender": contender, **median}
            row |= {"of_bare_loop_per_cpu_s": share, "of_two_bare_loops_per_cpu_s": beside}
            rows.append(row | ({"bar": BARS[name], "met": share >= BARS[name]} if contender == "tarsift" else {}))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", action="append", choices=BARS, help="default: all of them")
    parser.add_argument("--warm", type=int, help="samples to warm up with, a multiple of --skip")
    parser.add_argument("--skip", type=int, help="samples left out of the steady state, an even number")
    parser.add_argument("--samples", type=int, help="samples in all")
    parser.add_argument("--side", type=int, default=256, help="pixels along the side of the JPEGs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for hardware, every run, and the summary")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one = json.loads(args.one)
        run_alone(one["contender"], one["jobs"], Setup(*one["setup"]))
        return
    records = []
    for name in args.encoder or BARS:
        warm, skip, samples = (
            given or planned for given, planned in zip((args.warm, args.skip, args.samples), PLANS[name], strict=True)
        )
        sizes = {"warm": warm, "skip": skip, "samples": samples, "side": args.side}
        with tempfile.TemporaryDirectory() as folder:
            for record in compare(name, Path(folder), **sizes, repeats=args.repeats):
                records.append(record)
                print(json.dumps(record), flush=True)
    summary = summarise(records)
    for row in summary:
        print(json.dumps(row))
    if args.json:
        content = {"hardware": hardware(torch, np, pa, wds), "summary": summary, "runs": records}
        args.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
