"""Sifting in the main job: each sample gets a verdict or a reason, whatever dies on the way, and always the same."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tarsift.operators.errors import ConfigError, UsageError
from tarsift.operators.grouped import read_groups
from tarsift.pipelines import clean as recipe
from tarsift.pipelines.clean import clean
from tarsift.pipelines.config import load_config
from tarsift.pipelines.evaluate import evaluate
from tarsift.pipelines.plan import make_plan
from tarsift.pipelines.run import reopen_run
from tarsift.pipelines.select import select
from tarsift.pipelines.status import status
from tests.conftest import make_dump, make_encoder

ROUTING = [
    "sift.routing.class_size=30", "sift.routing.smallest=8", "sift.routing.classes_per_problem=3",
    "sift.most_duplicates=1", "sift.method.baseline.models=1",
]  # fmt: skip
SMALL = ["suspicion.published_ks=[8, 16]", "suspicion.reference_size=64"]


def test_drivers_and_tasks_that_join_load_no_torch():
    code = "import sys, tarsift.pipelines.sift; sys.exit(str([m for m in ('torch', 'sklearn') if m in sys.modules]))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == "[]"


@pytest.fixture(scope="module")
def made(ray_session, tmp_path_factory):
    """A folder with `dump`, of 3 shards whose samples have a `.cls`, `features.pt`, and `out`, cleaned and sifted."""
    folder = tmp_path_factory.mktemp("sift")
    make_dump(folder / "dump", shards=3, samples=80)
    for shard in (folder / "dump").glob("*.tar"):
        add_labels(shard)
    encoders = {"detect": make_encoder(folder / "enc.pt", folder / "dump")}
    encoders["features"] = make_encoder(folder / "features.pt", seed=1)
    given = [f"encoders.{role}.spec={file}" for role, file in encoders.items()]
    config = load_config(settings=[*given, *ROUTING, *SMALL, "sift.enabled=true", "encoders.features.views=2"])
    clean(str(folder / "dump"), str(folder / "out"), config=config)
    return folder


def add_labels(shard: Path) -> None:
    """Give every second sample of a shard a class, 0 to 2."""
    with tarfile.open(shard, "a", format=tarfile.USTAR_FORMAT) as tar:
        keys = sorted({name.partition(".")[0] for name in tar.getnames()})
    with tarfile.open(shard) as old:
        members = [(member, old.extractfile(member).read()) for member in old]  # pyright: ignore
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))
            key, _, part = member.name.partition(".")
            if part == "jpg" and keys.index(key) % 2:
                number = str(keys.index(key) % 3).encode()
                label = tarfile.TarInfo(f"{key}.cls")
                label.size = len(number)
                tar.addfile(label, io.BytesIO(number))


@pytest.fixture
def out(made, tmp_path):
    shutil.copytree(made / "out", tmp_path / "out")
    return tmp_path / "out"


def redo(out: Path, *, step: str = "sift", **changes) -> dict:
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    run = reopen_run(str(out), changes, redo=step)
    getattr(recipe, f"{step}_step")(run)
    return run.content["sift"]


def samples(out: Path) -> list[dict]:
    return [
        row for file in sorted((out / "sift" / "samples").glob("*.parquet")) for row in pq.read_table(file).to_pylist()
    ]


def results(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted((out / "sift").rglob("*.parquet"))}


def test_every_sample_has_a_verdict_or_a_reason(made):
    rows, said = samples(made / "out"), json.loads((made / "out" / "run.json").read_text())["sift"]
    assert len(rows) == 240
    assert said["by_status"] == {name: sum(r["sift_status"] == name for r in rows) for name in said["by_status"]}
    for row in rows:
        assert (row["sift_rank"] is not None) == (row["sift_status"] == "sifted")
        if row["suspicion_sifted"] is not None:
            assert row["suspicion_sifted"] >= row["suspicion"]
    assert said["sifted"] > 200
    assert not (made / "out" / "sift" / ".gathered").exists()


def test_verdicts_are_by_problem_and_each_class_is_in_as_many_as_there_are_repeats(made):
    verdicts = [
        row for file in (made / "out" / "sift" / "problems").iterdir() for row in read_groups(str(file)).to_pylist()
    ]
    by_sample: dict[tuple, set] = {}
    for row in verdicts:
        by_sample.setdefault((row["shard"], row["row"]), set()).add(row["problem"])
    assert all({name.partition("-")[0] for name in names} == {"0", "1"} for names in by_sample.values())
    sifted = {(row["shard"], row["row"]) for row in samples(made / "out") if row["sift_status"] == "sifted"}
    assert by_sample.keys() == sifted


def test_flags_are_by_both_verdicts(made):
    run = json.loads((made / "out" / "run.json").read_text())
    assert run["threshold"]["score"] == "suspicion_sifted"
    scores = {(r["shard"], r["row"]): r["suspicion_sifted"] for r in samples(made / "out")}
    flagged = [row for file in (made / "out" / "flags").iterdir() for row in pq.read_table(file).to_pylist()]
    cut = run["threshold"]["cutoff"]
    for row in flagged:
        if row["home"] != "errored":
            assert row["flagged"] == (scores[row["shard"], row["row"]] >= cut)


def test_the_report_says_what_became_of_samples_and_classes(made):
    page = (made / "out" / "report.html").read_text()
    assert 'id="classes"' in page
    assert "judged by the sifter" in page
    assert "a photo of a" in page.partition('id="classes"')[2]


def test_scores_of_sifted_samples_are_evaluated_with_the_others(out, made):
    rows = samples(out)[:12]
    truth = pa.table({"shard": [r["shard"] for r in rows], "row": pa.array([r["row"] for r in rows], pa.int32())})
    pq.write_table(truth, out.parent / "truth.parquet")
    assert {"suspicion", "suspicion_sifted", "sift_rank"} <= evaluate(
        str(out), f"{out.parent}/truth.parquet"
    ).scores.keys()


def test_features_are_embedded_with_diluted_views(made):
    first = next((made / "out" / "embeddings" / "features").glob("*.parquet"))
    schema = pq.read_schema(first)
    plain, views = schema.field("image_embedding").type.list_size, schema.field("view_embeddings").type.list_size
    assert views == 2 * plain


def test_a_clean_base_set_is_made_of_the_lowest_ranks_and_its_samples_are_copied_whole(out, made):
    found = select(str(out), 10)
    assert found.chosen == 10
    chosen = pq.read_table(found.listed).to_pylist()
    known = {(row["shard"], row["row"]): row for row in samples(out)}
    ranks = {}
    for row in known.values():
        if row["sift_rank"] is not None:
            ranks.setdefault(row["class"], []).append(row["sift_rank"])
    for row in chosen:
        mine = known[row["shard"], row["row"]]
        assert mine["sift_rank"] <= sorted(ranks[row["class"]])[4]  # two of each class, and the suspects
    pictures = 0
    for file in (out / "selected").glob("*.tar"):
        (dumped,) = (made / "dump").glob(f"{file.name}*")  # one of them is compressed
        with tarfile.open(file) as tar, tarfile.open(dumped) as source:
            for member in tar:
                pictures += member.name.endswith(".jpg")
                assert tar.extractfile(member).read() == source.extractfile(member.name).read()  # pyright: ignore
    assert pictures == 10
    fewer = select(str(out), 3, shards=False)
    assert (fewer.shards, len(pq.read_table(fewer.listed))) == (None, 3)
    assert not (out / "selected").exists()


@pytest.mark.parametrize("count", [0, 13])
def test_more_than_a_sifter_is_sure_of_is_not_chosen(out, count):
    with pytest.raises(UsageError, match="can be chosen"):
        select(str(out), count)


def test_another_budget_changes_what_is_sifted(out):
    said = redo(out, sift__budget=1)
    assert said["problems"] <= 2
    assert len([*(out / "sift" / "problems").iterdir()]) == said["problems"]  # none of before
    assert said["by_status"]["over_budget"] > 0
    rows = samples(out)
    assert {row["sift_status"] for row in rows if row["sift_rank"] is None} >= {"over_budget"}


def test_classes_by_label_and_a_network_on_pictures(out):
    quick = {"sift__method__network": "small-cnn", "sift__method__baseline__diluted_epochs": 1}
    said = redo(out, sift__route="cls", sift__picture_size=16, **quick)
    assert said["classes"] == {"sifted": 3}
    rows = samples(out)
    assert {row["class"] for row in rows} == {-1, 0, 1, 2}
    assert {row["sift_status"] for row in rows if row["class"] == -1} == {"unrouted"}


def test_classes_by_name(out, tmp_path):
    file = tmp_path / "classes.txt"
    file.write_text("red thing\n\nblue thing\n")
    changes = {"sift__route": str(file), "sift__routing__least_cosine": -1}
    said = redo(out, **changes)
    assert sum(said["classes"].values()) == 2
    rows = read_groups(str(out / "sift" / "classes.parquet")).to_pylist()
    assert sorted(row["name"] for row in rows) == ["blue thing", "red thing"]
    before = fingerprints(out)
    file.write_text("red thing\nblue thing\ngreen thing\n")
    assert sum(redo(out, **changes)["classes"].values()) == 3
    assert fingerprints(out)["sift"] != before["sift"]
    file.unlink()
    with pytest.raises(UsageError, match="no file of class names"):
        redo(out)


def fingerprints(out: Path) -> dict[str, str]:
    passes = json.loads((out / "run.json").read_text())["passes"]
    return {name: figures["fingerprint"] for name, figures in passes.items()}


def test_a_worker_that_dies_costs_its_problem_a_retry(out, tmp_path, monkeypatch):
    redo(out, sift__seed=5)
    undisturbed = results(out)
    assert sum(name.startswith("sift/problems/") for name in undisturbed) > 1
    shutil.rmtree(out / "sift")
    for name in ("classes", "route", "problems", "gather", "sifters", "sift"):
        shutil.rmtree(out / "ledger" / name)
    marker = str(tmp_path / "died")
    monkeypatch.setattr("tarsift.pipelines.sift._sift_one", dies_once(marker))
    said = redo(out, sift__seed=5)
    assert os.path.exists(marker)
    assert said["failed"] == {}
    found = results(out)
    assert found.keys() == undisturbed.keys()
    assert [name for name in found if found[name] != undisturbed[name]] == []


def dies_once(marker: str):
    def sift_one(job, problem):
        import os

        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return job(problem)
        os._exit(1)

    return sift_one


def test_a_problem_that_fails_is_told_and_the_others_go_on_and_it_is_tried_again(out, monkeypatch):
    def fails(job, problem):
        if problem.name == "0-0":
            raise ValueError("no luck")
        return job(problem)

    with monkeypatch.context() as patch:
        patch.setattr("tarsift.pipelines.sift._sift_one", fails)
        said = redo(out, sift__seed=9)
    assert said["failed"] == {"0-0": "ValueError: no luck"}
    assert said["problems"] > 1
    again = redo(out, sift__seed=9)
    assert again["failed"] == {}
    assert again["sifted"] >= said["sifted"]


def test_the_same_settings_do_nothing_again(out, monkeypatch):
    before = results(out)
    monkeypatch.setattr("tarsift.pipelines.sift._sift_one", lambda job, problem: 1 / 0)
    assert redo(out)["failed"] == {}
    assert results(out) == before


def test_verdicts_are_joined_to_several_shards_in_one_task(out, monkeypatch):
    before = results(out)
    for folder in ("ledger/sift", "sift/samples"):
        shutil.rmtree(out / folder)
    monkeypatch.setattr("tarsift.pipelines.sift.MOST_JOINS", 1)
    redo(out)
    assert results(out) == before


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"sift__memory_gb": 1e-6}, UsageError, "the largest problem"),
        ({"sift__routing__class_size": 5000}, UsageError, "too few for two classes"),
        ({"sift__method__sifter": "typo"}, ConfigError, "sift.method.sifter"),
        ({"flag__value": 0.1}, ConfigError, "does not belong to the pass sift"),
        ({"encoders__detect__spec": "other.pt"}, ConfigError, "does not belong to the pass sift"),
    ],
)
def test_what_it_refuses(out, changes, error, says):
    with pytest.raises(error, match=says):
        redo(out, **changes)


def test_without_features_nothing_is_begun(made, tmp_path):
    config = load_config(settings=[f"encoders.detect.spec={made / 'enc.pt'}", "sift.enabled=true"])
    with pytest.raises(UsageError, match="features=MODEL"):
        clean(str(made / "dump"), str(tmp_path / "none"), config=config)
    alone = load_config(settings=[f"encoders.features.spec={made / 'features.pt'}"])
    with pytest.raises(UsageError, match="alone judges nothing"):
        clean(str(made / "dump"), str(tmp_path / "none"), config=alone)
    assert not (tmp_path / "none").exists()


def test_other_features_take_the_place_of_those_that_are_there(made, out):
    other = make_encoder(out.parent / "other.pt", seed=2)
    before, embedded = results(out), fingerprints(out)
    redo(out, encoders__features__spec=str(made / "features.pt"))
    assert fingerprints(out) == embedded
    redo(out, encoders__features__spec=str(other))
    found = fingerprints(out)
    assert {name for name in found if found[name] != embedded[name]} >= {"embed.features", "route", "sift"}
    assert found["embed.detect"] == embedded["embed.detect"]
    assert results(out) != before
    run = json.loads((out / "run.json").read_text())
    assert run["encoders"]["features"]["spec"] == run["config"]["encoders"]["features"]["spec"] == str(other)
    assert run["config"]["encoders"]["features"]["views"] == 2


def test_features_that_were_being_replaced_are_not_mixed_with_the_earlier_ones(made, out, monkeypatch):
    other = make_encoder(out.parent / "other.pt", seed=2)

    def stopped(*arguments, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tarsift.pipelines.embed.run_pass", stopped)
        with pytest.raises(KeyboardInterrupt):
            redo(out, encoders__features__spec=str(other))
    assert "sift" in reopen_run(str(out)).stale_passes()
    redo(out)
    assert json.loads((out / "run.json").read_text())["encoders"]["features"]["spec"] == str(other)


def test_status_and_plan_name_the_passes_of_sifting(made):
    named = ["classes", "route", "problems", "sifters", "sift"]
    told = {p.name: (p.done, p.of) for p in status(str(made / "out")).passes}
    assert [name for name in told if name in named] == named
    assert told["classes"] == told["problems"] == (1, 1)
    assert told["route"] == told["sift"] == (3, 3)
    assert told["sifters"] == (len([*(made / "out" / "sift" / "problems").iterdir()]),) * 2
    config = reopen_run(str(made / "out")).config
    planned = {
        name: (done, of) for name, _, done, of in make_plan(str(made / "dump"), str(made / "out"), config).passes
    }
    assert planned == told
    begun = {name: (done, of) for name, _, done, of in make_plan(str(made / "dump"), "elsewhere", config).passes}
    assert begun["sifters"] == (0, 0)
    assert begun["route"] == (0, 3)


def test_an_encoder_that_saw_the_dump_gives_no_features(made, out):
    content = json.loads((out / "run.json").read_text())
    content["encoders"]["features"]["regime"]["code"] = "trained_on_this_dump"
    (out / "run.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="was trained on this dump"):
        redo(out)
