"""The trap corpus through every command: nothing is executed, nothing written elsewhere, everything accounted for."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tarsift.operators.errors import SHARD_PROBLEMS, ShardError
from tarsift.operators.shards import ReadConfig
from tarsift.pipelines.audit import audit
from tarsift.pipelines.clean import clean
from tarsift.pipelines.config import load_config
from tarsift.pipelines.poison import poison
from tarsift.pipelines.verify import verify
from tests.traps import MAX_IMAGE_BYTES, make_traps

pytestmark = pytest.mark.usefixtures("ray_session")
SMALL = ["suspicion.published_ks=[8]", "suspicion.reference_size=64", f"read.max_image_bytes={MAX_IMAGE_BYTES}"]


@pytest.fixture(scope="module")
def corpus(ray_session, encoder, tmp_path_factory):
    root = tmp_path_factory.mktemp("traps")
    made = make_traps(root / "dump", root / "canary")
    before = files(root)
    result = clean(str(root / "dump"), str(root / "out"), config=load_config(settings=SMALL), encoder=encoder)
    return root, made, result, before


def files(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if (root / "out") not in (path, *path.parents)}


def test_every_trap_is_in_its_place(corpus):
    root, made, result, _ = corpus
    named = Counter(trap.named for trap in made if trap.named and not trap.whole)
    record = json.loads((root / "out" / "ledger" / "embed.detect" / "traps.json").read_text())
    assert record["errors"] == named
    counts = result.counts
    assert counts["errors"] == named + Counter(image_too_large=1, truncated_member=1)
    assert counts["read"] == counts["kept"] + counts["removed"] + counts["errored"]
    problems = {name: found[0]["problem"] for name, found in counts["shard_problems"].items()}
    assert problems == {trap.name: trap.named for trap in made if trap.whole and trap.named}
    report = (root / "out" / "report.html").read_text()
    for name in {*named, *problems.values()}:
        assert name in report, name


def test_nothing_was_executed_or_written_elsewhere(corpus):
    root, _, _, before = corpus
    assert not (root / "canary").exists()
    assert files(root) == before
    for escaped in (root.parent / "escape.jpg", Path("/tmp/tarsift-escape.jpg"), Path("/tmp/tarsift-escape.txt")):
        assert not escaped.exists()


def test_the_report_shows_hostile_text_and_does_not_obey_it(corpus):
    root, *_ = corpus
    report = (root / "out" / "report.html").read_text()
    assert "<script>fetch" not in report
    assert "onerror=alert" not in report.replace("onerror=alert(1)&gt;", "")
    assert "\x1b" not in report
    assert "\u202e" not in report
    assert "\0" not in report


def test_the_result_is_proven_and_readable(corpus):
    root, *_ = corpus
    proof = verify(str(root / "out"))
    assert proof.holds, [shard for shard in proof.shards if shard.faults]
    flags = pa.concat_tables(pq.read_table(path) for path in (root / "out" / "flags").glob("*.parquet"))
    assert (
        len(flags)
        == pq.read_table(root / "out" / "keep.parquet").num_rows
        + flags.filter(pa.compute.not_equal(flags["home"], "clean")).num_rows
    )


def test_audit_names_them(corpus):
    root, made, _, before = corpus
    found = audit(str(root / "dump"), decode=True, read=ReadConfig(max_image_bytes=MAX_IMAGE_BYTES))
    by_shard = {shard.shard: {problem.problem for problem in shard.problems} for shard in found.shards}
    for trap in made:
        if trap.named:
            assert trap.named in by_shard[trap.name if trap.whole else "traps"], trap.name
    assert "forged_uid" in by_shard["traps"]
    assert all(not by_shard[f"good-{number}"] for number in range(3))
    assert set(SHARD_PROBLEMS) & {p for problems in by_shard.values() for p in problems}
    assert not (root / "canary").exists()
    assert files(root) == before


def test_poison_refuses_damaged_shards_and_copies_the_rest_without_obeying(corpus, tmp_path):
    root, _, _, before = corpus
    with pytest.raises(ShardError):
        poison(str(root / "dump"), out=str(tmp_path / "damaged"))
    whole = [str(root / "dump" / f"{name}.tar") for name in ("traps", "good-0", "good-1")]
    assert poison(whole, out=str(tmp_path / "copy"), rate=0.02).poisoned > 0
    assert not (root / "canary").exists()
    assert files(root) == before
