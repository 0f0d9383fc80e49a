"""Shards to embeddings: read, hash and decode on CPUs, encode in actors, commit shard by shard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from tarsift.operators import storage
from tarsift.operators.encoder_settings import EncoderInfo
from tarsift.operators.errors import ChangedError
from tarsift.operators.shards import Shard, list_shards
from tarsift.operators.sides import FEATURES
from tarsift.pipelines.commit import SINK_CPUS, PassResult, run_pass
from tarsift.pipelines.config import CleanConfig, ResourcesConfig
from tarsift.pipelines.ledger import Ledger, fingerprint, records_of
from tarsift.pipelines.progress import Listener, silent
from tarsift.pipelines.reading import read_pictures, shard_items
from tarsift.pipelines.session import ACTOR_OPTIONS, map_tables, session

# Ray fuses a stage into the one behind it when both ask for the same resources; reading and decoding
# would then run in the encoders' actors. Ray Data keeps a part of the CPUs back for every stage; with these shares
# (and those of the sink) it still runs a reader per CPU beside an actor per CPU.
READ_CPUS = 0.5
ENCODE_CPUS = 0.2
VIEWS = 3  # of the encoder that gives sifters their features
SHARDS_PER_ACTOR = 8  # an actor takes seconds to start; for fewer shards another one is not worth it


def gpu_share(resources: ResourcesConfig) -> float:
    """GPUs of one encoder actor: as asked for, else one where the cluster has any."""
    if resources.gpus_per_worker is not None:
        return resources.gpus_per_worker
    return 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0


def settled(config: CleanConfig) -> CleanConfig:
    """Settle what `auto` means for the encoders on this cluster: embeddings depend on it."""
    gpu = gpu_share(config.resources) > 0
    encoders = {
        role: encoder.settled(gpu=gpu and encoder.device != "cpu", views=VIEWS if role == FEATURES else 0)
        for role, encoder in config.encoders.items()
    }
    return config.model_copy(update={"encoders": encoders})


def encoder_actors(resources: ResourcesConfig, shards: int) -> dict[str, Any]:
    """Choose pool size and resources of the encoder actors from the cluster, the settings and the work there is.

    On CPUs a dump of many shards gets an actor and a reader per CPU, and whichever of the two has more to do
    takes the time: a large encoder nearly all of it, a small one little.
    """
    cluster = ray.cluster_resources()
    gpus, cpus = int(cluster.get("GPU", 0)), int(cluster.get("CPU", 1))
    per_worker = gpu_share(resources)
    if resources.workers is not None:
        workers = resources.workers
    elif per_worker:
        workers = max(1, int(gpus / per_worker))
    else:
        workers = max(1, min(cpus // resources.threads, -(-shards // SHARDS_PER_ACTOR)))
    options: dict[str, Any] = {"compute": ray.data.ActorPoolStrategy(size=workers), **ACTOR_OPTIONS}
    if per_worker:
        return options | {"num_gpus": per_worker}
    # Actors that held every CPU would wait for ever for the tasks that read and write beside them.
    share = max(cpus - READ_CPUS - SINK_CPUS, SINK_CPUS) / workers
    return options | {"num_cpus": min(resources.cpus_per_worker or ENCODE_CPUS, share)}


def embed_fingerprint(config: CleanConfig, role: str, info: EncoderInfo) -> str:
    """Digest of all that an embedding depends on, the weights included."""
    settings = config.result_settings()
    return fingerprint("embed", settings["read"], settings["images"], settings["encoders"][role], info.weights_sha256)


def refuse_other_weights(ledger: Ledger, info: EncoderInfo) -> None:
    """Refuse to go on with other weights under the same name; the settings of the two runs agree.

    Raises:
        ChangedError: if all that is embedded was embedded by others.
    """
    records = records_of(ledger.out, ledger.name)
    if records and all(record["fingerprint"] != ledger.fingerprint for record in records):
        raise ChangedError(
            f"{ledger.out} was embedded by other weights than {info.name} holds now ({info.weights_sha256[:12]}): "
            "put the earlier ones back, or give another --out."
        )


def embed_pass(
    shards: Sequence[Shard],
    out: str,
    config: CleanConfig,
    role: str = "detect",
    *,
    replace: bool = False,
    progress: Listener = silent,
) -> tuple[PassResult, Ledger, EncoderInfo]:
    """Embed all shards that are not committed yet under `out`/embeddings/`role`; `config` is `settled`.

    Raises:
        ChangedError: if they were embedded by other weights, unless these are to `replace` them.
    """
    # Loading open_clip takes many seconds, and most commands that import this module do not encode.
    from tarsift.operators.encoder import ClipEncoder, encoder_info

    encoder = config.encoders[role].model_copy(update={"threads": config.resources.threads})
    info = encoder_info(encoder.spec)
    ledger = Ledger(out, f"embed.{role}", embed_fingerprint(config, role, info))
    if not replace:
        refuse_other_weights(ledger, info)
    resources = config.resources

    folder = f"embeddings/{role}"

    def stream(wave: list[Shard]) -> ray.data.Dataset:
        pictures = map_tables(
            shard_items(wave),
            read_pictures,
            {"read": config.read, "images": config.images, "info": info, "folder": storage.join(out, folder)},
            num_cpus=READ_CPUS,
        )
        return pictures.map_batches(
            ClipEncoder,
            fn_constructor_kwargs={"encoder": encoder, "weights_sha256": info.weights_sha256},
            batch_size=resources.batch_size,
            batch_format="pyarrow",
            **encoder_actors(resources, len(wave)),
        )

    result = run_pass(
        ledger,
        shards,
        stream,
        folder=folder,
        metadata={"encoder": info.name, "weights_sha256": info.weights_sha256},
        wave_shards=resources.wave_shards,
        progress=progress,
    )
    return result, ledger, info


def embed(
    inputs: str | Sequence[str], out: str, *, config: CleanConfig, role: str = "detect", progress: Listener = silent
) -> PassResult:
    """Embed shards into `out`/embeddings/`role`, one Parquet file per shard; continue where a run stopped."""
    with session(stall_timeout_s=config.resources.stall_timeout_s):
        return embed_pass(list_shards(inputs), out, settled(config), role, progress=progress)[0]
