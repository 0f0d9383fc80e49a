"""A result in the formats of other tools: the uids of DataComp, embeddings, a table of issues, a folder of pictures."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from tarsift.operators import storage
from tarsift.operators.errors import ChangedError, UsageError
from tarsift.operators.flag import HOMES, unscorable
from tarsift.operators.interchange import IDENTITY, extension_of, numbers_of, plain_values, quality, unit_half
from tarsift.operators.npy import NpyFile
from tarsift.operators.schema import COLUMNS, matrix
from tarsift.operators.shards import Shard, fetch_members
from tarsift.operators.stored import ReadStored, Stored
from tarsift.operators.uids import SUBSET, SortedUids
from tarsift.pipelines.failures import failures_told
from tarsift.pipelines.flag import sifted_folder
from tarsift.pipelines.ledger import Ledger
from tarsift.pipelines.notebook import html_table
from tarsift.pipelines.printing import rows_of_export
from tarsift.pipelines.progress import Event, Listener, silent
from tarsift.pipelines.run import Run, reopen_judged
from tarsift.pipelines.write import sizes_url

BATCH_ROWS = 1024
FETCHED_BYTES = 32 << 20  # of pictures that are held at once
IDENTITY_FIELDS = tuple((name, cast(pa.DataType, COLUMNS[name].type)) for name in IDENTITY)
KEPT, ALL = "kept", "all"
WHICH = {KEPT: ("clean",), "removed": ("removed",), "errored": ("errored",), ALL: HOMES}


@dataclass
class Job:
    """What is exported, and what was met on the way.

    Attributes:
        homes: verdicts of the samples that are exported.
        role: whose embeddings.
        images: whether pictures are written too.
        written: samples; files: their URLs, but for pictures.
        left_out: samples of those homes by why they are not among them.
    """

    run: Run
    to: str
    homes: tuple[str, ...]
    role: str
    images: bool
    progress: Listener
    written: int = 0
    files: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def each_shard(self) -> Iterator[tuple[int, Shard]]:
        """Yield the shards in order, and tell how far it is."""
        total = len(self.run.shards)
        for i, shard in enumerate(self.run.shards):
            self.progress(Event("export", i, total, self.written))
            yield i, shard
        self.progress(Event("export", total, total, self.written, finished=True))

    def rows(self, shard: Shard, *sources: Stored) -> Iterator[pa.Table]:
        """Yield the rows of a shard that are exported: their flags, and the columns of `sources`."""
        flags = Stored(storage.join(self.run.out, "flags"))
        for table in ReadStored([flags, *sources], batch_rows=BATCH_ROWS)(shard.name):
            mine = table.filter(pc.field("home").isin(self.homes))
            if len(mine):
                yield mine

    def scores(self) -> Stored:
        return Stored(storage.join(self.run.out, "scores"))

    def embeddings(self, *columns: str) -> Stored:
        return Stored(storage.join(self.run.out, "embeddings", self.role), columns)


@dataclass(frozen=True)
class Format:
    """A format: what writes it, what it is, and for which samples unless others are asked for (a name of WHICH).

    Attributes:
        suffixes: of the file that it is; none: a folder.
        pictures: whether it has a place for them.
        beside_shards: whether it is about the shards of clean/ and belongs beside them.
    """

    write: Callable[[Job], None]
    what: str
    which: str = KEPT
    suffixes: tuple[str, ...] = ()
    pictures: bool = False
    beside_shards: bool = False


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        samples: that are in it; left_out: others of those that were asked for, by why they are not.
        to: where it is; files: but for pictures.
    """

    format: str
    samples: int
    left_out: dict[str, int]
    to: str
    files: tuple[str, ...]
    elapsed_s: float

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def _repr_html_(self) -> str:
        return html_table("tarsift export", rows_of_export(self).items())


