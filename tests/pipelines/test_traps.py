"""The trap corpus through every command: nothing is executed, nothing written elsewhere, everything accounted for."""

from __future__ import annotations

import json
import pickle
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from tarsift.operators.encoder import ClipEncoder
from tarsift.operators.errors import IMAGE_USABLE, SHARD_PROBLEMS, ShardError, UsageError
from tarsift.operators.poison import PoisonConfig
from tarsift.operators.shards import ReadConfig, list_shards
from tarsift.pipelines.audit import audit
from tarsift.pipelines.clean import CleanResult, clean
from tarsift.pipelines.config import load_config
from tarsift.pipelines.evaluate import evaluate
from tarsift.pipelines.poison import poison_here
from tarsift.pipelines.pretrain import PretrainConfig, pretrain_here
from tarsift.pipelines.reading import read_shards
from tarsift.pipelines.report.evaluation import write_evaluation
from tarsift.pipelines.status import status
from tarsift.pipelines.verify import verify
from tests.pipelines.test_cli import run
from tests.traps import MAX_IMAGE_BYTES, REFUSED_NAMES, Canary, Trap, make_traps

READ = ReadConfig(max_image_bytes=MAX_IMAGE_BYTES)
SMALL = ["suspicion.published_ks=[8]", "suspicion.reference_size=64", f"read.max_image_bytes={MAX_IMAGE_BYTES}"]
GOOD = 3


class Corpus(NamedTuple):
    """Where everything is: the dump, its traps, what `clean` made of it, and all files that were there before."""

    root: Path
    dump: str
    out: Path
    made: list[Trap]
    result: CleanResult
    before: set[Path]

    def is_untouched(self) -> bool:
        """Nothing was executed, nothing written outside the result folder."""
        escapes = ["escape.jpg", "tarsift-escape", "tarsift-escape.jpg", "tarsift-escape.txt"]
        places = [Path(), Path("/tmp"), self.root, self.root.parent]
        assert not [place / name for place in places for name in escapes if (place / name).exists()]
        assert not (self.root / "canary").exists()
        return files(self.root) == self.before


def files(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if (root / "out") not in (path, *path.parents)}


@pytest.fixture(scope="module")
def corpus(ray_session, encoder, witness, tmp_path_factory):
    root = tmp_path_factory.mktemp("traps")
    made = make_traps(root / "dump", root / "canary", good=GOOD)
    before = files(root)
    encoders = [f"encoders.detect.spec={encoder}", f"encoders.witness.spec={witness}"]
    result = clean(str(root / "dump"), str(root / "out"), config=load_config(settings=[*SMALL, *encoders]))
    return Corpus(root, str(root / "dump"), root / "out", made, result, before)


def errors_of(made: list[Trap]) -> list[str | None]:
    """Return the errors of the rows of traps.tar."""
    return [error for t in made if not t.whole for error in (*[None] * (t.rows - 1), t.named)]


def test_the_canary_sings(tmp_path):
    """Otherwise that it does not would say nothing."""
    made = make_traps(tmp_path / "dump", tmp_path / "canary", good=0)
    pickled = pickle.dumps(Canary(tmp_path / "canary"))
    loaded = [trap.name for trap in made if pickled in trap.content]
    assert loaded == ["pickles", "pickled-image", "pickled-json", "pickled-caption"]
    assert (tmp_path / "dump" / "sidecars.parquet").read_bytes() == pickled
    assert not (tmp_path / "canary").exists()
    pickle.loads(pickled)
    assert (tmp_path / "canary").read_text() == "executed"


@pytest.mark.parametrize("name", REFUSED_NAMES)
def test_names_that_could_be_paths_or_commands_are_refused(tmp_path, name):
    (tmp_path / f"{name}.tar").write_bytes(b"")
    with pytest.raises(UsageError, match="rename the file it comes from"):
        list_shards(str(tmp_path))


