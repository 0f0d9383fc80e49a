"""A clean base set: samples that are surely clean, for defences and repairs that need some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from tarsift.operators import storage
from tarsift.operators.errors import UsageError
from tarsift.operators.router import LowestPerClass
from tarsift.operators.schema import SIFTED_FOLDER
from tarsift.operators.shards import Shard
from tarsift.operators.sifter import SIFTED
from tarsift.operators.stored import put_table
from tarsift.operators.writer import split_shard
from tarsift.pipelines.folding import run_fold
from tarsift.pipelines.ledger import Ledger
from tarsift.pipelines.notebook import html_table
from tarsift.pipelines.printing import rows_of_selection
from tarsift.pipelines.progress import Event, Listener, silent
from tarsift.pipelines.run import Run, reopen_run
from tarsift.pipelines.tasks import side_by_side
from tarsift.sifters.result import quotas

TIE_KEY = b"tarsift.select"
LISTED = "selected.parquet"  # in the result folder
LARGEST_PART = 0.05  # what sifters are sure of: Meta-Sift's published results end there


@dataclass(frozen=True)
class Selection:
    """What was chosen, and how pure it is.

    Attributes:
        chosen: samples, from each sifted class in proportion to its size.
        of: samples that were sifted.
        suspects: how many of as many samples, chosen by the sifter alone, are suspects by density; these were left out.
        suspects_expected: how many there would be in a random choice.
        purity: share of clean samples in the sifter's choice, were all suspects poisoned and all others clean.
        listed: URL of the Parquet file with shard, row, uid and class of each; shards: folder of the samples, or None.
    """

    chosen: int
    of: int
    suspects: int
    suspects_expected: float
    purity: float
    listed: str
    shards: str | None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def _repr_html_(self) -> str:
        return html_table("tarsift select", rows_of_selection(self).items())


def select(out: str, count: int, *, shards: bool = True, progress: Listener = silent) -> Selection:
    """Choose the samples of a sifted result folder that are surely clean.

    Args:
        out: result folder.
        count: samples, at most 5 % of those that were sifted: of more than that no sifter is sure.
        shards: also copy the samples, byte for byte, to OUT/selected.

    Raises:
        UsageError: if `out` was not sifted, or has too few samples.
        BusyError: another run works on it.
    """
    run = reopen_run(out, progress=progress)
    with run.working():
        return _select(run, count, shards)


def _select(run: Run, count: int, shards: bool) -> Selection:
    print_, _ = run.complete("sift")
    plan = Ledger(run.out, "problems", print_).entries(["all"])["all"]["about"]
    sifted = np.array(plan["status"]) == SIFTED
    sizes = np.where(sifted, plan["samples"], 0)
    most = int(LARGEST_PART * sizes.sum())
    if not 0 < count <= most:
        raise UsageError(f"of {sizes.sum():,} sifted samples 1 to {most:,} can be chosen: got {count:,}.")
    shares = np.zeros(len(sizes), np.int64)
    shares[sifted] = quotas(sizes[sifted], count)

    def lowest(cutoff: float | None) -> pa.Table:
        fold = LowestPerClass(shares, key=TIE_KEY, cutoff=cutoff)
        return run_fold(fold, run.names, [storage.join(run.out, SIFTED_FOLDER)])

    suspect = np.asarray(lowest(None)["suspicion"]) >= np.float32(plan["suspect_cutoff"])
    chosen = lowest(plan["suspect_cutoff"])
    listed = storage.join(run.out, LISTED)
    put_table(listed, chosen.select(["shard", "row", "uid", "class"]))
    folder = storage.join(run.out, "selected")
    storage.remove_tree(folder)
    if shards:
        _copy(run, chosen, folder)
    return Selection(
        chosen=len(chosen),
        of=int(sizes.sum()),
        suspects=int(suspect.sum()),
        suspects_expected=round(len(suspect) * plan["suspects"] / sizes.sum(), 1),
        purity=round(1 - float(suspect.mean()), 4),
        listed=listed,
        shards=folder if shards else None,
    )


def _copy(run: Run, chosen: pa.Table, folder: str) -> None:
    names, rows = np.asarray(chosen["shard"]), np.asarray(chosen["row"])
    wanted = [shard for shard in run.shards if shard.name in set(names.tolist())]
    calls = ((shard, (shard, run.embedded[shard.name], rows[names == shard.name].tolist(), folder)) for shard in wanted)
    run.progress(Event("select", 0, len(wanted)))
    for done, (_, (result,)) in enumerate(side_by_side(_copy_rows, calls), 1):
        ray.get(result)
        run.progress(Event("select", done, len(wanted), finished=done == len(wanted)))


def _copy_rows(shard: Shard, entry: dict[str, Any], rows: Sequence[int], folder: str) -> None:
    homes = ["clean"] * entry["rows"]
    for row in rows:
        homes[row] = "selected"
    outputs = {"selected": storage.join(folder, f"{shard.name}.tar"), "clean": None, "errored": None}
    split_shard(shard, homes, outputs, expect_sha256=entry["source"]["sha256"])
