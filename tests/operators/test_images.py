"""Decoding equals open_clip's own transform to the last bit, and no image, however broken, ends a run."""

import hashlib
import io
import pickle
import struct
import warnings
import zlib

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import image_transform
from PIL import Image, ImageFile
from pydantic import ValidationError

from tarsift.operators.decoding import ImageConfig
from tarsift.operators.errors import END_OF_SHARD, REASONS, ConfigError
from tarsift.operators.images import DecodeImages, hash_images
from tarsift.operators.schema import SAMPLE_SCHEMA, matrix


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Draw waves, an edge and noise: content in which any difference in resampling shows."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([128 + 90 * np.sin(x / (3 + c)) * np.cos(y / (5 + c)) for c in range(4)], -1)
    waves[:, : width // 3] += 60
    array = np.clip(waves + rng.normal(0, 25, waves.shape), 0, 255).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray(array[..., 0].astype(np.uint16) * 257)
    if mode in ("1", "P"):
        return Image.fromarray(array[..., :3]).convert(mode)
    bands = {"L": array[..., 0], "LA": array[..., :2], "RGB": array[..., :3], "RGBA": array, "CMYK": array}[mode]
    return Image.fromarray(np.ascontiguousarray(bands), mode=mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def orientation() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


JPEG, LONG = encoded(picture(48, 40)), encoded(picture(300, 200))

IMAGES = {
    **{f"jpeg {s}": encoded(picture(70, 53), subsampling=s, quality=q) for s, q in (("4:4:4", 95), ("4:2:0", 60))},
    "jpeg 4:2:2": encoded(picture(53, 70), subsampling="4:2:2"),
    "jpeg gray": encoded(picture(61, 47, "L")),
    "jpeg gray tall": encoded(picture(47, 61, "L")),
    "jpeg progressive": encoded(picture(65, 33), progressive=True),
    "jpeg cmyk": encoded(picture(45, 64, "CMYK")),
    "jpeg with exif orientation": encoded(picture(64, 40), exif=orientation()),
    "jpeg with a colour profile": encoded(picture(40, 41), icc_profile=b"not a profile"),
    "jpeg of the final size": encoded(picture(32, 32)),
    "jpeg cropped only": encoded(picture(57, 32)),
    "jpeg cropped only, tall": encoded(picture(32, 57)),
    "jpeg smaller": encoded(picture(17, 9)),
    "jpeg one pixel": encoded(picture(1, 1)),
    "jpeg panorama": encoded(picture(640, 21)),
    "jpeg tower": encoded(picture(21, 640)),
    **{f"png {m}": encoded(picture(50, 37, m), "PNG") for m in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")},
    "png P with transparency": encoded(picture(37, 50, "P"), "PNG", transparency=bytes([0, 128, 255])),
    "png RGB with transparency": encoded(picture(50, 37), "PNG", transparency=(1, 2, 3)),
    "webp": encoded(picture(50, 37), "WEBP"),
    "webp with alpha": encoded(picture(37, 50, "RGBA"), "WEBP"),
    "webp lossless": encoded(picture(50, 37), "WEBP", lossless=True),
    "webp animated": encoded(picture(40, 40), "WEBP", save_all=True, append_images=[picture(40, 40, seed=1)]),
}


def by_open_clip(data: bytes, size: int, **how) -> np.ndarray:
    """Return what the encoder's own transform shows the encoder, scaled back from 0..1 to bytes."""
    transform = image_transform(size, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3, **how)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensor = transform(Image.open(io.BytesIO(data)))
    return np.rint(tensor.permute(1, 2, 0).numpy() * 255).astype(np.uint8)


def rows(*images: bytes | None, errors: list[str | None] | None = None) -> pa.Table:
    n = len(images)
    columns = {
        "shard": ["a"] * n,
        "row": list(range(n)),
        "key": [f"{i:04d}" for i in range(n)],
        "uid": [f"a/{i:04d}" for i in range(n)],
        "image_offset": [512 * i for i in range(n)],
        "image_size": [None if image is None else len(image) for image in images],
        "image": list(images),
        "caption": [f"caption {i}" for i in range(n)],
        "label": [None] * n,
        "error": errors or [None] * n,
    }
    return pa.table(columns, schema=SAMPLE_SCHEMA)


def pixels_of(data: bytes, size: int, **how) -> np.ndarray:
    table = DecodeImages(size, **how)(rows(data))
    assert table["error"].to_pylist() == [None]
    values, valid = matrix(table["pixels"])
    assert valid.all()
    return values.reshape(size, size, 3)


@pytest.mark.parametrize("size", [24, 32, 64])
@pytest.mark.parametrize("name", IMAGES)
def test_pixels_are_those_of_open_clip(name, size):
    np.testing.assert_array_equal(pixels_of(IMAGES[name], size), by_open_clip(IMAGES[name], size))


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("name", ["jpeg 4:2:0", "jpeg gray", "jpeg tower", "jpeg smaller", "png RGBA", "png P"])
def test_pixels_are_those_of_open_clip_in_every_resize_mode(name, interpolation, resize_mode):
    how = {"interpolation": interpolation, "resize_mode": resize_mode}
    np.testing.assert_array_equal(pixels_of(IMAGES[name], 32, **how), by_open_clip(IMAGES[name], 32, **how))


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 150), height=st.integers(1, 150), size=st.integers(8, 80), gray=st.booleans())
def test_pixels_are_those_of_open_clip_at_any_size(width, height, size, gray):
    data = encoded(picture(width, height, "L" if gray else "RGB"), "PNG")
    np.testing.assert_array_equal(pixels_of(data, size), by_open_clip(data, size))


def test_a_random_interpolation_means_bicubic_as_in_open_clip():
    np.testing.assert_array_equal(pixels_of(LONG, 32, interpolation="random"), pixels_of(LONG, 32))


def png_header(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def webp_header(width: int, height: int) -> bytes:
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    content = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas
    return b"RIFF" + struct.pack("<I", len(content)) + content


HUGE_JPEG = JPEG.replace(struct.pack(">HH", 40, 48), struct.pack(">HH", 60_000, 60_000), 1)

BROKEN = {
    "empty": (b"", "undecodable_image"),
    "a web page": (b"<!DOCTYPE html><html>not found</html>", "undecodable_image"),
    "a gif": (encoded(picture(40, 40), "GIF"), "undecodable_image"),
    "a bmp": (encoded(picture(40, 40), "BMP"), "undecodable_image"),
    "a tiff": (encoded(picture(40, 40), "TIFF"), "undecodable_image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "undecodable_image"),
    "jpeg: the first half": (LONG[: len(LONG) // 2], "undecodable_image"),
    "jpeg: all but 100 bytes": (LONG[:-100], "undecodable_image"),
    "jpeg: header only": (JPEG[:30], "undecodable_image"),
    "png: the first half": (encoded(picture(99, 99), "PNG")[:9000], "undecodable_image"),
    "png: no rows": (png_header(40, 40), "undecodable_image"),
    "webp: the first half": (encoded(picture(99, 99), "WEBP")[:900], "undecodable_image"),
    "png: a bomb": (png_header(100_000, 100_000), "too_many_pixels"),
    "png: over the limit": (png_header(8001, 8000), "too_many_pixels"),
    "jpeg: a bomb": (HUGE_JPEG, "too_many_pixels"),
    "webp: a bomb": (webp_header(16_000, 16_000), "too_many_pixels"),
    "a strip whose resized form is a bomb": (encoded(Image.new("L", (1, 65_000)), "PNG"), "too_many_pixels"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_is_a_row_with_a_reason(name):
    data, reason = BROKEN[name]
    table = DecodeImages(32)(rows(JPEG, data, JPEG))
    assert table["error"].to_pylist() == [None, reason, None]
    values, valid = matrix(table["pixels"])
    assert valid.tolist() == [True, False, True]
    assert table["pixels"].is_valid().to_pylist() == [True, False, True]
    np.testing.assert_array_equal(values[2], pixels_of(JPEG, 32).reshape(-1))
    assert reason in REASONS


@pytest.mark.parametrize("seed", range(150))
def test_random_damage_never_raises(seed):
    rng = np.random.default_rng(seed)
    names = sorted(IMAGES)
    data = bytearray(IMAGES[names[seed % len(names)]])
    for position in rng.integers(0, len(data), 8):
        data[position] = rng.integers(256)
    table = DecodeImages(16)(rows(bytes(data)))
    [error] = table["error"].to_pylist()
    assert error in (None, "undecodable_image", "too_many_pixels")
    assert table["pixels"].is_valid().to_pylist() == [error is None]


def test_settings_of_pillow_made_elsewhere_neither_matter_nor_change(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    table = DecodeImages(32)(rows(LONG[:-100], png_header(100_000, 100_000)))
    assert table["error"].to_pylist() == ["undecodable_image", "too_many_pixels"]
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
    assert Image.MAX_IMAGE_PIXELS is None


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DecodeImages(32)(rows(IMAGES["png P with transparency"], png_header(7000, 9000), png_header(7999, 7999)))


def test_the_pixel_limit_is_inclusive_and_formats_can_be_narrowed():
    config = ImageConfig(max_pixels=48 * 40)
    assert DecodeImages(32, config=config)(rows(JPEG))["error"].to_pylist() == [None]
    config = ImageConfig(max_pixels=48 * 40 - 1)
    assert DecodeImages(32, config=config)(rows(JPEG))["error"].to_pylist() == ["too_many_pixels"]
    config = ImageConfig(formats=("JPEG",))
    table = DecodeImages(32, config=config)(rows(JPEG, IMAGES["png RGB"], IMAGES["webp"]))
    assert table["error"].to_pylist() == [None, "undecodable_image", "undecodable_image"]


@pytest.mark.parametrize("wrong", [{"max_pixels": 0}, {"formats": ("GIF",)}, {"formats": ()}, {"max_pixel": 9}])
def test_image_config_refuses(wrong):
    with pytest.raises(ValidationError):
        ImageConfig(**wrong)


@pytest.mark.parametrize("wrong", [{"interpolation": "lanczos"}, {"resize_mode": "shrink"}])
def test_unknown_ways_to_resize_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong.values()))):
        DecodeImages(32, **wrong)


def test_rows_without_an_image_are_left_alone():
    table = DecodeImages(32)(rows(None, None, JPEG, errors=["missing_image", END_OF_SHARD, "missing_caption"]))
    assert table["error"].to_pylist() == ["missing_image", END_OF_SHARD, "missing_caption"]
    assert table["pixels"].is_valid().to_pylist() == [False, False, True]


def test_an_unusable_image_outranks_an_earlier_reason():
    table = DecodeImages(32)(rows(b"broken", errors=["missing_caption"]))
    assert table["error"].to_pylist() == ["undecodable_image"]


@pytest.mark.parametrize("keep_image", [False, True])
@pytest.mark.parametrize("n", [0, 3])
def test_decoding_is_a_map(n, keep_image):
    table = rows(*[JPEG] * n)
    out = pickle.loads(pickle.dumps(DecodeImages(32, keep_image=keep_image)))(table)
    kept = table.column_names if keep_image else [c for c in table.column_names if c != "image"]
    assert out.column_names == [*kept, "pixels"]
    assert out.select(kept).equals(table.select(kept))
    assert out.schema.field("pixels").type == pa.list_(pa.uint8(), 32 * 32 * 3)


def test_a_table_of_images_alone_gains_the_error_column():
    table = DecodeImages(32)(pa.table({"image": pa.array([JPEG, b"x"], pa.binary())}))
    assert table.column_names == ["pixels", "error"]
    assert table["error"].to_pylist() == [None, "undecodable_image"]


def test_chunked_tables_decode_like_whole_ones():
    whole = rows(JPEG, LONG, None, b"x")
    chunked = pa.concat_tables([whole.slice(0, 1), whole.slice(1, 3)])
    assert DecodeImages(16)(chunked).equals(DecodeImages(16)(whole))


@pytest.mark.parametrize("n", [0, 2])
def test_hashing_is_a_map(n):
    table = rows(*[JPEG, None][:n])
    out = pickle.loads(pickle.dumps(hash_images))(table)
    assert out.column_names == [*table.column_names, "image_sha256"]
    assert out.select(table.column_names).equals(table)
    assert out["image_sha256"].to_pylist() == [hashlib.sha256(JPEG).digest(), None][:n]
    assert out.schema.field("image_sha256").type == pa.binary(32)
