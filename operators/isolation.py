"""Decoding in a process of its own, for images whose decoder may die, hang or eat all memory.

It costs some 50 microseconds an image, and only the image at fault is lost: the next one gets a new process.
Run as a program this module is that process: it reads images from its standard input, each after a byte that
says whether its pixels are wanted and 4 that say how long it is, and answers with a byte that says whether it
could be decoded and the shape of what follows: pixels, or the reason why there are none.
"""

from __future__ import annotations

import faulthandler
import fcntl
import json
import math
import os
import resource
import select
import selectors
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, BinaryIO, TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from tarsift.operators.decoding import (
    ImageConfig,
    UnusableImage,
    check_fit,
    decode_image,
    fit_to_square,
    strict_pillow,
)
from tarsift.operators.errors import TarsiftError

Item = TypeVar("Item")
HANG_IMAGES = 2  # images that may take all the time one has, before a process that decodes in place is taken to hang
START_S = 60.0  # to import numpy and Pillow on a busy machine
BYTES_PER_PIXEL = 16  # of what decoders were seen to hold at once
BASE_BYTES = 1 << 30
PIPE_BYTES = 1 << 18
AHEAD = 32  # items, at most
REQUEST = struct.Struct("<?I")
ANSWER = struct.Struct("<?3I")


class IsolatedDecoder:
    """Images to pixels in another process, one for as long as it lives; started when it is first needed.

    Use as a context manager.

    Args:
        size: side of the squares that images are brought to, with the settings of `fit_to_square`; None: pixels are
            those of the image as it is.
        config: limits and formats.

    Raises:
        ConfigError: if `interpolation` or `resize_mode` is not one of open_clip's.
    """

    def __init__(
        self,
        size: int | None = None,
        *,
        interpolation: str = "bicubic",
        resize_mode: str = "shortest",
        config: ImageConfig,
    ) -> None:
        check_fit(interpolation=interpolation, resize_mode=resize_mode)
        self.config = config
        self._settings = {"size": size, "interpolation": interpolation, "resize_mode": resize_mode}
        self._process: subprocess.Popen[bytes] | None = None
        self._selector = selectors.DefaultSelector()
        self._window = 0  # bytes of requests that its pipe holds
        self._asked: deque[tuple[bytes, bool]] = deque()  # requests without an answer

    def __enter__(self) -> IsolatedDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._selector.close()

    def __call__(self, image: bytes) -> UInt8[np.ndarray, "h w 3"]:
        """Decode one image to RGB.

        Raises:
            UnusableImage: with the reason; `decoder_died` if it killed its process or did not end in time.
            TarsiftError: if no process can be started.
        """
        [(_, answer)] = self.each([image], lambda it: it)
        if isinstance(answer, UnusableImage):
            raise answer
        assert answer is not None
        return answer

    def check(self, image: bytes) -> None:
        """Decode one image and throw its pixels away.

        Raises:
            As a call does.
        """
        [(_, answer)] = self.each([image], lambda it: it, pixels=False)
        if isinstance(answer, UnusableImage):
            raise answer

    def each(
        self, items: Iterable[Item], image: Callable[[Item], bytes | None], *, pixels: bool = True
    ) -> Iterator[tuple[Item, np.ndarray | UnusableImage | None]]:
        """Decode the images of items, some of them ahead; there is no other use of this decoder meanwhile.

        Args:
            image: gives the image of an item, None if it has none.
            pixels: whether pixels are wanted, or only whether there are any.

        Yields:
            Each item in its turn, with the pixels of its image, or the reason for which there are none.

        Raises:
            TarsiftError: if no process can be started.
        """
        assert not self._asked
        ahead: deque[tuple[Item, bytes | None]] = deque()

        def first() -> tuple[Item, np.ndarray | UnusableImage | None]:
            item, data = ahead.popleft()
            return item, None if data is None else self._receive()

        try:
            for item in items:
                data = image(item)
                while ahead and (len(ahead) >= AHEAD or not self._has_room(data)):
                    yield first()
                if data is not None:
                    self._send(data, pixels)
                ahead.append((item, data))
            while ahead:
                yield first()
        finally:
            if self._asked:  # nobody waits for the answers
                self._end()

    def _has_room(self, image: bytes | None) -> bool:
        """Tell whether a request can be written at once: while a decoder waits to answer it does not read."""
        sizes = (REQUEST.size + len(data) for data, _ in self._asked)
        return image is None or not self._asked or sum(sizes) + REQUEST.size + len(image) <= self._window

    def _send(self, image: bytes, pixels: bool) -> None:
        process = self._process or self._start()
        self._asked.append((image, pixels))
        assert process.stdin
        with suppress(OSError):  # it has died, perhaps of an earlier image: the answers will tell
            process.stdin.write(REQUEST.pack(pixels, len(image)) + image)
            process.stdin.flush()

    def _receive(self) -> np.ndarray | UnusableImage:
        """Return the answer to the first request; if there is none, ask another process the others."""
        try:
            deadline = time.monotonic() + self.config.timeout_s
            usable, *shape = ANSWER.unpack(self._read(ANSWER.size, deadline))
            answer = self._read(math.prod(shape), deadline)
        except (OSError, EOFError, TimeoutError):
            _, *others = self._asked
            self._end()
            for request in others:
                self._send(*request)
            return UnusableImage("decoder_died")
        self._asked.popleft()
        if not usable:
            return UnusableImage(answer.decode())
        return np.frombuffer(answer, np.uint8).reshape(shape)

    def _start(self) -> subprocess.Popen[bytes]:
        settings = json.dumps(self._settings | {"config": self.config.model_dump()})
        # Not in the folder of whoever runs this, and not asked to stop when that one is: it ends with its user.
        command = [sys.executable, "-P", "-m", "tarsift.operators.isolation", settings]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._process = process
        assert process.stdin
        assert process.stdout
        _capacity(process.stdout.fileno())
        self._window = _capacity(process.stdin.fileno()) // 2  # requests begin on pages of their own, at worst
        os.set_blocking(process.stdout.fileno(), False)
        self._selector.register(process.stdout, selectors.EVENT_READ)
        try:
            self._read(1, time.monotonic() + START_S)
        except (OSError, EOFError, TimeoutError) as error:
            self._end()
            raise TarsiftError(
                f"no process to decode images in could be started ({type(error).__name__}, it ended with "
                f"{process.returncode}): is there memory left, and can {sys.executable} import tarsift?"
            ) from error
        return process

    def _read(self, size: int, deadline: float) -> bytearray:
        assert self._process
        assert self._process.stdout
        data = bytearray(size)
        view = memoryview(data)
        while view:
            try:
                read = os.readv(self._process.stdout.fileno(), [view])
            except BlockingIOError:
                if not self._selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError from None
                continue
            if not read:
                raise EOFError
            view = view[read:]
        return data

    def _end(self) -> None:
        self._asked.clear()
        if self._process is not None:
            assert self._process.stdout
            self._selector.unregister(self._process.stdout)
            self._process.kill()
            os.set_blocking(self._process.stdout.fileno(), True)
            with suppress(BrokenPipeError):
                self._process.communicate()
            self._process = None


