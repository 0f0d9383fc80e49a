from __future__ import annotations

import io
import os
import subprocess
import sys
import uuid
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from tarsift.operators import retry, storage
from tarsift.operators.errors import AccessError, StoreError, UsageError


@pytest.fixture(params=["path", "file", "memory"])
def root(request, tmp_path: Path) -> str:
    return {
        "path": str(tmp_path / "r"),
        "file": f"file://{tmp_path}/r",
        "memory": f"memory://{uuid.uuid4().hex}",
    }[request.param]


def test_what_is_written_is_read_listed_and_removed(root: str):
    assert storage.list_files(root) == []
    for name in ("b.json", "deep/er/a.json", "c.txt"):
        storage.put_bytes(storage.join(root, *name.split("/")), name.encode())
    assert storage.list_files(root, ".json") == ["b.json", "deep/er/a.json"]
    assert storage.list_files(root) == ["b.json", "c.txt", "deep/er/a.json"]
    url = storage.join(root, "deep/er/a.json")
    assert storage.read_bytes(url) == b"deep/er/a.json"
    storage.put_bytes(url, pa.py_buffer(b"new"))  # type: ignore[arg-type]
    assert storage.read_bytes(url) == b"new"
    assert storage.exists(url)
    storage.remove(url)
    storage.remove(url)
    assert not storage.exists(url)
    with pytest.raises(FileNotFoundError):
        storage.open_read(url)


def test_two_readers_of_a_file_do_not_share_a_position(root: str):
    url = storage.join(root, "x")
    storage.put_bytes(url, bytes(range(100)))
    with storage.open_read(url) as one, storage.open_read(url) as two:
        assert one.read(3) == two.read(3) == b"\0\1\2"
        one.seek(50)
        assert (one.read(1), two.read(1)) == (b"\x32", b"\3")


def test_a_write_that_fails_leaves_what_was_there(root: str):
    url = storage.join(root, "x")
    storage.put_bytes(url, b"old")
    with pytest.raises(RuntimeError), storage.open_write(url) as file:  # noqa: PT012
        file.write(b"half of the ne")
        raise RuntimeError
    assert storage.read_bytes(url) == b"old"
    assert storage.list_files(root) == ["x"]


def test_a_file_being_written_is_not_there_yet(root: str):
    url = storage.join(root, "x")
    with storage.open_write(url) as file:
        file.write(b"1" * 3_000_000)
        assert not storage.exists(url)
    assert len(storage.read_bytes(url)) == 3_000_000


def test_files_get_the_usual_permissions(tmp_path: Path):
    storage.put_bytes(str(tmp_path / "ours"), b"")
    (tmp_path / "usual").write_bytes(b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_is_local():
    assert all(map(storage.is_local, ["x", "/x", "file:///x", "a::b"]))
    assert not any(map(storage.is_local, ["memory://x", "s3://b/x", "hf://datasets/x"]))


def test_a_local_name_with_two_colons_is_no_chain(tmp_path: Path):
    storage.put_bytes(str(tmp_path / "a::memory:"), b"1")
    assert os.listdir(tmp_path) == ["a::memory:"]


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "..", "a/../b", "a//b", "./a", "a/", "a\0b", "s3://x", "a::b", "a\\b", "a\nb", "\udcff"]
)
def test_names_from_data_never_leave_their_folder(name: str):
    with pytest.raises(UsageError, match="the name"):
        storage.join("/out", name)


def test_join():
    assert storage.join("/out", "a", "b/c.tar") == "/out/a/b/c.tar"
    assert storage.join("/out/", "é ü") == "/out/é ü"
    assert storage.join("memory://", "x") == "memory://x"
    assert storage.join("s3://bucket/p") == "s3://bucket/p"


