"""The main job: embed -> score -> flag -> write -> report, each pass continued where it stopped.

Each function here does one step for a result folder and keeps `run.json` true; `clean` does all.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pyarrow.parquet as pq

from tarsift.operators import storage
from tarsift.operators.encoder_settings import EncoderConfig, EncoderInfo
from tarsift.operators.errors import ChangedError, ErrorRateError, TarsiftError, UsageError
from tarsift.operators.regime import encoder_regime
from tarsift.operators.schema import SCHEMA_VERSION
from tarsift.operators.shards import Shard, list_shards
from tarsift.pipelines import embed as embedding
from tarsift.pipelines import flag as flagging
from tarsift.pipelines import score as scoring
from tarsift.pipelines import write as writing
from tarsift.pipelines.config import CleanConfig, parse_config, refuse_changes
from tarsift.pipelines.ledger import Ledger, RunFile, fingerprint
from tarsift.pipelines.progress import Event, Listener, silent
from tarsift.pipelines.report import write_report
from tarsift.pipelines.session import session

ROLE = "detect"
PACKAGES = ("ray", "torch", "open_clip_torch", "faiss-cpu", "faiss-gpu", "pyarrow", "numpy", "Pillow", "tarsift")


@dataclass
class Run:
    """A result folder being worked on: its shards, settings and `run.json`."""

    out: str
    shards: list[Shard]
    config: CleanConfig
    file: RunFile
    progress: Listener = silent
    embedded: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def content(self) -> dict[str, Any]:
        return self.file.content


@dataclass(frozen=True)
class CleanResult:
    """What a run has done and where its results are.

    Attributes:
        counts: read = kept + removed + errored, `errors` by reason, `shard_problems` by shard.
        passes: figures per pass: shards, samples, elapsed_s, samples_per_s.
        report: URL of report.html; None if it was not written.
    """

    out: str
    counts: Mapping[str, Any]
    passes: Mapping[str, Any]
    report: str | None
    elapsed_s: float

    @property
    def scores(self) -> str:
        return storage.join(self.out, "scores")

    @property
    def clean_shards(self) -> str:
        return storage.join(self.out, "clean")


def open_run(
    inputs: str | Sequence[str], out: str, config: CleanConfig, *, progress: Listener = silent, save: bool = True
) -> Run:
    """Start a result folder, or go on with the one that is there; `save=False` leaves it untouched.

    Raises:
        ChangedError: if `out` was made from other shards or with other settings.
        UsageError: if no encoder is given or nothing is found.
    """
    if ROLE not in config.encoders:
        raise UsageError(
            "no encoder: give --encoder detect=MODEL, a CLIP trained on this dump "
            "(`tarsift pretrain SHARDS --out enc.pt`, then --encoder detect=enc.pt)."
        )
    unknown = sorted(set(config.encoders) - {ROLE})
    if unknown:
        raise UsageError(f"encoder role {unknown[0]!r} is not used yet; the only role is {ROLE!r}.")
    out = storage.absolute(out)
    config = with_absolute_paths(config)
    shards = list_shards(inputs)
    listed = [{"name": s.name, "url": s.url, "size": s.size} for s in shards]
    file = RunFile.load(out)
    if file is None:
        file = RunFile(out, _new_content(config, listed))
        if save:
            file.save()
    else:
        refuse_other_inputs(file.content["inputs"], listed, out)
        before = parse_config(file.content["config"])
        refuse_changes(before.result_settings(), config.result_settings(), out=out)
        file.content["config"] = config.model_dump(mode="json")
    return Run(out, shards, config, file, progress)


def with_absolute_paths(config: CleanConfig) -> CleanConfig:
    """Make local paths in the settings absolute: encoder files and a trusted reference."""
    encoders = {
        role: encoder.model_copy(update={"spec": _absolute_spec(encoder.spec)})
        for role, encoder in config.encoders.items()
    }
    reference = config.reference
    if reference.path is not None:
        reference = reference.model_copy(update={"path": storage.absolute(reference.path)})
    return config.model_copy(update={"encoders": encoders, "reference": reference})


def _absolute_spec(spec: str) -> str:
    """Make the file of `FILE` or `ARCHITECTURE:FILE` absolute; other specs are names."""
    if os.path.exists(spec):
        return storage.absolute(spec)
    architecture, colon, file = spec.partition(":")
    return f"{architecture}:{storage.absolute(file)}" if colon and os.path.exists(file) else spec


def reopen_run(out: str, changes: Mapping[str, Any] | None = None, *, progress: Listener = silent) -> Run:
    """Take up a result folder to redo one of its passes, with some settings changed.

    Args:
        changes: dotted setting names to values.

    Raises:
        UsageError: if `out` is no result folder.
        ConfigError: for a setting that does not exist or is out of range.
    """
    out = storage.absolute(out)
    file = RunFile.load_or_refuse(out)
    content = dict(file.content["config"])
    for name, value in (changes or {}).items():
        at = content
        *groups, last = name.split(".")
        for group in groups:
            at[group] = dict(at.get(group) or {})
            at = at[group]
        at[last] = value
    config = with_absolute_paths(parse_config(content))
    file.content["config"] = config.model_dump(mode="json")
    shards = [Shard(**item) for item in file.content["inputs"]]
    return Run(out, shards, config, file, progress)


def _new_content(config: CleanConfig, inputs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "tarsift": version("tarsift"),
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": config.model_dump(mode="json"),
        "inputs": inputs,
        "versions": package_versions(),
        "passes": {},
    }


def package_versions() -> dict[str, str]:
    """Versions of what a result may depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def refuse_other_inputs(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], out: str) -> None:
    """Compare the shards of a run with those given now, by name and size.

    Raises:
        ChangedError: naming what was added, is gone or has another size.
    """
    old, new = ({item["name"]: item["size"] for item in items} for items in (before, after))
    parts = [
        *(f"{name} is gone" for name in sorted(set(old) - set(new))),
        *(f"{name} is new" for name in sorted(set(new) - set(old))),
        *(
            f"{name} has {new[n]} bytes, had {old[n]}"
            for n in sorted(set(old) & set(new))
            if old[n] != new[n]
            for name in [n]
        ),
    ]
    if parts:
        shown = "; ".join(parts[:5]) + (f"; and {len(parts) - 5} more" if len(parts) > 5 else "")
        raise ChangedError(f"{out} was made from other shards: {shown}. Give the same shards, or another --out.")


