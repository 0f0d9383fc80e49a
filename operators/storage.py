"""Where bytes live: one small face over fsspec for local paths, `memory://`, `s3://` and the rest.

Nothing here needs a rename that the caller can see: a file that is written appears whole or not at
all. On a local disk it is written under another name in its folder first; for an object store it is
gathered in a local temporary file and put in one call.
"""

from __future__ import annotations

import io
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from tarsift.operators.access import CHECK_ALL, CHECKS, refusal, said
from tarsift.operators.errors import AccessError, TarsiftError, UsageError
from tarsift.operators.retry import first_contact, retried

# The extra of tarsift that brings a protocol's driver; others are named by fsspec itself.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}

# Switches off the repetitions of a driver, so that there is one policy: `retry`. (gcsfs has no such switch.)
ONE_ATTEMPT: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"retries": {"total_max_attempts": 1}, "connect_timeout": 10, "read_timeout": 30}}
}
ONE_ATTEMPT["s3a"] = ONE_ATTEMPT["s3"]

BLOCK_BYTES = 8 << 20

_UNFINISHED = re.compile(r"\.[0-9a-f]{16}\.tmp")  # names of files that are not whole yet

# What a URL may hold that is nobody else's business: user and password, and the query of a signed address.
_SECRETS = re.compile(r"://[^\s/@'\"]+@|\?[^\s'\"?]*=[^\s'\"]*")


def is_local(url: str) -> bool:
    """Tell whether `url` is a path on this machine."""
    return "://" not in url or url.startswith(("file://", "local://"))


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system that holds `url` and the path in it.

    Raises:
        UsageError: if the protocol is unknown, or its driver is not installed.
    """
    if not url or "\0" in url:
        raise UsageError(f"a path or URL must not be empty or hold a NUL character: got {url!r}")
    if is_local(url):  # not through `url_to_fs`: a local path may hold "::", which chains file systems there
        fs = LocalFileSystem()
        return fs, cast(str, fs._strip_protocol(url))
    protocol = url.split("://", 1)[0]
    try:
        fs, path = url_to_fs(url, **ONE_ATTEMPT.get(protocol, {}))
        if protocol in ONE_ATTEMPT:
            fs.retries = 1
        return fs, path
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        remedy = f"install `tarsift[{extra}]`" if extra else str(error)
        raise UsageError(f"{url!r}: no driver for {protocol}:// is installed; {remedy}") from error
    except ValueError as error:
        raise UsageError(f"{url!r}: {error}; use a path, s3://, gs://, hf://, http(s):// or memory://") from error


@contextmanager
def reachable(url: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what a store or its driver raises in the block into a sentence that says what to do.

    Raises:
        UsageError: in place of any error but those of tarsift, and of those by which a store refuses.
    """
    try:
        with first_contact():
            yield
    except TarsiftError as error:
        code = refusal(error.__cause__) if error.__cause__ else None
        if code is None:
            raise
        raise _unreachable(url, cast(BaseException, error.__cause__), CHECKS.get(code, CHECK_ALL)) from error
    except Exception as error:  # drivers raise their own
        remedy = "" if is_local(os.fspath(url)) else CHECKS.get(refusal(error) or "", CHECK_ALL)
        raise _unreachable(url, error, remedy) from error


def _unreachable(url: str | os.PathLike[str], error: BaseException, remedy: str) -> UsageError:
    told = without_secrets(f"{os.fspath(url)!r} cannot be reached: {said(error)}")
    return UsageError(f"{told}; {remedy}" if remedy else told)


def without_secrets(text: str) -> str:
    """Return text, such as an error's, with passwords and signatures in its URLs replaced by `***`."""
    return _SECRETS.sub(lambda found: "?***" if found[0].startswith("?") else "://***@", text)


def absolute(url: str) -> str:
    """Return a local path from the root: workers of a cluster need not run in this process's folder."""
    return os.path.abspath(url) if is_local(url) and "://" not in url else url


