"""The standing reference from night to night: embedded anew by tonight's encoders, grown by tonight's samples."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pyarrow as pa
import ray

from tarsift.operators import storage
from tarsift.operators.errors import UsageError
from tarsift.operators.folds import DrawnRows
from tarsift.operators.listing import list_shards
from tarsift.operators.repack import Taken, write_samples
from tarsift.operators.schema import append, places_of
from tarsift.operators.sides import FEATURES, Sides
from tarsift.operators.stored import ReadStored, Stored
from tarsift.pipelines.config import CleanConfig
from tarsift.pipelines.embed import embed_pass
from tarsift.pipelines.folding import run_fold
from tarsift.pipelines.progress import Event, Listener, silent
from tarsift.pipelines.run import Run
from tarsift.pipelines.score import dump_key
from tarsift.pipelines.standing import DENSITY, PICTURES, STANDING, StandingReference, rules_print, write_standing
from tarsift.pipelines.tasks import side_by_side

IDENTITY = ("shard", "row", "key", "uid", "caption", "image_sha256", "error")
PLACE = ("image_offset", "image_size")
EMBEDDINGS = ("image_embedding", "text_embedding")
PICTURES_PER_SHARD = 1000


def for_tonight(
    standing: StandingReference,
    folder: str,
    config: CleanConfig,
    weights: Mapping[str, str],
    *,
    changed: Collection[str] = (),
    progress: Listener = silent,
) -> StandingReference:
    """Return the standing reference as tonight's encoders see it, without samples of shards that have changed.

    Args:
        folder: where it is written, unless `standing` will do as it is.
        config: tonight's settings, `settled`.
        weights: SHA-256 of the weights of tonight's encoders by role.

    Raises:
        UsageError: if encoders have changed and the samples themselves were not kept.
    """
    others = [role for role, digest in weights.items() if standing.weights.get(role) != digest]
    if not others and not changed:
        return standing
    kept = {role: standing.read(role) for role in standing.weights}
    first = next(iter(kept.values()))
    rows = pa.array(np.flatnonzero(~np.isin(first["shard"].to_pylist(), list(changed))))
    identity = first.take(rows)
    tables = {}
    for role in weights:
        if role in others:
            embedded = _embed_pictures(standing, folder, config, role, progress).take(identity["picture"])
            new = {name: embedded[name] for name in (*EMBEDDINGS, "error") if name in embedded.column_names}
            tables[role] = append(identity.drop_columns([*EMBEDDINGS]), new)
        else:
            tables[role] = kept[role].take(rows)
    same_rules = standing.rules is not None and not others
    return write_standing(
        folder,
        tables,
        weights=weights,
        density=standing.read(DENSITY).take(rows) if same_rules else None,
        rules=(standing.rules, standing.rules_folder) if same_rules and standing.rules else None,
        pictures=standing.pictures,
    )


def _embed_pictures(
    standing: StandingReference, folder: str, config: CleanConfig, role: str, progress: Listener
) -> pa.Table:
    """Return the samples as a role's encoder embeds them, a row for each in the order of the shards."""
    if standing.pictures is None:
        raise UsageError(
            f"{standing.folder} was embedded by another {role}, and the samples themselves were not kept: give the "
            "same encoder, or begin another state."
        )
    shards = list_shards(standing.pictures)
    out = storage.join(folder, "embedded")

    def tell(event: Event) -> None:
        progress(Event(f"reference.{role}", event.done, event.total, event.samples, event.unit, event.finished))

    embed_pass(shards, out, config, role, progress=tell)
    read = ReadStored([Stored(storage.join(out, "embeddings", role))])
    return pa.concat_tables([table for shard in shards for table in read(shard.name)])


