"""Decoding in a process of its own, for images whose decoder may die, hang or eat all memory.

Slower than decoding in place, and only the image at fault is lost: the next one gets a new process.
Run as a program this module is that process: it reads images from its standard input, each after 4
bytes that say how long it is, and answers in the same way, after one byte that says whether these are its pixels
or the reason why there are none.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import selectors
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import UInt8

from tarsift.operators.decoding import ImageConfig, UnusableImage, decode_image, fit_to_square, strict_pillow

HANG_IMAGES = 2  # images that may take all the time one has, before a process that decodes in place is taken to hang
START_S = 60.0  # to import numpy and Pillow on a busy machine
BYTES_PER_PIXEL = 16  # of what decoders were seen to hold at once
BASE_BYTES = 1 << 30
LENGTH = struct.Struct("<I")
ANSWER = struct.Struct("<?I")


class IsolatedDecoder:
    """Images to pixels (size, size, 3) uint8, as `DecodeImages` does it, one process for as long as it lives.

    Use as a context manager. Settings are those of `fit_to_square`.
    """

    def __init__(self, size: int, *, interpolation: str, resize_mode: str, config: ImageConfig) -> None:
        self.size, self.config = size, config
        self._settings = {"size": size, "interpolation": interpolation, "resize_mode": resize_mode}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> IsolatedDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def __call__(self, image: bytes) -> UInt8[np.ndarray, "size size 3"]:
        """Decode one image.

        Raises:
            UnusableImage: with the reason; `decoder_died` if it killed its process or did not end in time.
        """
        try:
            return self._ask(image)
        except (OSError, EOFError, TimeoutError):
            self._end()
            raise UnusableImage("decoder_died") from None

    def _ask(self, image: bytes) -> np.ndarray:
        if self._process is None:
            self._process = self._start()
        assert self._process.stdin
        self._process.stdin.write(LENGTH.pack(len(image)) + image)
        self._process.stdin.flush()
        deadline = time.monotonic() + self.config.timeout_s
        usable, length = ANSWER.unpack(self._read(ANSWER.size, deadline))
        answer = self._read(length, deadline)
        if not usable:
            raise UnusableImage(answer.decode())
        return np.frombuffer(answer, np.uint8).reshape(self.size, self.size, 3)

    def _start(self) -> subprocess.Popen[bytes]:
        settings = json.dumps(self._settings | {"config": self.config.model_dump()})
        command = [sys.executable, "-m", "tarsift.operators.isolation", settings]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._process = process
        self._read(1, time.monotonic() + START_S)
        return process

    def _read(self, size: int, deadline: float) -> bytes:
        assert self._process
        assert self._process.stdout
        pieces, missing = [], size
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while missing:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                piece = os.read(self._process.stdout.fileno(), missing)
                if not piece:
                    raise EOFError
                pieces.append(piece)
                missing -= len(piece)
        return b"".join(pieces)

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            with suppress(BrokenPipeError):
                self._process.communicate()
            self._process = None


@contextmanager
def killed_after(seconds: float) -> Iterator[None]:
    """End this process if the block hangs, even where a decoder holds the interpreter; another one takes its place."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def serve(settings: dict[str, Any], requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more."""
    config = ImageConfig(**settings.pop("config"))
    fit = fit_to_square(**settings, max_pixels=config.max_pixels)
    limit = BASE_BYTES + BYTES_PER_PIXEL * config.max_pixels
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    answers.write(b"r")
    answers.flush()
    with strict_pillow(config.max_pixels):
        while header := requests.read(LENGTH.size):
            image = requests.read(LENGTH.unpack(header)[0])
            try:
                usable, answer = True, decode_image(image, fit=fit, config=config).tobytes()
            except UnusableImage as unusable:
                usable, answer = False, unusable.reason.encode()
            answers.write(ANSWER.pack(usable, len(answer)) + answer)
            answers.flush()


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a decoder prints is no answer
    serve(json.loads(sys.argv[1]), sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
