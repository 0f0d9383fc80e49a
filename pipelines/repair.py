"""A CLIP without what it learned of some of its training samples, and what it says before and after.

Exact unlearning and catastrophic forgetting (`eu`, `cf`) train on all shards without the samples, as `pretrain` does;
the other methods work in the memory of one job, on the samples and some random others.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from jaxtyping import Bool

from tarsift.operators import storage
from tarsift.operators.encoder_info import short_name
from tarsift.operators.errors import UsageError
from tarsift.operators.models import build_model, load_checkpoint, load_encoder, save_checkpoint
from tarsift.operators.repair_settings import RepairConfig
from tarsift.operators.repairer import Examine, UnlearnPairs
from tarsift.operators.schema import places_of
from tarsift.operators.shards import ReadShard, Shard, list_shards
from tarsift.operators.storage import join
from tarsift.operators.stored import ReadStored, Stored, put_table
from tarsift.operators.trace_verdict import Question
from tarsift.pipelines.choosing import choose_random
from tarsift.pipelines.notebook import html_table
from tarsift.pipelines.passes import embed_name
from tarsift.pipelines.pretrain import pretrain
from tarsift.pipelines.printing import COMPARED, rows_of_repair
from tarsift.pipelines.progress import Event, Listener, silent
from tarsift.pipelines.rules import load_arrays
from tarsift.pipelines.run import Run, absolute_spec, reopen_run
from tarsift.pipelines.select import LISTED as SELECTED
from tarsift.pipelines.session import gpu_share
from tarsift.pipelines.tasks import side_by_side
from tarsift.pipelines.trace import (
    ABOUT,
    FOLDER,
    JOB_TIMEOUT_S,
    QUERIES,
    SAMPLES,
    load_trace,
    regime_of,
)
from tarsift.pipelines.train_job import base_of
from tarsift.pipelines.train_settings import PretrainConfig
from tarsift.sifters.unlearn import METHODS, WITHOUT_FORGOTTEN

REPAIRS, LIST = "repair", "forgotten.parquet"
COLUMNS = ("shard", "row", "key", "image_offset", "image_size", "caption")


@dataclass(frozen=True)
class RepairResult:
    """What was repaired.

    Attributes:
        encoder: the file of the repaired encoder.
        method: of unlearning.
        forgot: samples that it was to forget; listed: URL of their list.
        before, after: shares, 0 to 1: of the `queries` of the trace, and of the `forgotten` samples, of which the model
            says what was traced; `recall_at_5` of captions.
        held: what the last is measured on.
        kept_to: what the model was to keep to.
    """

    encoder: str
    method: str
    forgot: int
    listed: str
    before: dict[str, float]
    after: dict[str, float]
    held: str
    kept_to: str
    elapsed_s: float

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def _repr_html_(self) -> str:
        rows = [*rows_of_repair(self), ("measured on", self.held), ("kept to", self.kept_to)]
        title = f"tarsift repair: {self.method}, {self.forgot:,} samples forgotten"
        return html_table(title, [COMPARED, *rows], {"repaired": self.encoder, "forgotten": self.listed})


def repair(
    out: str,
    *,
    encoder: str,
    to: str,
    method: str = "eu",
    trace: str | None = None,
    forget: str | None = None,
    held_out: str | Sequence[str] | None = None,
    config: RepairConfig | None = None,
    progress: Listener = silent,
) -> RepairResult:
    """Make an encoder that has forgotten the samples that were traced, or flagged.

    Args:
        out: result folder over the dump that it was trained on.
        encoder: an encoder file of `pretrain`, or, but for `eu`, any that `pretrain --from` takes.
        to: the file of the repaired one.
        method: a name in `METHODS`; `eu` is the surest.
        trace: name of the trace; None: the only one there is, if any.
        forget: `traced` samples, from `config.above` on, or `flagged` ones; None: `traced` if there is a trace.
        held_out: shards that it was not trained on, for `recall_at_5`; None: samples of the dump that are kept.
        config: settings.
        progress: told what is done.

    Raises:
        UsageError: no such method or trace, nothing to forget, or an encoder that was not trained on the dump or
            cannot be repaired so.
        BusyError: another run works on it.
    """
    start, config = time.monotonic(), config or RepairConfig()
    if method not in METHODS:
        raise UsageError(f"there is no method {method!r}: choose one of {', '.join(METHODS)}.")
    if storage.absolute(to) == storage.absolute(encoder):
        raise UsageError(f"{to} is the encoder itself: give another file for the repaired one.")
    encoder, to = absolute_spec(encoder), storage.absolute(to)
    run = reopen_run(out, progress=progress)
    run.complete(embed_name(run.roles[0]))
    if forget not in ("traced", "flagged", None):
        raise UsageError(f"`forget` must be traced or flagged, got {forget!r}.")
    about = find_trace(run.out, trace, forget)
    forget = forget or ("traced" if about else "flagged")
    if forget == "flagged":
        run.complete("flag")
    loaded = load_encoder(encoder)
    regime_of(loaded, run)
    if method == "eu":
        training = as_trained(encoder)
    elif method == "cf":
        training = PretrainConfig(base=encoder, epochs=config.epochs, seed=config.seed)
        training = training if config.lr is None else with_rate(training, config.lr)
    else:
        training = None
    repairing = _Repairing(run, encoder, about, config)
    with run.working():
        listed = join(run.out, REPAIRS, method, LIST)
        forgotten = repairing.forgotten(forget)
        if not len(forgotten):
            raise UsageError(f"no sample of {run.out} is {forget}: there is nothing to forget.")
        put_table(listed, forgotten)
        held, what = repairing.held(held_out, forgotten)
        before = repairing.examine(encoder, forgotten, held)
        if training is not None:
            urls = [shard.url for shard in run.shards]
            training = training.model_copy(update={"read": run.config.read, "leave_out": listed})
            pretrain(urls, out=to, config=training, progress=progress)
            kept_to = "all other pairs of the dump"
        else:
            retained, kept_to = repairing.retained(method, forgotten)
            repairing.unlearn(method, forgotten, retained, to)
        after = repairing.examine(to, forgotten, held)
    result = RepairResult(
        to, method, len(forgotten), listed, before, after, what, kept_to, round(time.monotonic() - start, 3)
    )
    storage.put_bytes(join(run.out, REPAIRS, method, "repair.json"), json.dumps(result.to_json(), indent=1).encode())
    return result


def find_trace(out: str, name: str | None, forget: str | None) -> dict[str, Any] | None:
    """Return what is known of a trace; of the only one, where none is named.

    Raises:
        UsageError: there is no such, or none or several where one is to be forgotten.
    """
    if name is not None:
        return load_trace(join(out, FOLDER, name))
    there = [file.removesuffix(f"/{ABOUT}") for file in storage.list_files(join(out, FOLDER), f"/{ABOUT}")]
    if len(there) == 1:
        return load_trace(join(out, FOLDER, there[0]))
    if there and forget != "flagged":
        raise UsageError(f"there are {len(there)} traces in {out}: give --trace {' or '.join(there)}.")
    if forget == "traced":
        raise UsageError(f"there is no trace in {out}: make one with `tarsift trace`.")
    return None


def as_trained(encoder: str) -> PretrainConfig:
    """Return how an encoder file was trained.

    Raises:
        UsageError: if it does not say.
    """
    checkpoint = load_checkpoint(encoder)
    settings = checkpoint.extra.get("settings")
    if settings is None:
        raise UsageError(f"{encoder} does not say how it was trained, which eu takes: use cf.")
    known = {name: settings[name] for name in PretrainConfig.model_fields if name in settings}
    return PretrainConfig(**{**known, "losses": None, "leave_out": None})


def with_rate(config: PretrainConfig, lr: float) -> PretrainConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"lr": lr})})


@dataclass(frozen=True)
class _Repairing:
    """A repair of an encoder by what is in one result folder."""

    run: Run
    spec: str
    about: dict[str, Any] | None
    config: RepairConfig

    def forgotten(self, forget: str) -> pa.Table:
        """Return the samples that are to be forgotten."""
        if forget == "traced":
            assert self.about is not None  # or there would be nothing traced
            data = storage.read_bytes(join(self.run.out, FOLDER, self.about["name"], SAMPLES))
            table = pq.read_table(pa.BufferReader(data))
            return (
                table.filter(pc.field("trace_score") >= self.config.above)
                .select(list(COLUMNS))
                .replace_schema_metadata(None)
            )
        flags = Stored(join(self.run.out, "flags"), ("flagged",))
        return self._pairs(lambda table: np.asarray(table["flagged"]), [flags])

    def _pairs(self, chosen: Callable[[pa.Table], np.ndarray], beside: Sequence[Stored] = ()) -> pa.Table:
        """Return the pairs of the dump that are chosen, by what is stored beside them too."""
        read = ReadStored([Stored(join(self.run.out, "embeddings", self.run.roles[0]), COLUMNS), *beside])
        parts = [table.filter(pa.array(chosen(table))) for name in self.run.names for table in read(name)]
        usable = pa.concat_tables(parts).filter(pc.field("image_offset").is_valid() & pc.field("caption").is_valid())
        return usable.select(list(COLUMNS)).replace_schema_metadata(None)

    def held(self, held_out: str | Sequence[str] | None, forgotten: pa.Table) -> tuple[_Held, str]:
        """Return pairs on which retrieval is measured, and what they are."""
        if held_out is not None:
            shards = list_shards(held_out)
            rows = pa.concat_tables(_pairs_of(shards, self.run, self.config.held))
            return _Held(rows, shards), f"{len(rows):,} pairs of {len(shards)} shards that are held out"
        rows = self._random(self.config.held, forgotten)
        return _Held(rows, self.run.shards), f"{len(rows):,} random pairs of the dump that are kept"

    def _random(self, count: int, leave: pa.Table) -> pa.Table:
        """Return random pairs, without some."""
        rows = choose_random(self.run, self.run.roles[0], count + len(leave), salt=f"repair {self.config.seed}")
        gone = set(places_of(leave))
        kept = rows.filter(pa.array(~_is_in(rows, gone)))
        return kept.slice(0, count).select(list(COLUMNS))

    def examine(self, spec: str, forgotten: pa.Table, held: _Held) -> dict[str, float]:
        question = None
        if self.about is not None:
            arrays, _ = load_arrays(join(self.run.out, FOLDER, self.about["name"], QUERIES))
            question = Question(arrays["pictures"], tuple(self.about["concepts"]))
        shards = {shard.name: shard for shard in self.run.shards}
        others = {shard.name: shard for shard in held.shards}
        job = Examine(shards, others, self.run.config.images, question)
        self.run.progress(Event("examine", 0, 1, unit="encoder"))
        [found] = [
            ray.get(result)
            for _, (result,) in side_by_side(
                _examine, [(spec, (job, spec, forgotten, held.rows))], timeout_s=JOB_TIMEOUT_S
            )
        ]
        self.run.progress(Event("examine", 1, 1, unit="encoder", finished=True))
        return {name: round(value, 4) for name, value in found.items()}

    def retained(self, method: str, forgotten: pa.Table) -> tuple[pa.Table, str]:
        """Return pairs that the model is to keep to, and what they are.

        Surely clean ones for a method that needs them, where `tarsift select` has chosen some; else random ones.
        """
        url = join(self.run.out, SELECTED)
        if method in WITHOUT_FORGOTTEN and storage.exists(url):
            selected = pq.read_table(pa.BufferReader(storage.read_bytes(url)), columns=["shard", "row"])
            places = set(places_of(selected))
            pairs = self._pairs(lambda table: _is_in(table, places))
            return pairs, f"{len(pairs):,} pairs that `tarsift select` has chosen"
        pairs = self._random(self.config.retained, forgotten)
        return pairs, f"{len(pairs):,} random pairs of the dump that are kept"

    def unlearn(self, method: str, forgotten: pa.Table, retained: pa.Table, to: str) -> None:
        """Unlearn in a job, and write the encoder file."""
        shards = {shard.name: shard for shard in self.run.shards}
        gpus = gpu_share(self.run.config.resources)
        job = UnlearnPairs(self.spec, shards, self.run.config.images, method, self.config, "cuda" if gpus else "cpu")
        self.run.progress(Event(method, 0, 1, unit="encoder"))
        call = [(method, (job, forgotten, retained))]
        [state] = [
            ray.get(result) for _, (result,) in side_by_side(_unlearn, call, num_gpus=gpus, timeout_s=JOB_TIMEOUT_S)
        ]
        self.run.progress(Event(method, 1, 1, unit="encoder", finished=True))
        loaded = load_encoder(self.spec)
        if loaded.config is None:
            raise UsageError(f"{self.spec} does not say what it is built from: give an encoder file of `pretrain`.")
        model = build_model(loaded.config, seed=0)
        model.load_state_dict(state)
        base = base_of(loaded, short_name(self.spec))
        save_checkpoint(
            to, model, config=loaded.config, shards=self.run.digests, steps=0, samples=0, seed=self.config.seed,
            base=base, extra={"repaired_by": method, "forgot": len(forgotten)},
        )  # fmt: skip


def _is_in(table: pa.Table, places: Set[tuple[str, int]]) -> Bool[np.ndarray, " n"]:
    return np.array([place in places for place in places_of(table)], bool)


@dataclass(frozen=True)
class _Held:
    rows: pa.Table
    shards: Sequence[Shard]


def _pairs_of(shards: Sequence[Shard], run: Run, most: int) -> list[pa.Table]:
    """Return the first pairs of shards."""
    parts, count = [], 0
    for shard in shards:
        for table in ReadShard(run.config.read)(shard):
            pairs = table.filter(pc.field("error").is_null()).select(list(COLUMNS)).slice(0, most - count)
            parts.append(pairs)
            count += len(pairs)
            if count == most:
                return parts
    if not count:
        raise UsageError("the shards that are held out have no pair of a picture and a caption.")
    return parts


def _examine(job: Examine, spec: str, forgotten: pa.Table, held: pa.Table) -> dict[str, float]:
    return job(spec, forgotten, held)


def _unlearn(job: UnlearnPairs, forgotten: pa.Table, retained: pa.Table) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    return job(forgotten, retained)
