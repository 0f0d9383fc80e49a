"""Reading the original shards without what was flagged, for those who train from them and write no cleaned copies."""

from __future__ import annotations

from typing import Any

import ray

from tarsift.operators import kept
from tarsift.operators.kept import SkipFlagged, Verdicts
from tarsift.pipelines.run import reopen_judged
from tarsift.pipelines.session import map_tables


def skip_flagged(out: str) -> SkipFlagged:
    """Make a stage for webdataset that passes on what `clean` writes to `clean/`, and skips the rest.

    Verdicts are read shard by shard from OUT/flags, when a sample of the shard comes. A sample is found by its shard
    (`__url__`: where the run read it, or the same path below another folder) and by the keys of its members. Where
    samples of a shard have one key and different verdicts, they are told apart by their order: the n-th sample of a
    key is taken for its n-th row. That is so if the stage stands right behind the reader, before any shuffle or
    filter, and if members of a sample stand together in the archive; a warning tells where the numbers differ.
    A member of a row that was not kept is taken out of a sample into which webdataset merges several rows
    (`a.b00.jpg` and `a.b01.jpg`).

    Args:
        out: a result folder of `clean`, which need not have written shards (`--no-shards`).

    Returns:
        A function from samples to samples; it can be pickled, for the workers of a DataLoader.

    Raises:
        UsageError: if `out` is no result folder or is not flagged; when it runs, for a shard that is not of the run,
            and for samples without `__url__` and `__key__`.
        ChangedError: when it runs, for a shard that has changed since.

    Example:
        >>> urls = "cc3m/{00000..00331}.tar"
        >>> ds = wds.WebDataset(urls).compose(skip_flagged("cc3m-clean")).shuffle(1000)  # doctest: +SKIP
    """
    run = reopen_judged(out)
    return SkipFlagged(Verdicts(run.out, run.shards))


def drop_flagged(ds: ray.data.Dataset, out: str, **ray_options: Any) -> ray.data.Dataset:
    """Return the rows of a Dataset that `clean` writes to `clean/`, in their order.

    Each task reads the verdicts of the shards in its block, and no others.

    Args:
        ds: of `read_shards`, over some or all of the shards that `out` was made from, under the same names; any
            Dataset with the columns `shard` and `row` will do.
        out: a result folder of `clean`.
        ray_options: passed to `map_batches` (`num_cpus`, ...).

    Raises:
        UsageError: if `out` is no result folder or is not flagged. When it runs, a shard that is not of the run, or
            has changed since, fails the task.

    Example:
        >>> ds = drop_flagged(read_shards("cc3m/{00000..00331}.tar"), "cc3m-clean")  # doctest: +SKIP
    """
    run = reopen_judged(out)
    return map_tables(ds, kept.drop_flagged, {"verdicts": Verdicts(run.out, run.shards)}, **ray_options)
