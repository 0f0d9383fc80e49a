"""Training leaves out the samples of a list, and nothing else changes."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tarsift.operators.errors import ChangedError, UsageError
from tarsift.operators.models import load_checkpoint
from tarsift.pipelines.pretrain import PretrainConfig, pretrain_here
from tests.conftest import make_dump


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("leaving")
    make_dump(folder / "dump", shards=2, samples=40, flaws=False)
    return folder


def listed(folder, name: str, rows: list[tuple[str, str, bool]]) -> str:
    url = str(folder / f"{name}.parquet")
    shards, keys, flagged = zip(*rows, strict=True)
    pq.write_table(pa.table({"shard": shards, "key": keys, "flagged": flagged}), url)
    return url


def trained(folder, out: str, **settings):
    config = PretrainConfig(epochs=2, batch_size=10, **settings)
    return pretrain_here(str(folder / "dump"), out=str(folder / out), config=config)


def test_samples_of_the_list_are_not_trained_on(folder):
    gone = [("00000", f"{i:09d}") for i in range(5)] + [("00001", "000000041")]
    file = listed(folder, "gone", [(*name, True) for name in gone] + [("00001", "000000042", False)])
    summary = trained(folder, "few.pt", leave_out=file, losses=str(folder / "losses.parquet"))
    assert (summary.pairs, summary.skipped) == (74, {"left_out": 6})
    assert summary.steps == 2 * 7
    table = pq.read_table(folder / "losses.parquet")
    seen = set(zip(table["shard"].to_pylist(), table["key"].to_pylist(), strict=True))
    assert len(seen) == 74
    assert not seen & set(gone)
    assert load_checkpoint(folder / "few.pt").extra["settings"]["leave_out"] == file
    assert trained(folder, "all.pt").weights_sha256 != summary.weights_sha256


def test_streamed_pairs_are_left_out_too(folder):
    file = listed(folder, "streamed", [("00000", f"{i:09d}", True) for i in range(40)])
    summary = trained(folder, "streamed.pt", leave_out=file, cache_bytes=0, shuffle=10)
    assert summary.pairs == 40
    assert summary.skipped["left_out"] > 0


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (None, "there is no list"),
        ([("other", "000000001", True)], "names other, which is none of the shards"),
        (
            [("00000", f"{i:09d}", True) for i in range(40)] + [("00001", f"{i:09d}", True) for i in range(40, 80)],
            "0 us",
        ),
    ],
)
def test_what_cannot_be_left_out_is_told(folder, rows, says):
    file = str(folder / "nowhere.parquet") if rows is None else listed(folder, "wrong", rows)
    with pytest.raises(UsageError, match=says):
        trained(folder, "none.pt", leave_out=file)


def test_a_file_of_something_else_is_told(folder):
    (folder / "text.parquet").write_text("shard key")
    with pytest.raises(UsageError, match="no Parquet file with the columns shard and key"):
        trained(folder, "none.pt", leave_out=str(folder / "text.parquet"))
    pq.write_table(pa.table({"name": ["a"]}), folder / "names.parquet")
    with pytest.raises(UsageError, match="no Parquet file with the columns shard and key"):
        trained(folder, "none.pt", leave_out=str(folder / "names.parquet"))


def test_a_training_does_not_go_on_with_another_list(folder, monkeypatch):
    first = listed(folder, "first", [("00000", "000000001", True)])
    second = listed(folder, "second", [("00000", "000000002", True)])

    class Stopped(Exception):
        pass

    def stop(step: int, loss: float) -> None:
        if step == 3:
            raise Stopped

    config = PretrainConfig(epochs=2, batch_size=10, leave_out=first, snapshot_s=0)
    out = str(folder / "broken.pt")
    with pytest.raises(Stopped):
        pretrain_here(str(folder / "dump"), out=out, config=config, on_step=stop)
    with pytest.raises(ChangedError, match="left_out"):
        pretrain_here(str(folder / "dump"), out=out, config=config.model_copy(update={"leave_out": second}))
