"""What a run needs, from numbers to numbers: CPU and GPU time, memory, object store, room for results.

Each constant says where it is from: *measured* (benchmarks/RESULTS.md, two cores of an AMD EPYC unless said otherwise),
*printed* (a vendor's or publisher's data sheet), *code* (a default of tarsift or Ray) or *assumed*. No GPU has been
measured: GPU time is a printed rate times an assumed utilisation, and decides nothing but how many GPUs to try first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

GB = 1e9

# Measured: whole runs of `clean`, seconds of the fastest and the slowest ("Memory": shards of 1,000, 128-pixel JPEGs,
# encoder `tiny` at width 512 of both towers, two cores, other work beside it).
MEASURED_CPUS = 2
SMALL_RUN, SMALL_RUN_S = 20_000, (95.0, 106.0)
LARGE_RUN, LARGE_RUN_S = 200_000, (510.0, 746.0)
MEASURED_WIDTH = 512
# What is left of the small run at the rate of the two fastest: what any run takes on these two cores.
BEGIN_S = SMALL_RUN_S[0] - SMALL_RUN * (LARGE_RUN_S[0] - SMALL_RUN_S[0]) / (LARGE_RUN - SMALL_RUN)
# Measured ("Embedding"), CPU seconds of a 256-pixel JPEG: reading, hashing and decoding it; and the driver's share.
READ_CPU_S = 0.81e-3
DRIVER_S = 0.03e-3
# Measured ("Scoring"): 30,874 samples/s by two threads, against one reference of 2,048 rows of width 1,024.
SEARCH_CPU_S = MEASURED_CPUS / 30_874
SEARCH_ROWS, SEARCH_WIDTH = 2048, 1024
# Measured ("Embedding", RN50 at 98cd1c0, an Intel Xeon): 4.38 samples per CPU-second, all of the run's processes.
RN50_PER_CPU_S = 4.38

# Measured ("Memory"): the highest peak of all processes of a run on two CPUs with two encoders; of a worker process
# more; of an encoder's process.
RUN_BYTES = 5.3 * GB
WORKER_BYTES = 0.155 * GB
ENCODER_BYTES = 1.0 * GB
# Code: a reader takes half a CPU (`encoding.READ_CPUS`).
WORKERS_PER_CPU = 2
# Assumed: what a process on a GPU holds on the host, for CUDA and its libraries.
GPU_PROCESS_BYTES = 4.0 * GB

# Code: blocks are of 8 MiB (`session.BLOCK_BYTES`), batches of 512 rows (`resources.batch_size`), pixels of 3 bytes.
BLOCK_BYTES = 8 << 20
BATCH_ROWS = 512
# Assumed: batches under way per encoder, blocks per reader; and as much again, so that nothing has to be spilled.
BATCHES_PER_ENCODER, BLOCKS_PER_READER, RESERVE = 4, 4, 2.0

# Assumed: Parquet beside the embeddings, per sample: identity, digest, caption, thirty scores and verdicts.
ROW_BYTES = 500

# Assumed: of a GPU's printed rate, what an encoder that is fed from the object store gets.
UTILISATION = 0.25


@dataclass(frozen=True)
class Encoder:
    """A CLIP: width of its embeddings, pixels of a side, GFLOP of an image and a caption, millions of parameters."""

    width: int
    image_size: int
    gflop: float
    mparams: float


@dataclass(frozen=True)
class Gpu:
    """A GPU: dense fp16 tensor TFLOP/s and GB of memory."""

    tflops: float
    memory_gb: float


@dataclass(frozen=True)
class Cluster:
    """Nodes that are alike: CPUs and GPUs of each, and which GPU."""

    nodes: int
    cpus: int
    gpus: int = 0
    gpu: str | None = None


class Span(NamedTuple):
    """Seconds by the fastest and by the slowest of the measured runs."""

    low: float
    high: float


# Printed: open_clip's docs/model_profile.csv (both towers, context of 77). The measured runs include `tiny`.
ENCODERS = {
    "RN50": Encoder(1024, 224, 18.18, 102.0),
    "RN101": Encoder(512, 224, 25.50, 119.7),
    "ViT-B-32": Encoder(512, 224, 14.78, 151.3),
    "ViT-B-16": Encoder(512, 224, 41.09, 149.6),
    "ViT-L-14": Encoder(768, 224, 175.33, 427.6),
    "ViT-H-14": Encoder(1024, 224, 381.68, 986.1),
}
TINY = Encoder(64, 32, 0.0, 0.0)

# Printed: NVIDIA's data sheets; where they print the rate with sparsity (L4, H100, H200), half of it.
GPUS = {
    "L4": Gpu(121.0, 24.0),
    "A100": Gpu(312.0, 80.0),
    "H100": Gpu(989.0, 80.0),
    "H200": Gpu(989.0, 141.0),
}


def encoder_profile(name: str) -> Encoder | None:
    """Return what is printed of an encoder by its name, `ARCHITECTURE` or `ARCHITECTURE:WEIGHTS`; None if nothing."""
    return ENCODERS.get(name.partition(":")[0].removesuffix("-quickgelu"))


def searched_rows(*, reference_size: int, banks: int, pool_size: int, candidates: int) -> int:
    """Return the rows that each sample is compared with: all references of `suspicion`, whose settings these are."""
    return reference_size * (1 + banks) + 2 * pool_size + candidates


def cpu_seconds(samples: int, *, width: int, searched: int, encoders: int = 1) -> Span:
    """CPU seconds of a whole run, over all CPUs, with encoders that take none: they are `tiny`, or on GPUs.

    Args:
        width: of the embeddings; searching takes time in proportion to it.
        searched: rows that each sample is compared with, see `searched_rows`.
        encoders: how many embed the dump; each reads and decodes all of it.
    """
    search = SEARCH_CPU_S * searched / SEARCH_ROWS / SEARCH_WIDTH * (width - MEASURED_WIDTH)
    more = search + (encoders - 1) * READ_CPU_S
    # The slowest and the fastest slope that the measured runs allow.
    steps = LARGE_RUN - SMALL_RUN
    low = MEASURED_CPUS * (LARGE_RUN_S[0] - SMALL_RUN_S[1]) / steps
    high = MEASURED_CPUS * (LARGE_RUN_S[1] - SMALL_RUN_S[0]) / steps
    return Span(samples * max(low + more, READ_CPU_S), samples * max(high + more, READ_CPU_S))


def encode_cpu_seconds(samples: int, encode_gflop: float) -> float:
    """CPU seconds to encode all samples in fp32, at the rate of RN50; `encode_gflop` of all encoders, per sample."""
    return samples * encode_gflop / (RN50_PER_CPU_S * ENCODERS["RN50"].gflop)


def gpu_seconds(samples: int, encode_gflop: float, gpu: Gpu) -> float:
    """Seconds of one GPU to encode all samples; by an assumed utilisation."""
    return samples * encode_gflop / (gpu.tflops * 1e3 * UTILISATION)


def elapsed_seconds(
    samples: int, cpu: Span, cpus: int, *, encoders: int = 1, gpu_s: float = 0.0, gpus: int = 0
) -> Span:
    """Seconds of a run on so many CPUs and GPUs in all, if its work can be spread over them evenly.

    Encoding on GPUs goes on beside reading, all else follows; the driver is one process. What a run takes however
    small the dump is (measured) is added, the start of nodes is not.
    """
    encode = gpu_s / gpus if gpus else 0.0
    reading = encoders * READ_CPU_S * samples
    low, high = (max(encode, reading / cpus) + (seconds - reading) / cpus for seconds in cpu)
    driver = DRIVER_S * samples
    return Span(BEGIN_S + max(low, driver), BEGIN_S + max(high, driver))


def memory_bytes(cpus: int, *, encoders: int, mparams: float = 0.0, on_gpu: bool = False) -> float:
    """Memory of the processes of one node, its object store left out; it does not grow with the dump (measured).

    Args:
        encoders: encoder actors of the node. mparams: millions of parameters of each, in fp32 on the host.
    """
    more_encoders = max(0, encoders - MEASURED_CPUS)
    total = RUN_BYTES + WORKERS_PER_CPU * max(0, cpus - MEASURED_CPUS) * WORKER_BYTES + more_encoders * ENCODER_BYTES
    return total + encoders * (4e6 * mparams + on_gpu * GPU_PROCESS_BYTES)


def object_store_bytes(cpus: int, *, encoders: int, image_size: int) -> float:
    """Shared memory of one node for Ray's object store: pixels on their way to encoders, blocks of readers."""
    pixels = BATCHES_PER_ENCODER * encoders * BATCH_ROWS * 3 * image_size**2
    return RESERVE * (pixels + WORKERS_PER_CPU * BLOCKS_PER_READER * cpus * BLOCK_BYTES)


def result_bytes(samples: int, embedding_bytes: int) -> float:
    """Bytes of OUT without its shards, which take what the dump takes; `embedding_bytes` of all of a sample's."""
    return samples * (embedding_bytes + ROW_BYTES)
