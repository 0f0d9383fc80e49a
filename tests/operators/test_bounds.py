"""What reading takes, whatever is in a shard: the peak of a process of its own for every trap."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tarsift.operators.shards import ReadConfig
from tests.operators.tars import archive, header, member, pax
from tests.traps import MAX_IMAGE_BYTES, MB, gzip_bomb, make_traps, member_bomb

# As SECURITY.md states it: with default settings, and beside two images of `max_image_bytes`. Whole payloads of
# the bombs are larger.
BOUND = 256 * MB
IMAGE_BYTES = 16 * MB
# The traps are small, or far over a limit: one that is held although nothing asks for it shows up.
TRAPS_BOUND = 16 * MB
# Forked, so that all children begin with the same memory.
CODE = """
import json, os, sys
from tarsift.operators.shards import ReadConfig, ReadShard, Shard
read = ReadShard(ReadConfig(**json.loads(sys.argv[1])), receipts=True)
for path in sys.argv[2:]:
    child = os.fork()
    if not child:
        code = 1
        try:
            for table in read(Shard("s", path, 0)):
                table.validate()
            code = 0
        finally:
            os._exit(code)
    _, status, used = os.wait4(child, 0)
    print(json.dumps([status, used.ru_maxrss * 1024]), flush=True)
"""


def peaks(folder: Path, shards: list[Path], config: ReadConfig, *, timeout: float) -> dict[str, int]:
    """Return by how many bytes more than for an empty shard memory rises in reading each."""
    (folder / "empty").write_bytes(archive([]))
    arguments = [config.model_dump_json(), str(folder / "empty"), *map(str, shards)]
    done = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    (status, baseline), *others = map(json.loads, done.stdout.splitlines())
    assert status == 0
    assert [status for status, _ in others] == [0] * len(shards), done.stderr
    return {shard.name: peak - baseline for shard, (_, peak) in zip(shards, others, strict=True)}


def test_no_trap_takes_more_memory_than_is_stated(tmp_path):
    make_traps(tmp_path / "dump", tmp_path / "canary", good=0)
    shards = sorted((tmp_path / "dump").glob("*.tar*"))
    config = ReadConfig(max_image_bytes=MAX_IMAGE_BYTES)
    taken = peaks(tmp_path, shards, config, timeout=300)
    assert max(taken.values()) < TRAPS_BOUND, {name: f"{peak >> 20} MB" for name, peak in taken.items()}


def images_alone(path: Path, size: int) -> None:
    """Write images as large as is allowed, each of a sample that waits for its caption."""
    with gzip.open(path, "wb", 1) as file:
        for number in range(size // IMAGE_BYTES):
            file.write(header(b"%03d.jpg" % number, IMAGE_BYTES) + bytes(IMAGE_BYTES))
        file.write(bytes(1024))


def long_names(path: Path, size: int) -> None:
    """Write members with names as long as is allowed, that take four bytes for each of theirs once they are text."""
    with gzip.open(path, "wb", 1) as file:
        for number in range(size // MB):
            file.write(pax(path="\N{GRINNING FACE}" + "x" * 1_000_000 + f"{number}.txt") + member("y", b"a"))
        file.write(bytes(1024))


@pytest.mark.parametrize(
    ("bomb", "size", "bound"),
    [
        (gzip_bomb, 512 * MB, BOUND),
        (images_alone, 512 * MB, BOUND),
        (member_bomb, 200_000, BOUND),
        (long_names, 300 * MB, 4 * BOUND),
    ],
)
def test_no_bomb_takes_more_memory_than_is_stated(tmp_path, bomb, size, bound):
    bomb(tmp_path / "bomb.tar.gz", size)
    assert (tmp_path / "bomb.tar.gz").stat().st_size < 12 * MB
    config = ReadConfig(max_image_bytes=IMAGE_BYTES)
    taken = peaks(tmp_path, [tmp_path / "bomb.tar.gz"], config, timeout=300)["bomb.tar.gz"]
    assert taken < bound + 2 * IMAGE_BYTES, f"{taken >> 20} MB"
