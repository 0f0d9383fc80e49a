"""The bytes of a shard on their way in: digested as they are in the file, then decompressed.

Neither step raises on damage. The stream ends where it can no longer be decompressed, and `problem` says
why, so that everything before that point is handed over, the same in every reading. A file that cannot be read
on is no damage: another reading may find it whole, so that it must not pass for one that is shorter.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from tarsift.operators import storage
from tarsift.operators.access import unread

# As in tarfile: the two magic bytes and "deflate". The name of a file says nothing for certain.
GZIP_MAGIC = b"\x1f\x8b\x08"
BUFFER_BYTES = 1 << 20
GZIP_PIECE_BYTES = 1 << 14


class DigestingReader(io.RawIOBase):
    """Pass a file's bytes through, with their number and their SHA-256.

    Args:
        url: of the file, for the error where it cannot be read on; the OSError as it came where None.
    """

    def __init__(self, file: BinaryIO, url: str | None = None) -> None:
        self._file: Any = file
        self._url = url
        self._sha256 = hashlib.sha256()
        self.bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            count = self._file.readinto(buffer)
        except OSError as error:
            if self._url is None:
                raise
            raise unread(self._url, error) from error
        self._sha256.update(memoryview(buffer)[:count])
        self.bytes += count
        return count

    @property
    def sha256(self) -> str:
        """SHA-256 of the bytes read so far, in hexadecimal."""
        return self._sha256.hexdigest()


class GunzipReader(io.RawIOBase):
    """Decompress gzip, one member after the other, in bounded memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._member: Any = None
        self._input = self._output = b""
        self._first = True
        self._ended = False
        self.problem: tuple[str, str] | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # Pieces are the same whatever is asked for, so that damage ends every reading at the same byte.
        while not self._output and not self._ended:
            self._output = self._next_piece()
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _next_piece(self) -> bytes:
        at_end = False
        if not self._input:
            self._input = self._file.read(GZIP_PIECE_BYTES)
            at_end = not self._input
        if self._member is None:
            if not self._first:
                self._input = self._input.lstrip(b"\0")  # some writers pad with zeros
            if at_end:
                self._ended = True
            if not self._input:
                return b""
            self._member = zlib.decompressobj(wbits=31)  # 31: a gzip header and its checksum
            self._first = False
        try:
            output = self._member.decompress(self._input, GZIP_PIECE_BYTES)
        except zlib.error as error:
            return self._damaged(str(error))
        if self._member.eof:
            self._input = self._member.unused_data
            self._member = None
        else:
            self._input = self._member.unconsumed_tail
            if at_end and not output:
                return self._damaged("the file ends inside a gzip member")
        return output

    def _damaged(self, detail: str) -> bytes:
        self._ended = True
        self.problem = ("gzip_damage", detail)
        return b""


class ShardStream:
    """A shard that is being read: `tar` gives the bytes of the archive, the rest is about the file."""

    def __init__(self, file: BinaryIO, url: str | None = None) -> None:
        self._digesting = DigestingReader(file, url)
        self._file = io.BufferedReader(self._digesting, BUFFER_BYTES)
        self.compressed = self._file.peek(len(GZIP_MAGIC)).startswith(GZIP_MAGIC)
        self._gunzip = GunzipReader(cast(BinaryIO, self._file)) if self.compressed else None
        self.tar = cast(BinaryIO, io.BufferedReader(self._gunzip, BUFFER_BYTES) if self._gunzip else self._file)

    @property
    def problem(self) -> tuple[str, str] | None:
        """Why the bytes ended early, as a code of SHARD_PROBLEMS and a sentence; None if they did not."""
        return self._gunzip.problem if self._gunzip else None

    def finish(self) -> tuple[str, int]:
        """Read what is left of the file and return its SHA-256 and its number of bytes."""
        while self._file.read(BUFFER_BYTES):
            pass
        return self._digesting.sha256, self._digesting.bytes


@contextmanager
def open_shard(url: str) -> Iterator[ShardStream]:
    """Open a `.tar` or `.tar.gz`, told apart by its first bytes.

    Raises:
        FileNotFoundError: if it is not there.
        IsADirectoryError: if it is a folder.
        StoreError, AccessError: if it cannot be opened, or cannot be read on, for what is no fault of its own.
    """
    try:
        file = storage.open_read(url)
    except (FileNotFoundError, IsADirectoryError):
        raise
    except OSError as error:
        raise unread(url, error) from error
    with file:
        yield ShardStream(file, url)
