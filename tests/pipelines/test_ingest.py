"""Nights of an ingestion: what came in counts once, the standing reference grows, and a state is whole at all times."""

import hashlib
import json
import os
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from tarsift.clip_detect.density import DensityRule
from tarsift.operators.errors import ErrorRateError, UsageError
from tarsift.operators.folds import DrawnRows
from tarsift.operators.scorer import ScoreDensity
from tarsift.operators.stored import Stored
from tarsift.pipelines import ingest as module
from tarsift.pipelines.clean import clean
from tarsift.pipelines.config import CleanConfig, load_config
from tarsift.pipelines.embed import embed
from tarsift.pipelines.folding import run_fold
from tarsift.pipelines.ingest import ingest, what_came_in
from tarsift.pipelines.ingest_settings import IngestConfig, parse_ingest_config
from tarsift.pipelines.nights import State
from tarsift.pipelines.rules import load_arrays
from tarsift.pipelines.run import reopen_run
from tarsift.pipelines.score import dump_key
from tarsift.pipelines.status import status_of_state
from tests.conftest import make_dump, make_encoder
from tests.pipelines.test_cli import run as run_command

SMALL = [
    "suspicion.published_ks=[8]",
    "suspicion.reference_size=64",
    "suspicion.candidates=200",
    "suspicion.pool_fraction=0.1",
    "resources.batch_size=64",
]
NIGHTS = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with six shards `all`, encoders that never saw them, and what was made of them in three nights."""
    folder = tmp_path_factory.mktemp("ingest")
    make_dump(folder / "all", shards=2 * NIGHTS, samples=80)
    make_dump(folder / "before", shards=2, samples=60, flaws=False, seed=9)
    make_encoder(folder / "base.pt", folder / "before")
    make_encoder(folder / "witness.pt", folder / "before", seed=1)
    return folder


def settings(world, *more: str) -> CleanConfig:
    roles = [
        f"encoders.{role}.spec={world / f'{file}.pt'}" for role, file in (("witness", "witness"), ("detect", "base"))
    ]
    return load_config(settings=[*SMALL, *roles, *more])


def fixed(world, *more: str) -> IngestConfig:
    return IngestConfig(clean=settings(world, *more), train=False, refit=0.6)


def arrive(world, folder, *numbers: int) -> None:
    """Put shards of `all` into a folder."""
    folder.mkdir(exist_ok=True)
    for path in sorted((world / "all").iterdir()):
        if int(path.name[:5]) in numbers:
            shutil.copy2(path, folder / path.name)


@pytest.fixture(scope="module")
def nights(world, ray_session):
    """Three nights of two shards each, encoders standing still; shards arrive in `arrivals`, the state is `state`."""
    results = []
    for night in range(NIGHTS):
        arrive(world, world / "arrivals", 2 * night, 2 * night + 1)
        results.append(ingest(str(world / "arrivals"), str(world / "state"), config=fixed(world)))
    return results


def loaded(folder) -> State:
    state = State.load(str(folder))
    assert state is not None
    return state


def test_a_shard_counts_in_one_night(world, nights, monkeypatch):
    assert [(result.night, result.shards) for result in nights] == [(1, 2), (2, 2), (3, 2)]
    seen = loaded(world / "state").seen()
    assert {name: told["night"] for name, told in seen.items()} == {f"{i:05d}": i // 2 + 1 for i in range(6)}
    with monkeypatch.context() as patch:
        patch.setattr("tarsift.pipelines.ingest.session", None)  # nothing is new: Ray is not asked for
        again = ingest(str(world / "arrivals"), str(world / "state"), config=fixed(world))
    assert again.night is None
    for result in nights:
        counts = result.counts
        assert counts["read"] == 160 == counts["kept"] + counts["removed"] + counts["errored"]


def test_the_standing_reference_is_that_of_one_run(world, nights, tmp_path):
    state = loaded(world / "state")
    config = settings(world, f"reference.key={state.content['key']}")
    clean(str(world / "all"), str(tmp_path / "one"), config=config)
    run = reopen_run(str(tmp_path / "one"))
    columns = ("key", "caption", "image_embedding", "text_embedding")
    largest, key = run.content["reference"]["largest_hash"], dump_key(run.embedded, run.config)
    fold = DrawnRows(largest, key=key, columns=columns)
    for role in ("detect", "witness"):
        one = run_fold(fold, run.names, [Stored(f"{run.out}/embeddings/{role}")])
        stands = pq.read_table(world / "state" / "reference" / f"{NIGHTS:04d}" / role / "rows.parquet")
        assert len(one) == 200
        assert stands.select(one.column_names).cast(one.schema).equals(one)

    against = f"reference.standing={world / 'state' / 'reference' / f'{NIGHTS:04d}'}"
    other = settings(world, f"reference.key={state.content['key']}", against)
    clean(str(world / "all"), str(tmp_path / "against"), config=other)
    for folder in ("scores", "flags"):
        for name in run.names:
            a, b = (pq.read_table(tmp_path / out / folder / f"{name}.parquet") for out in ("one", "against"))
            assert a.equals(b), (folder, name)


def test_rules_serve_until_too_much_of_the_reference_is_new(world, nights):
    runs = [json.loads((world / "state" / "nights" / f"{n:04d}" / "run.json").read_text()) for n in (1, 2, 3)]
    assert [run["reference"]["rules"] for run in runs] == ["fitted", "kept", "kept"]
    assert [run["reference"]["standing"] for run in runs] == [0, 158, 200]
    unfitted = [
        json.loads((world / "state" / "reference" / f"{n:04d}" / "about.json").read_text())["unfitted"] for n in (2, 3)
    ]
    assert 0.3 < unfitted[0] < 0.6 <= unfitted[1]  # the next night fits them again
    files = [(world / "state" / "nights" / f"{n:04d}" / "reference" / "density.npz") for n in (1, 2, 3)]
    contents = [dict(np.load(file)) for file in files]
    for other in contents[1:]:
        assert all(np.array_equal(contents[0][name], other[name]) for name in contents[0])


def test_densities_by_kept_rules_are_those_that_fitting_would_give(world, nights):
    """What a reference says of its rows' density is what its rule says of their embeddings."""
    folder = world / "state" / "reference" / "0002"
    rule = DensityRule.from_state(*load_arrays(str(folder / "rules" / "density.npz")))
    key = hashlib.sha256(loaded(world / "state").content["key"].encode()).digest()
    rows = pq.read_table(folder / "detect" / "rows.parquet")
    scored = ScoreDensity(rule, key=key)(rows)
    stored = pq.read_table(folder / "density" / "rows.parquet")
    assert scored.select(["shard", "row", "density"]).equals(
        stored.cast(scored.select(["shard", "row", "density"]).schema)
    )


