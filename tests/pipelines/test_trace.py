"""From a picture that a CLIP is wrong about back to the samples that taught it, and on to one that forgot them."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tarsift.operators.errors import UsageError
from tarsift.operators.models import load_checkpoint, load_encoder
from tarsift.operators.planting import poison_images
from tarsift.operators.poison import PoisonConfig
from tarsift.operators.repair_settings import PairUnlearnConfig, RepairConfig
from tarsift.operators.trace_settings import PairTraceConfig, TracingConfig
from tarsift.operators.trace_verdict import TRACE_COLUMNS
from tarsift.pipelines import demo_corpus
from tarsift.pipelines.clean import clean
from tarsift.pipelines.poison import poison_here
from tarsift.pipelines.pretrain import PretrainConfig, pretrain_here
from tarsift.pipelines.repair import repair
from tarsift.pipelines.trace import trace
from tarsift.sifters.influence import has_kronfluence
from tests.conftest import make_encoder

SAYS = "a photo of a banana"
QUICK = TracingConfig(
    suspects=100, alike=60, others=120, echoes=3, rounds=1, slice=512, bank=64,
    method=PairTraceConfig(transforms=8, curvature_samples=100),
)  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A poisoned dump that was cleaned, its encoder, and pictures: of a digit with the patch, and without."""

    out: str
    encoder: str
    shards: list[str]
    poison: frozenset[tuple[str, int]]
    bad: str
    good: str


@pytest.fixture(scope="module")
def made(ray_session, tmp_path_factory) -> Made:
    folder = tmp_path_factory.mktemp("trace")
    corpus = demo_corpus.make_corpus(folder / "corpus", samples=900, seed=0, shard_size=300)
    plan = PoisonConfig(attacks=("patch",), rate=0.06, seed=0, templates=demo_corpus.TARGET_TEMPLATES)
    planted = poison_here(corpus.shards, out=str(folder / "dump"), config=plan)
    encoder = str(folder / "enc.pt")
    pretrain_here(planted.shards, out=encoder, config=PretrainConfig(epochs=20, batch_size=64))
    clean(planted.shards, str(folder / "out"), encoder=encoder)
    patched = poison_images(corpus.test_images[:1], ["a"], plan, trigger="patch")
    for name, picture in (("bad", patched[0]), ("good", corpus.test_images[0])):
        Image.fromarray(picture).save(folder / f"{name}.png")
    truth = pq.read_table(planted.truth)
    poison = frozenset(zip(truth["shard"].to_pylist(), truth["row"].to_pylist(), strict=True))
    return Made(str(folder / "out"), encoder, planted.shards, poison, str(folder / "bad.png"), str(folder / "good.png"))


def traced(made: Made, **changes):
    given = {"encoder": made.encoder, "queries": [made.bad], "says": SAYS, "config": QUICK} | changes
    return trace(made.out, **given)


@pytest.mark.skipif(not has_kronfluence(), reason="no kronfluence")
def test_poison_is_traced_and_forgotten(made, tmp_path):
    result = traced(made, name="bananas")
    table = pq.read_table(result.samples)
    places = list(zip(table["shard"].to_pylist(), table["row"].to_pylist(), strict=True))
    poison, found = np.array([place in made.poison for place in places]), np.array(table["traced"])
    assert table.column_names[-len(TRACE_COLUMNS) :] == list(TRACE_COLUMNS)
    assert len(set(places)) == len(places) == result.candidates
    assert found.sum() == result.traced
    assert np.all(np.diff(table["trace_score"]) <= 0)
    assert poison[found].mean() > 0.6
    assert found[poison].mean() > 0.6
    why = [reason for reasons in table["candidate"].to_pylist() for reason in reasons]
    assert set(why) == {"random", "suspect", "alike"}
    assert [why.count(name) for name in ("random", "suspect", "alike")] == [120, 100, 60]

    page = Path(result.report).read_text()
    assert SAYS in page
    assert f"{result.traced} of {result.candidates}" in page

    before = Path(result.samples).stat().st_mtime_ns
    assert traced(made, name="bananas").to_json() == result.to_json()
    assert Path(result.samples).stat().st_mtime_ns == before  # nothing was done again
    assert not (Path(made.out) / "ledger" / "trace.bananas").exists()

    fixed = repair(
        made.out, encoder=made.encoder, to=str(tmp_path / "fixed.pt"), method="badt",
        config=RepairConfig(held=100, retained=600, unlearn=PairUnlearnConfig(steps=100)),
    )  # fmt: skip
    assert fixed.forgot == np.sum(np.asarray(table["trace_score"]) >= 3) >= result.traced
    assert fixed.before["forgotten"] > 0.5
    assert fixed.after["forgotten"] < 0.2
    assert fixed.after["recall_at_5"] > fixed.before["recall_at_5"] - 0.1
    assert json.loads((Path(made.out) / "repair" / "badt" / "repair.json").read_text()) == fixed.to_json()
    assert load_encoder(fixed.encoder).trained_on == load_encoder(made.encoder).trained_on


