"""What a model would be trained on, as webdataset reads a shard, beside what tarsift scores of it."""

from __future__ import annotations

import io
import re
from collections import Counter

from webdataset.tariterators import base_plus_ext, tar_file_expander

from tarsift.operators.samples import IMAGE_PARTS, scan_members
from tarsift.operators.streams import ShardStream
from tarsift.operators.tar import TarDamage

USED = IMAGE_PARTS | {"txt", "json"}

# Images and captions: key, part and payload, and how often; the payload is None where tarsift takes the
# member for one that is put into errored/.
Members = Counter[tuple[str, str, bytes | None]]


def trained(data: bytes) -> Members:
    """Return the images and captions that webdataset finds in a shard, up to where it fails."""
    found: Members = Counter()
    source = {"url": "s", "stream": io.BytesIO(data)}
    for file in tar_file_expander([source], handler=lambda error: False, eof_value=None):
        key, part = base_plus_ext(file["fname"])
        if key and part and part.lower() in USED:
            found[_without_time(key), part.lower(), file["data"]] += 1
    return found


def scored(data: bytes) -> Members | None:
    """Return the images and captions in tarsift's rows; None if it says that the shard is damaged."""
    found: Members = Counter()
    source = ShardStream(io.BytesIO(data))
    try:
        for placed in scan_members(source.tar, keep=lambda name, size: size):
            if placed.row is not None and placed.part in USED:
                payload = placed.member.payload if placed.member.type == "file" else None
                found[_without_time(placed.key), placed.part, payload] += 1
    except TarDamage:
        return None
    return None if source.problem else found


def unscored(data: bytes) -> Members:
    """Return what webdataset would train on and tarsift neither scores nor names as unusable; of a whole shard."""
    ours = scored(data)
    if ours is None:
        return Counter()
    missed = trained(data) - ours
    return Counter({(key, part, data): n for (key, part, data), n in missed.items() if not ours[key, part, None]})


def _without_time(key: str) -> str:
    """Drop what may be a time: in incremental archives of GNU tar tarfile takes it for a folder around the file."""
    return re.sub(r"^[0-7]{11}/", "", key)