def check_name(name: str) -> str:
    """Return `name`, a relative path made of names found in data, if it stays below the folder it is put in.

    Raises:
        UsageError: if it is empty or absolute, or holds "..", "::", a backslash, control characters or
            bytes that are not UTF-8.
    """
    fault = None
    if not name or name.startswith("/") or "://" in name:
        fault = "is empty or absolute"
    elif any(part in ("", ".", "..") for part in name.split("/")):
        fault = 'has a part that is empty, "." or ".."'
    elif "::" in name or "\\" in name:
        fault = 'holds "::" or a backslash'
    elif any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000 for c in name):
        fault = "holds control characters or bytes that are not UTF-8"
    if fault:
        raise UsageError(f"the name {name!r} {fault}; rename the file it comes from")
    return name


def join(root: str, *parts: str) -> str:
    """Return the URL of `parts` below `root`; parts are checked by `check_name`."""
    if not parts:
        return root
    below = "/".join(check_name(part) for part in parts)
    return root + below if root.endswith("/") else f"{root}/{below}"


def open_read(url: str) -> BinaryIO:
    """Open a file for reading; a remote read that fails is tried again where it stopped.

    Raises:
        OSError: if it is not there or cannot be read.
    """
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        return open(path, "rb")
    return cast(BinaryIO, io.BufferedReader(_RemoteReader(fs, path), 1 << 20))


def read_bytes(url: str) -> bytes:
    """Return a whole file."""
    with open_read(url) as file:
        return file.read()


def put_bytes(url: str, data: bytes) -> None:
    """Write a whole file, replacing what was there, so that readers see the old or the new one."""
    with open_write(url) as file:
        file.write(data)


def create(url: str, data: bytes) -> bool:
    """Write a file that is not there yet; of several who try at once, each with data of its own, one gets True.

    A store that cannot be asked for that is looked at first, which two can do at the same instant.
    """
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        with _beside(path) as beside:
            with open(beside, "xb") as file:
                file.write(data)
            try:
                os.link(beside, path)  # unlike a rename it fails where the name is taken
            except FileExistsError:
                return False
        return True
    try:
        retried(lambda: fs.pipe_file(path, data, mode="create"), f"write {url}")
    except FileExistsError:
        return read_bytes(url) == data  # a request that did arrive and whose answer got lost was tried again
    except (NotImplementedError, TypeError, ValueError):
        if exists(url):
            return False
        put_bytes(url, data)
    return True


@contextmanager
def open_write(url: str) -> Iterator[BinaryIO]:
    """Write a file that appears when the block ends, and not at all if it is left by an exception.

    Parent folders are made on a local disk. Memory does not grow with the file, which can be read back meanwhile.
    """
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        with _beside(path) as beside:
            with open(beside, "x+b", buffering=1 << 20) as file:
                yield cast(BinaryIO, file)
                file.flush()
                os.fsync(file.fileno())  # or a loss of power could leave the new name with nothing in it
            os.replace(beside, path)
        return
    with tempfile.NamedTemporaryFile(buffering=1 << 20) as file:
        yield cast(BinaryIO, file)
        file.flush()
        retried(lambda: fs.put_file(file.name, path), f"write {url}")


@contextmanager
def _beside(path: str) -> Iterator[str]:
    """Give another name in the folder of a local file, for what is not whole yet; nothing of that name stays."""
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    beside = os.path.join(folder, f".{secrets.token_hex(8)}.tmp")  # as `_UNFINISHED` has it
    try:
        yield beside
    finally:
        with suppress(OSError):
            os.remove(beside)


def remove_unfinished(folder: str, *, leave: str = "") -> None:
    """Remove what writers that died have left below a folder, but for the folder `leave` in it.

    A writer that is at work there after all fails when its file is whole. Stores are left none by writers that die.
    """
    fs, path = filesystem(folder)
    if not isinstance(fs, LocalFileSystem):
        return
    for below, folders, files in os.walk(path):
        folders[:] = [name for name in folders if (below, name) != (path, leave)]
        for name in filter(_UNFINISHED.fullmatch, files):
            with suppress(OSError):
                os.remove(os.path.join(below, name))


