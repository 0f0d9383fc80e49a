"""Pictures as a notebook has them, in place of members of a shard: bytes, PIL images or arrays of pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8
from PIL import Image

from tarsift.operators.decoding import (
    ImageConfig,
    UnusableImage,
    decode_image,
    fit_image,
    fit_to_square,
    strict_pillow,
)
from tarsift.operators.errors import UsageError
from tarsift.operators.images import append_pixels
from tarsift.operators.schema import append, set_error
from tarsift.operators.shards import ReadConfig, caption_of

OWN = "own."  # put before the names of the columns that rows have of their own, so that none hides one of tarsift's
TAKEN = "bytes, PIL images, or uint8 arrays of pixels (height, width, 3)"
_SHAPES = ((2,), (3, 1), (3, 3), (3, 4))  # dimensions and channels: grey, and with colours, and with transparency


class IdentifySamples:
    """Map: own columns to `own.NAME`, and beside them `image_sha256`, `caption` and `error`.

    The digest is that of the bytes of an image, as of a member of a shard; of pixels it is that of mode, size and
    values, so that a PIL image and an array with the same pixels are one image. A caption is bounded and checked as a
    shard's is. An own column `error` is gone on with: its reasons count. Own columns `shard` (text) and
    `row` (whole numbers), as `read_shards` gives them, are kept as what they are there.

    Args:
        image, caption: own columns; without a caption only images are looked at.
        config: bounds of images and captions.

    Raises:
        UsageError: when called, for a value that is no picture of the kinds known, or a caption that is no text.
    """

    def __init__(self, *, image: str, caption: str | None, config: ReadConfig | None = None):
        self.image, self.caption, self.config = image, caption, config or ReadConfig()

    def __call__(self, table: pa.Table) -> pa.Table:
        reasons: list[str | None] = [None] * len(table)
        digests: list[bytes | None] = [None] * len(table)
        for i, picture in enumerate(pictures_of(table[self.image])):
            try:
                digests[i] = None if picture is None else self._digest(picture)
                reasons[i] = "missing_image" if picture is None else None
            except UnusableImage as unusable:
                reasons[i] = unusable.reason
        named = table.rename_columns([OWN + name for name in table.column_names])
        new: dict[str, pa.Array] = {"image_sha256": pa.array(digests, pa.binary(32))}
        if self.caption is not None:
            new["caption"], wrong = self._captions(table[self.caption])
            reasons = [reason or other for reason, other in zip(reasons, wrong, strict=True)]
        if places := identity_of(table.schema):
            new |= {name: table[name].cast(kind) for name, kind in places.items()}
        error = table["error"].cast(pa.string()) if "error" in table.column_names else pa.nulls(len(table), pa.string())
        return set_error(append(named, {**new, "error": error}), reasons)

    def _digest(self, picture: bytes | Image.Image) -> bytes:
        if isinstance(picture, bytes):
            if len(picture) > self.config.max_image_bytes:
                raise UnusableImage("image_too_large")
            return hashlib.sha256(picture).digest()
        try:
            pixels, palette = picture.tobytes(), picture.getpalette()
        except Exception as error:  # one that is open, and not read yet, may be damaged in any way
            raise UnusableImage("undecodable_image") from error
        head = f"{picture.mode} {picture.width} {picture.height} {palette or ''}\0"
        return hashlib.sha256(head.encode() + pixels).digest()

    def _captions(self, column: pa.ChunkedArray) -> tuple[pa.Array, list[str | None]]:
        values = column.to_pylist()
        strange = next((v for v in values if v is not None and not isinstance(v, str | list)), None)
        if strange is not None:
            raise UsageError(f"the column {self.caption!r} holds {type(strange).__name__}, and captions are text.")
        found = [caption_of(value, self.config.max_caption_bytes) for value in values]
        return pa.array([text for text, _ in found], pa.string()), [reason for _, reason in found]


class DecodePictures:
    """Map: append `pixels`, as `DecodeImages` does for the bytes of images, to rows of `IdentifySamples`.

    Args:
        image: the own column.
        size, interpolation, resize_mode, config: as of `DecodeImages`.
    """

    def __init__(
        self,
        size: int,
        *,
        image: str,
        interpolation: str = "bicubic",
        resize_mode: str = "shortest",
        config: ImageConfig | None = None,
    ):
        self.size, self.image, self.config = size, image, config or ImageConfig()
        self.fit = fit_to_square(
            size, interpolation=interpolation, resize_mode=resize_mode, max_pixels=self.config.max_pixels
        )

    def __call__(self, table: pa.Table) -> pa.Table:
        known = table["image_sha256"].is_valid().to_pylist()
        pictures = pictures_of(table[OWN + self.image])
        usable = [picture if there else None for picture, there in zip(pictures, known, strict=True)]
        with strict_pillow(self.config.max_pixels):
            return append_pixels(table, usable, self._decode, self.size)

    def _decode(self, picture: bytes | Image.Image) -> UInt8[np.ndarray, "size size 3"]:
        decode: Callable[..., Any] = decode_image if isinstance(picture, bytes) else fit_image
        return partial(decode, fit=self.fit, config=self.config)(picture)


def identity_of(schema: pa.Schema) -> dict[str, pa.DataType]:
    """Return names and types of `shard` and `row`, if a table has both and they are what `read_shards` makes them."""
    if not {"shard", "row"} <= {*schema.names}:
        return {}
    shard, row = (schema.field(name).type for name in ("shard", "row"))
    if not (pa.types.is_string(shard) or pa.types.is_large_string(shard)) or not pa.types.is_integer(row):
        return {}
    return {"shard": pa.string(), "row": pa.int64()}


def pictures_of(column: pa.ChunkedArray) -> list[bytes | Image.Image | None]:
    """Return the pictures of a column (n); None where there is none. A struct's field `bytes` is what counts.

    Raises:
        UsageError: for a value that is none of them.
    """
    return [picture_of(value) for value in column.to_pylist()]


def picture_of(value: Any) -> bytes | Image.Image | None:
    """Return the picture that a value is; None if it is none.

    Raises:
        UsageError: if it is of another kind.
    """
    if isinstance(value, Mapping) and "bytes" in value:  # as the datasets of Hugging Face keep images
        value = value["bytes"]
    if value is None or isinstance(value, bytes | Image.Image):
        return value
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and (value.ndim, *value.shape[2:]) in _SHAPES:
        if not value.size:
            return b""  # a bad sample like any other
        return Image.fromarray(np.ascontiguousarray(value[..., 0] if value.shape[2:] == (1,) else value))
    what = f"{value.dtype} arrays of shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
    hint = ": read the files first, as ray.data.read_images does" if isinstance(value, str) else ""
    raise UsageError(f"images are given as {TAKEN}; found {what}{hint}.")
