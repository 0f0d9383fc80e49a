"""Embeddings that were made elsewhere, in place of encoding: those of clip-retrieval, joined to samples by their names.

Such a folder has `img_emb/img_emb_N.npy`, `text_emb/text_emb_N.npy` and `metadata/metadata_N.parquet`, whose rows go
together (`clip_inference/writer.py` of github.com/rom1504/clip-retrieval). A sample is found by its `uid` where the
metadata have that column, else by its key, which they call `image_path`. Nothing says what the encoder was.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float

from tarsift.operators import storage
from tarsift.operators.encoder_settings import EncoderInfo, Tower
from tarsift.operators.errors import END_OF_SHARD, IMAGE_USABLE, TarsiftError, UsageError
from tarsift.operators.external_sort import KEY, SortedRuns, starts_of_keys
from tarsift.operators.npy import NpyFile, NpyHeader, read_header, read_rows
from tarsift.operators.schema import append, fixed_size_list, set_error

PREFIX = "embeddings:"
NO_EMBEDDING = "no_embedding"
HEAD_BYTES = 64 << 10  # of each file that the digest covers
MAX_NAME_BYTES = 4096

_KINDS: dict[Tower, str] = {"image": "img_emb", "text": "text_emb"}
_RECORD = np.dtype([*KEY, ("partition", "u4"), ("row", "u4")])
_NUMBER = re.compile(r"_(\d+)\.(?:npy|parquet)$")


@dataclass(frozen=True)
class Partition:
    """Files whose rows go together."""

    metadata: str
    embeddings: dict[Tower, NpyHeader]
    rows: int


@dataclass(frozen=True)
class EmbeddingFolder:
    """A folder of embeddings: its partitions, the column that names samples, and a digest of what it holds.

    The digest covers the names, the sizes and the first 64 KiB of all files, and of the metadata the last instead.
    """

    url: str
    partitions: tuple[Partition, ...]
    column: str
    digest: str

    @property
    def rows(self) -> int:
        return sum(partition.rows for partition in self.partitions)

    @property
    def towers(self) -> tuple[Tower, ...]:
        return tuple(self.partitions[0].embeddings)


def folder_of(spec: str) -> str | None:
    """Return the folder of `embeddings:FOLDER`; None for other encoders."""
    return spec.removeprefix(PREFIX) if spec.startswith(PREFIX) else None


def imported_info(folder: EmbeddingFolder) -> EncoderInfo:
    """Describe embeddings as an encoder of which nothing is known."""
    first = next(iter(folder.partitions[0].embeddings.values()))
    name = f"{PREFIX}{folder.url.rstrip('/').rsplit('/', 1)[-1]}"
    nothing = (0.0, 0.0, 0.0)
    return EncoderInfo(name, folder.digest, first.columns, 0, nothing, nothing, "", "", 0, trained_on=None, steps=None)


def open_folder(url: str) -> EmbeddingFolder:
    """List the partitions of a folder of embeddings, and look at each.

    Raises:
        UsageError: if there are none, or files that should go together do not.
    """
    digest = hashlib.sha256()
    with storage.reachable(url):
        files = {kind: _numbered(url, kind) for kind in ("metadata", *_KINDS.values())}
        towers: list[Tower] = [tower for tower, kind in _KINDS.items() if files[kind]]
        if not files["metadata"] or not towers:
            raise UsageError(
                f"{url} holds no embeddings: looked for img_emb/img_emb_N.npy, text_emb/text_emb_N.npy and "
                "metadata/metadata_N.parquet, as clip-retrieval writes them."
            )
        partitions, columns = [], []
        for number, metadata in files["metadata"].items():
            headers: dict[Tower, NpyHeader] = {}
            for tower in towers:
                if number not in files[_KINDS[tower]]:
                    raise UsageError(f"{url} has {metadata}, and no {_KINDS[tower]}_{number}.npy that goes with it.")
                headers[tower] = read_header(storage.join(url, files[_KINDS[tower]][number]))
                _take_in(digest, files[_KINDS[tower]][number], headers[tower].url)
            rows, names = _look_at(storage.join(url, metadata))
            _take_in(digest, metadata, storage.join(url, metadata), last=True)
            wrong = [header for header in headers.values() if header.rows != rows]
            if wrong:
                raise UsageError(f"{metadata} of {url} has {rows} rows, and {wrong[0].url} has {wrong[0].rows}.")
            partitions.append(Partition(storage.join(url, metadata), headers, rows))
            columns.append(names)
    widths = {header.columns for partition in partitions for header in partition.embeddings.values()}
    if len(widths) > 1:
        raise UsageError(f"the embeddings in {url} are not all of one length: {sorted(widths)}.")
    column = next((name for name in ("uid", "image_path") if all(name in names for names in columns)), None)
    if column is None:
        raise UsageError(f"the metadata in {url} have neither `uid` nor `image_path`: nothing says whose they are.")
    return EmbeddingFolder(url, tuple(partitions), column, digest.hexdigest())


def _numbered(url: str, kind: str) -> dict[str, str]:
    """Return the files of a kind by the number in their names, in its order."""
    found = {}
    for name in storage.list_files(storage.join(url, kind)):
        number = _NUMBER.search(name)
        if number and name.startswith(kind):
            found[number[1]] = f"{kind}/{name}"
    return dict(sorted(found.items(), key=lambda item: int(item[0])))


def _look_at(url: str) -> tuple[int, set[str]]:
    """Return the number of rows of a Parquet file, and its columns of text.

    No others are read: of the types that Ray registers in pyarrow one is a pickle.
    """
    with storage.open_read(url) as file:
        try:
            parquet = pq.ParquetFile(file)
            kinds = [(field.name, field.type) for field in parquet.schema_arrow]
        except pa.ArrowException as error:
            raise UsageError(f"{url} is no Parquet file: {error}") from None
        text = {name for name, kind in kinds if pa.types.is_string(kind) or pa.types.is_large_string(kind)}
        names = [name for name, _ in kinds]
        return parquet.metadata.num_rows, {name for name in text if names.count(name) == 1}


def _names_in(url: str, column: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield which rows of some metadata have a name, and the halves of its digest, batch by batch.

    Text is read as dictionaries: a file of some kilobytes may say a megabyte of text a million times.

    Raises:
        UsageError: if a name is longer than any.
    """
    with storage.open_read(url) as file:
        for batch in pq.ParquetFile(file, read_dictionary=[column]).iter_batches(batch_size=8192, columns=[column]):
            names = batch.column(0)
            longest = max(map(len, names.dictionary.cast(pa.large_binary()).to_pylist()), default=0)
            if longest > MAX_NAME_BYTES:
                raise UsageError(f"the {column} in {url} holds a text of {longest:,} bytes, over {MAX_NAME_BYTES:,}.")
            high, low = digests_of(names.dictionary.to_pylist())
            of = names.indices.fill_null(0).to_numpy(zero_copy_only=False)
            nothing = np.zeros(len(names), np.uint64)
            yield np.asarray(names.is_valid()), high[of] if len(high) else nothing, low[of] if len(low) else nothing


