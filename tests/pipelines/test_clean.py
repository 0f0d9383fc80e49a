"""The main job end to end on a small dump: conservation, bytes, resume, invariance, refusals."""

import gzip
import json
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tarsift.clip_detect.suspicion import suspicion
from tarsift.operators.errors import ChangedError, ErrorRateError, ShardError, UsageError
from tarsift.operators.identity import identities, row_hashes
from tarsift.operators.schema import matrix
from tarsift.operators.sides import choose_sides
from tarsift.pipelines import clean as recipe
from tarsift.pipelines.clean import clean
from tarsift.pipelines.config import load_config
from tarsift.pipelines.ledger import RunFile
from tarsift.pipelines.reading import read_shards
from tarsift.pipelines.run import open_run, reopen_run
from tarsift.pipelines.score import dump_key

SMALL = ["suspicion.published_ks=[8, 16]", "suspicion.reference_size=128"]


def settings(encoder: str, *more: str):
    return load_config(settings=[f"encoders.detect.spec={encoder}", *SMALL, *more])


@pytest.fixture(scope="module")
def result(ray_session, dump, encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return clean(str(dump), str(out), config=settings(encoder))


def members(path) -> dict[str, bytes]:
    if not path.exists():
        return {}
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}  # pyright: ignore


def out_of(result):
    from pathlib import Path

    return Path(result.out)


def table(result, folder: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(p) for p in sorted((out_of(result) / folder).glob("*.parquet")))


def test_conservation_and_byte_identity(result, dump):
    out = out_of(result)
    counts = result.counts
    assert counts["read"] == 400 == counts["kept"] + counts["removed"] + counts["errored"]
    assert counts["errors"] == {"missing_caption": 1, "undecodable_image": 1}
    assert counts["removed"] == 20  # 5 % of the 398 that are judged, rounded up
    for shard in sorted(dump.iterdir()):
        name = shard.name.split(".")[0]
        homes = [members(out / home / f"{name}.tar") for home in ("clean", "removed", "errored")]
        assert sum(map(len, homes)) == len(members(shard))
        assert {k: v for home in homes for k, v in home.items()} == members(shard)


def test_every_sample_has_a_score_or_a_reason(result):
    scores = table(result, "scores")
    assert len(scores) == 400
    unscored = scores.filter(scores["suspicion"].is_null())
    assert unscored["error"].to_pylist() == ["undecodable_image"]
    for name in scores.column_names:
        if pa.types.is_floating(scores[name].type):
            values = scores[name].drop_null().to_numpy()
            assert np.isfinite(values).all(), name
    copies = scores.filter(pc.equal(scores["duplicate_count"], 2))
    assert copies["row"].to_pylist() == [6, 7]
    assert copies["suspicion_image"][0] == copies["suspicion_image"][1]
    assert copies["caption_excess"][0] != copies["caption_excess"][1]


def test_keep_list_agrees_with_the_clean_shards(result):
    keep = pq.read_table(out_of(result) / "keep.parquet")
    assert len(keep) == result.counts["kept"]
    in_shards = sum(len(members(p)) for p in (out_of(result) / "clean").glob("*.tar")) // 2
    assert in_shards == len(keep)


def test_passes_over_stored_rows_equal_the_array_function_bit_for_bit(result, dump):
    run = reopen_run(result.out)
    key = dump_key(run.embedded, run.config)
    rows = table(result, "embeddings/detect")
    rows = rows.take(np.argsort(row_hashes(rows, key)))  # of copies the caption of the first one counts
    embeddings, valid = matrix(rows["image_embedding"])
    captions, _ = matrix(rows["text_embedding"])
    arrays = (embeddings[valid].astype(np.float32), identities(rows, key)[valid], captions[valid].astype(np.float32))
    columns = suspicion(*arrays, config=run.config.suspicion, key=key)
    scores = table(result, "scores")
    scores = scores.take(np.argsort(row_hashes(scores, key))).filter(pa.array(valid))
    for name in ("density", "suspicion_image", "caption_excess", "suspicion", "slof_k16", "dao_k8"):
        assert np.array_equal(scores[name].to_numpy(), columns[name]), name


def test_the_same_command_again_does_nothing_again(result, dump, encoder):
    out = out_of(result)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.rglob("*") if p.is_file() and "ledger" in p.parts}
    clean(str(dump), str(out), config=settings(encoder))
    after = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in before}
    assert before == after


