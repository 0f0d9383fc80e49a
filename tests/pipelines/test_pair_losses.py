"""The loss of every pair in every epoch: against a computation by hand, and where values are missing."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tarsift.operators.decoding import ImageConfig
from tarsift.operators.errors import UsageError
from tarsift.operators.models import build_model, build_tokenizer, load_checkpoint, model_config, preprocessing
from tarsift.operators.shards import ReadConfig, ReadShard, list_shards
from tarsift.pipelines.pair_losses import PairLosses
from tarsift.pipelines.pairs import PairReader, cached_batches, load_pairs
from tarsift.pipelines.pretrain import PretrainConfig, pretrain_here
from tests.conftest import make_dump

READER = PairReader(32, "bicubic", "shortest", ReadConfig(), ImageConfig())


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    make_dump(folder, shards=2, samples=20)  # one without a caption and one without a picture
    return str(folder)


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    """A table of losses, the summary, and the loss of every step: 38 pairs, 3 batches of 12 each epoch, 8 steps."""
    folder = tmp_path_factory.mktemp("trained")
    file, steps = str(folder / "losses.parquet"), []
    summary = pretrain_here(
        shards,
        out=str(folder / "e.pt"),
        config=PretrainConfig(steps=8, batch_size=12, seed=4, losses=file),
        on_step=lambda step, loss: steps.append(loss),
    )
    return pq.read_table(file), summary, steps


def by_hand(model: torch.nn.Module, pixels: torch.Tensor, tokens: torch.Tensor) -> np.ndarray:
    """The mean of both cross entropies of each pair, in float64 from the features on."""
    prepared = preprocessing({})
    mean, std = torch.tensor(prepared.mean), torch.tensor(prepared.std)
    with torch.no_grad():
        images = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
        a = model.encode_image(images, normalize=True).double().numpy()
        b = model.encode_text(tokens, normalize=True).double().numpy()
        logits = float(model.logit_scale.exp()) * a @ b.T
    towards_texts = np.log(np.exp(logits).sum(axis=1)) - logits.diagonal()
    towards_images = np.log(np.exp(logits).sum(axis=0)) - logits.diagonal()
    return (towards_texts + towards_images) / 2


def test_losses_of_the_first_step_by_hand(shards, trained):
    table, _, steps = trained
    tokenizer = build_tokenizer(model_config("tiny"))
    cache = load_pairs(READER, list_shards(shards), tokenizer, most=40)
    batch = next(cached_batches(cache, batch_size=12, seed=4))
    expected = by_hand(build_model("tiny", seed=4).train(), batch.pixels, batch.tokens)
    names = cache.names.take(batch.rows.numpy()).to_pylist()
    found = {(row["shard"], row["key"]): row["losses"][0] for row in table.to_pylist()}
    # float32 sums of other orders differ in the last places
    np.testing.assert_allclose([found[n["shard"], n["key"]] for n in names], expected, rtol=2e-5)
    assert steps[0] == pytest.approx(expected.mean(), rel=1e-5)


def test_a_value_per_epoch_and_null_where_the_pair_was_left_out(shards, trained):
    table, summary, steps = trained
    assert summary.pairs == len(table) == 38
    assert [str(field.type) for field in table.schema] == ["string", "string", "list<element: float>"]
    assert table.schema.metadata[b"tarsift.weights_sha256"].decode() == summary.weights_sha256
    read = [row for shard in list_shards(shards) for t in ReadShard()(shard) for row in t.to_pylist()]
    usable = [(r["shard"], r["key"]) for r in read if r["error"] is None and r["key"] != "000000003"]
    assert list(zip(table["shard"].to_pylist(), table["key"].to_pylist(), strict=True)) == usable
    losses = table["losses"].to_pylist()
    assert {len(row) for row in losses} == {3}
    seen = [[value for row in losses if (value := row[epoch]) is not None] for epoch in range(3)]
    assert [len(values) for values in seen] == [36, 36, 24]
    for epoch in range(3):
        expected = np.mean(steps[3 * epoch : 3 * epoch + 3])
        assert np.mean(seen[epoch]) == pytest.approx(expected, rel=1e-5)


def test_recording_changes_nothing_that_is_learned(shards, trained, tmp_path):
    _, summary, _ = trained
    plain = pretrain_here(shards, out=str(tmp_path / "e.pt"), config=PretrainConfig(steps=8, batch_size=12, seed=4))
    assert plain.weights_sha256 == summary.weights_sha256
    assert load_checkpoint(tmp_path / "e.pt").extra["settings"]["losses"] is None


def test_values_of_all_workers_are_joined(shards):
    cache = load_pairs(READER, list_shards(shards), build_tokenizer(model_config("tiny")), most=40)
    alone = next(cached_batches(cache, batch_size=8, seed=1))
    ranks = [next(cached_batches(cache, batch_size=4, seed=1, rank=rank, world=2)) for rank in (0, 1)]
    losses = torch.arange(8.0)
    of_the_other = {torch.int64: ranks[1].rows, torch.float32: losses[4:]}
    record = PairLosses(cache.names, 1, gathered=lambda values: torch.cat([values, of_the_other[values.dtype]]))
    record(ranks[0], losses[:4])
    assert torch.equal(record.values[alone.rows, 0], losses)
    assert int(record.values.isnan().sum()) == 38 - 8


def test_losses_need_pairs_in_memory_and_a_file_of_their_own(shards, tmp_path):
    out = str(tmp_path / "e.pt")
    with pytest.raises(UsageError, match="`losses` needs all pairs in memory: they take 119808 bytes"):
        pretrain_here(shards, out=out, config=PretrainConfig(losses=str(tmp_path / "l.parquet"), cache_bytes=10**5))
    with pytest.raises(UsageError, match="`losses` and `out` are both"):
        pretrain_here(shards, out=out, config=PretrainConfig(losses=out))
    assert not list(tmp_path.iterdir())