@pytest.mark.parametrize(("protocol", "driver", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs")])
def test_a_missing_driver_names_the_extra(monkeypatch, protocol: str, driver: str, extra: str):
    monkeypatch.delitem(_registry, protocol, raising=False)
    monkeypatch.setitem(sys.modules, driver, None)
    with pytest.raises(UsageError, match=rf"tarsift\[{extra}\]"):
        storage.filesystem(f"{protocol}://bucket/x")


def test_an_unknown_protocol_is_a_usage_error():
    with pytest.raises(UsageError, match="nosuch"):
        storage.filesystem("nosuch://x")


class _FlakyFile(io.BytesIO):
    """Breaks off in the middle of a file, each time it is opened."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() >= FlakyFileSystem.breaks_at:
            FlakyFileSystem.breaks_at += 2_000_000
            raise ConnectionResetError("reset by peer")
        return super().read(size)


class FlakyFileSystem(MemoryFileSystem):
    protocol = "flaky"
    store: dict = {}  # noqa: RUF012 (as in its parent)
    breaks_at = 1_500_000

    def _open(self, path, mode="rb", **kwargs):
        if mode != "rb":
            return super()._open(path, mode, **kwargs)
        return _FlakyFile(super()._open(path, mode).getvalue())


def test_a_remote_read_goes_on_where_it_broke_off(monkeypatch):
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.001)
    data = os.urandom(5_000_000)
    storage.put_bytes("flaky://x", data)
    assert storage.read_bytes("flaky://x") == data
    assert FlakyFileSystem.breaks_at > 5_000_000  # it did break off
    assert retry.take_repeated() == 2
    assert retry.take_repeated() == 0
    monkeypatch.setattr(retry, "_patience_s", 0.1)
    monkeypatch.setattr(_FlakyFile, "read", lambda self, size=-1: (_ for _ in ()).throw(ConnectionResetError("again")))
    with pytest.raises(StoreError, match=r"cannot read .* at byte 0: ConnectionResetError: again; tried for 0.1 s"):
        storage.read_bytes("flaky://x")


def test_passwords_and_signatures_are_not_told():
    told = storage.without_secrets(
        "403 for 'https://store.example/a.tar?X-Amz-Signature=abc&X=1' and s3://key:secret@bucket/x; what? a = b"
    )
    assert told == "403 for 'https://store.example/a.tar?***' and s3://***@bucket/x; what? a = b"


@pytest.mark.parametrize(
    ("error", "lasts"),
    [
        (FileNotFoundError(), True),
        (ValueError(), True),
        (type("ParamValidationError", (Exception,), {})(), True),
        (OSError("SlowDown"), False),
        (ConnectionResetError(), False),
        (TimeoutError(), False),
        (type("ClientPayloadError", (Exception,), {})(), False),
        (type("InvalidURL", (ValueError,), {"__module__": "aiohttp.client_exceptions"})(), False),
    ],
)
def test_what_waiting_does_not_mend_is_raised_at_once(monkeypatch, error: Exception, lasts: bool):
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.001)
    asked = []

    def request() -> str:
        asked.append(1)
        if len(asked) < 3:
            raise error
        return "answer"

    if lasts:
        with pytest.raises(type(error)):
            retry.retried(request, "ask")
    else:
        assert retry.retried(request, "ask") == "answer"
    assert len(asked) == (1 if lasts else 3)
    assert retry.take_repeated() == (0 if lasts else 2)


@pytest.mark.parametrize("error", [PermissionError("no"), type("NoCredentialsError", (Exception,), {})("none")])
def test_a_refusal_is_told_at_once_and_what_to_check(monkeypatch, error: Exception):
    asked = []

    def refuse(self, path, **kwargs):
        asked.append(path)
        raise error

    monkeypatch.setattr(MemoryFileSystem, "info", refuse)
    with pytest.raises(
        AccessError, match=rf"cannot look for memory://x: {type(error).__name__}: .*; check credentials"
    ):
        storage.exists("memory://x")
    with (
        pytest.raises(UsageError, match=r"'memory://x' cannot be reached: .*; check credentials"),
        storage.reachable("memory://x"),
    ):
        storage.exists("memory://x")
    assert len(asked) == 2


def test_a_folder_that_cannot_be_written_to(monkeypatch, tmp_path: Path):
    storage.refuse_unwritable(str(tmp_path / "new"))
    assert storage.list_files(str(tmp_path)) == []
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"file' cannot be reached: "):
        storage.refuse_unwritable(str(tmp_path / "file"))
    root = f"memory://{uuid.uuid4().hex}"
    monkeypatch.setattr(MemoryFileSystem, "rm_file", lambda self, path: (_ for _ in ()).throw(PermissionError()))
    storage.refuse_unwritable(root)  # may write, must not remove


def test_a_store_that_does_not_answer_is_no_missing_file(monkeypatch):
    def away(self, path, **kwargs):
        raise ConnectionRefusedError("nobody there")

    monkeypatch.setattr(MemoryFileSystem, "info", away)
    with storage.reachable("memory://x"):
        monkeypatch.setattr(retry, "_patience_s", 0.05)
        with pytest.raises(StoreError, match="nobody there"):
            storage.exists("memory://x")


def test_what_writers_that_died_have_left_is_removed(tmp_path: Path):
    code = (
        "import os; from tarsift.operators import storage\n"
        f"with storage.open_write({str(tmp_path / 'a' / 'b' / 'x.tar')!r}) as file: file.write(b'x'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    [left] = (tmp_path / "a" / "b").iterdir()
    kept = [tmp_path / "a" / "whole.tar", tmp_path / "a" / ".mine.tmp", tmp_path / "lock" / left.name]
    for path in kept:
        storage.put_bytes(str(path), b"whole")
    storage.remove_unfinished(str(tmp_path), leave="lock")
    assert not left.exists()
    assert all(path.exists() for path in kept)
    storage.remove_unfinished("memory://nothing")