def test_a_changed_shard_is_taken_again_and_one_that_was_only_touched_is_not(world, nights, tmp_path):
    # The state names what lies below the folder of the first night; so shards change in place, in a copy of all.
    arrivals, state = world / "arrivals", tmp_path / "state"
    shutil.copytree(world / "state", state)
    before = (arrivals / "00001.tar").read_bytes()
    try:
        os.utime(arrivals / "00000.tar", (1, 1))
        (arrivals / "00001.tar").write_bytes(before[:10240] + b"\0" * 10240)
        (arrivals / "00004.tar").rename(arrivals / "00004.hidden")
        found = what_came_in(str(arrivals), str(state))
        assert [shard.name for shard in found.changed] == ["00001"]
        assert [shard.name for shard in found.doubtful] == ["00000"]
        assert found.gone == ["00004"]
        result = ingest(str(arrivals), str(state), config=fixed(world))
        assert (result.night, result.changed, result.gone) == (4, ("00001",), ("00004",))
        rows = pq.read_table(state / "reference" / "0004" / "detect" / "rows.parquet")
        of_it = [
            row
            for shard, row in zip(rows["shard"].to_pylist(), rows["row"].to_pylist(), strict=True)
            if shard == "00001"
        ]
        assert len(of_it) <= 10  # nothing of what it was
        later = what_came_in(str(arrivals), str(state))
        assert (later.new, later.changed, later.doubtful) == ([], [], [])
    finally:
        (arrivals / "00001.tar").write_bytes(before)
        (arrivals / "00004.hidden").rename(arrivals / "00004.tar")


STEPS = ("_train", "_standing", "_clean", "_look", "_grow", "_record")


def test_a_night_that_breaks_off_anywhere_is_gone_on_with(world, nights, tmp_path, monkeypatch):
    """After every step of a night a call ends; the next one goes on, with the shards that were decided at first."""
    state = tmp_path / "state"
    shutil.copytree(world / "state", state, ignore=shutil.ignore_patterns("0003*"))

    class Break(Exception):
        pass

    for step in STEPS:
        with monkeypatch.context() as patch:
            whole = getattr(module.Night, step)

            def broken(self, *arguments, whole=whole):
                whole(self, *arguments)
                raise Break

            patch.setattr(module.Night, step, broken)
            with pytest.raises(Break):
                ingest(str(world / "arrivals"), str(state), config=fixed(world))
        assert loaded(state).next == 3
        told = status_of_state(str(state))
        assert told is not None
        assert told.state == "stopped"
        assert told.tonight is not None
        assert (told.tonight.night, told.tonight.shards) == (3, 2)
        done = told.tonight.run and {step.name: step.done for step in told.tonight.run.passes}
        assert done is None if step in STEPS[:2] else done["write"] == 2
    (world / "arrivals" / "late.tar").write_bytes((world / "all" / "00001.tar").read_bytes())
    try:
        result = ingest(str(world / "arrivals"), str(state), config=fixed(world))
    finally:
        (world / "arrivals" / "late.tar").unlink()
    assert (result.night, result.shards) == (3, 2)
    for name in ("detect", "witness"):
        a, b = (pq.read_table(w / "reference" / "0003" / name / "rows.parquet") for w in (state, world / "state"))
        assert a.equals(b)
    for folder in ("scores", "flags"):
        for name in ("00004", "00005"):
            a, b = (pq.read_table(w / "nights" / "0003" / folder / f"{name}.parquet") for w in (state, world / "state"))
            assert a.equals(b)


