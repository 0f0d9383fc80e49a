"""Random samples by keyed hash: the same for any order and partition of the dump, mergeable, not to be foreseen."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int64, UInt8, UInt64


def keyed_hash(
    content: Sequence[bytes] | UInt8[np.ndarray, "n bytes"], key: bytes, salt: str = ""
) -> UInt64[np.ndarray, " n"]:
    """Hash each entry (an image's SHA-256) to 64 bits with BLAKE2b under a key of at most 64 bytes.

    Without the key nobody can tell which images get small hashes, so nobody can place images in a
    sample of the smallest ones or keep them out. Different salts give unrelated hashes.
    """
    if isinstance(content, np.ndarray):
        data, width = np.ascontiguousarray(content).tobytes(), content.shape[1]
        entries: Iterable[bytes] = (data[i : i + width] for i in range(0, len(data), width))
    else:
        entries = content
    start = hashlib.blake2b(digest_size=8, key=key, person=hashlib.blake2b(salt.encode(), digest_size=16).digest())
    digests = bytearray()
    for entry in entries:
        state = start.copy()
        state.update(entry)
        digests += state.digest()
    return np.frombuffer(bytes(digests), "<u8").astype(np.uint64)


def resalt(hashes: UInt64[np.ndarray, " n"], salt: str) -> UInt64[np.ndarray, " n"]:
    """Derive a second, unrelated order from keyed hashes, at the cost of a few multiplications.

    The mixing (SplitMix64; Steele, Lea, Flood 2014) is one to one, so distinct hashes stay distinct, and
    public, so the result is as unforeseeable as the keyed hashes it came from.
    """
    offset = np.frombuffer(hashlib.blake2b(salt.encode(), digest_size=8).digest(), "<u8").astype(np.uint64)
    x = hashes + offset
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def smallest(hashes: UInt64[np.ndarray, " n"], count: int) -> Int64[np.ndarray, " m"]:
    """Return the rows of the `count` smallest distinct hashes, in order of hash; of copies the first row.

    Samples merge: the smallest of two samples of `count` together is the sample of both sets.
    """
    _, first = np.unique(hashes, return_index=True)
    return first[:count].astype(np.int64)