def test_a_pass_called_by_name_does_not_repeat_what_clean_did(result):
    out = out_of(result)
    before = {p: p.stat().st_mtime_ns for p in (out / "ledger").rglob("*.json")}
    recipe.score_step(reopen_run(str(out)))
    assert before == {p: p.stat().st_mtime_ns for p in (out / "ledger").rglob("*.json")}


def copied(result, folder):
    """A result folder to work on, as the one that all tests share was after `clean`."""
    shutil.copytree(result.out, folder)
    return folder


def tables(out, folder: str) -> dict[str, pa.Table]:
    return {p.name: pq.read_table(p) for p in sorted((out / folder).glob("*.parquet"))}


def test_scores_of_stored_embeddings_do_not_depend_on_batches_or_workers(result, tmp_path):
    out = copied(result, tmp_path / "o")
    for name in ("reference", "density", "enriched", "score"):
        shutil.rmtree(out / "ledger" / name)
    for name in ("density", "reference", "scores"):
        shutil.rmtree(out / name)
    recipe.score_step(reopen_run(str(out), {"resources.batch_size": 7, "resources.workers": 2}))
    assert tables(out, "scores") == tables(out_of(result), "scores")


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "workers"), [(32, 4), (256, 1)])
def test_batch_size_and_workers_change_nothing_of_the_whole(result, dump, encoder, tmp_path, batch, workers):
    spread = (f"resources.batch_size={batch}", f"resources.workers={workers}", "resources.cpus_per_worker=0.25")
    other = clean(str(dump), str(tmp_path), config=settings(encoder, *spread))
    for folder in ("embeddings/detect", "scores", "flags"):
        assert tables(tmp_path, folder) == tables(out_of(result), folder)
    for home in ("clean", "removed", "errored"):
        for file in sorted((out_of(result) / home).glob("*.tar")):
            assert file.read_bytes() == (tmp_path / home / file.name).read_bytes()
    assert other.counts == result.counts


def test_what_auto_means_is_settled_by_the_first_run(result, dump, encoder, tmp_path):
    run = json.loads((out_of(result) / "run.json").read_text())
    assert (run["config"]["encoders"]["detect"]["precision"], run["config"]["encoders"]["detect"]["micro_batch"]) == (
        "fp32",
        64,
    )
    begun = RunFile(str(tmp_path), {**run, "config": settings(encoder).model_dump(mode="json")})
    begun.content["config"]["encoders"]["detect"] |= {"precision": "fp16", "micro_batch": 256}  # as on a GPU
    begun.save()
    continued = open_run(str(dump), str(tmp_path), settings(encoder)).config.encoders["detect"]
    assert (continued.precision, continued.micro_batch) == ("fp16", 256)
    with pytest.raises(ChangedError, match="precision: 'fp16' -> 'fp32'"):
        open_run(str(dump), str(tmp_path), settings(encoder, "encoders.detect.precision=fp32"))


def test_a_changed_input_or_setting_is_refused(result, dump, encoder, tmp_path):
    with pytest.raises(ChangedError, match=r"flag\.value: 0\.05 -> 0\.1"):
        clean(str(dump), result.out, config=settings(encoder, "flag.value=0.1"))
    with pytest.raises(ChangedError, match="00004 is gone"):
        clean(str(dump / "0000[0-3].tar"), result.out, config=settings(encoder))
    with pytest.raises(UsageError, match="no encoder"):
        clean(str(dump), str(tmp_path), config=load_config())
    with pytest.raises(UsageError, match="no encoder role 'judge'; the roles are detect and witness"):
        clean(str(dump), str(tmp_path), config=settings(encoder, f"encoders.judge.spec={encoder}"))
    assert not list(tmp_path.iterdir())


def test_a_policy_given_again_replaces_the_one_before(result, tmp_path):
    out = tmp_path / "o"
    out.mkdir()
    shutil.copy(out_of(result) / "run.json", out)
    first = reopen_run(str(out), {"flag.on_error": {"missing_caption": "keep"}}, redo="flag")
    first.record("flag", {})
    assert reopen_run(str(out)).config.flag.on_error == {"missing_caption": "keep"}
    assert reopen_run(str(out), {"flag.on_error": {"all": "drop"}}).config.flag.on_error == {"all": "drop"}