def embed_step(run: Run) -> None:
    """Embed what is not embedded yet, and check which regime the encoder is in."""
    result, ledger, info = embedding.embed_pass(run.shards, run.out, run.config, ROLE, progress=run.progress)
    run.embedded = result.entries
    run.file.record_pass(ledger.name, result.figures(ledger.fingerprint))
    run.content.setdefault("encoders", {})[ROLE] = describe_encoder(run, info)
    run.file.save()


def describe_encoder(run: Run, info: EncoderInfo) -> dict[str, Any]:
    """What `run.json` says about the encoder, with the encoder check once all digests are known."""
    digests = {name: entry["source"]["sha256"] for name, entry in run.embedded.items()}
    regime = encoder_regime(info, digests)
    return {
        "name": info.name,
        "spec": run.config.encoders[ROLE].spec,
        "weights_sha256": info.weights_sha256,
        "embed_dim": info.embed_dim,
        "image_size": info.image_size,
        "regime": {
            "code": regime.code,
            "share": regime.share,
            "sentence": regime.sentence,
            "blind_to": regime.blind_to,
        },
    }


def load_embedded(run: Run) -> str:
    """Read the ledger of the embed pass and return its fingerprint.

    Raises:
        UsageError: if shards are not embedded yet.
    """
    recorded = run.content.get("passes", {}).get(f"embed.{ROLE}", {}).get("fingerprint")
    entries = Ledger(run.out, f"embed.{ROLE}", recorded).entries() if recorded else {}
    missing = [s.name for s in run.shards if s.name not in entries]
    if missing:
        raise UsageError(
            f"{len(missing)} of {len(run.shards)} shards of {run.out} are not embedded (first: {missing[0]}): "
            "run `tarsift embed` or `tarsift clean` first."
        )
    run.embedded = entries
    return recorded


