"""Shards to embeddings: read, hash and decode on CPUs, encode, commit shard by shard."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import ray

from tarsift.operators import storage
from tarsift.operators.encoder_info import encoder_info
from tarsift.operators.encoder_settings import EncoderConfig, EncoderInfo
from tarsift.operators.errors import ChangedError, TarsiftError, UsageError
from tarsift.operators.flag import unscorable
from tarsift.operators.imported import (
    EmbeddingFolder,
    ImportedEmbeddings,
    folder_of,
    imported_info,
    index_is_there,
    open_folder,
    write_index,
)
from tarsift.operators.shards import Shard, list_shards
from tarsift.operators.sides import FEATURES
from tarsift.pipelines.commit import PassResult, run_pass
from tarsift.pipelines.config import CleanConfig
from tarsift.pipelines.encoding import READ_CPUS, EncodeRole, encode_rows
from tarsift.pipelines.ledger import Ledger, fingerprint, records_of
from tarsift.pipelines.metrics import reported
from tarsift.pipelines.progress import Event, Listener, silent
from tarsift.pipelines.reading import read_joined, read_pictures, shard_items
from tarsift.pipelines.session import gpu_share, map_tables, session

VIEWS = 3  # of the encoder that gives sifters their features


def settled(config: CleanConfig) -> CleanConfig:
    """Settle what `auto` means for the encoders on this cluster: embeddings depend on it."""
    gpu = gpu_share(config.resources) > 0
    encoders = {
        role: encoder.settled(gpu=gpu and encoder.device != "cpu", views=VIEWS if role == FEATURES else 0)
        for role, encoder in config.encoders.items()
    }
    return config.model_copy(update={"encoders": encoders})


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
        UsageError: if embeddings that were made elsewhere lack something, or are of another dump.
    """
    encoder = config.encoders[role].model_copy(update={"threads": config.resources.threads})
    imported = folder_of(encoder.spec)
    given = None if imported is None else open_folder(imported)
    info = encoder_info(encoder.spec) if given is None else imported_info(given)
    ledger = Ledger(out, f"embed.{role}", embed_fingerprint(config, role, info))
    if not replace:
        refuse_other_weights(ledger, info)
    resources, folder = config.resources, f"embeddings/{role}"

    def commit(stream: Callable[[list[Shard]], ray.data.Dataset]) -> PassResult:
        return run_pass(
            ledger,
            shards,
            stream,
            folder=folder,
            metadata={"encoder": info.name, "weights_sha256": info.weights_sha256},
            wave_shards=resources.wave_shards,
            progress=progress,
        )

    def encode(wave: list[Shard]) -> ray.data.Dataset:
        pictures = map_tables(
            shard_items(wave),
            read_pictures,
            {"read": config.read, "images": config.images, "info": info, "folder": storage.join(out, folder)},
            num_cpus=READ_CPUS,
        )
        arguments = {"encoder": encoder, "weights_sha256": info.weights_sha256}
        return encode_rows(pictures, EncodeRole, arguments, resources, shards=len(wave))

    if given is None:
        return commit(encode), ledger, info
    _refuse_lacking(given, encoder, role)
    with _indexed(given, ledger, shards, role, progress) as index:
        join = ImportedEmbeddings(given, index, towers=encoder.towers, store=encoder.store)
        arguments = {"read": config.read, "join": join}
        result = commit(lambda wave: map_tables(shard_items(wave), read_joined, arguments, num_cpus=READ_CPUS))
    return dataclasses.replace(result, about={"embeddings_of_no_sample": _left_over(given, result)}), ledger, info


def _refuse_lacking(given: EmbeddingFolder, encoder: EncoderConfig, role: str) -> None:
    """Refuse embeddings made elsewhere where an encoder is asked for what they have not.

    Raises:
        UsageError: if there are none for a tower, or for diluted views.
    """
    lacking = [tower for tower in encoder.towers if tower not in given.towers]
    if lacking:
        raise UsageError(
            f"{given.url} has no {lacking[0]} embeddings: give a folder that has, or "
            f"--set encoders.{role}.towers=[{', '.join(given.towers)}]."
        )
    if encoder.views:
        raise UsageError(
            f"{given.url} has no embeddings of diluted copies, which the encoder given as {role} is asked for: give "
            f"one that encodes, or --set encoders.{role}.views=0 with a sifter that does without."
        )


@contextmanager
def _indexed(
    given: EmbeddingFolder, ledger: Ledger, shards: Sequence[Shard], role: str, progress: Listener
) -> Iterator[str]:
    """Index embeddings made elsewhere, unless all shards have theirs; the index goes when they have.

    Raises:
        UsageError: if two embeddings have one name.
    """
    indexes = storage.join(ledger.out, "embeddings", ".index")
    index = storage.join(indexes, f"{role}-{given.digest[:16]}")
    done = len(ledger.entries([shard.name for shard in shards]))
    if done < len(shards) and not index_is_there(index):
        progress(Event(ledger.name, done, len(shards), note="finding whose embeddings they are"))
        write_index(given, index)
    yield index
    storage.remove_tree(indexes)


def _left_over(given: EmbeddingFolder, result: PassResult) -> int:
    """Count the embeddings that no sample took.

    Raises:
        UsageError: if none was taken.
        TarsiftError: if more were than there are.
    """
    lost = sum(n for entry in result.entries.values() for why, n in entry["errors"].items() if unscorable(why))
    taken = result.samples - lost
    if not taken and result.samples:
        raise UsageError(
            f"none of the {given.rows:,} embeddings in {given.url} is of a sample: by their {given.column} they "
            "are of another dump."
        )
    if taken > given.rows:
        raise TarsiftError(
            f"{taken:,} samples took the {given.rows:,} embeddings in {given.url}: samples of several shards have the "
            "same key, and nothing says whose an embedding is. Encode the dump, or give embeddings with uids."
        )
    return given.rows - taken


def embed(
    inputs: str | Sequence[str], out: str, *, config: CleanConfig, role: str = "detect", progress: Listener = silent
) -> PassResult:
    """Embed shards into `out`/embeddings/`role`, one Parquet file per shard; continue where a run stopped."""
    with session(stall_timeout_s=config.resources.stall_timeout_s), reported(progress) as progress:
        return embed_pass(list_shards(inputs), out, settled(config), role, progress=progress)[0]