def test_another_threshold_needs_no_encoding_and_marks_later_passes(result, tmp_path):
    out = copied(result, tmp_path / "o")
    embedded = {p: p.stat().st_mtime_ns for p in (out / "embeddings").rglob("*.parquet")}
    run = reopen_run(str(out), {"flag.value": 0.1})
    recipe.flag_step(run)
    assert run.content["counts"]["removed"] == 40
    assert run.stale_passes() == ["write"]
    recipe.write_step(run)
    assert run.stale_passes() == []
    assert len(pq.read_table(out / "keep.parquet")) == 400 - 40 - 2
    run = reopen_run(str(out), {"flag.policy": "z", "flag.value": 2.0})
    recipe.flag_step(run)
    flags, scores = (
        pa.concat_tables(pq.read_table(p) for p in sorted((out / f).glob("*.parquet"))) for f in ("flags", "scores")
    )
    cutoff = run.content["threshold"]["cutoff"]
    judged = scores["error"].is_null().to_numpy() & scores["suspicion"].is_valid().to_numpy()
    assert flags["flagged"].to_numpy().sum() == (scores["suspicion"].fill_null(-9).to_numpy()[judged] >= cutoff).sum()
    assert embedded == {p: p.stat().st_mtime_ns for p in (out / "embeddings").rglob("*.parquet")}


def test_too_many_errors_fail_after_all_is_written(result, dump, encoder):
    with pytest.raises(ErrorRateError, match=r"2 of 400 samples \(0\.5%\)"):
        clean(str(dump), result.out, config=settings(encoder, "max_error_rate=0.001"))


def test_run_json_tells_the_regime_coverage_and_figures(result):
    run = json.loads((out_of(result) / "run.json").read_text())
    assert run["encoders"]["detect"]["regime"]["code"] == "trained_on_this_dump"
    assert run["reference"]["largest_rate"] == 0.05
    assert set(run["passes"]) >= {
        "embed.detect",
        "reference",
        "density",
        "enriched",
        "score",
        "flag",
        "write",
        "report",
    }
    assert run["threshold"]["ties_within_one_ulp"] >= 1
    assert "<html" in (out_of(result) / "report.html").read_text()