def grow(
    run: Run,
    standing: StandingReference | None,
    folder: str,
    *,
    pictures: bool,
    refit: float,
    progress: Listener = silent,
) -> StandingReference:
    """Write the standing reference after a night: the smallest hashes of what stood and of what came in.

    Args:
        run: the night's, scored.
        standing: what it was fitted with.
        pictures: whether the samples themselves are kept.
        refit: rules are kept for the next night unless this share of the rows was not there when they were fitted.
    """
    about, key = run.content["reference"], dump_key(run.embedded, run.config)
    sides = Sides.from_json(run.content["sides"])
    weights = {role: told["weights_sha256"] for role, told in run.content["encoders"].items() if role != FEATURES}
    roles = list(weights)
    scored = sides.density is not None and not pictures
    rows = _drawn(run, standing, roles, int(about["largest_hash"]), key, scored=scored)
    stood = None if standing is None else standing.read(next(iter(standing.weights)))
    before = {} if stood is None else {identity: i for i, identity in enumerate(places_of(stood))}
    at = np.array([before.get(identity, -1) for identity in places_of(rows)], np.int64)
    fitted = np.ones(len(rows), bool)
    if about["rules"] == "kept" and stood is not None:
        was = stood["fitted"].to_numpy()
        fitted = np.where(at >= 0, was[np.maximum(at, 0)], False)
    places = None
    if pictures:
        kept = standing.pictures if standing is not None else None
        places = _write_pictures(run, stood, kept, folder, rows, at, progress)
    tables = {}
    for i, role in enumerate(roles):
        prefix = "" if i == 0 else f"{role}_"
        embeddings = [f"{prefix}{name}" for name in EMBEDDINGS if f"{prefix}{name}" in rows.column_names]
        table = rows.select([*IDENTITY, *embeddings])
        table = table.rename_columns([name.removeprefix(prefix) for name in table.column_names])
        offsets = np.full((len(rows), 2), -1, np.int64) if places is None else places
        extra = {"picture": pa.array(np.arange(len(rows)), pa.int32()), "fitted": pa.array(fitted)}
        place = {name: pa.array(offsets[:, i]) for i, name in enumerate(PLACE)}
        tables[role] = append(table, {**place, **extra})
    unfitted = float(1 - fitted.mean())
    keep = not pictures and unfitted < refit
    return write_standing(
        folder,
        tables,
        weights=weights,
        density=rows.select(["shard", "row", "density"]) if keep and scored else None,
        rules=(rules_print(run.config, sides, weights), storage.join(run.out, "reference")) if keep else None,
        pictures=PICTURES if pictures else None,
        unfitted=unfitted,
        largest_hash=about["largest_hash"],
    )


def _drawn(
    run: Run, standing: StandingReference | None, roles: Sequence[str], largest: int, key: bytes, *, scored: bool
) -> pa.Table:
    """Return the rows of smallest hash of tonight and of those that stood, with all roles' embeddings."""
    first, *others = roles
    names = [*IDENTITY, *PLACE, *EMBEDDINGS]
    tonight: list[str | Stored] = [Stored(storage.join(run.out, "embeddings", first), tuple(names))]
    stood: list[str | Stored] = [] if standing is None else [standing.stored(first, *names[2:])]
    if scored:
        tonight.append(Stored(storage.join(run.out, DENSITY), ("shard", "row", "density")))
        stood.append(Stored(storage.join(run.out, "reference"), drawn=True))
        names.append("density")
    for role in others:
        tonight.append(Stored(storage.join(run.out, "embeddings", role), ("shard", "row", *EMBEDDINGS), f"{role}_"))
        if standing is not None:
            stood.append(standing.stored(role, *EMBEDDINGS, prefix=f"{role}_"))
        names += [f"{role}_{name}" for name in EMBEDDINGS]
    fold = DrawnRows(largest, key=key, columns=tuple(names))
    return run_fold(fold, run.names, tonight, beside=None if standing is None else ([STANDING], stood))


def _write_pictures(
    run: Run,
    stood: pa.Table | None,
    kept: str | None,
    folder: str,
    rows: pa.Table,
    at: np.ndarray,
    progress: Listener,
) -> np.ndarray:
    """Write the samples themselves as shards, in the order of the rows; return offset and size of each image (n, 2).

    Args:
        stood: the rows that stood; kept: the folder of their samples.
        at: (n,) which of these a row is, -1 for one of tonight's.
    """
    by_picture = {} if kept is None else {shard.name: shard for shard in list_shards(kept)}
    by_name = {shard.name: shard for shard in run.shards}
    wanted: list[Taken] = []
    plain = rows.select(["shard", "caption", *PLACE]).to_pylist()
    for row, i in zip(plain, at.tolist(), strict=True):
        if i >= 0 and stood is not None:
            source = by_picture[_picture_shard(stood["picture"][i].as_py())]
            place = [stood[name][i].as_py() for name in PLACE]
        else:
            source, place = by_name[row["shard"]], [row[name] for name in PLACE]
        wanted.append(Taken(source, place[0], place[1], row["caption"]))
    chunks = [wanted[i : i + PICTURES_PER_SHARD] for i in range(0, len(wanted), PICTURES_PER_SHARD)]
    captions = run.config.read.captions
    calls = (
        (i, (chunk, storage.join(folder, PICTURES, f"{_picture_shard(i * PICTURES_PER_SHARD)}.tar"), captions))
        for i, chunk in enumerate(chunks)
    )
    places: dict[int, np.ndarray] = {}
    for i, (result,) in side_by_side(write_samples, calls):
        places[i] = ray.get(result)
        progress(Event("pictures", len(places), len(chunks), finished=len(places) == len(chunks)))
    return np.concatenate([places[i] for i in range(len(chunks))])


def _picture_shard(picture: int) -> str:
    return f"{picture // PICTURES_PER_SHARD:05d}"
