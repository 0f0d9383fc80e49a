"""An S3 server for tests: moto's, as a process of its own, behind a proxy that fails, or refuses, like a real store."""

from __future__ import annotations

import http.client
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import fsspec

from tests.pipelines.runs import RESULTS

SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
# What S3 answers where access is wrong: status by code.
REFUSALS = {
    "AccessDenied": 403,
    "InvalidAccessKeyId": 403,
    "SignatureDoesNotMatch": 403,
    "ExpiredToken": 400,
    "InvalidToken": 400,
    "AuthorizationHeaderMalformed": 400,
}
LONGEST_STREAK = 3
HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "content-length"}


@dataclass
class Store:
    """Where the server listens, how often the proxy fails, and how often it did, by kind.

    It does not fail by chance more than `LONGEST_STREAK` times in a row for one object: a command's patience is
    tried by `away_until`.
    """

    endpoint: str = ""
    direct: str = ""  # the server itself, which does not fail
    rate: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    away_until: float = 0.0  # by time.monotonic(): until then nobody is served
    refusal: str = ""  # one of REFUSALS: every request is refused with it
    refuse_from: int = 0  # but only those of objects from this byte on
    break_off: int = 0  # so many of the next answers that begin in the middle of an object break off
    resets: list[str] = field(default_factory=list)  # ranges whose answer broke off in the middle
    streaks: Counter[str] = field(default_factory=Counter)  # how often in a row it has failed now, by path

    @property
    def environment(self) -> dict[str, str]:
        """What processes need to use it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


def files_of(store: Store) -> Any:
    """Return the store's file system, past the proxy that fails."""
    given = store.environment
    keys = {"key": given["AWS_ACCESS_KEY_ID"], "secret": given["AWS_SECRET_ACCESS_KEY"]}
    return fsspec.filesystem("s3", endpoint_url=store.direct, use_listings_cache=False, **keys)


def stored(store: Store, out: str) -> dict[str, bytes]:
    """Return all results of a run in a bucket, by path, as `runs.contents` does on a disk."""
    files = files_of(store)
    found = {
        path.removeprefix(f"{out}/"): files.cat_file(path)
        for results in RESULTS
        for path in files.find(f"{out}/{results}")
        if "/.parts/" not in path
    }
    return {**found, "keep.parquet": files.cat_file(f"{out}/keep.parquet")}


@contextmanager
def s3_server(*, seed: int = 0) -> Iterator[Store]:
    """Run a server and its proxy; both end with the block."""
    port = _free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, server)
        with s3_proxy(port, seed=seed) as store:
            yield store
    finally:
        server.kill()
        server.wait()


@contextmanager
def s3_proxy(port: int = 0, *, seed: int = 0) -> Iterator[Store]:
    """Run the proxy of the server at `port`; without one it can do nothing but refuse."""
    store, rng, guard = Store(direct=f"http://127.0.0.1:{port}"), random.Random(seed), threading.Lock()

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with guard:
                store.requests += 1
                fails, resets = rng.random() < store.rate, rng.random() < 0.5
                path = self.path.partition("?")[0]
                fails = fails and store.streaks[path] < LONGEST_STREAK
                store.streaks[path] = store.streaks[path] + 1 if fails else 0
                if store.break_off and _first_byte(self.headers) > 0:
                    store.break_off -= 1
                    fails = resets = True
            if store.refusal and _first_byte(self.headers) >= store.refuse_from:
                store.failures[store.refusal] += 1
                self._answer(REFUSALS[store.refusal], {"Content-Type": "application/xml"}, _refusal(store.refusal))
                return
            if time.monotonic() < store.away_until or (fails and not (resets and self.command == "GET")):
                store.failures["503"] += 1
                self._answer(503, {"Content-Type": "application/xml"}, SLOW_DOWN)
                return
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request(self.command, self.path, body, dict(self.headers))
            response = connection.getresponse()
            content = response.read()
            headers = {k: v for k, v in response.getheaders() if k.lower() not in HOP_BY_HOP}
            if self.command == "HEAD":
                headers["Content-Length"] = response.getheader("Content-Length") or "0"
            if fails and len(content) > 1:
                store.failures["reset"] += 1
                store.resets.append(self.headers.get("Range") or "")
                self.send_response(response.status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            self._answer(response.status, headers, content)

        def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _forward

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    store.endpoint = f"http://127.0.0.1:{proxy.server_address[1]}"
    thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield store
    finally:
        proxy.shutdown()
        proxy.server_close()


def _refusal(code: str) -> bytes:
    region = "<Region>eu-west-3</Region>" if code == "AuthorizationHeaderMalformed" else ""
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>No.</Message>{region}</Error>".encode()


def _first_byte(headers: Message) -> int:
    return int((headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert server.poll() is None, "the server ended"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError("the server does not listen")