def score_step(run: Run) -> None:
    """Fit the reference and score every sample."""
    embed_print = load_embedded(run)
    digests = {name: entry["source"]["sha256"] for name, entry in sorted(run.embedded.items())}
    print_ = scoring.score_fingerprint(embed_print, digests, run.config)
    _, about = scoring.score_passes(
        run.shards,
        run.out,
        run.config,
        run.embedded,
        print_,
        role=ROLE,
        progress=run.progress,
        finished=run.file.record_pass,
    )
    run.content["reference"] = about
    run.file.save()


def _score_print(run: Run) -> str:
    recorded = run.content.get("passes", {}).get("score", {}).get("fingerprint")
    entries = Ledger(run.out, "score", recorded).entries() if recorded else {}
    if len(entries) < len(run.shards):
        raise UsageError(f"{run.out} is not scored completely: run `tarsift score {run.out}` first.")
    return recorded


def flag_step(run: Run) -> None:
    """Find the cutoff and flag every sample."""
    load_embedded(run)
    print_ = fingerprint("flag", _score_print(run), run.config.flag.model_dump(mode="json"))
    policy = run.config.flag
    flagging.check_score_exists(policy.score, score_columns(run))
    quarantined = flagging.quarantined_shards(run.embedded, policy)
    location, scale = scoring.score_location(run.out, ROLE, policy.score) if policy.policy == "z" else (0.0, 1.0)
    names = [shard.name for shard in run.shards]
    threshold = flagging.find_threshold(run.out, names, policy, location=location, scale=scale, quarantined=quarantined)
    result, ledger = flagging.flag_pass(
        run.shards, run.out, policy, print_, threshold=threshold, quarantined=quarantined,
        wave_shards=run.config.resources.wave_shards, progress=run.progress,
    )  # fmt: skip
    run.content["threshold"] = threshold.to_json()
    run.content["counts"] = writing.count_homes(names, run.out, run.embedded)
    run.file.record_pass(ledger.name, result.figures(print_))


def score_columns(run: Run) -> list[str]:
    """Names of the float columns of the score files."""
    for shard in run.shards:
        with storage.open_read(storage.join(run.out, "scores", f"{shard.name}.parquet")) as raw:
            schema = pq.read_schema(raw)
        names = [f.name for f in schema if str(f.type) == "float" and f.name not in ("clip_similarity", "image_norm")]
        if names:
            return names
    return []


def write_step(run: Run) -> None:
    """Write the cleaned shards (unless switched off) and `keep.parquet`."""
    load_embedded(run)
    flag_print = run.content.get("passes", {}).get("flag", {}).get("fingerprint")
    entries = Ledger(run.out, "flag", flag_print).entries() if flag_print else {}
    if len(entries) < len(run.shards):
        raise UsageError(f"{run.out} is not flagged completely: run `tarsift flag {run.out}` first.")
    print_ = fingerprint("write", flag_print, run.config.write.model_dump(mode="json"))
    start = time.monotonic()
    figures: dict[str, Any] = {}
    if run.config.write.shards:
        result, ledger = writing.write_pass(run.shards, run.out, run.embedded, print_, progress=run.progress)
        figures = result.figures(ledger.fingerprint)
        written = {home: sum(e["homes"][home]["samples"] for e in result.entries.values()) for home in writing.HOMES}
        counts = run.content["counts"]
        if [written[h] for h in writing.HOMES] != [counts[h] for h in ("kept", "removed", "errored")]:
            raise TarsiftError(f"shards hold {written}, flags say {counts}; report this as a defect.")
    kept = writing.write_lists([s.name for s in run.shards], run.out)
    figures |= {"fingerprint": print_, "kept": kept, "elapsed_s": round(time.monotonic() - start, 3)}
    run.file.record_pass("write", {"shards": len(run.shards), "samples": run.content["counts"]["read"], **figures})