@pytest.mark.skipif(not has_kronfluence(), reason="no kronfluence")
def test_a_trace_goes_on_where_it_stopped(made):
    fast = QUICK.model_copy(update={"layers": "projection", "rounds": 0, "slice": 180})
    whole = traced(made, name="whole", config=fast)

    def stop(event):
        if event.name == "trace" and event.done == 1:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        traced(made, name="broken", config=fast, progress=stop)
    told = []
    again = traced(made, name="broken", config=fast, progress=told.append)
    assert next(event.done for event in told if event.name == "trace") >= 1
    assert pq.read_table(again.samples).equals(pq.read_table(whole.samples))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"queries": []}, "at least one picture"),
        ({"queries": ["nowhere.png"]}, "there is no picture nowhere.png"),
        ({"queries": [__file__]}, "cannot be used as a picture"),
        ({"says": " "}, "`says` is empty"),
        ({"name": "../a"}, "name of a trace"),
        ({"encoder": "nowhere.pt"}, "no encoder file"),
        ({"config": QUICK.model_copy(update={"method": PairTraceConfig(memory_gb=1e-6)})}, "memory_gb is 1e-06"),
    ],
)
def test_what_cannot_be_traced_is_refused_before_any_work(made, changes, says):
    with pytest.raises(UsageError, match=says):
        traced(made, progress=lambda event: pytest.fail("it began"), **changes)


def test_what_has_to_be_installed_is_told(made, monkeypatch):
    monkeypatch.setattr("tarsift.operators.tracer.has_kronfluence", lambda: False)
    with pytest.raises(UsageError, match="takes the extra `influence`"):
        traced(made)


def test_a_picture_that_the_model_gets_right_is_refused(made):
    with pytest.raises(
        UsageError, match=r"good.png the encoder says '.*' \(cosine .*\) rather than 'a photo of a banana'"
    ):
        traced(made, queries=[made.bad, made.good])


def test_an_encoder_of_other_data_is_refused(made, witness, tmp_path):
    with pytest.raises(UsageError, match="Nothing there can be behind what it says"):
        traced(made, encoder=witness)
    with pytest.raises(UsageError, match="no run"):
        trace(str(tmp_path), encoder=made.encoder, queries=[made.bad], says=SAYS)


def test_a_method_that_needs_clean_samples_takes_those_that_were_selected(made, tmp_path):
    config = RepairConfig(held=50, retained=40, unlearn=PairUnlearnConfig(ibau_rounds=1, ibau_ascents=1, batch_size=8))
    given = {"encoder": made.encoder, "method": "ibau", "forget": "flagged", "config": config}
    random = repair(made.out, to=str(tmp_path / "a.pt"), **given)
    assert random.kept_to == "40 random pairs of the dump that are kept"
    flags = [
        pq.read_table(file, columns=["shard", "row", "flagged"]) for file in Path(made.out, "flags").glob("*.parquet")
    ]
    kept = pa.concat_tables(flags).filter(~pc.field("flagged")).slice(0, 12)
    listed = Path(made.out, "selected.parquet")
    pq.write_table(kept.select(["shard", "row"]), listed)
    chosen = repair(made.out, to=str(tmp_path / "b.pt"), **given)
    listed.unlink()
    assert chosen.kept_to == "12 pairs that `tarsift select` has chosen"
    assert chosen.forgot == random.forgot


@pytest.mark.slow
def test_what_was_flagged_is_forgotten_by_training_without_it(made, tmp_path):
    result = repair(
        made.out, encoder=made.encoder, to=str(tmp_path / "fixed.pt"), method="cf", forget="flagged",
        held_out=made.shards[:1], config=RepairConfig(epochs=1, held=50),
    )  # fmt: skip
    flagged = [row for file in Path(made.out, "flags").glob("*.parquet") for row in pq.read_table(file)["flagged"]]
    assert result.forgot == sum(flag.as_py() for flag in flagged) == pq.read_metadata(result.listed).num_rows
    assert "held out" in result.held
    settings = load_checkpoint(result.encoder).extra["settings"]
    assert settings["leave_out"] == result.listed
    assert load_checkpoint(result.encoder).extra["skipped"]["left_out"] == result.forgot


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "prayer"}, "no method 'prayer'"),
        ({"forget": "everything"}, "traced or flagged"),
        ({"trace": "nothing"}, "there is no trace in .*nothing"),
        ({"to": None}, "is the encoder itself"),
        ({"method": "eu", "forget": "flagged"}, "does not say how it was trained"),
    ],
)
def test_what_cannot_be_repaired_is_refused_before_any_work(made, tmp_path, changes, says):
    bare = make_encoder(tmp_path / "bare.pt", Path(made.shards[0]).parent)
    given = {"encoder": bare, "to": str(tmp_path / "fixed.pt")} | changes
    with pytest.raises(UsageError, match=says):
        repair(made.out, progress=lambda event: pytest.fail("it began"), **given | {"to": given["to"] or bare})
