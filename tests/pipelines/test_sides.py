"""Two encoders, or the other one alone: who judges what, and whether the columns say so."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tarsift.clip_detect.mismatch import fit_mismatch
from tarsift.clip_detect.neighbors import unit_norm
from tarsift.operators import storage
from tarsift.operators.errors import UsageError
from tarsift.operators.folds import FetchRows
from tarsift.operators.identity import identities
from tarsift.operators.schema import matrix
from tarsift.operators.sides import choose_sides
from tarsift.pipelines.clean import clean, score_step
from tarsift.pipelines.config import load_config
from tarsift.pipelines.plan import make_plan
from tarsift.pipelines.run import reopen_run
from tarsift.pipelines.score import dump_key
from tests.conftest import make_encoder

SMALL = ["suspicion.published_ks=[8]", "suspicion.reference_size=128"]
TRAINED, NOT, UNKNOWN, PARTLY = "trained_on_this_dump", "not_trained_on_this_dump", "unknown", "partly"


def settings(**encoders: str):
    return load_config(settings=[*(f"encoders.{role}.spec={path}" for role, path in encoders.items()), *SMALL])


def table(out: str, folder: str) -> pa.Table:
    names = sorted(storage.list_files(storage.join(out, folder), ".parquet"))
    return pa.concat_tables(pq.read_table(storage.join(out, folder, name)) for name in names)


@pytest.fixture(scope="module")
def both(ray_session, dump, encoder, witness, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("both"))
    config = settings(detect=encoder, witness=witness)
    return clean(str(dump), out, config=config), config


@pytest.mark.parametrize(
    ("regimes", "density", "captions", "judges"),
    [
        ({"detect": None}, "detect", None, "density"),
        ({"detect": UNKNOWN}, "detect", None, "density"),
        ({"detect": PARTLY, "witness": NOT}, "detect", "witness", "density captions"),
        ({"detect": TRAINED, "witness": UNKNOWN}, "detect", "witness", "density captions"),
        ({"detect": TRAINED, "witness": PARTLY}, "detect", None, "density"),
        ({"detect": NOT}, "detect", "detect", "captions"),
        ({"detect": NOT, "witness": NOT}, "detect", "witness", "captions"),
        ({"detect": NOT, "witness": TRAINED}, "detect", "detect", "captions"),
        ({"witness": None}, None, "witness", "captions"),
    ],
)
def test_the_check_decides_who_judges(regimes, density, captions, judges):
    sides = choose_sides(regimes)
    assert (sides.density, sides.captions, " ".join(sides.judges)) == (density, captions, judges)
    assert sides.second_look == (captions if judges == "density captions" else None)
    assert len(sides.looked_for) == len(sides.judges)
    assert any("triggers" in kind for kind in sides.not_looked_for)
    assert any("captions that do not fit" in kind for kind in sides.not_looked_for) == ("captions" not in sides.judges)


def test_a_witness_that_saw_the_dump_judges_nothing(ray_session, dump, encoder, tmp_path):
    with pytest.raises(UsageError, match="the encoder given as witness was trained on this dump"):
        clean(str(dump), str(tmp_path), config=settings(witness=encoder))


def test_both_sides_judge(both):
    result, _ = both
    scores = table(result.out, "scores")
    parts = ["suspicion_density", "neighbor_disagreement", "caption_mismatch"]
    assert {"suspicion_image", "caption_excess", "suspicion", *parts} <= {*scores.column_names}
    assert not [name for name in scores.column_names if "embedding" in name]
    density, second, captions, together = (scores[name].to_numpy() for name in (*parts, "suspicion"))
    errors = scores["error"].to_pylist()
    for i, error in enumerate(errors):
        judged = error in (None, "missing_caption")
        assert (not np.isnan(together[i]), not np.isnan(captions[i])) == (judged, error is None)
        assert np.isnan(second[i]) != judged
    whole = ~np.isnan(together) & ~np.isnan(captions)
    ones = np.ones(whole.sum())
    columns = np.stack([density[whole], second[whole], captions[whole], ones], axis=1)
    fitted, residues, *_ = np.linalg.lstsq(columns, together[whole], rcond=None)
    assert (fitted[:3] > 0).all()  # the sum of all, each in units of its spread
    assert residues[0] < 1e-4
    run = json.loads(storage.read_bytes(storage.join(result.out, "run.json")))
    assert run["encoders"]["witness"]["regime"]["code"] == NOT
    assert run["sides"]["judges"] == ["density", "captions"]
    assert {"embed.detect", "embed.witness", "density", "score"} <= {*run["passes"]}
    report = storage.read_bytes(storage.join(result.out, "report.html")).decode()
    assert "What its encoder has learned, and captions that do not fit" in report


def test_the_caption_side_is_that_of_the_function(both):
    result, config = both
    embeddings, scores = table(result.out, "embeddings/witness"), table(result.out, "scores")
    key = dump_key(reopen_run(result.out).embedded, config)
    images, usable = matrix(embeddings["image_embedding"])
    captions, _ = matrix(embeddings["text_embedding"])
    arrays = images.astype(np.float32), captions.astype(np.float32), identities(embeddings, key)
    fold = FetchRows(2**64 - 1, key=key, also={"captions": "text_embedding"})
    rows = fold.finish(fold.add(fold.init(), embeddings))
    rule = fit_mismatch(*(rows[n] for n in ("embeddings", "captions", "ids", "hashes")), config.mismatch)
    wanted = rule.score(*(a[usable] for a in arrays))
    for name, column in wanted.items():
        assert scores[name].to_numpy()[usable].tobytes() == column.tobytes(), name
    cosines = (unit_norm(arrays[0]) * unit_norm(arrays[1])).sum(axis=1)[usable]
    found = scores["witness_clip_similarity"].to_numpy()[usable]
    np.testing.assert_allclose(found[~np.isnan(found)], cosines[~np.isnan(found)], atol=1e-6)


def test_the_same_command_does_nothing_again(both, dump):
    result, config = both
    before = (table(result.out, "scores"), sorted(storage.list_files(storage.join(result.out, "ledger"), ".json")))
    again = clean(str(dump), result.out, config=config)
    after = (table(again.out, "scores"), sorted(storage.list_files(storage.join(again.out, "ledger"), ".json")))
    assert before == after


def test_a_witness_alone_judges_captions(ray_session, dump, witness, tmp_path):
    config = settings(witness=witness)
    plan = make_plan(str(dump), str(tmp_path), config)
    assert [name for name, *_ in plan.passes] == ["embed.witness", "score", "flag", "write"]
    assert plan.coverage is None
    result = clean(str(dump), str(tmp_path), config=config)
    scores = table(result.out, "scores")
    assert scores["suspicion"].equals(scores["caption_mismatch"])
    assert "density" not in scores.column_names
    assert result.counts["removed"] == 20
    assert not (tmp_path / "density").exists()
    assert "Captions that do not fit" in (tmp_path / "report.html").read_text()
    run = reopen_run(result.out, {"mismatch.neighbors": 4})
    score_step(run)
    assert not table(result.out, "scores")["suspicion"].equals(scores["suspicion"])


def test_an_encoder_that_never_saw_the_dump_judges_captions(ray_session, dump, tmp_path):
    stranger = make_encoder(tmp_path / "stranger.pt", seed=2)
    result = clean(str(dump), str(tmp_path / "out"), config=settings(detect=stranger))
    scores = table(result.out, "scores")
    assert scores["suspicion"].equals(scores["caption_mismatch"])
    assert scores["suspicion_density"].null_count == scores["density"].null_count


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("encoders.witness.towers=[image]", "must be image and text"),
        ("reference.path=ref.parquet", "leave --reference"),
    ],
)
def test_a_witness_alone_refuses_what_it_cannot_use(dump, witness, tmp_path, change, says):
    config = load_config(settings=[f"encoders.witness.spec={witness}", *SMALL, change])
    with pytest.raises(UsageError, match=says):
        make_plan(str(dump), str(tmp_path), config)