def exists(url: str) -> bool:
    """Tell whether a file is there now, whatever an earlier listing said."""
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        return os.path.isfile(path)
    fs.invalidate_cache()
    try:  # not `isfile`, to which a store that does not answer has no file
        return retried(lambda: fs.info(path), f"look for {url}")["type"] != "directory"
    except (FileNotFoundError, NotADirectoryError):
        return False


def remove(url: str) -> None:
    """Remove a file; that it was not there is fine."""
    fs, path = filesystem(url)
    with suppress(FileNotFoundError):
        asked(fs, lambda: fs.rm_file(path), f"remove {url}")


def refuse_unwritable(folder: str) -> None:
    """Write a file below `folder` and remove it, before there is work whose result could not be put there.

    Raises:
        UsageError: if it cannot be written.
    """
    url = join(folder, f"write-test-{secrets.token_hex(8)}")
    with reachable(folder):
        put_bytes(url, b"")
        with suppress(AccessError):  # who may write need not be allowed to remove
            remove(url)


def remove_tree(folder: str) -> None:
    """Remove a folder and all below it; that it was not there is fine."""
    fs, path = filesystem(folder)
    with suppress(FileNotFoundError):
        asked(fs, lambda: fs.rm(path, recursive=True), f"remove {folder}")


def list_files(folder: str, suffix: str = "") -> list[str]:
    """Return the names below `folder`, at any depth and sorted, that end in `suffix`; none if it is not there.

    `join(folder, name)` is the URL of each.
    """
    fs, path = filesystem(folder)
    found = find(fs, path, suffix)
    return sorted(name[len(path.rstrip("/")) + 1 :] for name in found)


def find(fs: fsspec.AbstractFileSystem, path: str, suffix: str | tuple[str, ...] = "") -> dict[str, dict[str, Any]]:
    """Return path and facts (`size` among them) of the files below the folder `path` that end in `suffix`.

    The case of the suffix is ignored.
    """
    fs.invalidate_cache()
    try:
        listed = asked(fs, lambda: fs.find(path, detail=True), f"list {path}")
        infos = cast(dict[str, dict[str, Any]], listed)
    except FileNotFoundError:
        return {}
    below = path.rstrip("/") + "/"
    found = {}
    for name, info in infos.items():
        is_file = info.get("type") == "file" or info.get("islink")
        if is_file and name.startswith(below) and name.lower().endswith(suffix):
            found[name] = info
    return found


def asked(fs: fsspec.AbstractFileSystem, request: Callable[[], Any], doing: str) -> Any:
    """Return what a request to a file system returns, tried again as `retried` does where that is remote."""
    return request() if isinstance(fs, LocalFileSystem) else retried(request, doing)


class _RemoteReader(io.RawIOBase):
    """A remote file that is opened again at the same byte when a read fails."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str) -> None:
        self._fs, self._path, self._at = fs, path, 0
        self._file: Any = None
        self._file = retried(self._open, f"open {path}")

    def _open(self) -> Any:
        if "memory" in self._fs.protocol:  # there, all readers of a file share one position
            file: Any = io.BytesIO(cast(bytes, self._fs.cat_file(self._path)))
        else:
            file = self._fs.open(self._path, "rb", block_size=BLOCK_BYTES)
        if self._at:
            file.seek(self._at)
        return file

    def _read(self, size: int) -> bytes:
        if self._file is None:
            self._file = self._open()
        try:
            return self._file.read(size)
        except Exception:
            self._file = None
            raise

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = retried(lambda: self._read(len(view)), f"read {self._path} at byte {self._at}")
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        if self._file is None:
            self._file = retried(self._open, f"open {self._path}")
        self._at = self._file.seek(offset, whence)
        return self._at

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        super().close()
