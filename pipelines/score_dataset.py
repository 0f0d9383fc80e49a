"""Scores for a Ray Dataset of one's own images and captions: no shards, no result folder."""

from __future__ import annotations

import copy
import hashlib
import re
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import ray

from tarsift.clip_detect.suspicion import DensityRule
from tarsift.operators import storage
from tarsift.operators.encoder_info import encoder_info
from tarsift.operators.encoder_settings import EncoderConfig, EncoderInfo
from tarsift.operators.errors import UsageError
from tarsift.operators.folds import Fold, SumOfDigests
from tarsift.operators.imported import folder_of
from tarsift.operators.pictures import OWN, DecodePictures, IdentifySamples
from tarsift.operators.schema import COLUMNS
from tarsift.operators.scorer import ScoreDensity
from tarsift.operators.sides import DETECT, WITNESS, Sides, choose_sides
from tarsift.pipelines.blocks import Blocks, beside, fold_blocks, map_blocks, numbered, slices
from tarsift.pipelines.config import CleanConfig
from tarsift.pipelines.embed import settled
from tarsift.pipelines.encoding import READ_CPUS, EncodeRole, encode_rows
from tarsift.pipelines.fitting import fit_enriched, fit_reference
from tarsift.pipelines.progress import Event, Listener, silent
from tarsift.pipelines.rules import load_arrays
from tarsift.pipelines.run import absolute_spec, refuse_encoders
from tarsift.pipelines.score import BOTH_TOWERS, Search, last_maps
from tarsift.pipelines.session import data_settings, map_tables, session
from tarsift.pipelines.trusted import TrustedReference

READ_ROWS = 64  # of one's own images, decoded at once
MAKERS = ("ClipEncoder", "CountCopies", "SmoothScores", "ScoreMismatch", "Judge")
WRITTEN = {name for name, column in COLUMNS.items() if column.written_by.startswith(MAKERS)}
LIKE_SCORES = re.compile(r"density|(multiscale|purified)_\w+|\w+_k\d+")


def score_dataset(
    ds: ray.data.Dataset,
    *,
    encoder: str | None = None,
    witness: str | None = None,
    image: str = "image",
    caption: str | None = "caption",
    leave_out: Sequence[str] = (),
    embeddings: bool = False,
    key: str | None = None,
    config: CleanConfig | None = None,
    progress: Listener = silent,
) -> ray.data.Dataset:
    """Score a Dataset of images and captions by the rules of `clean`, in the Ray session that is there.

    The same images and captions get the same scores as by `clean` with the same encoders, settings and key, whatever
    the order and the blocks of the Dataset. It is read and encoded once. What it holds, but for `leave_out`, and the
    embeddings lie in the object store meanwhile, which spills to disk; nothing of its size is held on the driver.

    Encoders are taken at their word, since nothing is known of the shards that these images come from: `encoder`, if
    it was trained on these pairs, shows triggers that it has learned; `witness`, if it never saw them, shows captions
    that do not fit. Images are decoded in the workers: from strangers, better clean shards, where one that
    kills its decoder is lost alone.

    Args:
        ds: one row per sample. Images are bytes (JPEG, PNG, WEBP), PIL images, or uint8 arrays (height, width, 3).
        encoder: a CLIP trained on these pairs; as for `clean`. It, `witness`, or both.
        witness: a CLIP that never saw them.
        image, caption: names of the columns. Without a caption (None) only images are judged, by `encoder`.
        leave_out: own columns that the result does without, as that of the images.
        embeddings: whether the result has `image_embedding` and `text_embedding`, float16 (d,), and those of the
            witness under names that begin with `witness_`.
        key: of the hash that draws the reference, `reference.key` of `clean`; None derives it from all images.
        config: all settings; those of shards, verdicts and outputs have no effect.
        progress: told what is done; silent by default.

    Returns:
        A Dataset in the object store, with rows in their order and own columns as they were, and behind these the
        columns of the files in `scores/`: `suspicion` and all that it is made of (float32, higher = more suspicious)
        and `error`: null, or a reason code of docs/schema.md. A row without a usable image has null scores.

    Raises:
        UsageError: no Ray, encoder or column, or one of the name of a score; images or captions of another kind; too
            few images to fit the rules on.

    Example:
        >>> scored = score_dataset(ds, encoder="enc.pt", caption="text")   # doctest: +SKIP
        >>> scored.sort("suspicion", descending=True).take(10)             # doctest: +SKIP
    """
    config = _with_encoders(config or CleanConfig(), encoder, witness, key, towers=caption is not None)
    if not ray.is_initialized():
        raise UsageError("Ray is not running: call ray.init() first. The Dataset that comes back lives in its session.")
    with session(stall_timeout_s=config.resources.stall_timeout_s):
        columns = Columns.of(ds, image, caption, leave_out, embeddings)
        with data_settings(ds.context, config.resources.stall_timeout_s, execution_options=_in_order(ds)):
            tables, trusted = _encode(ds, columns, settled(config), progress)
        scored: Any = _scored(tables, columns, config, trusted, progress)
    return ray.data.from_arrow_refs(scored)