def export(
    out: str,
    to: str | None = None,
    *,
    format: str,
    which: str | None = None,
    role: str | None = None,
    images: bool = False,
    progress: Listener = silent,
) -> Exported:
    """Write a result in a format of FORMATS; the same result gives the same bytes.

    Args:
        out: a result folder that is flagged.
        to: file or folder, local or a URL; what was there before is replaced. None, for `sizes`: beside the shards.
        format: a name of FORMATS.
        which: samples of that verdict, a name of WHICH; None = as the format has it.
        role: of the encoder whose embeddings are exported; None = the first there is.
        images: also write the pictures, where the format has a place for them.

    Raises:
        UsageError: says what to give instead.
        ChangedError: if a shard whose pictures are written has changed.

    Example:
        >>> export("cc3m-clean", "subset.npy", format="datacomp").samples  # doctest: +SKIP
        3139870
    """
    start = time.monotonic()
    chosen = FORMATS.get(format)
    if chosen is None:
        known = "; ".join(f"{name}: {known.what}" for name, known in FORMATS.items())
        raise UsageError(f"there is no format {format!r}. {known}.")
    which = which or chosen.which
    if which not in WHICH:
        raise UsageError(f"there are no samples {which!r}; give one of {', '.join(WHICH)}.")
    if chosen.beside_shards and which != chosen.which:
        raise UsageError(f"{format} is about the shards of clean/, which hold what was kept: got {which} samples.")
    if images and not chosen.pictures:
        raise UsageError(f"{format} has no place for pictures: leave --images out.")
    with failures_told():
        run = reopen_judged(out)
        if role is not None and role not in run.roles:
            raise UsageError(f"{run.out} has no encoder {role!r}; it has {', '.join(run.roles)}.")
        to = _target(run, to, format, chosen)
        job = Job(run, to, WHICH[which], role or run.roles[0], images, progress)
        with run.held() if to.startswith(run.out.rstrip("/") + "/") else nullcontext():
            chosen.write(job)
    left_out = {why: count for why, count in job.left_out.items() if count}
    return Exported(format, job.written, left_out, to, tuple(job.files), round(time.monotonic() - start, 3))


def _target(run: Run, to: str | None, format: str, chosen: Format) -> str:
    """Return where to write, which is tried."""
    if to is None:
        if not chosen.beside_shards:
            raise UsageError(f"say where to write: --to {'FILE' if chosen.suffixes else 'FOLDER'}.")
        return storage.join(run.out, "clean")
    to = storage.absolute(to)
    if chosen.suffixes and not to.endswith(chosen.suffixes):
        raise UsageError(f"{format} is a file that ends in {' or '.join(chosen.suffixes)}: got --to {to}.")
    storage.refuse_unwritable(to.rpartition("/")[0] or "/" if chosen.suffixes else to)
    return to