@pytest.mark.parametrize("role", ["detect", "witness"])
def test_every_trap_is_named(corpus, role):
    """Each sample by its error, each shard by its problem: in the records of both encoders and in the flags."""
    for trap in corpus.made:
        if trap.whole:
            record = json.loads((corpus.out / "ledger" / f"embed.{role}" / f"{trap.name}.json").read_text())
            found = [problem["problem"] for problem in record["source"]["problems"]]
            assert found == ([trap.named] if trap.named else []), trap.name
    record = json.loads((corpus.out / "ledger" / f"embed.{role}" / "traps.json").read_text())
    assert record["errors"] == Counter(filter(None, errors_of(corpus.made)))
    flags = pq.read_table(corpus.out / "flags" / "traps.parquet")
    assert flags["error"].to_pylist() == errors_of(corpus.made)
    assert all(row["home"] == "errored" for row in flags.to_pylist() if row["error"])
    assert pq.read_table(corpus.out / "flags" / "zeros.parquet")["error"].to_pylist() == ["image_too_large"]
    assert pq.read_table(corpus.out / "flags" / "claims.parquet")["error"].to_pylist() == [None, "truncated_member"]


def test_the_report_names_them(corpus):
    counts = corpus.result.counts
    named = Counter(filter(None, errors_of(corpus.made))) + Counter(image_too_large=1, truncated_member=1)
    assert counts["errors"] == named
    assert counts["read"] == counts["kept"] + counts["removed"] + counts["errored"]
    problems = {name: found[0]["problem"] for name, found in counts["shard_problems"].items()}
    assert problems == {trap.name: trap.named for trap in corpus.made if trap.whole and trap.named}
    errors, damaged = (corpus.out / "report.html").read_text().split('id="errors"')[1].split("Damaged shards")
    rows = re.findall(r"<tr><td><code>(\w+)</code>.*?</td><td class=\"num\">(\d+)</td>", errors)
    assert {reason: int(count) for reason, count in rows} == named
    rows = re.findall(r"<tr><td class=\"id foreign\">(.*?)</td><td><code>(\w+)</code>", damaged.split("</table>")[0])
    assert dict(rows) == problems


def test_nothing_was_executed_or_written_elsewhere(corpus):
    assert corpus.is_untouched()


def test_the_report_shows_hostile_text_and_does_not_obey_it(corpus):
    report = (corpus.out / "report.html").read_text()
    assert "<script>fetch" not in report
    assert "<svg onload" not in report
    assert "onerror=alert" not in report.replace("onerror=alert(1)&gt;", "")
    assert "\x1b" not in report
    assert "\u202e" not in report
    assert "\0" not in report


def test_the_result_is_proven_and_readable(corpus):
    proof = verify(str(corpus.out))
    assert proof.holds, [shard for shard in proof.shards if shard.faults]
    flags = pa.concat_tables(pq.read_table(path) for path in (corpus.out / "flags").glob("*.parquet"))
    kept = pq.read_table(corpus.out / "keep.parquet").num_rows
    assert len(flags) == kept + flags.filter(pa.compute.not_equal(flags["home"], "clean")).num_rows


def test_audit_names_them(corpus):
    found = audit(corpus.dump, decode=True, read=READ)
    by_shard = {shard.shard: {problem.problem for problem in shard.problems} for shard in found.shards}
    for trap in corpus.made:
        if trap.named:
            assert trap.named in by_shard[trap.name if trap.whole else "traps"], trap.name
    assert "forged_uid" in by_shard["traps"]
    assert by_shard["sidecars"] == {"sidecar_unreadable"}
    assert all(not by_shard[f"good-{number}"] for number in range(GOOD))
    assert set(SHARD_PROBLEMS) & {p for problems in by_shard.values() for p in problems}
    assert corpus.is_untouched()


def test_poison_refuses_each_damaged_shard_and_copies_the_others(corpus, tmp_path):
    """What is poisoned keeps every member of its sample, in its place."""
    for shard in list_shards(corpus.dump):
        trap = next((trap for trap in corpus.made if trap.whole and trap.name == shard.name), None)
        config, out = PoisonConfig(rate=0.02, read=READ), tmp_path / "copy"
        if trap and trap.named:
            with pytest.raises(ShardError, match=trap.named):
                poison_here(shard.url, out=str(out), config=config)
            continue
        summary = poison_here(shard.url, out=str(out), config=config)
        assert summary.poisoned == round(0.02 * summary.samples), shard.name
        with tarfile.open(shard.url) as before, tarfile.open(out / f"{shard.name}.tar") as after:
            assert before.getnames() == after.getnames(), shard.name
    assert json.loads((tmp_path / "copy" / "truth.json").read_text())["settings"]["rate"] == 0.02
    assert corpus.is_untouched()