def test_a_damaged_shard_is_salvaged_quarantined_or_refused(ray_session, dump, encoder, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard in dump.iterdir():
        (shards / shard.name).write_bytes(shard.read_bytes())
    whole = (shards / "00001.tar").read_bytes()
    (shards / "00001.tar").write_bytes(whole[: len(whole) // 1024 * 512 + 100])  # inside a block
    salvaged = clean(str(shards), str(tmp_path / "o"), config=settings(encoder))
    problem = salvaged.counts["shard_problems"]["00001"][0]
    assert problem["problem"] == "truncated"
    assert 320 < salvaged.counts["read"] < 400
    source = members(shards / "00000.tar")
    assert source == {
        k: v for h in ("clean", "removed", "errored") for k, v in members(tmp_path / "o" / h / "00000.tar").items()
    }
    assert (tmp_path / "o" / "errored" / "00001.tail").stat().st_size > 0
    run = reopen_run(str(tmp_path / "o"), {"flag.on_bad_shard": "quarantine"})
    recipe.flag_step(run)
    rows = pq.read_table(tmp_path / "o" / "flags" / "00001.parquet")
    assert set(rows["home"].to_pylist()) == {"errored"}
    run = reopen_run(str(tmp_path / "o"), {"flag.on_bad_shard": "fail"})
    with pytest.raises(ShardError, match="the first is 00001: truncated"):
        recipe.flag_step(run)


def test_notebook_lines(ray_session, dump, encoder):
    from tarsift.operators.encoder import ClipEncoder

    ds = read_shards(str(dump / "0000[01].tar"))
    assert ds.count() == 160
    ds = ds.map_batches(
        ClipEncoder,
        fn_constructor_kwargs={"encoder": encoder},
        batch_size=64,
        compute=ray_session.data.ActorPoolStrategy(size=1),
    )
    rows = ds.to_pandas()
    assert len(rows) == 160
    assert rows["image_embedding"].notna().sum() == 159


def test_webdataset_and_gnu_tar_read_the_clean_shards(result, tmp_path):
    import subprocess

    import webdataset

    for shard in sorted((out_of(result) / "clean").glob("*.tar")):
        samples = list(webdataset.WebDataset(str(shard), shardshuffle=False))
        assert all({"jpg", "txt"} <= set(sample) for sample in samples)
        if shutil.which("tar"):
            listed = subprocess.run(["tar", "tf", shard], capture_output=True, text=True, check=True).stdout.split()
            assert len(listed) == 2 * len(samples)


def test_an_untouched_shard_is_identical(result, dump, tmp_path):
    out = copied(result, tmp_path / "o")
    run = reopen_run(str(out), {"flag.value": 0})
    recipe.flag_step(run)
    recipe.write_step(run)
    for name in ("00001", "00002", "00003"):
        assert (out / "clean" / f"{name}.tar").read_bytes() == (dump / f"{name}.tar").read_bytes()
    assert (out / "clean" / "00004.tar").read_bytes() == gzip.decompress((dump / "00004.tar.gz").read_bytes())


def test_what_workers_run_gives_what_is_stored(result, encoder, tmp_path):
    """The functions that Ray ships to its workers, called here on one shard."""
    from tarsift.operators.encoder import ClipEncoder
    from tarsift.operators.encoder_info import encoder_info
    from tarsift.operators.flag import Flag
    from tarsift.operators.shards import Shard
    from tarsift.pipelines import reading, score
    from tarsift.pipelines.flag import flag_rows

    run = reopen_run(result.out)
    shard: Shard = run.shards[0]
    items = pa.Table.from_pylist([{"name": shard.name, "url": shard.url, "size": shard.size}])
    stored = {
        f: pq.read_table(out_of(result) / f / "00000.parquet")
        for f in ("embeddings/detect", "density", "scores", "flags")
    }

    settings = {"read": run.config.read, "images": run.config.images, "info": encoder_info(encoder)}
    pictures, again = (list(reading.read_pictures(items, **settings, folder=str(tmp_path))) for _ in range(2))
    assert pa.concat_tables(pictures).equals(pa.concat_tables(again))  # the second attempt decodes in another process
    embedded = pa.concat_tables(map(ClipEncoder(encoder), pictures))
    rows = embedded.filter(pc.greater_equal(embedded["row"], 0)).select(stored["embeddings/detect"].column_names)
    assert rows.to_pylist() == stored["embeddings/detect"].to_pylist()

    folders = score.ScoreFolders(result.out, choose_sides({"detect": "trained_on_this_dump"}))
    arguments = (folders, dump_key(run.embedded, run.config), score.Search("auto", 1, 64, "here"))
    for scorer, folder in ((score.DensityScorer, "density"), (score.LastScorer, "scores")):
        table = pa.concat_tables(score._score_in_task(items, scorer=scorer, arguments=arguments))
        rows = table.filter(pc.greater_equal(table["row"], 0)).select(stored[folder].column_names)
        assert rows.to_pylist() == stored[folder].to_pylist()

    threshold = run.content["threshold"]
    flag = Flag(run.config.flag, cutoff=threshold["cutoff"], tie_hash=threshold["tie_hash"])
    tables = list(flag_rows(items, folders=[str(out_of(result) / "scores")], flag=flag))
    assert pa.concat_tables(tables[:-1]).to_pylist() == stored["flags"].to_pylist()


def test_a_shard_is_split_by_its_flags(result, tmp_path):
    from tarsift.pipelines.write import write_shard

    shutil.copytree(out_of(result) / "flags", tmp_path / "flags")
    run = reopen_run(result.out)
    shard = run.shards[0]
    entry = write_shard(shard, str(tmp_path), run.embedded[shard.name]["source"]["sha256"])
    assert entry["rows"] == sum(home["samples"] for home in entry["homes"].values()) == 80
    for home in ("clean", "errored"):
        assert (tmp_path / home / "00000.tar").read_bytes() == (out_of(result) / home / "00000.tar").read_bytes()
    with pytest.raises(ChangedError):
        write_shard(shard, str(tmp_path), "0" * 64)


def test_policies_are_found_in_one_shard_as_in_many(result):
    from tarsift.operators.folds import Count
    from tarsift.pipelines.folding import _fold_some

    names = [f"{i:05d}" for i in range(5)]
    state, _ = _fold_some(Count("home"), names, [str(out_of(result) / "flags")])
    homes = Count("home").finish(state)
    assert homes == {"clean": result.counts["kept"], "removed": 20, "errored": 2}
