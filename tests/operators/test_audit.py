"""AuditShard: every cut and every damaged header is noticed; what lies beside a shard must agree with it."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import pickle
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tarsift.operators import storage
from tarsift.operators.audit import PROBLEMS, AuditShard, ShardAudit, shared_uids
from tarsift.operators.errors import AccessError
from tarsift.operators.shards import Shard
from tests.operators.tars import archive, breaking, member

END = 1024  # two zero blocks
SAMPLES = 12


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 24, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=90)
    return out.getvalue()


def members(samples: int = SAMPLES, **fields) -> list[bytes]:
    made = []
    for i in range(samples):
        image = jpeg(i)
        stated = {name: value(image) if callable(value) else value for name, value in fields.items()}
        made += [member(f"{i:05d}.jpg", image), member(f"{i:05d}.txt", b"a caption of number %d" % i)]
        made += [member(f"{i:05d}.json", json.dumps(stated).encode())] if fields else []
    return made


def put(folder: Path, data: bytes, name: str = "s.tar") -> Shard:
    path = folder / name
    path.write_bytes(data)
    return Shard(name.partition(".")[0], str(path), len(data))


def look(shard: Shard, **options) -> ShardAudit:
    return AuditShard(**options)(shard)[0]


def found(audit: ShardAudit) -> dict[str, int]:
    assert {problem.problem for problem in audit.problems} <= PROBLEMS.keys()
    return {problem.problem: problem.count for problem in audit.problems}


@pytest.mark.parametrize("decode", [False, True])
def test_a_whole_shard(tmp_path: Path, decode: bool):
    data = archive(members())
    audit = look(put(tmp_path, data), decode=decode)
    assert audit.whole
    assert audit.samples == SAMPLES
    assert audit.members == 2 * SAMPLES
    assert audit.bytes == len(data)
    assert audit.sha256 == hashlib.sha256(data).hexdigest()


def test_every_cut_before_the_end_of_the_second_zero_block_is_noticed(tmp_path: Path):
    body = b"".join(members())
    data = archive([body])
    cuts = random.Random(0).sample(range(len(body) + END), 1000)
    cuts += [0, 1, 511, 512, len(body) - 1, len(body), len(body) + 1, len(body) + END - 1]
    missed = [cut for cut in cuts if look(put(tmp_path, data[:cut])).whole]
    assert not missed


def test_a_cut_in_the_padding_loses_nothing(tmp_path: Path):
    body = b"".join(members())
    data = archive([body])
    assert len(data) > len(body) + END
    for cut in random.Random(0).sample(range(len(body) + END, len(data)), 50):
        audit = look(put(tmp_path, data[:cut]))
        assert audit.whole
        assert audit.samples == SAMPLES


def test_every_cut_of_a_gzipped_shard_is_noticed(tmp_path: Path):
    data = gzip.compress(archive(members()), mtime=0)
    for cut in random.Random(0).sample(range(len(data)), 200):
        assert not look(put(tmp_path, data[:cut], name="a.tar.gz")).whole, cut


@pytest.mark.parametrize("bits", ["all", "one"])
def test_a_flipped_byte_in_a_header_is_noticed(tmp_path: Path, bits: str):
    parts = members()
    rng = random.Random(0)
    starts = np.cumsum([0, *map(len, parts[:-1])])
    data = archive(parts)
    for _ in range(200):
        within = rng.randrange(512)
        at = int(rng.choice(starts)) + within
        flipped = bytearray(data)
        flipped[at] ^= 0xFF if bits == "all" else 1 << rng.randrange(8)
        # The checksum ends in zeros or spaces, as its writer liked: one for the other says the same.
        if within in (154, 155) and flipped[at] in b"\0 ":
            continue
        assert not look(put(tmp_path, bytes(flipped))).whole, at


def flip_in_payloads(count: int, **fields) -> list[bytes]:
    """Return shards with one bit of one image flipped each."""
    parts, rng = members(**fields), random.Random(1)
    step = len(parts) // SAMPLES
    shards = []
    for _ in range(count):
        which = step * rng.randrange(SAMPLES)
        size = int(parts[which][124:135], 8)
        flipped = bytearray(parts[which])
        flipped[512 + rng.randrange(size)] ^= 1 << rng.randrange(8)
        shards.append(archive([*parts[:which], bytes(flipped), *parts[which + 1 :]]))
    return shards


def test_flipped_payload_bits_are_noticed_by_digest_and_by_gzip_not_by_the_archive(tmp_path: Path):
    stated = {"sha256": lambda image: hashlib.sha256(image).hexdigest()}
    for data in flip_in_payloads(40, **stated):
        assert found(look(put(tmp_path, data))) == {"digest_mismatch": 1}
    bare = flip_in_payloads(40)
    assert all(look(put(tmp_path, data)).whole for data in bare), "a tar has no digest of its payloads"
    decoded = sum(not look(put(tmp_path, data), decode=True).whole for data in bare)
    assert 0 < decoded < len(bare), "some flips end the decoding, most only change the picture"
    packed = bytearray(gzip.compress(archive(members()), mtime=0))
    for at in random.Random(2).sample(range(10, len(packed)), 40):
        packed[at] ^= 4
        assert not look(put(tmp_path, bytes(packed), name="a.tar.gz")).whole, at
        packed[at] ^= 4


def test_digests_of_images_as_downloaded_prove_nothing_once_they_were_resized(tmp_path: Path):
    audit = look(put(tmp_path, archive(members(md5=lambda image: hashlib.md5(image + b"original").hexdigest()))))
    assert audit.whole
    assert audit.digests_checked == 0


@pytest.mark.parametrize("name", ["md5", "sha512"])
def test_one_image_that_is_not_the_stated_one(tmp_path: Path, name: str):
    parts = members(**{name: lambda image: hashlib.new(name, image).hexdigest().upper()})
    parts[6] = member("00002.jpg", jpeg(99))
    audit = look(put(tmp_path, archive(parts)))
    assert found(audit) == {"digest_mismatch": 1}
    assert audit.problems[0].examples == ("00002",)
    assert audit.digests_checked == SAMPLES


def test_undecodable_images_are_named_only_when_decoding(tmp_path: Path):
    shard = put(tmp_path, archive([*members(2), member("x.jpg", b"<html>404</html>"), member("x.txt", b"lost")]))
    assert look(shard).whole
    audit = look(shard, decode=True)
    assert found(audit) == {"undecodable_image": 1}
    assert audit.problems[0].examples == ("x",)


def test_sample_problems_and_an_empty_shard(tmp_path: Path):
    parts = [*members(2), member("b.jpg", jpeg(7)), member("00000.jpg", jpeg(8)), member("00000.txt", b"again")]
    assert found(look(put(tmp_path, archive(parts)))) == {"missing_caption": 1, "duplicate_key": 1}
    assert found(look(put(tmp_path, archive([])))) == {"no_samples": 1}
    assert "unreadable" in found(look(Shard("gone", str(tmp_path / "gone.tar"), 0)))


def test_a_shard_that_cannot_be_reached_is_its_own_problem(tmp_path: Path, monkeypatch):
    data = archive(members())
    (tmp_path / "loop.tar").symlink_to("loop.tar")
    assert found(look(Shard("loop", str(tmp_path / "loop.tar"), 0))) == {"unreadable": 1}
    for error in (PermissionError("no"), OSError(errno.EIO, "broken")):

        def opened(url: str, error=error):
            if url.endswith(".tar"):
                return breaking(data[:8192], error)
            raise FileNotFoundError(url)

        monkeypatch.setattr(storage, "open_read", opened)
        audit = look(Shard("s", "dump/s.tar", len(data)))
        assert found(audit) == {"unreadable": 1}
        assert audit.members > 0
        assert "cannot read the shard dump/s.tar" in audit.problems[-1].examples[0]


def test_what_lies_beside_a_shard_and_cannot_be_reached_is_a_problem_of_that(tmp_path: Path, monkeypatch):
    shard = put(tmp_path, archive(members()))

    def refused(url):
        raise AccessError(f"cannot look for {url}")

    monkeypatch.setattr(storage, "exists", refused)
    audit = look(shard)
    assert (found(audit), audit.samples) == ({"sidecar_unreadable": 1}, SAMPLES)


def test_stats_of_img2dataset(tmp_path: Path):
    shard = put(tmp_path, archive(members()))
    stats = Path(shard.url.removesuffix(".tar") + "_stats.json")
    stats.write_text(json.dumps({"count": 20, "successes": SAMPLES, "failed_to_download": 8}))
    assert look(shard).whole
    stats.write_text(json.dumps({"successes": SAMPLES + 3}))
    assert found(look(shard)) == {"stats_mismatch": 3}
    for broken in ('{"successes": "12"}', "[]", "{", "", "{}", "[" * 100_000):
        stats.write_text(broken)
        assert found(look(shard)) == {"sidecar_unreadable": 1}


def test_the_parquet_of_img2dataset(tmp_path: Path):
    shard = put(tmp_path, archive(members()))
    path = Path(shard.url.removesuffix(".tar") + ".parquet")

    def listed(keys: list[str], statuses: list[str]) -> dict[str, int]:
        pq.write_table(pa.table({"key": keys, "status": statuses}), path)
        return found(look(shard))

    keys = [f"{i:05d}" for i in range(SAMPLES)]
    assert listed([*keys, "00012"], ["success"] * SAMPLES + ["failed_to_download"]) == {}
    assert listed([*keys, "00012"], ["success"] * (SAMPLES + 1)) == {"parquet_mismatch": 1}
    assert listed(keys[2:], ["success"] * (SAMPLES - 2)) == {"parquet_mismatch": 2}
    pq.write_table(pa.table({"url": keys}), path)  # of another make
    assert look(shard).whole
    path.write_bytes(b"PAR1 is not enough")
    assert found(look(shard)) == {"sidecar_unreadable": 1}


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "name", ["arrow_pickled_object", "arrow_tensor", "arrow_tensor_v2", "arrow_variable_shaped_tensor"]
)
@pytest.mark.parametrize("column", ["key", "other"])
def test_types_that_ray_registers_run_nothing(name: str, column: str, tmp_path: Path):
    pytest.importorskip("ray.data._internal.object_extensions.arrow")
    pytest.importorskip("ray.data._internal.tensor_extensions.arrow")
    shard, bomb = put(tmp_path, archive(members())), pickle.dumps(Bomb(tmp_path / "ran"))
    stored = pa.large_binary() if name == "arrow_pickled_object" else pa.list_(pa.binary())
    value = bomb if name == "arrow_pickled_object" else [bomb]
    about = {b"ARROW:extension:name": f"ray.data.{name}".encode(), b"ARROW:extension:metadata": bomb}
    fields = {"key": pa.field("key", pa.string()), "status": pa.field("status", pa.string())}
    fields[column] = pa.field(column, stored, metadata=about)
    values = {"key": ["0000"], "status": ["success"], "other": ["x"], column: [value]}
    pq.write_table(pa.table({n: values[n] for n in fields}, schema=pa.schema(fields.values())), tmp_path / "s.parquet")
    counted = found(look(shard))
    assert not (tmp_path / "ran").exists()
    assert {"sidecar_unreadable", "parquet_mismatch"} & counted.keys()


@pytest.mark.parametrize(
    ("key", "says"),
    [
        (pa.array(range(3)), "its column 'key' is int64, not text"),
        (pa.array([{"a": 1}] * 3), "its column 'key' is struct"),
        (pa.array([2**31 - 1] * 3, pa.date32()), "its column 'key' is date32"),  # a day that Python has not
        (pa.array([b"\xff"] * 3), "its column 'key' is binary"),
        (pa.array(["k" * 1_000_000] * 3), "a text of 1,000,000 bytes, over 4,096"),
    ],
)
def test_a_parquet_that_is_not_img2datasets(tmp_path: Path, key: pa.Array, says: str):
    shard = put(tmp_path, archive(members()))
    pq.write_table(pa.table({"key": key, "status": ["success"] * len(key)}), tmp_path / "s.parquet")
    audit = look(shard)
    assert found(audit) == {"sidecar_unreadable": 1}
    assert says in audit.problems[0].examples[0]


def test_a_parquet_of_columns_twice_or_too_many_rows(tmp_path: Path, monkeypatch):
    shard, path = put(tmp_path, archive(members())), tmp_path / "s.parquet"
    texts = pa.array(["a", "b"])
    pq.write_table(pa.Table.from_arrays([texts, texts, texts], ["key", "key", "status"]), path)
    assert "is string and string" in look(shard).problems[0].examples[0]
    monkeypatch.setattr("tarsift.operators.audit.MAX_LISTED", 1)
    pq.write_table(pa.table({"key": texts, "status": texts}), path)
    assert "it lists 2 samples, over 1" in look(shard).problems[0].examples[0]


def test_a_small_parquet_that_says_much_is_not_unfolded(tmp_path: Path):
    shard = put(tmp_path, archive(members()))
    rows = pa.array(np.zeros(70_000, np.int32))
    columns = {"key": pa.array(["k" * 4000]), "status": pa.array(["success"])}
    folded = {name: pa.DictionaryArray.from_arrays(rows, values) for name, values in columns.items()}
    pq.write_table(pa.table(folded), tmp_path / "s.parquet")  # 280 MB of keys
    assert (tmp_path / "s.parquet").stat().st_size < 1_000_000
    usual, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        assert found(look(shard)).keys() == {"parquet_mismatch"}
        peak = tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)
    assert peak < 50_000_000


def test_every_damage_of_a_parquet_is_a_problem_and_no_crash(tmp_path: Path):
    shard, path = put(tmp_path, archive(members())), tmp_path / "s.parquet"
    keys = [f"{i:05d}" for i in range(SAMPLES)]
    pq.write_table(pa.table({"key": keys, "status": ["success"] * SAMPLES}), path)
    whole, rng = path.read_bytes(), random.Random(0)
    for _ in range(150):
        data = bytearray(whole)
        for at in rng.sample(range(len(data)), rng.randint(1, 4)):
            data[at] = rng.randrange(256)
        path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.25 else data)
        assert found(look(shard)).keys() <= {"sidecar_unreadable", "parquet_mismatch"}


def test_shared_uids():
    stated = {"a": 2 << 40, "b": 3 << 40, "s/1": 5 << 40, "s/2": 7 << 40}  # hashes with the lowest bit clear
    rows = [("a", 1), ("b", 1), ("a", 1), ("s/1", 0), ("s/1", 1), ("s/2", 0)]
    hashes = np.array([stated[uid] | by_json for uid, by_json in rows], np.uint64)
    repeated, forged = shared_uids(hashes)
    assert repeated.tolist() == [True, False, True, False, False, False]
    assert forged.tolist() == [False, False, False, False, True, False]
    assert [mask.tolist() for mask in shared_uids(np.zeros(3, np.uint64))] == [[False] * 3] * 2