@dataclass(frozen=True)
class Columns:
    """Own columns of a Dataset: which are looked at, and which the result has and has not."""

    image: str
    caption: str | None
    kept: tuple[str, ...]
    left_out: tuple[str, ...]
    embeddings: bool

    @classmethod
    def of(
        cls, ds: ray.data.Dataset, image: str, caption: str | None, leave_out: Sequence[str], embeddings: bool
    ) -> Columns:
        """Look at the schema of a Dataset.

        Raises:
            UsageError: if a column is not there, or one has the name of a column that the result gets.
        """
        schema = ds.schema()
        if schema is None:
            raise UsageError("the Dataset is empty: there is nothing to score.")
        types = dict(zip(schema.names, schema.types, strict=True))
        for name in (image, *((caption,) if caption is not None else ()), *leave_out):
            if name not in types:
                raise UsageError(f"there is no column {name!r}; the Dataset has: {', '.join(types)}.")
        kept = tuple(name for name in types if name not in leave_out)
        same = [name for name in kept if _bare(name) in WRITTEN or LIKE_SCORES.fullmatch(name)]
        if "error" in kept and types["error"] not in (pa.string(), pa.large_string(), pa.null(), object):
            same.append("error")
        if same:
            raise UsageError(
                f"the result gets columns of the names {', '.join(same)}, which the Dataset has: rename them, drop "
                f"them with ds.drop_columns({same!r}), or give them as leave_out."
            )
        return cls(image, caption, kept, tuple(leave_out), embeddings)


def _bare(name: str) -> str:
    return name.removeprefix(f"{WITNESS}_")


def _with_encoders(
    config: CleanConfig, encoder: str | None, witness: str | None, key: str | None, *, towers: bool
) -> CleanConfig:
    """Settle which encoders there are and what they embed."""
    given = {DETECT: encoder, WITNESS: witness}
    encoders = config.encoders | {role: EncoderConfig(spec=spec) for role, spec in given.items() if spec is not None}
    encoders = {role: encoders[role] for role in (DETECT, WITNESS) if role in encoders}  # features judge nothing
    encoders = {role: e.model_copy(update={"spec": absolute_spec(e.spec)}) for role, e in encoders.items()}
    if not towers:
        if WITNESS in encoders:
            raise UsageError("a witness judges how well captions fit: name the column of captions.")
        encoders = {role: e.model_copy(update={"towers": ("image",)}) for role, e in encoders.items()}
    imported = [e.spec for e in encoders.values() if folder_of(e.spec) is not None]
    if imported:
        raise UsageError(f"{imported[0]}: embeddings made elsewhere are joined to shards, and not to a Dataset.")
    reference = config.reference if key is None else config.reference.model_copy(update={"key": key})
    config = config.model_copy(update={"encoders": encoders, "reference": reference})
    if not encoders:
        raise UsageError(
            "no encoder: give encoder=MODEL, a CLIP trained on these pairs, witness=MODEL, one that never saw them, "
            "or both."
        )
    refuse_encoders(config.model_copy(update={"sift": config.sift.model_copy(update={"enabled": False})}))
    return config