def datacomp(job: Job) -> None:
    """Write the subset file that DataComp's resharder takes; see `tarsift.operators.uids`."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        uids = SortedUids(folder)
        everything = Job(job.run, job.to, HOMES, job.role, False, job.progress)
        for _, shard in everything.each_shard():
            for table in everything.rows(shard):
                kept = [home in job.homes for home in table["home"].to_pylist()]
                uids.add(table["uid"].to_pylist(), kept, shard.name)
        sink = NpyFile(job.to, SUBSET, (), stack)
        for block in uids.blocks():
            sink.add(block)
        job.written = sink.rows
    job.files.append(job.to)
    job.left_out = Counter({"with the uid of another": uids.repeated, "with the uid of one not kept": uids.shared})


def clip_retrieval(job: Job) -> None:
    """Write embeddings as clip-retrieval's inference does: a partition per shard, row i of its files is one sample.

    `img_emb/img_emb_N.npy` and `text_emb/text_emb_N.npy` hold float16 of norm 1, `metadata/metadata_N.parquet` the
    key as `image_path`, the caption and whatever is known besides; N has as many digits as the number of partitions
    (`clip_inference/writer.py` of github.com/rom1504/clip-retrieval). Samples without one of the embeddings are left
    out, as they are there. A shard without any sample has no files.
    """
    towers = [tower for tower in ("image", "text") if tower in job.run.config.encoders[job.role].towers]
    names = {"image": "img_emb", "text": "text_emb"}
    width = len(str(len(job.run.shards)))
    kinds = {**{names[tower]: "npy" for tower in towers}, "metadata": "parquet"}
    partitions = [
        {kind: f"{kind}/{kind}_{i:0{width}d}.{suffix}" for kind, suffix in kinds.items()}
        for i in range(len(job.run.shards))
    ]
    _refuse_others(job.to, kinds, {name for files in partitions for name in files.values()})
    columns = ("caption", *(f"{tower}_embedding" for tower in towers))
    for i, shard in job.each_shard():
        files = {kind: storage.join(job.to, name) for kind, name in partitions[i].items()}
        with ExitStack() as stack:
            sinks: dict[str, Any] = {}
            for table in job.rows(shard, job.scores(), job.embeddings(*columns)):
                found = {tower: matrix(table[f"{tower}_embedding"]) for tower in towers}
                whole = np.logical_and.reduce([valid for _, valid in found.values()])
                job.left_out["without an embedding"] += int((~whole).sum())
                if not whole.any():
                    continue
                table = table.filter(pa.array(whole))
                about = _metadata(table)
                if not sinks:
                    for tower in towers:
                        d = found[tower][0].shape[1]
                        url = files[names[tower]]
                        sinks[tower] = NpyFile(url, np.dtype(np.float16), (d,), stack)
                    sink = stack.enter_context(storage.open_write(files["metadata"]))
                    sinks["metadata"] = stack.enter_context(pq.ParquetWriter(sink, about.schema))
                for tower in towers:
                    sinks[tower].add(unit_half(found[tower][0][whole]))
                sinks["metadata"].write_table(about)
                job.written += len(about)
        for url in files.values():
            if sinks:
                job.files.append(url)
            elif storage.exists(url):
                storage.remove(url)  # of an earlier export, with other verdicts


def _metadata(table: pa.Table) -> pa.Table:
    """Return the table that lies beside embeddings: how clip-retrieval calls it first, then the rest."""
    columns = {"image_path": table["key"], "caption": table["caption"]}
    names = [*IDENTITY, "home", "reasons", "error", *numbers_of(table.schema)]
    return pa.table(columns | {name: table[name] for name in names})


def _refuse_others(folder: str, kinds: Sequence[str] | dict[str, str], mine: set[str]) -> None:
    """Refuse a folder with files that would be taken for a part of what is written.

    Raises:
        UsageError: names one.
    """
    for kind in kinds:
        for name in storage.list_files(storage.join(folder, kind)):
            if f"{kind}/{name}" not in mine:
                raise UsageError(
                    f"{folder} holds {kind}/{name}, which is not of this result: give another --to, or remove it."
                )


def fiftyone(job: Job) -> None:
    """Write a FiftyOneImageClassificationDataset: `labels.json`, and `data/SHARD/ROW.jpg` where pictures are asked for.

    The label of a picture is its verdict, and attributes of the label are caption, reasons, identity and scores; in
    docs.voxel51.com, Importing data, this is the one format with such attributes whose JSON is described. Load it with
    `fo.Dataset.from_dir(dataset_dir=TO, dataset_type=fo.types.FiftyOneImageClassificationDataset,
    label_field="verdict")`. Samples without a picture that could be decoded are left out. Text is escaped to ASCII,
    and no name of a file comes from a sample.
    """
    url = storage.join(job.to, "labels.json")
    columns = ("caption", "image_offset", "image_size", "image_sha256")
    with storage.open_write(url) as sink:
        sink.write(b'{"labels": {')
        for _, shard in job.each_shard():
            for table in job.rows(shard, job.scores(), job.embeddings(*columns)):
                usable = pa.array([not unscorable(error) for error in table["error"].to_pylist()], pa.bool_())
                job.left_out["without a picture that can be decoded"] += len(table) - sum(usable.to_pylist())
                table = table.filter(usable)
                names = ["caption", "reasons", *IDENTITY, "error", *numbers_of(table.schema)]
                for row in table.select(["home", *names]).to_pylist():
                    name = f"{shard.name}/{row['row']:08d}"
                    label = {"label": row.pop("home"), "attributes": plain_values(row)}
                    text = f"{json.dumps(name)}: {json.dumps(label, allow_nan=False)}"
                    sink.write(f"{',' if job.written else ''}\n{text}".encode("ascii"))
                    job.written += 1
                if job.images:
                    _write_pictures(shard, table, storage.join(job.to, "data", shard.name))
        sink.write(b"\n}}\n")
    job.files.append(url)


def _write_pictures(shard: Shard, table: pa.Table, folder: str) -> None:
    """Write the pictures of some rows of a shard, as many at once as may be held."""
    rows = table.select(["row", "image_offset", "image_size", "image_sha256"]).to_pylist()
    while rows:
        held, count = 0, 0
        while count < len(rows) and (not count or held + rows[count]["image_size"] <= FETCHED_BYTES):
            held += rows[count]["image_size"]
            count += 1
        some, rows = rows[:count], rows[count:]
        pictures = fetch_members(shard, [(row["image_offset"], row["image_size"]) for row in some])
        for row, picture in zip(some, pictures, strict=True):
            if hashlib.sha256(picture).digest() != row["image_sha256"]:
                raise ChangedError(f"{shard.url} has changed: the picture of row {row['row']} is another one.")
            storage.put_bytes(storage.join(folder, f"{row['row']:08d}.{extension_of(picture)}"), picture)


def datalab(job: Job) -> None:
    """Write the columns that cleanlab's Datalab has for outliers: `is_outlier_issue` and `outlier_score`.

    The score is that by which samples were flagged, turned round by `tarsift.operators.interchange.quality`; it is
    null for samples without one. Parquet or CSV, by the name of the file.
    """
    score = job.run.config.flag.score
    folders = [storage.join(job.run.out, "scores"), *sifted_folder(job.run.out, score)]
    sources = [Stored(folder, ("row", score)) for folder in folders]
    schema = pa.schema([*IDENTITY_FIELDS, ("is_outlier_issue", pa.bool_()), ("outlier_score", pa.float64())])
    with storage.open_write(job.to) as sink:
        is_csv = job.to.endswith(".csv")
        with pyarrow.csv.CSVWriter(sink, schema) if is_csv else pq.ParquetWriter(sink, schema) as writer:
            for _, shard in job.each_shard():
                for table in job.rows(shard, *sources):
                    values = table[score].combine_chunks()
                    there = np.asarray(values.is_valid())
                    scores = quality(values.fill_null(0).to_numpy(zero_copy_only=False))
                    columns = {name: table[name] for name, _ in IDENTITY_FIELDS} | {
                        "is_outlier_issue": table["flagged"]
                    }
                    columns["outlier_score"] = pa.array(scores, mask=~there)
                    writer.write_table(pa.table(columns).cast(schema))
                    job.written += len(table)
    job.files.append(job.to)


def sizes(job: Job) -> None:
    """Write `sizes.json`, the samples of each shard of clean/, for open_clip's `--train-data`.

    open_clip (`get_dataset_size` in `open_clip_train/data.py`) looks for it beside the first shard, and for each shard
    in it by the name of its file; so every folder of shards gets one, of its own shards.

    Raises:
        UsageError: if no shards were written, or others since.
    """
    run = job.run
    written = run.fingerprint_of("write")
    if written is None or not run.config.write.shards or "write" in run.stale_passes():
        raise UsageError(f"the shards of {run.out}/clean are not there, or out of date: run `tarsift write {run.out}`.")
    entries = Ledger(run.out, "write", written).entries(run.names)
    folders: dict[str, dict[str, int]] = {}
    for _, shard in job.each_shard():
        count = entries[shard.name]["homes"]["clean"]["samples"] if shard.name in entries else None
        if count is None:
            raise UsageError(f"the shard {shard.name} was not written: run `tarsift write {run.out}`.")
        if count:  # a shard of which nothing is kept is not there
            folder, _, name = shard.name.rpartition("/")
            folders.setdefault(folder, {})[f"{name}.tar"] = count
            job.written += count
    for folder, table in sorted(folders.items()):
        url = sizes_url(job.to, folder)
        storage.put_bytes(url, (json.dumps(table, indent=0) + "\n").encode())
        job.files.append(url)


FORMATS = {
    "datacomp": Format(datacomp, "sorted uids (.npy) for DataComp's resharder", suffixes=(".npy",)),
    "clip-retrieval": Format(clip_retrieval, "folder of img_emb, text_emb and metadata"),
    "fiftyone": Format(fiftyone, "folder with labels.json, with --images also pictures", which=ALL, pictures=True),
    "datalab": Format(datalab, "cleanlab's outlier columns", which=ALL, suffixes=(".parquet", ".csv")),
    "sizes": Format(sizes, "sizes.json beside the shards of clean/, for open_clip", beside_shards=True),
}
