"""By what samples are the same, drawn and put in order: keyed hashes of their images and of their places."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from tarsift.clip_detect.sampling import keyed_hash, resalt
from tarsift.operators.flag import unscorable
from tarsift.operators.schema import places_of


def identities(table: pa.Table, key: bytes) -> np.ndarray:
    """Keyed hash (n,) uint64 of `image_sha256`: what counts as the same image; 0 where there is none."""
    digests = table["image_sha256"].to_pylist()
    out = np.zeros(len(digests), np.uint64)
    present = [i for i, digest in enumerate(digests) if digest is not None]
    if present:
        out[present] = keyed_hash([digests[i] for i in present], key, "identity")
    return out


def drawing_hashes(ids: np.ndarray, key: bytes) -> np.ndarray:
    """Keyed hash (n,) uint64 of identities, by which samples are drawn; the same as in `suspicion()`."""
    return keyed_hash(ids.view(np.uint8).reshape(len(ids), 8), key, "reference") if len(ids) else ids


def content_hashes(table: pa.Table, key: bytes, salt: str = "") -> np.ndarray:
    """Drawing hashes (n,) uint64 of a table's images; a salt gives an unrelated draw."""
    return salted(drawing_hashes(identities(table, key), key), salt)


def row_hashes(table: pa.Table, key: bytes) -> np.ndarray:
    """Keyed hash (n,) uint64 of the identity (shard, row): breaks ties between equal scores."""
    names = [f"{shard}\0{row}".encode() for shard, row in places_of(table)]
    return keyed_hash(names, key, "row") if names else np.zeros(0, np.uint64)


def salted(hashes: np.ndarray, salt: str) -> np.ndarray:
    """Derive another draw from hashes (n,); the same one for an empty salt."""
    return resalt(hashes, salt) if salt else hashes


def scorable(table: pa.Table) -> np.ndarray:
    """Mask (n,) of the rows that have an image embedding."""
    return np.array([not unscorable(error) for error in table["error"].to_pylist()], bool)