def _capacity(pipe: int) -> int:
    """Make a pipe larger where that can be done, and return how many bytes it holds at least."""
    try:
        with suppress(OSError):  # there is a limit on those of a user
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        return fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ)
    except AttributeError:  # not on Linux
        return select.PIPE_BUF


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
    fit = _as_it_is if settings["size"] is None else fit_to_square(**settings, max_pixels=config.max_pixels)
    decode, look = (partial(decode_image, fit=function, config=config) for function in (fit, _corner))
    limit = BASE_BYTES + BYTES_PER_PIXEL * config.max_pixels
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    answers.write(b"r")
    answers.flush()
    with strict_pillow(config.max_pixels):
        while header := requests.read(REQUEST.size):
            wanted, length = REQUEST.unpack(header)
            image = requests.read(length)
            # Where the one who asks is gone, nobody else ends a decoder that hangs.
            signal.setitimer(signal.ITIMER_REAL, 2 * config.timeout_s)
            try:
                pixels = (decode if wanted else look)(image)
                usable, shape, answer = True, pixels.shape, pixels.tobytes()
            except UnusableImage as unusable:
                answer = unusable.reason.encode()
                usable, shape = False, (len(answer), 1, 1)
            signal.setitimer(signal.ITIMER_REAL, 0)
            answers.write(ANSWER.pack(usable, *shape) + answer)
            answers.flush()


def _as_it_is(image: Image.Image) -> Image.Image:
    return image


def _corner(image: Image.Image) -> Image.Image:
    """Return one pixel of an image that is decoded whole: enough for who asks whether that can be done."""
    return image.crop((0, 0, 1, 1))


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # which all processes of a job get, where its user may go on a while
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a decoder prints is no answer
    serve(json.loads(sys.argv[1]), sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
