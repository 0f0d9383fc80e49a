"""A pass that is done again with other settings, and stopped: what it leaves is never taken for what it is not."""

import json
import shutil
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tarsift.operators.encoder import ClipEncoder
from tarsift.operators.encoder_info import encoder_info
from tarsift.operators.errors import ChangedError, ConfigError, UsageError
from tarsift.pipelines import clean as recipe
from tarsift.pipelines import redo as redoing
from tarsift.pipelines import score as scoring
from tarsift.pipelines.clean import clean
from tarsift.pipelines.commit import parts_of
from tarsift.pipelines.config import load_config
from tarsift.pipelines.embed import refuse_other_weights
from tarsift.pipelines.ledger import Ledger
from tarsift.pipelines.run import open_run, reopen_run
from tarsift.pipelines.trusted import TrustedReference
from tarsift.pipelines.verify import verify
from tests.conftest import make_dump, make_encoder

HOMES = ("clean", "removed", "errored")


@pytest.fixture(scope="module")
def settings(encoder):
    small = ["suspicion.published_ks=[8, 16]", "suspicion.reference_size=64"]
    return load_config(settings=[f"encoders.detect.spec={encoder}", *small])


@pytest.fixture(scope="module")
def whole(ray_session, tmp_path_factory, settings):
    """A folder with `dump`, of two shards, and `out`, what `clean` made of it."""
    folder = tmp_path_factory.mktemp("redo")
    make_dump(folder / "dump", shards=2, samples=70)
    clean(str(folder / "dump"), str(folder / "out"), config=settings)
    return folder


@pytest.fixture
def out(whole, tmp_path):
    shutil.copytree(whole / "out", tmp_path / "out")
    return tmp_path / "out"


def files(out: Path, *folders: str) -> dict[str, bytes]:
    return {f"{f}/{p.name}": p.read_bytes() for f in folders for p in sorted((out / f).glob("[!.]*.*"))}


def members(folder: Path) -> int:
    count = 0
    for file in folder.glob("*.tar"):
        with tarfile.open(file) as tar:
            count += len(tar.getmembers())
    return count


class Stopped(Exception):
    pass


def stop_at_commit(monkeypatch, name: str) -> None:
    """Have a pass stop when it has made its first outputs and is about to commit them."""
    commit = Ledger.commit

    def stop(self, shard, entry):
        if self.name == name:
            raise Stopped
        return commit(self, shard, entry)

    monkeypatch.setattr(Ledger, "commit", stop)


def redo(out: Path, step: str, **changes) -> None:
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    getattr(recipe, f"{step}_step")(reopen_run(str(out), changes, redo=step))


@pytest.mark.parametrize("step", ["flag", "write"])
def test_back_to_the_first_settings_after_others_were_begun(whole, out, step, monkeypatch):
    with monkeypatch.context() as patch:
        if step == "write":
            redo(out, "flag", flag__value=0.3)
        stop_at_commit(patch, step)
        with pytest.raises(Stopped):
            redo(out, step, **({"flag__value": 0.3} if step == "flag" else {}))
    redo(out, "flag", flag__value=0.05)
    redo(out, "write")
    assert files(out, "flags", *HOMES) == files(whole / "out", "flags", *HOMES)


def test_settings_are_kept_when_their_pass_is_done_with_them(whole, out, monkeypatch, settings):
    def stop(*_, **__):
        raise Stopped

    before = json.loads((out / "run.json").read_text())["config"]
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "scoring_pass", stop)
        with pytest.raises(Stopped):
            redo(out, "score", reference__key="other")  # has fitted a reference of its own by then
    assert json.loads((out / "run.json").read_text())["config"] == before
    clean(str(whole / "dump"), str(out), config=settings)
    assert files(out, "scores", "reference") == files(whole / "out", "scores", "reference")
    redo(out, "score", reference__key="other")
    assert json.loads((out / "run.json").read_text())["config"]["reference"]["key"] == "other"
    assert files(out, "scores") != files(whole / "out", "scores")


def test_scores_whose_rules_were_fitted_anew_are_not_used(out, monkeypatch):
    stop = scoring.LastScorer

    def each_but_the_last(*arguments, **named):
        if arguments[2] is stop:
            raise Stopped
        return scoring_pass(*arguments, **named)

    scoring_pass = scoring.scoring_pass
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "scoring_pass", each_but_the_last)
        with pytest.raises(Stopped):
            redo(out, "score", reference__key="other")
    with pytest.raises(UsageError, match="are no longer those of the scores"):
        redo(out, "flag", flag__policy="z", flag__value=2.0)