def test_pretrain_takes_the_pairs_that_are_whole(corpus, tmp_path):
    config = PretrainConfig(steps=1, batch_size=50, read=READ)
    summary = pretrain_here(corpus.dump, out=str(tmp_path / "e.pt"), config=config)
    counts = corpus.result.counts
    flags = pa.concat_tables(pq.read_table(path) for path in (corpus.out / "flags").glob("*.parquet"))
    trained = {None, "bad_json", "caption_not_utf8"}  # of these there is a picture with a caption
    assert summary.pairs == sum(error in trained for error in flags["error"].to_pylist())
    damage = Counter(problems[0]["problem"] for problems in counts["shard_problems"].values())
    assert summary.skipped == Counter({e: n for e, n in counts["errors"].items() if e not in trained}) + damage
    assert corpus.is_untouched()


def test_status_and_evaluate_read_the_results(corpus, tmp_path):
    told = status(str(corpus.out))
    assert told.state == "complete"
    assert {p.done for p in told.passes} == {len(list_shards(corpus.dump))}
    flags = pq.read_table(corpus.out / "flags" / "traps.parquet", columns=["shard", "row", "uid"])
    attack = pa.array(["<script>alert(1)</script>\x1b[2J"] * len(flags))
    pq.write_table(flags.append_column("attack", attack), tmp_path / "truth.parquet")
    result = evaluate(str(corpus.out), str(tmp_path / "truth.parquet"))
    assert (result.poisoned, result.errored_poisoned) == (len(flags), len(list(filter(None, errors_of(corpus.made)))))
    page = Path(write_evaluation(result, str(tmp_path / "page.html"))).read_text()
    assert "<script>alert" not in page
    assert "\x1b" not in page
    assert corpus.is_untouched()


@pytest.mark.slow
def test_read_shards_and_an_encoder_in_a_dataset(corpus, encoder):
    rows = read_shards([f"{corpus.dump}/{name}.tar" for name in ("traps", "text", "claims", "nothing")], config=READ)
    rows = rows.map_batches(
        ClipEncoder,
        fn_constructor_kwargs={"encoder": encoder, "device": "cpu"},
        batch_size=64,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    found = {(row["shard"], row["row"]): row for row in rows.take_all()}
    for row, error in enumerate(errors_of(corpus.made)):
        assert found["traps", row]["error"] == error
        assert (found["traps", row]["image_embedding"] is not None) == (error is None or error in IMAGE_USABLE)
    assert corpus.is_untouched()


@pytest.mark.slow
def test_the_single_passes(corpus, monkeypatch, capsys):
    def contents():
        folders = ("scores", "flags", "clean", "removed", "errored")
        return {
            path: path.read_bytes() for name in folders for path in (corpus.out / name).rglob("*") if path.is_file()
        }

    before = contents()
    for command in ("score", "flag", "write", "report"):
        code, printed, told = run(monkeypatch, capsys, command, str(corpus.out))
        assert code == 0, told
        assert "\x1b" not in printed
    assert contents() == before
    assert corpus.is_untouched()


@pytest.mark.slow
def test_captions_from_json(corpus, encoder, tmp_path):
    """The same errors, except that of captions: those that only a json can hold."""
    config = load_config(settings=[*SMALL, "read.captions=json:caption"])
    result = clean(corpus.dump, str(tmp_path / "out"), encoder=encoder, config=config)
    assert result.counts["read"] == corpus.result.counts["read"]
    flags = pq.read_table(tmp_path / "out" / "flags" / "traps.parquet")
    for error, of_json in zip(errors_of(corpus.made), flags["error"].to_pylist(), strict=True):
        by_caption = error is None or error.startswith(("missing_caption", "caption_"))
        assert of_json == ("missing_caption" if by_caption else error)
    assert verify(str(tmp_path / "out")).holds
    assert corpus.is_untouched()
