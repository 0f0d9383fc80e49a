"""Decoding in a process of its own: the same pixels, and a decoder that dies, hangs or eats takes one image with it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tarsift.operators.decoding import ImageConfig, UnusableImage
from tarsift.operators.errors import ConfigError, TarsiftError
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


def test_pictures_as_they_are_or_a_look_alone():
    tall, flat = jpeg(0, (300, 20)), jpeg(1, (9, 64))
    with IsolatedDecoder(config=ImageConfig(max_pixels=10_000)) as decode:
        for image in (tall, flat, tall):
            np.testing.assert_array_equal(decode(image), np.asarray(Image.open(io.BytesIO(image))))
            decode.check(image)
        for ask in (decode, decode.check):
            with pytest.raises(UnusableImage, match="undecodable_image"):
                ask(flat[:-200])
            with pytest.raises(UnusableImage, match="too_many_pixels"):
                ask(jpeg(2, (101, 100)))


def test_images_decoded_ahead_are_answered_in_their_turn(tmp_path, monkeypatch):
    """Small ones many at once, large ones alone; what dies takes none of those behind it along."""
    monkeypatch.setenv("PYTHONPATH", hostile(tmp_path))
    images: list[bytes | None] = [jpeg(i, (20 + i, 30)) for i in range(90)]
    images[40:43] = [None, jpeg(40, (700, 900)), jpeg(41, (600, 900))]
    images[70] = None
    wanted = [None if image is None else np.asarray(Image.open(io.BytesIO(image))) for image in images]
    for row in (0, 5, 6, 41, 89):
        images[row] = (images[row] or b"") + KILL
    images[7] = b"<html>"
    reasons = dict.fromkeys((0, 5, 6, 41, 89), "decoder_died") | {7: "undecodable_image"}
    with IsolatedDecoder(config=ImageConfig()) as decode:
        for pixels in (True, False):
            answers = list(decode.each(enumerate(images), lambda item: item[1], pixels=pixels))
            assert [row for (row, _), _ in answers] == list(range(90))
            for (row, _), answer in answers:
                if row in reasons:
                    assert isinstance(answer, UnusableImage)
                    assert answer.reason == reasons[row]
                elif wanted[row] is None:
                    assert answer is None
                elif pixels:
                    np.testing.assert_array_equal(answer, wanted[row])
        abandoned = decode.each(images, lambda image: image)
        next(abandoned)
        del abandoned
        np.testing.assert_array_equal(decode(images[1] or b""), wanted[1])


def test_what_is_wrong_with_the_decoder_is_not_blamed_on_images(monkeypatch):
    with pytest.raises(ConfigError, match="`interpolation` must be bicubic or bilinear, got 'nearest'"):
        IsolatedDecoder(8, interpolation="nearest", config=ImageConfig())
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with (
        IsolatedDecoder(config=ImageConfig()) as decode,
        pytest.raises(TarsiftError, match="no process to decode images in could be started"),
    ):
        decode(jpeg(0))


def test_neither_a_request_to_stop_nor_the_folder_it_runs_in_ends_a_decoder(tmp_path, monkeypatch):
    (tmp_path / "numpy.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    with IsolatedDecoder(config=ImageConfig()) as decode:
        decode.check(jpeg(0))
        process = decode._process
        assert process
        assert os.getpgid(process.pid) != os.getpgid(0)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        decode.check(jpeg(0))
        assert decode._process is process


def test_a_decoder_that_hangs_ends_without_its_user(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", hostile(tmp_path))
    (tmp_path / "image").write_bytes(jpeg(0) + HANG)
    code = (
        "import pathlib, sys\n"
        "from tarsift.operators.decoding import ImageConfig\n"
        "from tarsift.operators.isolation import IsolatedDecoder\n"
        "decode = IsolatedDecoder(config=ImageConfig(timeout_s=2))\n"
        "print(decode._start().pid, flush=True)\n"
        "decode(pathlib.Path(sys.argv[1]).read_bytes())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "image"], stdout=subprocess.PIPE) as user:
        assert user.stdout
        decoder = int(user.stdout.readline())
        time.sleep(0.5)
        user.kill()
    deadline = time.monotonic() + 60
    while is_running(decoder):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_running(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"  # ended, though nobody has asked how
    except FileNotFoundError:
        return False


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