def test_a_policy_that_is_refused_is_not_kept(whole, out, settings):
    with pytest.raises(ConfigError, match="there is no score 'typo'"):
        redo(out, "flag", flag__score="typo")
    clean(str(whole / "dump"), str(out), config=settings)


def test_a_setting_of_another_pass_is_refused(out, encoder):
    with pytest.raises(ConfigError, match=r"encoders\.detect\.spec does not belong to the pass score"):
        redo(out, "score", encoders__detect__spec=encoder)
    with pytest.raises(ConfigError, match=r"flag\.value does not belong to the pass write"):
        redo(out, "write", flag__value=0.1)


def test_shards_of_earlier_verdicts_do_not_stay_beside_new_lists(whole, out):
    redo(out, "flag", flag__value=0.2)
    redo(out, "write", write__shards=False)
    assert not any((out / home).exists() for home in HOMES)
    assert len(pq.read_table(out / "keep.parquet")) < len(pq.read_table(whole / "out" / "keep.parquet"))
    redo(out, "write", write__shards=True)
    assert members(out / "clean") == 2 * len(pq.read_table(out / "keep.parquet"))


def test_a_result_folder_below_the_dump_is_no_part_of_it(whole, tmp_path, settings):
    shutil.copytree(whole / "dump", tmp_path / "dump")
    out = str(tmp_path / "dump" / "out")
    first = clean(str(tmp_path / "dump"), out, config=settings)
    assert clean(str(tmp_path / "dump"), out, config=settings).counts == first.counts
    assert verify(out, str(tmp_path / "dump")).holds
    with pytest.raises(UsageError, match="all shards that are given lie in"):
        open_run(f"{out}/clean", out, settings)


def test_other_weights_under_the_same_name_are_refused(whole, out, tmp_path, settings, encoder):
    spec = make_encoder(tmp_path / "enc.pt", seed=9)
    with pytest.raises(ChangedError, match="were replaced while it was on"):
        ClipEncoder(spec, weights_sha256=encoder_info(encoder).weights_sha256)
    ledger = Ledger(str(out), "embed.detect", "a fingerprint with other weights")
    with pytest.raises(ChangedError, match="was embedded by other weights"):
        refuse_other_weights(ledger, encoder_info(spec))
    refuse_other_weights(Ledger(str(tmp_path), "embed.detect", "of a new folder"), encoder_info(spec))


def test_parts_of_one_shard_never_lie_below_those_of_another():
    assert not parts_of("f", "train/00000").startswith(parts_of("f", "train") + "/")
    assert parts_of("f", "a/b") != parts_of("f", "a%2Fb")


def test_a_trusted_reference_is_by_the_same_encoder(whole, out, tmp_path, witness):
    other = load_config(settings=[f"encoders.detect.spec={witness}"])
    recipe.embed_step(open_run(str(whole / "dump"), str(tmp_path / "other"), other))
    with pytest.raises(UsageError, match="was embedded by another encoder"):
        redo(out, "score", reference__path=str(tmp_path / "other" / "embeddings" / "detect"))
    with pytest.raises(UsageError, match="lacks the columns"):
        redo(out, "score", reference__path=str(out / "keep.parquet"))
    with pytest.raises(UsageError, match="no Parquet file there"):
        redo(out, "score", reference__path=str(tmp_path / "nowhere"))


def test_a_trusted_reference_that_was_refreshed_is_another_one(whole, out, tmp_path, encoder):
    reference = tmp_path / "reference"
    shutil.copytree(out / "embeddings" / "detect", reference)
    redo(out, "score", reference__path=str(reference))
    first = files(out, "scores")
    weights = encoder_info(encoder).weights_sha256
    found = TrustedReference.find(str(reference), weights)
    embeddings, ids = found.draw(50, b"key")
    assert embeddings.shape == (50, embeddings.shape[1])
    assert len(set(ids.tolist())) == 50
    (reference / "00001.parquet").unlink()
    assert TrustedReference.find(str(reference), weights).digest != found.digest
    redo(out, "score")
    assert files(out, "scores") != first


def test_another_threshold_in_a_notebook(whole, out):
    found = redoing.redo(str(out), "flag", changes={"flag.value": 0.1, "flag.score": "dao_k16"})
    assert found.counts["removed"] == 14
    assert found.report is None
    metadata = pq.read_schema(next((out / "flags").glob("*.parquet"))).metadata
    assert metadata[b"tarsift.score"] == b"dao_k16"
    again = redoing.redo(str(out), "write", "report")
    assert again.counts["kept"] == members(out / "clean") // 2
    assert again.report == f"{out}/report.html"
    with pytest.raises(ConfigError, match=r"suspicion\.banks does not belong to the pass flag"):
        redoing.redo(str(out), "flag", changes={"suspicion.banks": 2})