def _take_in(digest: Any, name: str, url: str, *, last: bool = False) -> None:
    with storage.open_read(url) as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - HEAD_BYTES) if last else 0)
        digest.update(f"{name}\0{size}\0".encode())
        digest.update(file.read(HEAD_BYTES))


def write_index(folder: EmbeddingFolder, to: str) -> None:
    """Write where the embedding of each name is: `high.npy`, `low.npy` (its digest, sorted) and `place.npy`.

    Raises:
        UsageError: if two rows of the metadata have one name.
    """
    with tempfile.TemporaryDirectory() as spilled, ExitStack() as stack:
        runs = SortedRuns(spilled, _RECORD)
        for i, partition in enumerate(folder.partitions):
            row = 0
            for there, high, low in _names_in(partition.metadata, folder.column):
                records = np.zeros(len(there), _RECORD)
                records["high"], records["low"], records["partition"] = high, low, i
                records["row"] = np.arange(row, row + len(there))
                row += len(there)
                runs.add(records[there])
        # The first is closed last: where it is, the others are.
        highs = NpyFile(storage.join(to, "high.npy"), np.dtype("u8"), (), stack)
        lows = NpyFile(storage.join(to, "low.npy"), np.dtype("u8"), (), stack)
        places = NpyFile(storage.join(to, "place.npy"), np.dtype("u4"), (2,), stack)
        before = np.empty(0, _RECORD)
        for block in runs.blocks():
            joined = np.concatenate([before, block])
            if len(starts_of_keys(joined)) < len(joined):
                raise UsageError(_repeated(folder, joined))
            highs.add(block["high"])
            lows.add(block["low"])
            places.add(np.stack([block["partition"], block["row"]], axis=1))
            before = joined[-1:]


def _repeated(folder: EmbeddingFolder, records: np.ndarray) -> str:
    second = np.setdiff1d(np.arange(len(records)), starts_of_keys(records))[0]
    places = []
    for partition, row in records[["partition", "row"]][second - 1 : second + 1].tolist():
        places.append((folder.partitions[partition].metadata, row))
    with storage.open_read(places[0][0]) as file:
        name = pq.read_table(file, columns=[folder.column]).column(0)[places[0][1]].as_py()
    where = " and ".join(f"row {row} of {url}" for url, row in places)
    return f"two embeddings have the {folder.column} {str(name)[:80]!r} ({where}): nothing says which is whose."


def index_is_there(url: str) -> bool:
    """Tell whether `write_index` has finished there."""
    return storage.exists(storage.join(url, "high.npy"))


