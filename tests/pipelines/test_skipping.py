"""The original shards, less what was flagged, are what `clean` wrote to clean/."""

from __future__ import annotations

import shutil

import pyarrow.parquet as pq
import pytest
import webdataset as wds
from torch.utils.data import DataLoader

import tarsift
from tarsift.operators.errors import UsageError
from tarsift.pipelines.reading import read_shards

# webdataset leaves the shards it has read open
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def read(folder, *stages) -> list[tuple]:
    urls = sorted(map(str, folder.rglob("*.tar*")))
    samples = wds.WebDataset(urls, shardshuffle=False).compose(*stages)
    return [(s["__key__"], s.get("jpg"), s.get("txt"), s.get("json")) for s in samples]


def test_webdataset_reads_what_was_kept(cleaned):
    found = read(cleaned / "dump", tarsift.skip_flagged(str(cleaned / "out")))
    assert found == read(cleaned / "out" / "clean")
    assert 100 < len(found) < 181


def test_workers_of_a_loader_share_the_shards(cleaned):
    urls = sorted(map(str, (cleaned / "dump").rglob("*.tar*")))
    dataset = wds.WebDataset(urls, shardshuffle=False).compose(tarsift.skip_flagged(str(cleaned / "out")))
    loader = DataLoader(dataset.to_tuple("__key__"), batch_size=None, num_workers=2, multiprocessing_context="fork")
    keys = sorted(key for (key,) in loader)
    assert keys == sorted(key for key, *_ in read(cleaned / "out" / "clean"))


def test_a_dataset_keeps_the_rows_that_were_kept(cleaned):
    ds = tarsift.drop_flagged(read_shards(str(cleaned / "dump")), str(cleaned / "out"))
    rows = ds.select_columns(["shard", "row", "key", "image"]).to_pandas().sort_values(["shard", "row"])
    keep = pq.read_table(cleaned / "out" / "keep.parquet")
    assert list(zip(rows["shard"], rows["row"], strict=True)) == list(
        zip(keep["shard"].to_pylist(), keep["row"].to_pylist(), strict=True)
    )
    assert list(rows["image"]) == [image for _, image, *_ in read(cleaned / "out" / "clean")]


def test_a_run_that_is_not_flagged_is_refused(cleaned, tmp_path):
    with pytest.raises(UsageError, match=r"holds no run\.json"):
        tarsift.skip_flagged(str(tmp_path))
    out = tmp_path / "out"
    shutil.copytree(cleaned / "out", out)
    (out / "ledger" / "flag" / "a" / "00001.json").unlink()
    with pytest.raises(UsageError, match=r"1 of 3 shards .* have not been through the pass flag"):
        tarsift.skip_flagged(str(out))