def test_status_of_a_state_tells_of_its_nights(world, nights, monkeypatch, capsys):
    told = status_of_state(str(world / "state"))
    assert told is not None
    assert (told.state, told.tonight, told.shards) == ("waiting", None, 6)
    assert told.reference == loaded(world / "state").records[-1]["reference"]["rows"]
    for night, result in zip(told.nights, nights, strict=True):
        assert night.night == result.night
        assert night.shards == 2
        for name in ("read", "kept", "removed", "errored"):
            assert getattr(night, name) == result.counts[name]
        assert (night.findings, night.drift) == (len(result.findings), len(result.drift))
    code, text, _ = run_command(monkeypatch, capsys, "status", str(world / "state"))
    assert code == 0
    assert "waiting for the next night" in text
    assert "3 nights, 6 shards" in text
    assert text.count("160") == 3
    code, text, _ = run_command(monkeypatch, capsys, "status", str(world / "state"), "--json")
    assert [night["night"] for night in json.loads(text)["nights"]] == [1, 2, 3]


def test_nightly_training_embeds_the_standing_samples_anew(world, tmp_path, ray_session):
    arrivals, state = tmp_path / "arrivals", tmp_path / "state"
    config = IngestConfig(clean=settings(world), epochs=1)
    for night in range(2):
        arrive(world, arrivals, 2 * night, 2 * night + 1)
        ingest(str(arrivals), str(state), config=config)
    first, second = loaded(state).records
    assert first["weights"]["witness"] == second["weights"]["witness"]
    assert first["weights"]["detect"] != second["weights"]["detect"]
    run = json.loads((state / "nights" / "0002" / "run.json").read_text())
    assert run["encoders"]["detect"]["regime"]["code"] == "trained_on_this_dump"
    assert run["encoders"]["witness"]["regime"]["code"] == "not_trained_on_this_dump"
    assert run["sides"]["judges"] == ["density", "captions"]
    assert run["reference"]["rules"] == "fitted"
    # What the first night left, as the second one's encoder sees it, is what that encoder says of these pictures.
    embed(
        str(arrivals / "00000.tar"),
        str(tmp_path / "alone"),
        config=load_config(settings=[f"encoders.detect.spec={state / 'nights' / '0002' / 'encoder.pt'}"]),
    )
    alone = pq.read_table(tmp_path / "alone" / "embeddings" / "detect" / "00000.parquet")
    stands = pq.read_table(state / "nights" / "0002" / "standing" / "detect" / "rows.parquet")
    by_row = {row["row"]: row["image_embedding"] for row in stands.to_pylist() if row["shard"] == "00000"}
    assert len(by_row) > 60
    for row in alone.to_pylist():
        if row["row"] in by_row:
            assert np.allclose(row["image_embedding"], by_row[row["row"]], atol=2e-3)


def test_what_does_not_go_together_is_refused_before_work(world, nights, tmp_path):
    state, arrivals = str(world / "state"), str(world / "arrivals")
    with pytest.raises(UsageError, match="stand still"):
        ingest(arrivals, state, config=IngestConfig(clean=settings(world)))
    with pytest.raises(UsageError, match="leave --root out"):
        ingest(arrivals, state, config=fixed(world), root=str(tmp_path))
    with pytest.raises(UsageError, match=r"reference\.key"):
        ingest(arrivals, str(tmp_path / "new"), config=fixed(world, "reference.key=k"))
    alone = load_config(settings=[f"encoders.witness.spec={world / 'witness.pt'}"])
    with pytest.raises(UsageError, match="--fixed"):
        ingest(arrivals, str(tmp_path / "new"), config=IngestConfig(clean=alone))
    assert not (tmp_path / "new").exists()
    with pytest.raises(UsageError, match="lies outside the root"):
        ingest(str(world / "state" / "nights" / "0001" / "clean"), state, config=fixed(world))
    with pytest.raises(UsageError, match=r"ingest\.epochs"):
        parse_ingest_config({"ingest": {"epochs": 0}})


def test_too_many_bad_samples_are_told_once_the_night_counts(world, tmp_path, ray_session):
    arrive(world, tmp_path / "arrivals", 0, 1)
    config = fixed(world, "max_error_rate=0.001")
    with pytest.raises(ErrorRateError):
        ingest(str(tmp_path / "arrivals"), str(tmp_path / "state"), config=config)
    assert ingest(str(tmp_path / "arrivals"), str(tmp_path / "state"), config=config).night is None
