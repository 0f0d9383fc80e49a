"""Exports agree with the result they are made from, and are what their tools read."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from tarsift.operators import storage
from tarsift.operators.errors import ChangedError, UsageError
from tarsift.operators.schema import matrix
from tarsift.pipelines.export import FORMATS, export
from tarsift.pipelines.verify import verify
from tests.pipelines.test_cli import run

TARGETS = {
    "datacomp": "subset.npy",
    "clip-retrieval": "embeddings",
    "fiftyone": "pictures",
    "datalab": "issues.parquet",
    "sizes": "sizes",
}


def stored(out: Path, folder: str) -> pa.Table:
    """All rows of a pass, in the order of shards."""
    return pa.concat_tables(pq.read_table(p) for p in sorted((out / folder).rglob("*.parquet")))


def of_home(out: Path, *homes: str) -> pa.Table:
    """Flags, scores, and embeddings side by side, of samples of these verdicts."""
    table = stored(out, "flags")
    for folder in ("scores", "embeddings/detect"):
        other = stored(out, folder)
        for name in set(other.column_names) - set(table.column_names):
            table = table.append_column(name, other[name])
    return table.filter(pc.field("home").isin(homes))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_format_is_tried():
    assert set(TARGETS) == set(FORMATS)


@pytest.mark.parametrize("format", TARGETS)
def test_the_same_result_gives_the_same_bytes_anywhere(format, cleaned, tmp_path):
    out, images = str(cleaned / "out"), format == "fiftyone"
    first = export(out, str(tmp_path / "1" / TARGETS[format]), format=format, images=images)
    again = export(out, str(tmp_path / "1" / TARGETS[format]), format=format, images=images)
    assert (first.samples, first.left_out, first.files) == (again.samples, again.left_out, again.files)
    store = f"memory://exports/{tmp_path.name}"
    export(out, f"{store}/{TARGETS[format]}", format=format, images=images)
    files = contents(tmp_path / "1")
    assert {name: storage.read_bytes(storage.join(store, name)) for name in storage.list_files(store)} == files
    assert files
    assert all(url.removeprefix(str(tmp_path / "1") + "/") in files for url in first.files)


def test_datacomp_lists_the_uids_that_were_kept(cleaned, tmp_path):
    done = export(str(cleaned / "out"), str(tmp_path / "kept.npy"), format="datacomp")
    # the sample whose key comes again has no json, so its uid is none of 128 bits: it is not kept
    kept = sorted(divmod(int(uid, 16), 2**64) for uid in of_home(cleaned / "out", "clean")["uid"].to_pylist())
    found = np.load(tmp_path / "kept.npy")
    assert found.dtype == np.dtype("u8,u8")
    assert [tuple(map(int, uid)) for uid in found] == kept
    assert done.samples == len(kept) > 100
    with pytest.raises(UsageError, match=r"the uid 'b/00002/000000120' .* has not 32 hexadecimal digits"):
        export(str(cleaned / "out"), str(tmp_path / "all.npy"), format="datacomp", which="all")
    assert not (tmp_path / "all.npy").exists()


def test_embeddings_lie_as_clip_retrieval_writes_them(cleaned, tmp_path):
    done = export(str(cleaned / "out"), str(tmp_path / "e"), format="clip-retrieval", which="all")
    table = of_home(cleaned / "out", "clean", "removed", "errored")
    whole = np.logical_and(*(np.asarray(table[f"{t}_embedding"].is_valid()) for t in ("image", "text")))
    wanted = table.filter(pa.array(whole))
    assert done.samples == len(wanted)
    assert done.left_out == {"without an embedding": 6}  # a picture and a caption are missing in each shard
    parts = [str(i) for i in range(3)]
    for kind, tower in (("img_emb", "image"), ("text_emb", "text")):
        assert sorted(p.name for p in (tmp_path / "e" / kind).iterdir()) == [f"{kind}_{i}.npy" for i in parts]
        found = np.concatenate([np.load(tmp_path / "e" / kind / f"{kind}_{i}.npy") for i in parts])
        assert found.dtype == np.float16
        raw = matrix(wanted[f"{tower}_embedding"])[0].astype(np.float64)
        np.testing.assert_allclose(found, raw / np.linalg.norm(raw, axis=1, keepdims=True), atol=2**-11)
    about = pa.concat_tables(pq.read_table(tmp_path / "e" / "metadata" / f"metadata_{i}.parquet") for i in parts)
    assert about.column_names[:2] == ["image_path", "caption"]
    for name, source in {"image_path": "key", **{n: n for n in about.column_names[1:]}}.items():
        assert about[name].to_pylist() == wanted[source].to_pylist()
    assert {"suspicion", "home", "reasons", "uid"} <= set(about.column_names)


def test_embeddings_of_another_result_are_not_mixed_in(cleaned, tmp_path):
    to = tmp_path / "e"
    export(str(cleaned / "out"), str(to), format="clip-retrieval")
    kept = sum(len(pq.read_table(p)) for p in (to / "metadata").iterdir())
    assert kept == len(stored(cleaned / "out", "flags").filter(pc.field("home") == "clean"))
    (to / "img_emb" / "img_emb_7.npy").write_bytes(b"")
    with pytest.raises(UsageError, match=r"holds img_emb/img_emb_7\.npy, which is not of this result"):
        export(str(cleaned / "out"), str(to), format="clip-retrieval")


def test_fiftyone_gets_verdicts_as_labels_and_the_pictures(cleaned, tmp_path):
    done = export(str(cleaned / "out"), str(tmp_path / "f"), format="fiftyone", images=True)
    text = (tmp_path / "f" / "labels.json").read_bytes()
    labels = json.loads(text)["labels"]
    table = of_home(cleaned / "out", "clean", "removed", "errored")
    rows = [row for row in table.to_pylist() if row["error"] != "undecodable_image"]
    assert done.left_out == {"without a picture that can be decoded": 3}
    assert list(labels) == [f"{row['shard']}/{row['row']:08d}" for row in rows]
    for label, row in zip(labels.values(), rows, strict=True):
        assert label["label"] == row["home"]
        found = label["attributes"]
        assert found.get("caption") == row["caption"]
        assert found["reasons"] == row["reasons"]
        assert found["suspicion"] == row["suspicion"]
        assert (found["shard"], found["row"], found["uid"]) == (row["shard"], row["row"], row["uid"])
    pictures = contents(tmp_path / "f" / "data")
    assert {name.rpartition(".")[0] for name in pictures} == set(labels)
    for row in rows:
        data = pictures[f"{row['shard']}/{row['row']:08d}.jpg"]
        assert hashlib.sha256(data).digest() == row["image_sha256"]


def test_fiftyone_without_pictures_and_for_some_verdicts(cleaned, tmp_path):
    done = export(str(cleaned / "out"), str(tmp_path / "f"), format="fiftyone", which="removed")
    assert list(contents(tmp_path / "f")) == ["labels.json"]
    labels = json.loads((tmp_path / "f" / "labels.json").read_text())["labels"]
    assert {label["label"] for label in labels.values()} == {"removed"}
    assert len(labels) == done.samples > 5


def test_hostile_captions_are_text(cleaned, tmp_path):
    export(str(cleaned / "out"), str(tmp_path / "f"), format="fiftyone")
    text = (tmp_path / "f" / "labels.json").read_bytes()
    assert text.isascii()
    assert b"\n<script>" not in text  # the line feed of the caption is escaped
    assert b"\\n<script>" in text


def test_pictures_of_a_shard_that_has_changed_are_refused(cleaned, tmp_path):
    shutil.copytree(cleaned / "out", tmp_path / "out")
    about = json.loads((tmp_path / "out" / "run.json").read_text())
    shard = tmp_path / "00000.tar"
    data = bytearray((cleaned / "dump" / "a" / "00000.tar").read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    about["inputs"][0]["url"] = str(shard)
    (tmp_path / "out" / "run.json").write_text(json.dumps(about))
    with pytest.raises(ChangedError, match="picture of row 0 is another one"):
        export(str(tmp_path / "out"), str(tmp_path / "f"), format="fiftyone", images=True)
    assert not (tmp_path / "f" / "labels.json").exists()


@pytest.mark.parametrize("name", ["i.parquet", "i.csv"])
def test_datalab_has_the_lowest_score_for_the_most_suspicious(name, cleaned, tmp_path):
    done = export(str(cleaned / "out"), str(tmp_path / name), format="datalab")
    read = pq.read_table if name.endswith("parquet") else pyarrow.csv.read_csv
    found = read(tmp_path / name)
    assert found.column_names == ["shard", "row", "key", "uid", "is_outlier_issue", "outlier_score"]
    table = of_home(cleaned / "out", "clean", "removed", "errored")
    assert done.samples == len(found) == len(table)
    assert found["is_outlier_issue"].to_pylist() == table["flagged"].to_pylist()
    there = np.asarray(table["suspicion"].is_valid())
    assert np.asarray(found["outlier_score"].is_valid()).tolist() == there.tolist()
    assert not there.all()
    scores = found["outlier_score"].to_numpy()[there]
    assert ((scores > 0) & (scores < 1)).all()
    suspicion = table["suspicion"].to_numpy()[there]
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(suspicion.astype(np.float64))))
    issues = np.array(found["is_outlier_issue"].to_pylist())[there]
    judged = np.array([error is None for error in table["error"].to_pylist()])[there]
    assert scores[issues].max() < scores[judged & ~issues].min()


def test_sizes_are_those_that_open_clip_looks_for(cleaned, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(cleaned / "out", out)
    done = export(str(out), format="sizes")
    total = 0
    for folder in ("a", "b"):  # as open_clip's get_dataset_size does
        sizes = json.loads((out / "clean" / folder / "sizes.json").read_text())
        shards = sorted(map(str, (out / "clean" / folder).glob("*.tar")))
        assert sorted(sizes) == [Path(shard).name for shard in shards]
        for shard in shards:
            assert sizes[Path(shard).name] == len(list(wds.WebDataset([shard], shardshuffle=False)))
        total += sum(sizes.values())
    assert done.samples == total == json.loads((out / "run.json").read_text())["counts"]["kept"]


def test_sizes_do_not_outlive_the_shards_they_are_of(cleaned, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    shutil.copytree(cleaned / "out", out)
    export(str(out), format="sizes")
    assert verify(str(out)).holds
    assert run(monkeypatch, capsys, "flag", str(out), "--fraction", "0.2", "-q")[0] == 0
    with pytest.raises(UsageError, match=r"out of date: run `tarsift write"):
        export(str(out), format="sizes")
    assert run(monkeypatch, capsys, "write", str(out), "-q")[0] == 0
    assert not list((out / "clean").rglob("sizes.json"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"format": "npz", "to": "x"}, r"there is no format 'npz'\. datacomp: sorted uids.*; clip-retrieval: folder"),
        ({"format": "datacomp"}, "say where to write: --to FILE"),
        ({"format": "fiftyone"}, "say where to write: --to FOLDER"),
        ({"format": "datacomp", "to": "x.txt"}, r"a file that ends in \.npy"),
        ({"format": "datalab", "to": "x", "images": True}, "no place for pictures"),
        ({"format": "sizes", "which": "all"}, "hold what was kept"),
        ({"format": "datalab", "to": "x.csv", "which": "some"}, "no samples 'some'; give one of kept, removed"),
        ({"format": "clip-retrieval", "to": "x", "role": "witness"}, "has no encoder 'witness'; it has detect"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(arguments, words, cleaned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=words):
        export(str(cleaned / "out"), **arguments)
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_not_finished_is_refused(cleaned, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(cleaned / "out", out)
    about = json.loads((out / "run.json").read_text())
    written = about["passes"].pop("write")
    (out / "run.json").write_text(json.dumps(about))
    with pytest.raises(UsageError, match=r"not there, or out of date: run `tarsift write"):
        export(str(out), format="sizes")
    about["passes"] |= {"write": written, "flag": about["passes"]["flag"] | {"fingerprint": "0" * 16}}
    (out / "run.json").write_text(json.dumps(about))
    with pytest.raises(UsageError, match="have not been through the pass flag"):
        export(str(out), str(tmp_path / "i.csv"), format="datalab")


def test_verdicts_of_earlier_scores_are_refused(cleaned, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(cleaned / "out", out)
    about = json.loads((out / "run.json").read_text())
    about["config"]["flag"]["value"] = 0.3
    (out / "run.json").write_text(json.dumps(about))
    with pytest.raises(UsageError, match=r"the verdicts of .* are out of date"):
        export(str(out), str(tmp_path / "i.csv"), format="datalab")


def test_the_command_says_what_how_many_and_where(cleaned, tmp_path, monkeypatch, capsys):
    to = str(tmp_path / "s.npy")
    code, out, _ = run(monkeypatch, capsys, "export", str(cleaned / "out"), "--to", to, "--format", "datacomp")
    assert code == 0
    assert out.startswith("datacomp")
    assert f"{len(np.load(to)):,} samples in" in out
    assert to in out
    code, out, _ = run(
        monkeypatch,
        capsys,
        "export",
        str(cleaned / "out"),
        "--to",
        str(tmp_path / "f"),
        "--format",
        "fiftyone",
        "--json",
    )
    assert json.loads(out)["left_out"] == {"without a picture that can be decoded": 3}
    code, _, err = run(monkeypatch, capsys, "export", str(cleaned / "out"), "--format", "datacomp")
    assert code == 2
    assert "say where to write" in err
