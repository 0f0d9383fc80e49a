"""The loss of every pair in every epoch, as it was while an encoder was trained; backdoors are learned first."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float32

from tarsift.operators import storage

if TYPE_CHECKING:
    from tarsift.pipelines.pairs import Batch


class PairLosses:
    """Records the loss of every pair of a cache by epoch: the mean of its two cross entropies in its batch.

    Args:
        names: a row per pair, as `PairCache.names`.
        epochs: passes over the pairs, begun ones included.
        gathered: joins the values of all workers, in the order of their ranks.
    """

    def __init__(
        self,
        names: pa.Table,
        epochs: int,
        *,
        gathered: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
    ) -> None:
        self.names, self.gathered = names, gathered
        self.values = torch.full((len(names), epochs), torch.nan)

    def __call__(self, batch: Batch, losses: Float32[torch.Tensor, " b"]) -> None:
        """Record a batch of the cache."""
        assert batch.rows is not None  # a stream knows no rows, and is refused before
        rows = self.gathered(batch.rows.to(losses.device))
        self.values[rows.cpu(), batch.epoch] = self.gathered(losses).cpu()

    def write(self, url: str, metadata: dict[str, str]) -> None:
        """Write `shard`, `key` and `losses` as Parquet: a value per epoch, null where the pair was left out of it."""
        n, epochs = self.values.shape
        flat = self.values.reshape(-1).numpy()
        ends = pa.array(np.arange(n + 1) * epochs, pa.int32())
        lists = pa.ListArray.from_arrays(ends, pa.array(flat, mask=np.isnan(flat)))
        table = self.names.append_column("losses", lists)
        table = table.replace_schema_metadata({f"tarsift.{name}": value for name, value in metadata.items()})
        with storage.open_write(url) as file:
            pq.write_table(table, file)


def are_of(url: str, weights_sha256: str) -> bool:
    """Tell whether there is a file of losses that says it is of the training of these weights."""
    try:
        with storage.open_read(url) as file:
            said = pq.read_schema(file).metadata or {}
    except (FileNotFoundError, pa.ArrowInvalid):
        return False
    return said.get(b"tarsift.weights_sha256") == weights_sha256.encode()
