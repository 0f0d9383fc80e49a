"""Tables of images: hashing their bytes, and decoding them to pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8

from tarsift.operators.decoding import ImageConfig, UnusableImage, decode_image, fit_to_square, strict_pillow
from tarsift.operators.isolation import IsolatedDecoder
from tarsift.operators.schema import append, fixed_size_list, set_error


def hash_images(table: pa.Table) -> pa.Table:
    """Append `image_sha256`, the SHA-256 of the image bytes; null where there is no image."""
    digests = [
        None if image is None else hashlib.sha256(image).digest()
        for chunk in table["image"].chunks
        for image in (value.as_buffer() for value in chunk)
    ]
    return append(table, {"image_sha256": pa.array(digests, pa.binary(32))})


def append_pixels(
    table: pa.Table, images: Sequence[Any], decode: Callable[[Any], UInt8[np.ndarray, "size size 3"]], size: int
) -> pa.Table:
    """Append `pixels`, those of `images` (n), and the reason why a row has none to `error`; None is no image."""
    pixels = np.zeros((len(table), size, size, 3), np.uint8)
    reasons: list[str | None] = [None] * len(table)
    for i, image in enumerate(images):
        if image is None:
            continue
        try:
            pixels[i] = decode(image)
        except UnusableImage as unusable:
            reasons[i] = unusable.reason
    usable = np.array([image is not None for image in images], bool) & np.array([r is None for r in reasons], bool)
    table = append(table, {"pixels": fixed_size_list(pixels.reshape(len(table), size**2 * 3), usable)})
    if "error" not in table.column_names:
        table = append(table, {"error": pa.nulls(len(table), pa.string())})
    return set_error(table, reasons) if any(reasons) else table


class DecodeImages:
    """Append `pixels`: images decoded, resized and cropped to a square as open_clip does it.

    A row whose image cannot be used gets null pixels and an `error` (`undecodable_image`,
    `too_many_pixels`); a row without an image is left alone. `image` is dropped.

    Args:
        size: pixels along one side, as the encoder takes them.
        interpolation: `bicubic` or `bilinear`.
        resize_mode: `shortest` (resize the short side, crop the centre), `longest` (pad) or `squash`.
        config: limits and formats.
        keep_image: keep the column `image`.
        isolated: decode in a process of its own; an image that kills it is `decoder_died`, and no more is lost.

    Raises:
        ConfigError: if `interpolation` or `resize_mode` is not one of open_clip's.
    """

    def __init__(
        self,
        size: int,
        *,
        interpolation: str = "bicubic",
        resize_mode: str = "shortest",
        config: ImageConfig | None = None,
        keep_image: bool = False,
        isolated: bool = False,
    ) -> None:
        self.size = size
        self.config = config or ImageConfig()
        self.keep_image = keep_image
        self.isolated = isolated
        self.interpolation, self.resize_mode = interpolation, resize_mode
        self.fit = fit_to_square(
            size, interpolation=interpolation, resize_mode=resize_mode, max_pixels=self.config.max_pixels
        )

    def __call__(self, table: pa.Table) -> pa.Table:
        with self._decoder() as decode:  # a table is bounded; one by one costs 2 % of decoding
            table = append_pixels(table, table["image"].to_pylist(), decode, self.size)
        return table if self.keep_image else table.drop_columns(["image"])

    @contextmanager
    def _decoder(self) -> Iterator[Callable[[bytes], np.ndarray]]:
        if not self.isolated:
            with strict_pillow(self.config.max_pixels):
                yield partial(decode_image, fit=self.fit, config=self.config)
            return
        settings = {"interpolation": self.interpolation, "resize_mode": self.resize_mode}
        with IsolatedDecoder(self.size, **settings, config=self.config) as decode:
            yield decode
