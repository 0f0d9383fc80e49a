"""What other tools call the columns of a row, and how they scale them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Float16, Float64

IDENTITY = ("shard", "row", "key", "uid")
_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp"}


def numbers_of(schema: pa.Schema) -> list[str]:
    """Return the columns of a score file that are scores or measures of a sample."""
    return [f.name for f in schema if pa.types.is_floating(f.type) or f.name == "duplicate_count"]


def unit_half(embeddings: Float[np.ndarray, "n d"]) -> Float16[np.ndarray, "n d"]:
    """Scale embeddings to norm 1 and store them as float16; those of norm 0 stay 0.

    As `clip_inference/mapper.py` of github.com/rom1504/clip-retrieval does.
    """
    exact = embeddings.astype(np.float32)
    norms = np.linalg.norm(exact, axis=1, keepdims=True)
    return (exact / np.where(norms > 0, norms, 1)).astype(np.float16)


def quality(scores: Float[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Turn scores, higher = more suspicious, into cleanlab's: from 0 to 1, lower = worse; NaN stays.

    `1 / (1 + exp(score))` keeps their order: their absolute size has no meaning in either scale. cleanlab's docs
    (docs.cleanlab.ai, Datalab Issue Types): "a smaller value ... indicates that it is less common or typical".
    """
    exact = np.asarray(scores, np.float64)
    return np.exp(-np.logaddexp(0, exact))


def extension_of(picture: bytes) -> str:
    """Return the extension of a picture's file, by its content alone."""
    return next((name for magic, name in _MAGIC.items() if picture.startswith(magic)), "jpg")


def plain_values(row: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is not there."""
    return {name: value for name, value in row.items() if value is not None}
