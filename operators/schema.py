"""The row: which columns there are, their Arrow types, and how lists become arrays.

Inside tarsift a sample is identified by (`shard`, `row`); `key` and `uid` are labels chosen by
strangers. Embeddings are stored as the encoder gives them, not normalised, in fixed-size lists
without any Ray extension type, so that pyarrow, polars, pandas and DuckDB read them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Column:
    """A column of the row: its Arrow type (as text for variable widths), who writes it, what it means."""

    type: pa.DataType | str
    written_by: str
    meaning: str


COLUMNS: dict[str, Column] = {
    "shard": Column(pa.string(), "ReadShard", "path below the inputs' common folder, without `.tar` or `.tar.gz`"),
    "row": Column(pa.int32(), "ReadShard", "position of the sample in its shard, from 0"),
    "key": Column(pa.string(), "ReadShard", "WebDataset key: folder and name of its members, without the extension"),
    "uid": Column(pa.string(), "ReadShard", "`uid` of the sample's json, or `<shard>/<key>`"),
    "image_offset": Column(pa.int64(), "ReadShard", "first byte of the image in the (uncompressed) shard"),
    "image_size": Column(pa.int64(), "ReadShard", "bytes of the image member"),
    "image": Column(pa.large_binary(), "ReadShard", "the image member's bytes as they are; never written to Parquet"),
    "caption": Column(pa.string(), "ReadShard", "the caption, from `.txt` or a json field"),
    "label": Column(pa.int32(), "ReadShard", "class, from a `.cls` that holds a whole number"),
    "error": Column(pa.string(), "any", "reason code, null = fine"),
    "image_sha256": Column(pa.binary(32), "hash_images", "SHA-256 of the image bytes"),
    "pixels": Column("fixed_size_list<uint8>[h*w*3]", "DecodeImages", "resized RGB pixels (h, w, 3); never stored"),
    "image_embedding": Column("fixed_size_list<float16|float32>[d]", "ClipEncoder", "image embedding, not normalised"),
    "text_embedding": Column("fixed_size_list<float16|float32>[d]", "ClipEncoder", "caption embedding, not normalised"),
    "clip_similarity": Column(pa.float32(), "ClipEncoder", "cosine of the embeddings; its sign is no verdict"),
    "view_embeddings": Column(
        "fixed_size_list<float16|float32>[views*d]", "ClipEncoder", "embeddings of diluted copies, one after another"
    ),
    "image_norm": Column(pa.float32(), "ClipEncoder", "Euclidean norm of the image embedding"),
    "duplicate_count": Column(pa.int32(), "CountCopies", "samples of the dump with the same image, itself included"),
    "suspicion_image": Column(pa.float32(), "SmoothScores", "the verdict score from images alone"),
    "caption_excess": Column(
        pa.float32(), "SmoothScores", "how much more its caption agrees with those of suspect neighbours than of others"
    ),
    "neighbor_disagreement": Column(
        pa.float32(), "SmoothScores", "how much less alike it and its neighbours are to the witness than they should be"
    ),
    "witness_clip_similarity": Column(pa.float32(), "ClipEncoder", "cosine of the witness's embeddings"),
    "caption_distance": Column(pa.float32(), "ScoreMismatch", "1 - cosine of the embeddings by who judges captions"),
    "lemon_image": Column(pa.float32(), "ScoreMismatch", "how far the caption is from those of similar images"),
    "lemon_caption": Column(pa.float32(), "ScoreMismatch", "how far the image is from those of similar captions"),
    "caption_unmatched": Column(pa.float32(), "ScoreMismatch", "how badly the caption fits the images it fits best"),
    "safeclip": Column(pa.float32(), "ScoreMismatch", "log odds that the pair does not fit, of a mixture of two"),
    "caption_mismatch": Column(pa.float32(), "ScoreMismatch", "the caption side of the verdict"),
    "suspicion_density": Column(pa.float32(), "Judge", "the density side of the verdict, where captions judge too"),
    "suspicion": Column(pa.float32(), "SmoothScores, Judge", "the default verdict score, higher = more suspicious"),
    "class": Column(pa.int32(), "RouteCaptions, RouteLabels", "class by the caption or the label; -1 = unrouted"),
    "class_cosine": Column(pa.float32(), "RouteCaptions", "cosine of the caption and the center of its class"),
    "sift_rank": Column(pa.float32(), "JoinVerdicts", "mean rank in its class by the sifter, 0 to 1"),
    "sift_status": Column(pa.string(), "JoinVerdicts", "`sifted`, or why it was not"),
    "suspicion_sifted": Column(pa.float32(), "JoinVerdicts", "`suspicion`, raised where the sifter confirms it"),
    "flagged": Column(pa.bool_(), "Flag", "whether the sample is removed"),
    "reasons": Column(pa.list_(pa.string()), "Flag", "every score or rule behind the verdict"),
}  # fmt: skip

# Float columns of the score files that are no scores: their orientation is their own.
MEASURES = ("clip_similarity", "image_norm", "witness_clip_similarity")
# Scores that are not in the score files, but beside them in those of the sifted samples.
SIFTED_FOLDER = "sift/samples"
SIFTED_SCORES = ("suspicion_sifted", "sift_rank")

SAMPLE_SCHEMA = pa.schema(
    [
        (name, COLUMNS[name].type)
        for name in ("shard", "row", "key", "uid", "image_offset", "image_size", "image", "caption", "label", "error")
    ]
)


def as_table(batch: pa.Table | Mapping[str, Any]) -> pa.Table:
    """Return `batch` as an Arrow table, whichever batch format Ray or a notebook hands over.

    A dict of arrays (Ray's default format) becomes a table whose 2-D arrays are fixed-size lists.
    """
    if isinstance(batch, pa.Table):
        return batch
    columns = {}
    for name, values in batch.items():
        array = np.asarray(values) if not isinstance(values, pa.Array | pa.ChunkedArray) else values
        if isinstance(array, np.ndarray) and array.ndim == 2:
            array = fixed_size_list(array)
        elif isinstance(array, np.ndarray) and array.ndim > 2:
            array = fixed_size_list(array.reshape(len(array), -1))
        elif isinstance(array, np.ndarray) and array.dtype == object:
            declared = COLUMNS[name].type if name in COLUMNS else None
            array = pa.array(array.tolist(), type=declared if isinstance(declared, pa.DataType) else None)
        else:
            array = pa.array(array) if isinstance(array, np.ndarray) else array
        columns[name] = array
    return pa.table(columns)


def places_of(table: pa.Table | pa.RecordBatch) -> list[tuple[str, int]]:
    """Return (shard, row) of each sample, which is its identity within a dump."""
    return list(zip(table["shard"].to_pylist(), table["row"].to_pylist(), strict=True))


def fixed_size_list(values: np.ndarray, valid: np.ndarray | None = None) -> pa.FixedSizeListArray:
    """Turn an (n, d) array into n lists of d values, null where `valid` (n,) is false."""
    d = values.shape[1]
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    mask = None if valid is None or valid.all() else pa.array(~valid)
    return pa.FixedSizeListArray.from_arrays(flat, d, mask=mask)


def matrix(column: pa.ChunkedArray | pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return an Arrow list column as an (n, d) array and an (n,) mask of the rows that are not null.

    Null rows are zeros. This is the one place where Arrow lists become arrays: `flatten()` alone
    drops null rows and shifts all that follow.

    Raises:
        ValueError: if the column is not of fixed-size lists, or lists differ in length.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # combine_chunks of zero chunks
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], type=array.type)
    if not pa.types.is_fixed_size_list(array.type):
        raise ValueError(f"expected a column of fixed-size lists, got {array.type}")
    d = array.type.list_size
    values = array.values.slice(array.offset * d, len(array) * d)
    out = values.to_numpy(zero_copy_only=False).reshape(len(array), d)
    valid = np.asarray(array.is_valid())
    if not valid.all():
        out = out.copy()
        out[~valid] = 0
    return out, valid


def append(table: pa.Table, columns: Mapping[str, pa.Array | np.ndarray]) -> pa.Table:
    """Append columns in order, replacing those of the same name in place."""
    for name, values in columns.items():
        array = pa.array(values) if isinstance(values, np.ndarray) else values
        at = table.schema.get_field_index(name)
        table = table.append_column(name, array) if at < 0 else table.set_column(at, name, array)
    return table


def set_error(table: pa.Table, reasons: list[str | None]) -> pa.Table:
    """Put a reason where one is given; rows with None keep what they had."""
    old = table["error"].to_pylist()
    return append(table, {"error": pa.array([new or was for new, was in zip(reasons, old, strict=True)], pa.string())})