def _in_order(ds: ray.data.Dataset) -> Any:
    options = copy.copy(ds.context.execution_options)
    options.preserve_order = True
    return options


def _encode(
    ds: ray.data.Dataset, columns: Columns, config: CleanConfig, progress: Listener
) -> tuple[list[tuple[int, ray.ObjectRef]], TrustedReference | None]:
    """Read and encode a Dataset; return (rows, table) of its blocks, and the trusted reference if there is one."""
    infos = {role: encoder_info(encoder.spec) for role, encoder in config.encoders.items()}
    trusted = None
    if config.reference.path:
        trusted = TrustedReference.find(storage.absolute(config.reference.path), infos[DETECT].weights_sha256)
    rows = map_tables(ds, _identified, {"identify": _identify(columns, config)}, num_cpus=READ_CPUS)
    last = [*infos][-1]
    for role, info in infos.items():
        rows = map_tables(rows, _decoded, {"decode": _decode(columns, config, info)}, num_cpus=READ_CPUS)
        lost = [OWN + name for name in columns.left_out] if role == last else []
        prefix = "" if role == next(iter(infos)) else f"{role}_"
        arguments = {
            "encoder": config.encoders[role].model_copy(update={"threads": config.resources.threads}),
            "weights_sha256": info.weights_sha256,
            "prefix": prefix,
            "without": lost,
        }
        rows = encode_rows(rows, EncodeRole, arguments, config.resources, shards=None, kind=f"{prefix}encoder")
    progress(Event("embed", 0, 1, unit="Dataset"))
    tables, samples = [], 0
    for bundle in rows.iter_internal_ref_bundles():
        for entry in bundle.blocks:
            count = entry.metadata.num_rows or 0
            tables.append((count, entry.ref))
            samples += count
        progress(Event("embed", 0, 1, samples, unit="Dataset"))
    progress(Event("embed", 1, 1, samples, unit="Dataset", finished=True))
    return [(count, ref) for count, ref in tables if count], trusted


def _identify(columns: Columns, config: CleanConfig) -> IdentifySamples:
    return IdentifySamples(image=columns.image, caption=columns.caption, config=config.read)


def _decode(columns: Columns, config: CleanConfig, info: EncoderInfo) -> DecodePictures:
    fit = {"interpolation": info.interpolation, "resize_mode": info.resize_mode}
    return DecodePictures(info.image_size, image=columns.image, config=config.images, **fit)


def _identified(table: pa.Table, *, identify: IdentifySamples) -> Iterator[pa.Table]:
    yield from map(identify, slices(table, READ_ROWS))


def _decoded(table: pa.Table, *, decode: DecodePictures) -> Iterator[pa.Table]:
    yield from map(decode, slices(table, READ_ROWS))


@dataclass(frozen=True)
class ScoreBlocks:
    """What the fits read, in the object store; the rules are kept in this process alone, under `memory`."""

    blocks: Blocks
    sides: Sides
    memory: str

    @property
    def standing(self) -> None:
        return None

    def fold(self, fold: Fold, names: Sequence[str], role: str, **which: Any) -> Any:
        """Run a fold over all rows, which have the columns of all roles and, once that is known, their density."""
        return fold_blocks(fold, self.blocks if role == self.sides.first else replace(self.blocks, prefix=f"{role}_"))

    def rule(self, name: str) -> str:
        return storage.join(self.memory, f"{name}.npz")


def _scored(
    tables: list[tuple[int, ray.ObjectRef]],
    columns: Columns,
    config: CleanConfig,
    trusted: TrustedReference | None,
    progress: Listener,
) -> list[ray.ObjectRef]:
    """Fit the rules and score; return the tables of the result, block by block."""
    looked_at = map_blocks(_looked_at, [(i, (ref,)) for i, (_, ref) in enumerate(tables)])
    blocks, sides = numbered(looked_at), choose_sides(dict.fromkeys(config.encoders))
    if not blocks.rows:
        raise UsageError("the Dataset is empty: there is nothing to score.")
    sources = ScoreBlocks(blocks, sides, f"memory://tarsift-{secrets.token_hex(8)}")
    try:
        sources, maps = _fitted(sources, config, trusted, progress)
    finally:
        storage.remove_tree(sources.memory)
    ours = sources.blocks.arguments
    calls = deque((i, (first, ref, *rest)) for (i, (first, *rest)), (_, ref) in zip(ours, tables, strict=True))
    tables.clear()  # a block leaves the object store when it is scored
    return [ref for _, ref in _each("score", _last_of, [maps, columns], calls, progress)]


