"""One image to pixels, as open_clip's own transform would make them, whatever the bytes try to do.

Decoding is Pillow's, whole and at full scale: what open_clip does to an image before it becomes a
tensor is done here to the last bit, so that embeddings are those of the encoder's own
preprocessing. A decoder's reduced scale would be faster and would blur small triggers; the
resampling of uint8 tensors in torch is off by one in a tenth of all values and no faster.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from pydantic import BaseModel, ConfigDict, Field

from tarsift.operators.errors import ConfigError

# Imported for what they register: Pillow would otherwise load every plugin it has on meeting the first WebP.
_PLUGINS = (JpegImagePlugin, PngImagePlugin, WebPImagePlugin)

ImageFormat = Literal["JPEG", "PNG", "WEBP"]


class ImageConfig(BaseModel):
    """What counts as a usable image."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_pixels: Annotated[
        int, Field(gt=0, description="width x height, as stored or as resized, up to which an image is decoded")
    ] = 64_000_000
    formats: Annotated[
        tuple[ImageFormat, ...], Field(min_length=1, description="formats by content, whatever the extension says")
    ] = ("JPEG", "PNG", "WEBP")
    timeout_s: Annotated[
        float, Field(gt=0, description="seconds for one image, where images are decoded in a process of their own")
    ] = 30.0


class UnusableImage(Exception):
    """An image that cannot be used; `reason` is the code for the column `error`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode_image(
    data: bytes, *, fit: Callable[[Image.Image], Image.Image], config: ImageConfig
) -> UInt8[np.ndarray, "size size 3"]:
    """Decode an image to RGB pixels after `fit` has brought it to its size; call it inside `strict_pillow`.

    Like open_clip it resizes in the image's own mode and converts to RGB afterwards, and heeds
    neither EXIF orientation nor colour profiles. A file that ends early is an error; one that was
    closed with an end marker after part of its picture cannot be told from a whole one.

    Raises:
        UnusableImage: with the reason code.
    """
    return _square(lambda: Image.open(io.BytesIO(data), formats=config.formats), fit, config)


def fit_image(
    image: Image.Image, *, fit: Callable[[Image.Image], Image.Image], config: ImageConfig
) -> UInt8[np.ndarray, "size size 3"]:
    """Do as `decode_image` with an image that is open already, of any format.

    Raises:
        UnusableImage: with the reason code.
    """
    return _square(lambda: image, fit, config)


def _square(
    opened: Callable[[], Image.Image], fit: Callable[[Image.Image], Image.Image], config: ImageConfig
) -> UInt8[np.ndarray, "size size 3"]:
    try:
        image = opened()
        if image.width * image.height > config.max_pixels:
            raise UnusableImage("too_many_pixels")
        image.load()
        image = fit(image)
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except UnusableImage:
        raise
    except Image.DecompressionBombError as error:
        raise UnusableImage("too_many_pixels") from error
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error on hostile bytes
        raise UnusableImage("undecodable_image") from error


@contextmanager
def strict_pillow(max_pixels: int) -> Iterator[None]:
    """Have Pillow refuse truncated and huge images without a warning, whatever its global settings were."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    Image.MAX_IMAGE_PIXELS = (max_pixels + 1) // 2  # it warns from here on and raises at twice that
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = before


def fit_to_square(
    size: int, *, interpolation: str, resize_mode: str, max_pixels: int
) -> Callable[[Image.Image], Image.Image]:
    """Return the function that brings an image to size x size, bit by bit as open_clip's transform does.

    Resizing the shorter side of a long strip makes a far larger image: over `max_pixels` the
    function raises `UnusableImage`.

    Raises:
        ConfigError: if `interpolation` or `resize_mode` is not one of open_clip's.
    """
    check_fit(interpolation=interpolation, resize_mode=resize_mode)
    if resize_mode == "shortest":
        resample = Image.Resampling.BILINEAR if interpolation == "bilinear" else Image.Resampling.BICUBIC
        return partial(_fit_shortest, size=size, resample=resample, max_pixels=max_pixels)
    # Loading open_clip takes seconds in every process that decodes, and few encoders resize this way.
    from open_clip.transform import image_transform
    from torchvision.transforms import Compose

    whole = image_transform(size, is_train=False, resize_mode=resize_mode, interpolation=interpolation)
    assert isinstance(whole, Compose)
    return Compose(whole.transforms[:-3])  # without the conversions to RGB and to a normalised tensor


def check_fit(*, interpolation: str, resize_mode: str) -> None:
    """Refuse settings that `fit_to_square` does not know.

    Raises:
        ConfigError: says which.
    """
    if interpolation not in ("bicubic", "bilinear", "random"):
        raise ConfigError(f"`interpolation` must be bicubic or bilinear, got {interpolation!r}.")
    if resize_mode not in ("shortest", "longest", "squash"):
        raise ConfigError(f"`resize_mode` must be shortest, longest or squash, got {resize_mode!r}.")


def _fit_shortest(image: Image.Image, *, size: int, resample: Image.Resampling, max_pixels: int) -> Image.Image:
    """Resize the shorter side to `size` and crop the centre, as torchvision's Resize and CenterCrop do."""
    width, height = image.size
    if width <= height:
        new_width, new_height = size, int(size * height / width)
    else:
        new_width, new_height = int(size * width / height), size
    if new_width * new_height > max(max_pixels, size * size):
        raise UnusableImage("too_many_pixels")
    left, top = round((new_width - size) / 2.0), round((new_height - size) / 2.0)
    if (new_width, new_height) == (width, height):
        pass
    elif left and image.mode in ("RGB", "L"):
        # Pillow resamples rows first, then columns, with 8 bits in between: doing so in two calls gives the
        # same pixels, and the columns that the crop throws away are resampled once only.
        image = image.resize((new_width, height), resample).crop((left, 0, left + size, height))
        image = image.resize((size, size), resample)
    else:
        image = image.resize((new_width, new_height), resample)
    return image if image.size == (size, size) else image.crop((left, top, left + size, top + size))