def report_step(run: Run) -> str:
    """Write `report.html`; it names passes that are out of date."""
    start = time.monotonic()
    run.content["stale"] = stale_passes(run)
    run.file.save()
    run.progress(Event("report", 0, 1, unit="page"))
    url = write_report(run.out)
    run.progress(Event("report", 1, 1, unit="page", finished=True))
    run.file.record_pass(
        "report", {"fingerprint": _current_prints(run)["report"], "elapsed_s": round(time.monotonic() - start, 3)}
    )
    return url


def _current_prints(run: Run) -> dict[str, str]:
    """Fingerprint that each later pass must have to agree with the settings and the passes before it."""
    passes = run.content.get("passes", {})
    score = passes.get("score", {}).get("fingerprint")
    flag = fingerprint("flag", score, run.config.flag.model_dump(mode="json"))
    write = fingerprint("write", flag, run.config.write.model_dump(mode="json"))
    return {"flag": flag, "write": write, "report": fingerprint("report", write)}


def stale_passes(run: Run) -> list[str]:
    """Passes whose result was made from an earlier state of the passes before them."""
    passes = run.content.get("passes", {})
    current = _current_prints(run)
    return [n for n in ("flag", "write") if n in passes and passes[n].get("fingerprint") != current[n]]


def result_of(run: Run, start: float, report: str | None) -> CleanResult:
    """Sum up a run.

    Raises:
        ErrorRateError: if more samples were errored than `max_error_rate` allows; all is written by then.
    """
    counts = run.content.get("counts", {})
    if counts.get("read") and counts["errored"] / counts["read"] > run.config.max_error_rate:
        raise ErrorRateError(
            f"{counts['errored']} of {counts['read']} samples ({counts['errored'] / counts['read']:.1%}) carry "
            f"an error, over max_error_rate={run.config.max_error_rate:g}; the result in {run.out} is complete. "
            "See the errors in its report."
        )
    return CleanResult(run.out, counts, run.content.get("passes", {}), report, time.monotonic() - start)


def clean(
    inputs: str | Sequence[str],
    out: str,
    *,
    encoder: str | None = None,
    config: CleanConfig | None = None,
    progress: Listener = silent,
) -> CleanResult:
    """Clean a dump: score every sample, flag the most suspicious, write cleaned shards and a report.

    The same call again continues after any crash; what is committed is not done again.

    Args:
        inputs: paths, globs, brace patterns, folders or URLs of WebDataset shards.
        out: result folder, local or `s3://...`.
        encoder: short for `config.encoders["detect"]`: a CLIP trained on this dump.
        config: all settings.
        progress: told what is done; silent by default.

    Raises:
        UsageError: wrong arguments, before any work.
        ChangedError: `out` was made from other shards or with other settings.
        ErrorRateError: complete, but more bad samples than `max_error_rate`.

    Example:
        >>> result = clean("dump/*.tar", "out", encoder="enc.pt")  # doctest: +SKIP
        >>> result.counts["removed"]                               # doctest: +SKIP
        50
    """
    start = time.monotonic()
    config = config or CleanConfig()
    if encoder is not None:
        config = config.model_copy(update={"encoders": {**config.encoders, ROLE: EncoderConfig(spec=encoder)}})
    run = open_run(inputs, out, config, progress=progress)
    with session():
        embed_step(run)
        score_step(run)
        flag_step(run)
        write_step(run)
        report = report_step(run)
    return result_of(run, start, report)