def digests_of(names: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the halves (n,) of a 128-bit digest of each name."""
    data = b"".join(hashlib.blake2b(n.encode("utf-8", "surrogatepass"), digest_size=16).digest() for n in names)
    halves = np.frombuffer(data, "<u8").reshape(-1, 2)
    return halves[:, 0], halves[:, 1]


@lru_cache(maxsize=3)
def _index(url: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, Any]:
    """Map the files of an index into memory; of a store, a local copy, which ends with this process."""
    folder, copy = url, None
    if not storage.is_local(url):
        copy = tempfile.TemporaryDirectory()
        folder = copy.name
        for name in ("high.npy", "low.npy", "place.npy"):
            with storage.open_read(storage.join(url, name)) as source, open(f"{folder}/{name}", "wb") as sink:
                while piece := source.read(storage.BLOCK_BYTES):
                    sink.write(piece)
    high, low, place = (np.load(f"{folder}/{name}.npy", mmap_mode="r") for name in ("high", "low", "place"))
    return high, low, place, copy


class ImportedEmbeddings:
    """Map: append the columns that `ClipEncoder` does, from a folder of embeddings, and drop `image`.

    A sample with a picture that has no embedding gets the error `no_embedding`; so does one that repeats a key, whose
    embedding nobody can tell from that of the first.

    Args:
        folder: from `open_folder`; index: where `write_index` has put its index.
        towers: which embeddings.
        store: type of the embeddings that are appended.
    """

    def __init__(self, folder: EmbeddingFolder, index: str, *, towers: Sequence[Tower], store: str) -> None:
        self.folder, self.index, self.towers, self.store = folder, index, tuple(towers), store

    def __call__(self, table: pa.Table) -> pa.Table:
        """Append the columns.

        Raises:
            TarsiftError: if an embedding is not finite in the type that is stored.
        """
        errors = table["error"].to_pylist()
        pictures = np.asarray(table["image"].is_valid())
        mine = pictures & np.array([e is None or (e in IMAGE_USABLE and e != "duplicate_key") for e in errors], bool)
        names = table["uid" if self.folder.column == "uid" else "key"].to_pylist()
        found, places = self._find(names, mine)
        seen = {"image": found, "text": found & np.asarray(table["caption"].is_valid())}
        new: dict[str, pa.Array] = {}
        arrays = {}
        for tower in self.towers:
            arrays[tower] = self._take(tower, places, seen[tower])
            new[f"{tower}_embedding"] = fixed_size_list(arrays[tower], seen[tower])
            if tower == "image":
                new["image_norm"] = pa.array(_norms(arrays[tower]), mask=~found)
        if len(arrays) == 2:
            new["clip_similarity"] = pa.array(_cosines(*arrays.values()), mask=~seen["text"])
        missing = pictures & ~found & np.array([e != END_OF_SHARD for e in errors], bool)
        table = append(table, new).drop_columns(["image"])
        return set_error(table, [NO_EMBEDDING if lacks else None for lacks in missing]) if missing.any() else table

    def _find(self, names: list[str], mine: Bool[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
        """Return which rows (n,) have an embedding, and the partition and row (n, 2) of each."""
        high, low, place, _ = _index(self.index)
        found, places = np.zeros(len(names), bool), np.zeros((len(names), 2), np.int64)
        if not len(high) or not mine.any():
            return found, places
        of = np.flatnonzero(mine)
        first, second = digests_of(names[i] for i in of)
        at = np.minimum(np.searchsorted(high, first), len(high) - 1)
        same = (high[at] == first) & (low[at] == second)
        found[of[same]] = True
        places[of[same]] = place[at[same]]
        return found, places

    def _take(self, tower: Tower, places: np.ndarray, seen: Bool[np.ndarray, " n"]) -> Float[np.ndarray, "n d"]:
        headers = [partition.embeddings[tower] for partition in self.folder.partitions]
        out = np.zeros((len(seen), headers[0].columns), self.store)
        for partition in np.unique(places[seen, 0]).tolist():
            rows = np.flatnonzero(seen & (places[:, 0] == partition))
            values = read_rows(headers[partition], places[rows, 1])
            with np.errstate(over="ignore"):
                out[rows] = values
            if not np.isfinite(out[rows]).all():
                raise TarsiftError(f"{headers[partition].url} holds embeddings that are not finite as {self.store}.")
        return out


def _norms(embeddings: Float[np.ndarray, "n d"]) -> np.ndarray:
    return np.linalg.norm(embeddings.astype(np.float32), axis=1)


def _cosines(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "n d"]) -> np.ndarray:
    length = _norms(a) * _norms(b)
    dot = np.einsum("nd,nd->n", a.astype(np.float32), b.astype(np.float32))
    return np.clip(np.divide(dot, length, out=np.zeros_like(dot), where=length > 0), -1, 1)
