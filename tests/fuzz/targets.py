"""What is fuzzed: functions of bytes that check what must hold for every input. No fuzzer is needed to call them.

`benchmarks/fuzz.py` looks for inputs that reach new code; those it kept lie in `corpus/<target>/`, and the tests
call the targets with all of them.
"""

from __future__ import annotations

import io
import json
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa

from tarsift.operators.audit import AuditShard
from tarsift.operators.errors import IMAGE_USABLE, REASONS, SHARD_PROBLEMS
from tarsift.operators.samples import Placed
from tarsift.operators.shards import ReadConfig, Sample, SampleFields, Shard, ShardCounts, read_samples
from tarsift.operators.streams import ShardStream
from tarsift.operators.tar import Member
from tarsift.operators.writer import split_shard
from tarsift.pipelines.printing import plain
from tarsift.pipelines.report.folds import normalise, words_of
from tarsift.pipelines.text import JOINERS, visible
from tests.operators.trained import unscored

CORPUS = Path(__file__).parent / "corpus"
SMALL = ReadConfig(max_image_bytes=4096, max_caption_bytes=64, max_json_bytes=4096)
HOMES = ("clean", "removed", "errored")


def tar(data: bytes) -> None:
    """A shard is read to the end or to a named problem; splitting it loses no sample and makes sound archives.

    Of a shard without a problem, nothing that webdataset trains on goes unscored.
    """
    rows, problems = _read(data)
    assert all(problem in SHARD_PROBLEMS for problem in problems)
    assert problems or not unscored(data)
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.store["/s.tar"] = _file(memory, "/s.tar", data)
    homes = [HOMES[(len(data) + i * i) % 3] for i in range(len(rows))]
    outputs = {home: f"memory://{home}/s.tar" for home in HOMES}
    result = split_shard(Shard(name="s", url="memory://s.tar", size=len(data)), homes, outputs)
    assert (result.problem is not None) == bool(problems)
    for home in HOMES:
        wanted = [row for row, at in zip(rows, homes, strict=True) if at == home]
        assert result.homes[home].samples == len(wanted)
        if not result.homes[home].bytes:
            continue
        archive = memory.store[f"/{home}/s.tar"].getvalue()
        again, damage = _read(archive)
        # A problem of the file as a whole is carried over where the file is.
        assert not damage or (problems and archive == data), damage
        # Of the sample that is cut, what was whole is in its home; its image may be there or not.
        images = iter([row.image for row in again if row.image])
        whole = [row.image for row in wanted if row.image and row.error != "truncated_member"]
        assert all(image in images for image in whole)  # `in` takes from the iterator: the same order


def _read(data: bytes) -> tuple[list[SampleFields], list[str]]:
    counts = ShardCounts()
    source = ShardStream(io.BytesIO(data))
    rows = [sample.finish("s", SMALL) for sample in read_samples(source, SMALL, counts)]
    digest, size = source.finish()
    assert size == len(data)
    assert len(digest) == 64
    for row in rows:
        assert row.error is None or row.error in REASONS
        (row.key + row.uid).encode()
        assert (row.image is not None) <= (row.error is None or row.error in IMAGE_USABLE)
        assert row.label is None or 0 <= row.label < 2**31
        if row.image is not None and not source.compressed:
            assert row.image_offset is not None
            assert data[row.image_offset : row.image_offset + row.image_size] == row.image
    return rows, [problem.problem for problem in counts.problems]


def _file(memory: Any, path: str, data: bytes) -> Any:
    from fsspec.implementations.memory import MemoryFile

    return MemoryFile(memory, path, data)


def sample_json(data: bytes) -> None:
    """The json of a sample gives strings that can be stored, or a reason; so does what img2dataset wrote beside it."""
    for captions in ("json:caption", "txt"):
        config = SMALL.model_copy(update={"captions": captions})
        row = _sample(config, image=b"picture", json=data, txt=b"a thing")
        _check_text(row, config)
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.store["/s.tar"] = _file(memory, "/s.tar", bytes(10240))
    memory.store["/s_stats.json"] = _file(memory, "/s_stats.json", data)
    audit, _ = AuditShard(key=b"k" * 16)(Shard(name="s", url="memory://s.tar", size=10240))
    assert audit.problems
    json.dumps([problem.model_dump() for problem in audit.problems]).encode()


def caption(data: bytes) -> None:
    """A caption becomes text within bounds, safe in a terminal and in a page, and its words can be counted."""
    row = _sample(SMALL, image=b"picture", txt=data)
    _check_text(row, SMALL)
    text = row.caption
    if text is None:
        return
    assert not any(_acts(c) for c in plain(ValueError(text)) if c != "\n")
    assert not any(_acts(c) for c in visible(text, 60) if c not in JOINERS)  # some scripts need those
    normal = normalise(pa.array([text]))
    words = words_of(normal)[1].to_pylist()
    assert not any(_acts(c) for c in normal[0].as_py())
    assert all(word in normal[0].as_py() for word in words)


def _acts(character: str) -> bool:
    """Tell whether a terminal or a page would do something at this character other than show it."""
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _sample(config: ReadConfig, image: bytes, **parts: bytes) -> SampleFields:
    sample = Sample("key", repeats=False)
    bounds = {"txt": config.max_caption_bytes, "json": config.max_json_bytes}
    for part, data in (("jpg", image), *parts.items()):
        kept = data[: bounds.get(part, len(data))]
        if part == "json" and len(data) > config.max_json_bytes:
            kept = b""
        member = Member(f"key.{part}", "file", 0, b"", 512, len(data), kept)
        sample.add(Placed(member=member, row=0, key="key", part=part, repeats=False, closed=0, cut=False))
    return sample.finish("s", config)


def _check_text(row: SampleFields, config: ReadConfig) -> None:
    assert row.key == "key"
    assert row.uid
    row.uid.encode()
    assert row.error is None or row.error in IMAGE_USABLE
    assert row.image == b"picture"
    if row.caption is not None:
        assert row.caption.strip()
        assert len(row.caption) <= config.max_caption_bytes
        row.caption.encode()
    else:
        assert row.error


TARGETS: dict[str, Callable[[bytes], None]] = {"tar": tar, "json": sample_json, "caption": caption}


def kept(target: str) -> Iterator[Path]:
    """Yield the files of the kept corpus."""
    yield from sorted((CORPUS / target).iterdir())
