"""Decoding in a process of its own: the same pixels, and a decoder that dies, hangs or eats takes one image with it."""

from __future__ import annotations

import io
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tarsift.operators.decoding import ImageConfig, UnusableImage
from tarsift.operators.images import DecodeImages
from tarsift.operators.isolation import IsolatedDecoder
from tests.operators.hostile_decoder import EAT, HANG, KILL, hostile


def jpeg(seed: int, size: tuple[int, int] = (50, 40)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def table(*images: bytes | None) -> pa.Table:
    return pa.table({"image": pa.array(images, pa.large_binary())})


def test_the_same_pixels_and_reasons_as_in_place():
    images = table(jpeg(0), None, jpeg(1, (300, 20)), b"<html>", jpeg(2)[:-200], jpeg(3, (700, 700)))
    config = ImageConfig(max_pixels=400_000)
    for mode in ("shortest", "squash"):
        inside, apart = (DecodeImages(32, resize_mode=mode, config=config, isolated=i)(images) for i in (False, True))
        assert inside.equals(apart)
        reasons = [None, None, None, "undecodable_image", "undecodable_image", "too_many_pixels"]
        assert apart["error"].to_pylist() == reasons


@pytest.mark.parametrize("word", [KILL, HANG, EAT])
def test_one_image_is_lost_and_the_next_ones_are_not(tmp_path, monkeypatch, word):
    monkeypatch.setenv("PYTHONPATH", hostile(tmp_path))
    images = [jpeg(i) for i in range(5)]
    images[1] += word
    images[3] += word
    config = ImageConfig(timeout_s=2 if word == HANG else 30)
    start = time.monotonic()
    decoded = DecodeImages(16, config=config, isolated=True)(table(*images))
    assert time.monotonic() - start < 60
    lost = "undecodable_image" if word == EAT else "decoder_died"  # an allocation that fails is an error like others
    assert decoded["error"].to_pylist() == [None, lost, None, lost, None]
    plain = DecodeImages(16)(table(*[image for i, image in enumerate(images) if i in (0, 2, 4)]))
    assert decoded["pixels"].drop_null().equals(plain["pixels"])


def test_a_decoder_ends_with_its_user():
    with IsolatedDecoder(8, interpolation="bicubic", resize_mode="shortest", config=ImageConfig()) as decode:
        assert decode(jpeg(0)).shape == (8, 8, 3)
        process = decode._process
        assert process
        assert process.poll() is None
        with pytest.raises(UnusableImage, match="undecodable_image"):
            decode(b"")
        assert decode._process is process
    assert process.poll() is not None


def test_a_worker_that_hangs_is_ended():
    """Also where a decoder holds the interpreter, which a regular expression does as well."""
    code = (
        "import re\n"
        "from tarsift.operators.isolation import killed_after\n"
        "with killed_after(60): pass\n"
        "print('in time', flush=True)\n"
        "with killed_after(1): re.match('(a+)+b', 'a' * 64)\n"
    )
    start = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert ended.stdout == "in time\n"
    assert "Timeout (0:00:01)!" in ended.stderr
    assert time.monotonic() - start < 100
