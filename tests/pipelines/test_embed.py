"""`clean` with embeddings that were made elsewhere, in place of encoding: those that `export` wrote."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tarsift.operators.errors import ChangedError, UsageError
from tarsift.operators.schema import matrix
from tarsift.pipelines.clean import clean
from tarsift.pipelines.config import load_config
from tarsift.pipelines.export import export
from tests.pipelines.test_cli import run

SMALL = ["suspicion.published_ks=[8]", "suspicion.reference_size=64", "flag.value=0.1"]


def settings(folder, *more: str):
    return load_config(settings=[*SMALL, f"encoders.detect.spec=embeddings:{folder}", *more])


def stored(out, folder: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(p) for p in sorted((out / folder).rglob("*.parquet")))


@pytest.fixture(scope="module")
def given(cleaned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("given") / "emb"
    export(str(cleaned / "out"), str(folder), format="clip-retrieval", which="all")
    return folder


def test_a_dump_is_cleaned_by_embeddings_made_elsewhere(cleaned, given, tmp_path, monkeypatch, capsys):
    arguments = [str(cleaned / "dump"), "--out", str(tmp_path / "out"), "--encoder", f"detect=embeddings:{given}"]
    sets = [word for setting in SMALL for word in ("--set", setting)]
    code, out, _ = run(monkeypatch, capsys, "clean", *arguments, *sets, "--dry-run")
    assert code == 0
    assert "embeddings:emb (" in out
    assert " px" not in out
    code, out, _ = run(monkeypatch, capsys, "clean", *arguments, *sets)
    assert code == 0
    assert "left over" in out
    assert "1 embeddings are of no sample" in out
    about = json.loads((tmp_path / "out" / "run.json").read_text())
    assert about["encoders"]["detect"]["regime"]["code"] == "unknown"
    # Per shard a picture that is none and a caption that is missing; and the sample whose key comes again.
    assert about["counts"]["errors"] == {"no_embedding": 7}
    assert about["passes"]["embed.detect"]["embeddings_of_no_sample"] == 1
    before, after = stored(cleaned / "out", "embeddings/detect"), stored(tmp_path / "out", "embeddings/detect")
    names = ["shard", "row", "key", "uid", "image_offset", "image_size", "caption", "image_sha256"]
    assert after.select(names).equals(before.select(names))
    for tower in ("image", "text"):
        (raw, _), (unit, there) = (matrix(table[f"{tower}_embedding"]) for table in (before, after))
        wanted = raw[there] / np.linalg.norm(raw[there].astype(np.float64), axis=1, keepdims=True)
        np.testing.assert_allclose(unit[there], wanted, atol=2**-11)
        assert there.sum() == 181 - 7
    assert not (tmp_path / "out" / "embeddings" / ".index").exists()
    # Rounded anew and with a few samples less, scores of so small a dump move; those of other embeddings are unrelated.
    old, new = (stored(out, "scores")["suspicion"].to_numpy() for out in (cleaned / "out", tmp_path / "out"))
    both = ~np.isnan(old) & ~np.isnan(new)
    assert np.corrcoef(old[both], new[both])[0, 1] > 0.6


def test_other_embeddings_under_the_same_name_are_refused(cleaned, given, tmp_path):
    folder = tmp_path / "emb"
    shutil.copytree(given, folder)
    out = str(tmp_path / "out")
    clean(str(cleaned / "dump"), out, config=settings(folder))
    values = np.load(folder / "img_emb" / "img_emb_0.npy")
    np.save(folder / "img_emb" / "img_emb_0.npy", values[::-1])
    with pytest.raises(ChangedError, match="was embedded by other weights than embeddings:emb holds now"):
        clean(str(cleaned / "dump"), out, config=settings(folder))


def test_what_embeddings_cannot_give_is_refused(cleaned, given, tmp_path):
    dump, out = str(cleaned / "dump"), str(tmp_path / "out")
    with pytest.raises(UsageError, match="has no embeddings of diluted copies"):
        clean(dump, out + "1", config=settings(given, "encoders.detect.views=2"))
    alone = tmp_path / "alone"
    shutil.copytree(given, alone)
    shutil.rmtree(alone / "text_emb")
    with pytest.raises(UsageError, match=r"has no text embeddings.*encoders\.detect\.towers=\[image\]"):
        clean(dump, out + "2", config=settings(alone))
    strange = tmp_path / "strange"
    shutil.copytree(given, strange)
    for path in (strange / "metadata").iterdir():
        names = pa.array([f"{path.stem} {i}" for i in range(pq.read_metadata(path).num_rows)])
        pq.write_table(pa.table({"image_path": names}), path)
    with pytest.raises(UsageError, match=r"none of the \d+ embeddings in .* is of a sample: by their image_path"):
        clean(dump, out + "3", config=settings(strange))
