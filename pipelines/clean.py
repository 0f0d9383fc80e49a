"""The main job: embed -> score -> (sift ->) flag -> write -> report, each pass continued where it stopped.

Each function here does one step for a result folder and keeps `run.json` true; `clean` does all.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow.parquet as pq

from tarsift.operators import storage
from tarsift.operators.encoder_settings import EncoderConfig, EncoderInfo
from tarsift.operators.errors import ChangedError, ErrorRateError, TarsiftError, UsageError
from tarsift.operators.regime import encoder_regime
from tarsift.operators.schema import MEASURES, SIFTED_SCORES
from tarsift.operators.sides import DETECT, FEATURES, choose_sides
from tarsift.pipelines import embed as embedding
from tarsift.pipelines import flag as flagging
from tarsift.pipelines import score as scoring
from tarsift.pipelines import write as writing
from tarsift.pipelines.class_names import class_names_of
from tarsift.pipelines.config import CleanConfig, parse_config
from tarsift.pipelines.ledger import fingerprint
from tarsift.pipelines.notebook import html_table
from tarsift.pipelines.passes import embed_name, passes_of_score
from tarsift.pipelines.printing import rows_of_result
from tarsift.pipelines.progress import Event, Listener, silent
from tarsift.pipelines.report import write_report
from tarsift.pipelines.run import NO_FEATURES, Run, open_run
from tarsift.pipelines.standing import StandingReference
from tarsift.pipelines.trusted import TrustedReference


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

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def _repr_html_(self) -> str:
        return html_table("tarsift clean", rows_of_result(self).items(), {"report": self.report})


def embed_step(run: Run) -> None:
    """Embed what is not embedded yet with every encoder, and check which regime each is in."""
    run.settle(embedding.settled(run.config))
    for role in run.roles:
        _embed_role(run, role)


def _embed_role(run: Run, role: str, *, replace: bool = False) -> None:
    result, ledger, info = embedding.embed_pass(
        run.shards, run.out, run.config, role, replace=replace, progress=run.progress
    )
    run.done(result, ledger.fingerprint)
    refuse_other_samples(run, role)
    run.content.setdefault("encoders", {})[role] = describe_encoder(run, role, info)
    run.file.save()


def refuse_other_samples(run: Run, role: str) -> None:
    """Compare what two encoders were given.

    Raises:
        ChangedError: if a shard has changed between the two passes.
    """
    for name, entry in run.complete(embed_name(role))[1].items():
        first = run.embedded[name]
        if (entry["source"]["sha256"], entry["rows"]) != (first["source"]["sha256"], first["rows"]):
            raise ChangedError(f"{name} has changed while the run was on: start again with another --out.")


def describe_encoder(run: Run, role: str, info: EncoderInfo) -> dict[str, Any]:
    """What `run.json` says about the encoder, with the encoder check now that all digests are known."""
    regime = encoder_regime(info, run.digests)
    return {
        "name": info.name,
        "spec": run.config.encoders[role].spec,
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


def score_step(run: Run) -> None:
    """Fit the reference and score every sample."""
    judging = [role for role in run.roles if role != FEATURES]
    prints = {role: run.complete(embed_name(role))[0] for role in judging}
    sides = choose_sides({role: run.content["encoders"][role]["regime"]["code"] for role in judging})
    trusted = None
    if run.config.reference.path and sides.density:
        weights = run.content["encoders"][sides.density]["weights_sha256"]
        trusted = TrustedReference.find(run.config.reference.path, weights)
    standing = None
    if run.config.reference.standing:
        by = {role: run.content["encoders"][role]["weights_sha256"] for role in judging}
        standing = StandingReference.find(run.config.reference.standing, by)
    print_ = scoring.score_fingerprint(prints, run.digests, sides, run.config, trusted, standing)
    run.content["reference"] = scoring.score_passes(
        run.shards, run.out, run.config, run.embedded, print_, sides,
        trusted=trusted, standing=standing, progress=run.progress, finished=run.record,
    )  # fmt: skip
    run.content["sides"] = sides.to_json()
    run.file.save()


def sift_step(run: Run) -> None:
    """Route every sample to a class, and sift the classes."""
    from tarsift.pipelines import sift as sifting  # loads scikit-learn, for which other steps need not wait

    role = run.sift_role
    if role is None:
        raise UsageError(NO_FEATURES)
    _embed_features(run, role)
    if run.content["encoders"][role]["regime"]["code"] in ("trained_on_this_dump", "partly"):
        raise UsageError(
            f"the encoder given as {role} was trained on this dump: what is planted looks ordinary to it. Give "
            "--encoder features=MODEL, one that never saw these shards."
        )
    run.complete("score")
    passes = sifting.SiftPasses(
        run.shards, run.out, run.config, role, run.wanted_fingerprints()["sift"],
        key=scoring.dump_key(run.embedded, run.config), class_names=class_names_of(run.config),
        samples=sum(e["rows"] for e in run.embedded.values()), progress=run.progress, finished=run.record,
    )  # fmt: skip
    run.content["sift"] = passes.run()
    run.file.save()


def _embed_features(run: Run, role: str) -> None:
    """Embed what is sifted, unless that is done; an encoder that is given now takes the place of an earlier one."""
    name, before = embed_name(role), parse_config(run.content["config"])
    config = embedding.settled(run.config)
    wanted, had = (c.result_settings()["encoders"].get(role) for c in (config, before))
    if wanted != had:
        run.content["passes"].pop(name, None)
    run.settle(config)
    if name not in run.content["passes"]:
        _embed_role(run, role, replace=True)
    run.complete(name)


def flag_step(run: Run) -> None:
    """Find the cutoff and flag every sample."""
    policy = run.config.flag
    for name in passes_of_score(policy.score):
        run.complete(name)
    print_ = run.wanted_fingerprints()["flag"]
    flagging.check_score_exists(policy.score, score_columns(run))
    quarantined = flagging.quarantined_shards(run.embedded, policy)
    location, scale = scoring.score_location(run.out, policy.score) if policy.policy == "z" else (0.0, 1.0)
    threshold = flagging.find_threshold(
        run.out, run.names, policy, location=location, scale=scale, quarantined=quarantined
    )
    result, ledger = flagging.flag_pass(
        run.shards, run.out, policy, print_, threshold=threshold, quarantined=quarantined,
        wave_shards=run.config.resources.wave_shards, progress=run.progress,
    )  # fmt: skip
    run.content["threshold"] = threshold.to_json()
    run.content["counts"] = writing.count_homes(run.names, run.out, run.embedded)
    run.done(result, ledger.fingerprint)


def score_columns(run: Run) -> list[str]:
    """Names of the scores that samples can be flagged by."""
    for name in run.names:
        with storage.open_read(storage.join(run.out, "scores", f"{name}.parquet")) as raw:
            schema = pq.read_schema(raw)
        names = [f.name for f in schema if str(f.type) == "float" and f.name not in MEASURES]
        if names:
            return [*names, *(SIFTED_SCORES if run.fingerprint_of("sift") else ())]
    return []


def write_step(run: Run) -> None:
    """Write the cleaned shards (unless switched off) and `keep.parquet`."""
    flag_print, _ = run.complete("flag")
    print_ = fingerprint("write", flag_print, run.config.write.model_dump(mode="json"))
    start = time.monotonic()
    figures: dict[str, Any] = {}
    if not run.config.write.shards:
        writing.remove_shards(run.names, run.out, print_)
    else:
        result, ledger = writing.write_pass(run.shards, run.out, run.embedded, print_, progress=run.progress)
        figures = result.figures(ledger.fingerprint)
        written = {home: sum(e["homes"][home]["samples"] for e in result.entries.values()) for home in writing.HOMES}
        counts = run.content["counts"]
        if [written[h] for h in writing.HOMES] != [counts[h] for h in ("kept", "removed", "errored")]:
            raise TarsiftError(f"shards hold {written}, flags say {counts}; report this as a defect.")
    kept = writing.write_lists(run.names, run.out)
    figures |= {"fingerprint": print_, "kept": kept, "elapsed_s": round(time.monotonic() - start, 3)}
    run.record("write", {"shards": len(run.shards), "samples": run.content["counts"]["read"], **figures})


def report_step(run: Run) -> str:
    """Write `report.html`; it names passes that are out of date."""
    start = time.monotonic()
    run.content["stale"] = run.stale_passes()
    run.file.save()
    run.progress(Event("report", 0, 1, unit="page"))
    url = write_report(run.out)
    run.progress(Event("report", 1, 1, unit="page", finished=True))
    figures = {"fingerprint": run.wanted_fingerprints()["report"], "elapsed_s": round(time.monotonic() - start, 3)}
    run.record("report", figures)
    return url


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
    root: str | None = None,
    progress: Listener = silent,
) -> CleanResult:
    """Clean a dump: score every sample, flag the most suspicious, write cleaned shards and a report.

    The same call again continues after any crash; what is committed is not done again.

    Args:
        inputs: paths, globs, brace patterns, folders or URLs of WebDataset shards.
        out: result folder, local or `s3://...`.
        encoder: short for `config.encoders["detect"]`: a CLIP trained on this dump.
        config: all settings.
        root: folder below which shards are named; None: the one that all have in common.
        progress: told what is done; silent by default.

    Raises:
        UsageError: wrong arguments, before any work.
        ChangedError: `out` was made from other shards or with other settings.
        ErrorRateError: complete, but more bad samples than `max_error_rate`.
        BusyError: another run works on `out`.

    Example:
        >>> result = clean("dump/*.tar", "out", encoder="enc.pt")  # doctest: +SKIP
        >>> result.counts["removed"]                               # doctest: +SKIP
        50
    """
    start = time.monotonic()
    config = config or CleanConfig()
    if encoder is not None:
        config = config.model_copy(update={"encoders": {**config.encoders, DETECT: EncoderConfig(spec=encoder)}})
    run = open_run(inputs, out, config, root=root, progress=progress)
    with run.working():
        embed_step(run)
        score_step(run)
        if run.config.sift.enabled:
            sift_step(run)
        flag_step(run)
        write_step(run)
        report = report_step(run)
    return result_of(run, start, report)