def _fitted(
    sources: ScoreBlocks, config: CleanConfig, trusted: TrustedReference | None, progress: Listener
) -> tuple[ScoreBlocks, list[Callable[[pa.Table], pa.Table]]]:
    """Fit all rules; return the rows with their density beside them, and what appends the other scores."""
    blocks, resources = sources.blocks, config.resources
    search = Search(resources.backend, resources.threads, resources.batch_size, "")
    if config.reference.key is not None:
        key = hashlib.sha256(config.reference.key.encode()).digest()
    else:
        key = fold_blocks(SumOfDigests(), blocks)
    progress(Event("reference", 0, 1, unit="sample"))
    about = fit_reference((), sources, config, key, samples=blocks.rows, trusted=trusted)
    progress(Event("reference", 1, 1, unit="sample", finished=True))
    if sources.sides.density:
        rule = DensityRule.from_state(*load_arrays(sources.rule("density")))
        score = ScoreDensity(rule, key=key, backend=search.backend, threads=search.threads)
        found = _each("density", _density_of, [score], deque(blocks.arguments), progress)
        both = tuple((*refs, ref) for refs, (_, ref) in zip(blocks.refs, found, strict=True))
        sources = replace(sources, blocks=replace(blocks, refs=both))
    progress(Event("enriched", 0, 1, unit="sample"))
    fit_enriched((), sources, config, key, largest_candidate_hash=about["largest_candidate_hash"])
    progress(Event("enriched", 1, 1, unit="sample", finished=True))
    return sources, last_maps(sources, key, search)


def _each(
    name: str, function: Callable[..., Any], arguments: Sequence[Any], calls: deque[Any], progress: Listener
) -> list[tuple[int, ray.ObjectRef]]:
    """Call a function for every block, with arguments that all calls share; `calls` is emptied on the way."""
    shared, blocks = ray.put(arguments), len(calls)
    rows = finished = 0

    def done(more: int) -> None:
        nonlocal rows, finished
        rows, finished = rows + more, finished + 1
        progress(Event(name, finished, blocks, rows, unit="blocks", finished=finished == blocks))

    progress(Event(name, 0, blocks, unit="blocks"))
    return map_blocks(function, ((i, (shared, *given)) for i, given in _taken(calls)), done=done)


def _taken(calls: deque[Any]) -> Iterator[Any]:
    while calls:
        yield calls.popleft()


def _looked_at(table: pa.Table) -> tuple[int, pa.Table]:
    """Leave out own columns: what rules are fitted on is read again and again."""
    return len(table), table.select([name for name in table.column_names if not name.startswith(OWN)])


def _density_of(arguments: Sequence[Any], first: int, *tables: pa.Table) -> tuple[int, pa.Table]:
    (score,) = arguments
    table = beside(first, *tables).select(["image_sha256", "error", "image_embedding"])
    scored = score(table)
    return len(table), scored.drop_columns(["image_sha256", "error"])


def _last_of(arguments: Sequence[Any], first: int, own: pa.Table, *tables: pa.Table) -> tuple[int, pa.Table]:
    """Append all scores to the rows of a block, and give own columns their names back."""
    maps, columns = arguments
    table = beside(first, *tables)
    for append_to in maps:
        table = append_to(table)
    dropped = {"shard", "row", "image_sha256", "caption"} | {
        name for name in table.column_names if not columns.embeddings and name.endswith(BOTH_TOWERS)
    }
    made = {name: table[name] for name in table.column_names if name not in dropped}
    error = made.pop("error")
    mine = {name: own[OWN + name] for name in columns.kept if name != "error"}
    return len(table), pa.table({**mine, **made, "error": error})
